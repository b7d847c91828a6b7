"""How a trained encoder becomes a bundle: graphs, weights, model card and the training images.

In: an encoder and the un-augmented training images. Out: a bundle directory whose ONNX graph was
compared with the network on real images, or `ExportError` and nothing written.
"""

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from numpy.typing import NDArray

from trainer.config import ExportConfig
from trainer.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from trainer.model_card import model_card
from trainer.onnx_graph import (
    CPU,
    ExportError,
    OnnxGraph,
    Prepared,
    build_graph,
    measure_parity,
    published_copy,
)
from trainer.quiet_onnxruntime import onnxruntime
from trainer.representation.bundle import BundleGallery, write_bundle
from trainer.representation.neighbours import exact_graph
from trainer.representation.preprocess import InputContract
from trainer.variants import CUDA, make_variants

__all__ = ["ExportError", "checkout_commit", "export_bundle"]

GALLERY_NEIGHBOURS = 10  # edges per training image that the bundle carries
UNIT_LENGTH_TOLERANCE = 1e-4  # float32 gives 1e-6; only an embedding of zeros or NaN misses it
EMBED_BATCH = 32  # images at a time; a ResNet-50 at 224 px needs about 1 GB for them


def export_bundle(
    encoder: Encoder,
    directory: str | Path,
    *,
    ids: Sequence[str],
    prepared: Prepared,
    contract: InputContract,
    recipe: dict[str, Any],
    training: dict[str, Any],
    config: ExportConfig,
    labels: NDArray[np.int64] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the bundle of a trained encoder, all or nothing.

    The same encoder, images and facts give the same bundle, byte for byte but for the timings in
    `speed.json`, and so the same model_id, on the same machine with the same number of threads.
    Images are streamed in blocks of `EMBED_BATCH`. What grows with N is the embeddings, held twice
    while the file is made (8 N D bytes), and the graph, held twice too (24 N K bytes): 1.3 GB
    + 0.3 GB for the 1.28 M images of ImageNet at D = 128. The exact graph takes N^2 D
    multiplications, which is seconds at 50 k images and hours at a million.

    Args:
        encoder: on any device, in any mode; it is copied, not changed.
        directory: where the bundle will stand; an older bundle there is replaced at the very end.
        ids: N names of the training images, all different.
        prepared: gives the un-augmented images of some positions in `ids`: uint8 (B, S, S, 3).
        contract: how those images were prepared; its size is the encoder's.
        recipe: the resolved recipe of the run, as JSON values.
        training: facts of the run, as JSON values; no dates, or repeated exports differ.
        config: the precisions to export besides float32; one that misses its floor is left out,
            with the reason in the manifest. fp16 is measured on the encoder's own device.
        labels: (N,) classes, for the kNN accuracy of those only; None where unknown.
        say: told one line of each.

    Raises:
        ExportError: weights or outputs that are not finite, a graph that does not answer as the
            network does, no images, or images of another shape. Nothing is written.
        OSError: the directory cannot be written; an older bundle there stays.
    """
    side = encoder.image_size_px
    if contract.size_px != side:
        raise ExportError(f"the encoder takes {side} px, the contract gives {contract.size_px} px")
    if not ids:
        raise ExportError("there are no images: a bundle needs at least one, for its parity check")

    network = published_copy(encoder)
    graph = build_graph(network)
    parity = measure_parity(network, graph, _checked(prepared, side), len(ids))
    embeddings = _embed_gallery(graph, _checked(prepared, side), ids, encoder.embedding_dim)
    on_cuda = next(encoder.parameters()).device.type == "cuda"
    made = make_variants(
        graph,
        config,
        prepared=_checked(prepared, side),
        embeddings=embeddings,
        labels=labels,
        provider=CUDA if on_cuda else CPU,
        say=say,
    )
    provenance = _provenance()
    card = model_card(
        feature_dim=encoder.feature_dim,
        embedding_dim=encoder.embedding_dim,
        images=len(ids),
        contract=contract,
        recipe=recipe,
        training=training,
        parity=parity,
        variants=made.variants,
        provenance=provenance,
    )
    return write_bundle(
        directory,
        encoder_onnx=graph.content,
        weights=safetensors.torch.save(network.encoder.state_dict()),
        contract=contract,
        feature_dim=encoder.feature_dim,
        embedding_dim=encoder.embedding_dim,
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
        recipe=recipe,
        training=training,
        parity=parity,
        provenance=provenance,
        card=card,
        gallery=BundleGallery(list(ids), embeddings, exact_graph(embeddings, GALLERY_NEIGHBOURS)),
        variants=made.variants,
        speed=made.speed if made.variants else None,
    )


def _checked(prepared: Prepared, side: int) -> Prepared:
    def checked(indices: Sequence[int]) -> NDArray[np.uint8]:
        images = prepared(indices)
        if images.dtype != np.uint8 or images.shape != (len(indices), side, side, 3):
            raise ExportError(
                f"wanted images uint8 ({len(indices)}, {side}, {side}, 3), "
                f"got {images.dtype} {images.shape}"
            )
        return images

    return checked


def _embed_gallery(
    graph: OnnxGraph, prepared: Prepared, ids: Sequence[str], dim: int
) -> NDArray[np.float32]:
    """Embed every image with the graph itself, so that gallery and service agree."""
    embeddings = np.empty((len(ids), dim), np.float32)
    for start in range(0, len(ids), EMBED_BATCH):
        positions = range(start, min(start + EMBED_BATCH, len(ids)))
        rows = graph.run(prepared(positions))["embedding"]
        # `not close` rather than `far`, because a NaN is neither.
        wrong = np.flatnonzero(~(np.abs(np.linalg.norm(rows, axis=1) - 1) < UNIT_LENGTH_TOLERANCE))
        if wrong.size:
            first = positions[wrong[0]]
            raise ExportError(
                f"the embedding of image {ids[first]!r} has length "
                f"{np.linalg.norm(rows[wrong[0]]):g}, wanted 1: the encoder cannot tell this image"
            )
        embeddings[start : start + len(rows)] = rows
    return embeddings


def _provenance() -> dict[str, Any]:
    return {
        "commit": checkout_commit(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def checkout_commit(root: Path) -> str | None:
    """Return the commit checked out at `root`, with "-dirty" after it when tracked files differ.

    None where `root` is not the top of a git checkout (an installed package may lie inside somebody
    else's), or where there is no git.
    """
    # Inside a git hook these point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(
                ["git", *arguments],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
