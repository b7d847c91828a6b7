"""The service on a GPU: is it really used, does it answer as the CPU does, and G11: what it costs.

    python tests/gpu/serve.py --output serve.json            # on a GPU, after ./deploy/setup
    python tests/gpu/serve.py --output serve.json --toy --execution-provider cpu       # seconds

The same gallery and a ResNet-18 of random weights at 224 px are served by the CPU (fp32) and by the
GPU (fp32, then fp16), one after the other. It ends with an error where /info does not name CUDA for
the encoder and the GPU for the search, where an embedding in fp32 is further than 1e-3 in cosine
from the CPU's, or where less than 99.9 % of the searches have the same ten nearest.
  G11  images a second of /embed in fp16, raw pixels, 1 and 32 images a body, against the bare
       session in this process on batches of 32 (goal >= 0.80), in turns, medians; with JPEGs of
       500 x 375 px the host decodes: images a second, and the cores that the service takes.
--toy: 32 px, a small gallery; that it runs says nothing about speed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import onnxruntime
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from client import Client
from client.models import Info
from service.embedder import CUDA, OnnxEmbedder
from tests.benchmarks.served_models import jpeg, photo, random_bundle
from tests.benchmarks.wire import closed_loop, npy, request
from tests.faults.started import Started
from trainer.representation.bundle import open_bundle

K = 10
SAME_COSINE = 1 - 1e-3
SAME_SEARCHES = 0.999
CONNECTIONS = 64


class Sizes(NamedTuple):
    """How much of everything."""

    size_px: int
    gallery: int
    images: int
    queries: int
    seconds: float
    rounds: int


FULL = Sizes(224, 100_000, 512, 2_000, 5.0, 5)
TOY = Sizes(32, 6_000, 8, 50, 0.3, 1)


class Answers(NamedTuple):
    """What a service says of the same questions."""

    info: Info
    embeddings: NDArray[np.float32]  # (images, D)
    neighbours: list[set[str]]  # of each query


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--execution-provider", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    sizes = TOY if options.toy else FULL
    on_gpu = options.execution_provider == "cuda"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = random_bundle(folder, sizes.size_px, variants=("fp16",))
        with serving(bundle, folder, "cpu", "fp32", visible=False) as service:
            fill(service.port, sizes.gallery)
            wanted = answers(service.port, sizes)
        with serving(bundle, folder, options.execution_provider, "fp32") as service:
            found = answers(service.port, sizes)
        rows += compared(wanted, found, on_gpu=on_gpu)
        precision = "fp16" if on_gpu else "fp32"
        with serving(bundle, folder, options.execution_provider, precision) as service:
            half = answers(service.port, sizes)
            rows.append(
                {
                    "benchmark": f"{precision} embeddings against fp32 on the CPU",
                    "smallest_cosine": smallest_cosine(wanted, half),
                }
            )
            rows += g11(service, bundle, sizes, options.execution_provider, precision)
    options.output.write_text(
        json.dumps({"facts": facts(sizes, found.info), "rows": rows}, indent=1)
    )
    for row in rows:
        sys.stdout.write(f"{json.dumps(row)}\n")
    return 0 if all(row.get("met", True) for row in rows) else 1


@contextlib.contextmanager
def serving(
    bundle: Path, folder: Path, provider: str, precision: str, *, visible: bool = True
) -> Iterator[Started]:
    """The service on the one gallery of this run; without `visible` it sees no GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        started = Started(
            bundle,
            folder / "state",
            log=folder / f"{provider}-{precision}.log",
            execution_provider=provider,
            precision=precision,
            graph_neighbours=0,  # beside the searches that are compared nothing else runs
            max_queue_wait_s=60.0,
        )
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    with started:
        yield started


def fill(port: int, count: int) -> None:
    """Add random vectors in clusters, as encoders make them: the nearest differ by little."""
    with Client(f"http://127.0.0.1:{port}") as client:
        dim = client.info().dims["embedding"]
        vectors = clustered(count, dim, seed=0)
        client.add(vectors=vectors, ids=[f"{n:07d}" for n in range(count)])


def clustered(count: int, dim: int, *, seed: int) -> NDArray[np.float32]:
    """(count, dim) of unit length around 256 centres that do not depend on the seed."""
    centres = np.random.default_rng(7).standard_normal((256, dim), np.float32)
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 256, count)]
    vectors += rng.standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def answers(port: int, sizes: Sizes) -> Answers:
    """Embeddings of pictures and the ten nearest of vectors, as a caller gets them."""
    with Client(f"http://127.0.0.1:{port}", timeout_s=120) as client:
        pictures = [photo(n, sizes.size_px, sizes.size_px) for n in range(sizes.images)]
        embeddings = client.embed(pictures).embeddings
        queries = clustered(sizes.queries, embeddings.shape[1], seed=1)
        found = client.neighbours(vectors=queries, k=K).results
        nearest = [{each.id for each in row} for row in found]
        return Answers(client.info(), embeddings, nearest)


def compared(wanted: Answers, found: Answers, *, on_gpu: bool) -> list[dict[str, Any]]:
    """Rows of what has to be: the GPU is used, and says what the CPU says."""
    used = (found.info.execution_provider, found.info.search["device"])
    cosine = smallest_cosine(wanted, found)
    same = statistics.mean(w == f for w, f in zip(wanted.neighbours, found.neighbours, strict=True))
    return [
        {"benchmark": "in use", "used": used, "met": not on_gpu or used == (CUDA, "gpu")},
        {
            "benchmark": "fp32 embeddings against the CPU's",
            "smallest_cosine": cosine,
            "met": cosine >= SAME_COSINE,
        },
        {
            "benchmark": "searches with the same ten nearest as on the CPU",
            "share": same,
            "met": same >= SAME_SEARCHES,
        },
    ]


def smallest_cosine(wanted: Answers, found: Answers) -> float:
    """Over all pictures."""
    return float((wanted.embeddings * found.embeddings).sum(1, dtype=np.float64).min())


def g11(
    service: Started, directory: Path, sizes: Sizes, provider: str, precision: str
) -> list[dict[str, Any]]:
    """Throughput of /embed beside the bare session, in turns."""
    pictures = np.stack([photo(n, sizes.size_px, sizes.size_px) for n in range(32)])
    session = OnnxEmbedder(
        open_bundle(directory), execution_provider=provider, precision=precision
    )._session
    bodies = {
        "raw, 1 image a body": (
            1,
            [request(npy(row[None]), "application/x-npy") for row in pictures],
        ),
        "raw, 32 images a body": (32, [request(npy(pictures), "application/x-npy")]),
        "JPEG 500x375, 1 image a body": (
            1,
            [request(jpeg(photo(n, 500, 375)), "image/jpeg") for n in range(32)],
        ),
    }
    rows = []
    for name, (count, wires) in bodies.items():
        connections = min(CONNECTIONS, 4 * CONNECTIONS // count)
        closed_loop(service.port, wires, connections=connections, seconds=sizes.seconds / 2)
        ours, bare, cores = [], [], []
        for _ in range(sizes.rounds):
            bare.append(rate(lambda: session.run(None, {"images": pictures}), 32, sizes.seconds))
            before = service.cpu_s()
            load = closed_loop(service.port, wires, connections=connections, seconds=sizes.seconds)
            ours.append(count * load.answers / load.seconds)
            cores.append((service.cpu_s() - before) / load.seconds)
        rows.append(
            {
                "benchmark": f"G11 /embed {precision}, {name}",
                "images_per_s": statistics.median(ours),
                "bare_session_images_per_s": statistics.median(bare),
                "ratio": statistics.median(o / b for o, b in zip(ours, bare, strict=True)),
                "cores": statistics.median(cores),
            }
        )
    return rows


def rate(call: Callable[[], object], count: int, seconds: float) -> float:
    """Images a second of a call that takes `count` at a time."""
    call()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        call()
        done += count
    return done / (time.perf_counter() - begun)


def facts(sizes: Sizes, info: Info) -> dict[str, Any]:
    """When, on what, of what."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "gpu": gpu,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "faiss": faiss.__version__,
        "sizes": sizes._asdict(),
        "search": dict(info.search),
    }


if __name__ == "__main__":
    sys.exit(main())
