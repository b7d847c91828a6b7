"""What the benchmarks of the service serve: bundles of random weights, pictures, other servers."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray
from PIL import Image

from trainer.config import EncoderConfig, ExportConfig
from trainer.encoder import build_encoder
from trainer.export import export_bundle
from trainer.representation.preprocess import InputContract

ROOT = Path(__file__).parents[2]


def random_bundle(
    folder: Path, size_px: int, *, variants: Sequence[Literal["fp16", "int8"]] = ("int8",)
) -> Path:
    """A ResNet-18 of random weights, exported by the trainer."""
    encoder = build_encoder(
        EncoderConfig(
            backbone="resnet18", image_size_px=size_px, head="linear", dim=128, normalise=False
        )
    )
    contract = InputContract(size_px=size_px)
    images = np.stack([photo(n, size_px, size_px) for n in range(64)])
    return export_bundle(
        encoder,
        folder / f"resnet18-{size_px}",
        ids=[str(n) for n in range(len(images))],
        prepared=lambda positions: images[np.asarray(positions)],
        contract=contract,
        recipe={},
        training={},
        config=ExportConfig(variants=tuple(variants), calibration_images=32),
    )


def photo(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """A picture whose detail falls off as in photographs: noise of several sizes, added."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cell in (64, 16, 4, 1):
        coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) * cell**0.5
    total -= total.min()
    return (total * (255 / total.max())).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int = 90) -> bytes:
    """The picture as a JPEG with 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def session(graph: bytes | str) -> Any:
    """A bare session with the service's options."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Other:
    """Another server in a process of its own: `python tests/benchmarks/other_servers.py KIND`."""

    def __init__(self, kind: str, graph: Path | None = None, size_px: int = 0) -> None:
        arguments = [kind, str(graph or ""), str(size_px)]
        script = Path(__file__).with_name("other_servers.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        line = b""
        while not line.startswith(b"port "):
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"{kind} did not start")
        self.port = int(line.split()[1])
        self._whole = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """Processor seconds of the process and its children."""
        taken = 0.0
        for process in (self._whole, *self._whole.children(recursive=True)):
            times = process.cpu_times()
            taken += times.user + times.system
        return taken

    def stop(self) -> None:
        """End it and its children."""
        family = [*self._whole.children(recursive=True), self._whole]
        for process in family:
            process.kill()
        psutil.wait_procs(family)
        self._process.communicate()
