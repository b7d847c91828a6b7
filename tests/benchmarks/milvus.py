"""A gallery in Milvus beside plain numpy: recall@10, and what searching and writing take.

    OMP_NUM_THREADS=1 python tests/benchmarks/milvus.py --bundle DIR [--items 50000]
    ... --url milvus://HOST:PORT        # of a Milvus that is there, instead of milvus-lite
    ... --effort 10 20 50 128           # HNSW with these `ef` in place of the service's own: where
                                        # recall does not move with it, no graph was searched

Items are CIFAR-10's training images under the bundle's encoder, queries its test images. Everything
goes through MilvusGallery's own snapshot; the answer to compare with is every cosine in float64.
Collections are named benchmark_... and dropped at the end. Asserts nothing.
"""

import argparse
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pymilvus import MilvusException

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.gallery.milvus import Store
from service.gallery.milvus_facts import row_of
from service.gallery.milvus_language import Index
from service.gallery.milvus_snapshot import MilvusSnapshot
from service.gallery.protocol import Item
from tests.benchmarks.cifar10_pack import PACK, read_pack
from tests.service.milvus import Milvus, installed
from trainer.representation.bundle import Bundle, open_bundle

K, BATCH = 10, 256


@contextlib.contextmanager
def server() -> Iterator[str]:
    """milvus-lite on loopback; gives the URL without a collection."""
    directory = Path(tempfile.mkdtemp(prefix="invprop-milvus-"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    milvus = Milvus(installed(), directory, port)
    milvus.start()
    try:
        yield f"milvus://127.0.0.1:{port}"
    finally:
        milvus.kill()
        shutil.rmtree(directory)


def embedded(bundle: Bundle, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, S, S, 3) -> (N, D): the encoder on images that have its input's size already."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        bundle.encoder_onnx(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = (given.name for given in session.get_inputs())
    parts = [
        session.run(["embedding"], {name: images[start : start + BATCH]})[0]
        for start in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def nearest(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(B, D), (N, D) -> (B, K) rows, every cosine in float64."""
    found = []
    for start in range(0, len(queries), 100):
        cosines = queries[start : start + 100].astype(np.float64) @ vectors.T.astype(np.float64)
        found.append(np.argsort(-cosines, axis=1, kind="stable")[:, :K])
    return np.concatenate(found)


def measured(
    url: str,
    index: Index,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    efforts: Sequence[int | None],
) -> Iterator[str]:
    """Lines of the table, one for each effort."""
    wanted = nearest(queries, vectors)
    store = Store(f"{url}/benchmark_{index}_{os.getpid()}", timeout_s=300.0)
    try:
        store.make_items(vectors.shape[1], index, "benchmark")
        began = time.perf_counter()
        for start in range(0, len(vectors), 2000):
            rows = range(start, min(start + 2000, len(vectors)))
            store.upsert(
                store.items,
                [
                    row_of(Item(f"train/{n:05d}.png", vectors[n], {"n": n % 10}), n + 1)
                    for n in rows
                ],
            )
        store.seal()
        _await_index(store)
        wrote_s = time.perf_counter() - began
        count = store.count()
        snapshot = MilvusSnapshot(
            store, count, count, dim=vectors.shape[1], exact=index == "flat", whole_items=0
        )
        search = store._client.search
        for effort in efforts if index == "hnsw" else (None,):
            if effort is not None:
                own = {"search_params": {"params": {"ef": effort}}}
                store._client.search = lambda *a, own=own, **k: search(*a, **{**k, **own})
            name = index if effort is None else f"{index}, ef {effort}"
            searched = _searched(snapshot, queries, wanted)
            yield f"| {name} | {searched} | {len(vectors) / wrote_s:,.0f} |"
    finally:
        store.drop()
        store.close()


def _await_index(store: Store, tries: int = 30) -> None:
    """milvus-lite builds the index later and says nothing of it; loading again waits for it."""
    for left in reversed(range(tries)):
        try:
            store._client.release_collection(store.items)
            store._client.load_collection(store.items, timeout=600)
        except MilvusException as error:  # it reads the file that it is still writing
            if "not fully written" not in str(error) or not left:
                raise
            time.sleep(2)
        else:
            return


def _searched(
    snapshot: MilvusSnapshot, queries: NDArray[np.float32], wanted: NDArray[np.int64]
) -> str:
    """Columns: recall, equal lists, one query, of a batch."""
    snapshot.search(queries[:1], K, exact=False)  # what a first search has to do besides
    began = time.perf_counter()
    found = snapshot.search(queries, K, exact=False).rows - 1
    together_s = time.perf_counter() - began
    alone_s = []
    for query in queries[:50]:
        began = time.perf_counter()
        snapshot.search(query[None], K, exact=False)
        alone_s.append(time.perf_counter() - began)
    recall = np.mean([len(set(f) & set(w)) / K for f, w in zip(found, wanted, strict=True)])
    return (
        f"{recall:.4f} | {np.mean((found == wanted).all(axis=1)):.4f} | "
        f"{1e3 * np.median(alone_s):.1f} | {1e3 * together_s / len(queries):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--url", help="milvus://HOST:PORT of one that is there")
    parser.add_argument("--index", choices=get_args(Index), nargs="+", default=["flat", "hnsw"])
    parser.add_argument("--effort", type=int, nargs="+", default=[None])
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    vectors = embedded(bundle, read_pack("train", options.pack).images[: options.items])
    test = read_pack("test", options.pack).images
    every = max(1, len(test) // options.queries)  # the pack is sorted by class
    queries = embedded(bundle, np.ascontiguousarray(test[::every][: options.queries]))
    print(
        f"{len(vectors):,} items, {len(queries):,} queries, {vectors.shape[1]} dimensions, model "
        f"{bundle.model_id[:12]}, load {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| index | recall@10 | same list | one query, ms | of a batch, ms a query "
        "| items written and indexed a second |\n|---|---|---|---|---|---|"
    )
    with contextlib.nullcontext(options.url) if options.url else server() as url:
        for index in options.index:
            for line in measured(url, index, vectors, queries, options.effort):
                print(line, flush=True)


if __name__ == "__main__":
    main()
