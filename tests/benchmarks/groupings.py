"""What groupings are worth on labelled images, and what the kept graph and groupings cost.

    python tests/benchmarks/groupings.py quality --bundle BUNDLE --data images.npz   # a packed .npz
    python tests/benchmarks/groupings.py speed --items 50000
    python tests/benchmarks/groupings.py scale --items 100000

quality: NMI (arithmetic mean) and purity of the items that are grouped, beside k-means (one start,
fitted on all items, judged on the same ones) with as many clusters and with as many as there are
classes, and beside components of the plain kNN graph and of partners. speed: groups/s with and
without the kept graph, interleaved; what building and carrying it on take. scale: one grouping.
"""

import argparse
import io
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import records_of
from service.graph import ItemGraph, built_graph, carried_graph
from service.groups import propagated_groups
from service.partition import mutual_pairs, partition
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import prepare

SETTINGS = ((4, 3), (4, 2), (6, 3), (10, 2))  # (k, steps), the service's defaults first
MIN_SIZE = 3


def silent(*_: object) -> None:
    """No progress is wanted."""


def snapshot_of(vectors: NDArray[np.float32]) -> FaissSnapshot:
    count = len(vectors)
    ids = [f"item/{n:07d}" for n in range(count)]
    records = records_of(
        vectors=vectors, ids=ids, metadata=[b"{}"] * count, seqs=np.arange(1, count + 1)
    )
    return FaissSnapshot.of(records, count)


def places_of(graph: ItemGraph, k: int) -> NDArray[np.int64]:
    wanted = graph.neighbours[:, :k]
    return np.where(wanted >= 0, np.searchsorted(graph.seqs, wanted), -1)


def packed_images(path: Path, most: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """At most `most` images drawn from a packed .npz (trainer/README.md has the format)."""
    with np.load(path) as pack:
        labels = pack["labels"].astype(np.int64)
        chosen = np.random.default_rng(0).permutation(len(labels))[:most]
        if "images" in pack:
            images = pack["images"]
            return [images[i] for i in chosen], labels[chosen]
        shapes, pixels = pack["shapes"].astype(np.int64), pack["pixels"]
        ends = np.concatenate([[0], np.cumsum(shapes.prod(axis=1))])
        return [pixels[ends[i] : ends[i + 1]].reshape(shapes[i]) for i in chosen], labels[chosen]


def embeddings_of(bundle_at: Path, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    bundle = open_bundle(bundle_at)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        bundle.encoder_onnx(), options, providers=["CPUExecutionProvider"]
    )

    def batches() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(images), 256):
            prepared = []
            for image in images[start : start + 256]:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                prepared.append(prepare(buffer.getvalue(), bundle.contract))
            yield np.stack(prepared)

    return np.concatenate([session.run(["embedding"], {"images": b})[0] for b in batches()])


def line(title: str, found: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """A row: `found` is the group of each item, -1 for none."""
    grouped = found >= 0
    _, own, sizes = np.unique(found[grouped], return_inverse=True, return_counts=True)
    table = np.zeros((len(sizes), int(labels.max()) + 1))
    np.add.at(table, (own, labels[grouped]), 1)
    nmi = normalized_mutual_info_score(labels[grouped], own)
    purity = table.max(axis=1).sum() / grouped.sum()
    return (
        f"| {title} | {len(sizes)} | {grouped.mean():.2f} | {sizes.max() / len(found):.3f} "
        f"| {nmi:.3f} | {purity:.3f} |"
    )


def components(one: NDArray[np.int64], other: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    ones = np.ones(len(one), np.int8)
    found = connected_components(coo_array((ones, (one, other)), (count, count)), directed=False)[1]
    sizes = np.bincount(found)
    return np.where(sizes[found] >= MIN_SIZE, found, -1)


def quality(options: argparse.Namespace) -> None:
    images, labels = packed_images(options.data, options.images)
    vectors = embeddings_of(options.bundle, images)
    snapshot = snapshot_of(vectors)
    count, classes = len(vectors), len(np.unique(labels))
    graph = built_graph(snapshot, max(k for k, _ in SETTINGS), progress=silent)
    print(f"{options.data.name}: {count} images, {classes} classes, chance purity", end=" ")
    print(f"{np.bincount(labels).max() / count:.3f}\n")
    print("| | groups | share grouped | largest | NMI | purity |\n|---|---|---|---|---|---|")
    for k, steps in SETTINGS:
        places = places_of(graph, k)
        found = partition(
            snapshot, snapshot.rows(), places, steps=steps, min_size=MIN_SIZE, report=silent
        )
        groups = np.full(count, -1, np.int64)
        sizes = np.diff(found.starts)
        groups[found.members] = np.repeat(np.arange(len(sizes)), sizes)
        print(line(f"grouping, k = {k}, steps = {steps}", groups, labels))
        means = KMeans(len(sizes), n_init=1, random_state=0).fit_predict(vectors)
        print(line("k-means, as many clusters", np.where(groups >= 0, means, -1), labels))
        one, other = mutual_pairs(places, steps, silent)
        print(line("components of partners", components(one, other, count), labels), flush=True)
    ends = places_of(graph, 4).ravel()
    plain = components(np.repeat(np.arange(count), 4), ends, count)
    print(line("components of the 4-nearest graph", plain, labels))
    means = KMeans(classes, n_init=1, random_state=0).fit_predict(vectors)
    print(line("k-means, as many clusters as classes", means, labels))


def clustered(count: int, dim: int = 128) -> NDArray[np.float32]:
    """Unit vectors around 1,000 directions: searches among them are as among embeddings."""
    draw = np.random.default_rng(0)
    middles = draw.standard_normal((1000, dim)).astype(np.float32)
    vectors = middles[draw.integers(1000, size=count)]
    vectors += draw.standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(function: Any, *arguments: Any, **options: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    answer = function(*arguments, **options)
    return answer, time.perf_counter() - began


def speed(options: argparse.Namespace) -> None:
    vectors = clustered(options.items + 101)
    snapshot = snapshot_of(vectors[: options.items])
    graph, took = timed(built_graph, snapshot, options.k, progress=silent)
    print(f"build, k = {options.k}: {took:.1f} s, {graph.size_bytes / 2**20:.0f} MiB")
    for more in (1, 100):
        grown = snapshot_of(vectors[: options.items + more])
        _, took = timed(carried_graph, graph, grown, progress=silent)
        print(f"carried on over {more} items more: {took * 1000:.0f} ms")
    draw = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {"with the graph": [], "without": []}
    for _ in range(options.rounds):
        anchors = draw.integers(options.items, size=20)
        for name, kept in (("with the graph", graph), ("without", None)):
            began = time.perf_counter()
            for anchor in anchors:
                propagated_groups(
                    snapshot,
                    vectors=vectors[[anchor]],
                    rows=np.asarray([anchor]),
                    k=4,
                    steps=3,
                    order="nearest",
                    limit=200,
                    graph=kept,
                )
            seconds[name].append(time.perf_counter() - began)
    rates = {name: 20 / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"groups/s {name}, k = 4, steps = 3, one thread: {rate:.0f}")
    ratio = statistics.median(
        b / a for a, b in zip(seconds["with the graph"], seconds["without"], strict=True)
    )
    print(f"median ratio of the rounds: {ratio:.1f}")


def scale(options: argparse.Namespace) -> None:
    snapshot = snapshot_of(clustered(options.items))
    graph, took = timed(built_graph, snapshot, 10, progress=silent)
    print(f"graph of {options.items:,} items, k = 10: {took:.0f} s")
    for k, steps in ((4, 3), (6, 3)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        places = places_of(graph, k)
        rows = snapshot.rows()
        found, took = timed(
            partition, snapshot, rows, places, steps=steps, min_size=MIN_SIZE, report=silent
        )
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"grouping, k = {k}, steps = {steps}: {took:.1f} s, {len(found.starts) - 1} groups, "
            f"peak memory {before / 2**10:.0f} -> {after / 2**10:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = parser.add_subparsers(dest="word", required=True)
    judging = words.add_parser("quality")
    judging.add_argument("--bundle", type=Path, required=True)
    judging.add_argument("--data", type=Path, required=True)
    judging.add_argument("--images", type=int, default=10_000)
    racing = words.add_parser("speed")
    racing.add_argument("--items", type=int, default=50_000)
    racing.add_argument("--k", type=int, default=50)
    racing.add_argument("--rounds", type=int, default=9)
    growing = words.add_parser("scale")
    growing.add_argument("--items", type=int, default=100_000)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    {"quality": quality, "speed": speed, "scale": scale}[options.word](options)


if __name__ == "__main__":
    main()
