"""A service over a large gallery, in a process of its own: starts, memory, searches over HTTP.

    python tests/benchmarks/search_http.py start DIRECTORY [--items 1000000]
    python tests/benchmarks/search_http.py http DIRECTORY [--items 50000]
    python tests/benchmarks/search_http.py overhead DIRECTORY

start: seconds from the start of the process to ready, from the log and from a generation, resident
memory, and sampled answers compared with brute force. http: 64 queries a request as .npy, answers
as .npz, through HNSW, beside the same searches in process. overhead: CPU time of the server for one
query a request beyond the search itself, beside a FastAPI application that sends the body back.
DIRECTORY keeps bundle and state for the next run. Vectors as in tests/benchmarks/search.py.
"""

import argparse
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import faiss
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from search import DIM, K, clustered
from wire import closed_loop, request

from service.gallery.choice import SearchOptions
from service.gallery.database import Database
from service.gallery.logged import LoggedGallery
from service.gallery.oplog import open_active
from service.gallery.rows import Operation
from trainer.representation.bundle import BundleGallery, open_bundle, write_bundle
from trainer.representation.neighbours import KnnGraph
from trainer.representation.preprocess import InputContract

ROOT = Path(__file__).parents[2]
BATCH = 64
NPY = {"Content-Type": "application/x-npy", "Accept": "application/x-npz"}


def bundle_in(directory: Path) -> Path:
    """A bundle whose encoder is a projection; its gallery is empty."""
    path = directory / "bundle"
    if path.exists():
        return path
    weights = np.random.default_rng(0).standard_normal((8 * 8 * 3, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["real"], ["features"], axis=1),
        helper.make_node("MatMul", ["features", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 192]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM]),
        ],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    empty = np.empty((0, DIM), np.float32)
    nothing = KnnGraph(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))
    return write_bundle(
        path,
        encoder_onnx=model.SerializeToString(),
        weights=b"",
        contract=InputContract(size_px=8),
        feature_dim=192,
        embedding_dim=DIM,
        pixel_mean=[0.5] * 3,
        pixel_std=[0.5] * 3,
        recipe={"name": "benchmark"},
        training={},
        parity={},
        provenance={},
        card="# benchmark\n",
        gallery=BundleGallery([], empty, nothing),
    )


def state_in(directory: Path, vectors: NDArray[np.float32]) -> Path:
    """A state whose log holds these vectors as items."""
    path = directory / f"state-{len(vectors)}"
    if path.exists():
        return path
    bundle = open_bundle(bundle_in(directory))

    def operations() -> Iterator[Operation]:
        for n, vector in enumerate(vectors):
            metadata = b'{"label":%d,"file":"%d.jpg"}' % (n % 1000, n)
            yield Operation("upsert", f"images/{n:09d}.jpg", vector.tobytes(), metadata)

    database = Database(path)
    open_active(database, model_id=bundle.model_id, dim=DIM, first=operations)
    database.close()
    return path


class Running:
    """A service in a process of its own."""

    def __init__(self, url: str, pid: int, ready_s: float) -> None:
        self.pid, self.ready_s = pid, ready_s
        self.port = int(urlsplit(url).port or 0)
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """The answer's body; the connection stays open."""
        self._connection.request("POST", path, body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content[:500]
        return content

    def get(self, path: str) -> bytes:
        """The answer's body."""
        self._connection.request("GET", path)
        return self._connection.getresponse().read()

    def cpu_s(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> tuple[float, float]:
        """Resident now, and at most."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        named = dict(line.split(":", 1) for line in status.splitlines())
        return tuple(int(named[n].split()[0]) / 1e3 for n in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


@contextmanager
def serving(command: list[str]) -> Iterator[Running]:
    """Run a service until the block ends."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        words = [word for word in line.split() if word.startswith("http")]
        assert words, line
        yield Running(words[0], process.pid, time.perf_counter() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def service(directory: Path, state: Path, *flags: str) -> list[str]:
    """The command line of a service."""
    return [
        *("-m", "service.run", "--bundle", str(bundle_in(directory)), "--state", str(state)),
        *("--port", "0", "--decoder-processes", "1", *flags),
    ]


def npy(array: NDArray[np.float32]) -> bytes:
    """As a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def start(directory: Path, items: int) -> None:
    """A million items: how long, how much, and is it right."""
    vectors, queries = clustered(items), clustered(BATCH, seed=5)
    began = time.perf_counter()
    state = state_in(directory, vectors)
    print(f"{items} items, log written in {time.perf_counter() - began:.1f} s", flush=True)
    flags = ("--exact-items", str(items))
    for what in ("the log", "a generation", "a generation"):
        with serving(service(directory, state, *flags)) as running:
            print(f"ready from {what} after {running.ready_s:.2f} s", flush=True)
            content = running.post(f"/neighbours?k={K}", npy(queries), NPY)
            print("resident MB now, at most:", *running.memory_mb(), flush=True)
    with np.load(io.BytesIO(content)) as answer:
        ids, similarities = answer["ids"], answer["similarities"]
    best = np.full((BATCH, K), -np.inf)
    rows = np.full((BATCH, K), -1)
    for first in range(0, items, 100_000):
        part = queries.astype(np.float64) @ vectors[first : first + 100_000].T.astype(np.float64)
        both = np.concatenate([best, part], axis=1)
        numbers = np.arange(first, first + part.shape[1])
        named = np.concatenate([rows, np.broadcast_to(numbers, part.shape)], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :K]
        best = np.take_along_axis(both, order, axis=1)
        rows = np.take_along_axis(named, order, axis=1)
    expected = [[f"images/{n:09d}.jpg" for n in line] for line in rows]
    same = (ids == np.asarray(expected)).mean()
    print(f"ids equal to brute force: {same:.4f}, similarities within", end=" ")
    print(f"{np.abs(similarities - best).max():.1e}")


def over_http(directory: Path, items: int, rounds: int) -> None:
    """C12 over HTTP."""
    vectors, queries = clustered(items), clustered(512, seed=5)
    state = state_in(directory, vectors)
    options = SearchOptions(exact_items=1000)
    gallery = LoggedGallery(state, open_bundle(bundle_in(directory)), search=options)
    while gallery.snapshot().index()["index"] != "hnsw":
        time.sleep(0.5)
    gallery.close()
    snapshot = gallery.snapshot()
    faiss.omp_set_num_threads(1)
    truth = snapshot.search(queries, K).rows
    raw = snapshot.segments[0].approximate
    assert raw is not None
    effort = snapshot.segments[0].effort
    bodies = [npy(queries[n : n + BATCH]) for n in range(0, 512, BATCH)]

    def faiss_alone() -> None:
        for n in range(0, 512, BATCH):
            raw.search(queries[n : n + BATCH], K, effort=effort, allowed=None)

    with serving(service(directory, state, "--exact-items", "1000")) as running:
        path = f"/neighbours?k={K}"

        def through_http() -> None:
            for body in bodies:
                running.post(path, body, NPY)

        times = alternately({"faiss": faiss_alone, "http": through_http}, rounds)
        before = running.cpu_s()
        for _ in range(10):
            through_http()
        cpu = (running.cpu_s() - before) / (10 * len(bodies))
        with np.load(io.BytesIO(running.post(path, npy(queries), NPY))) as answer:
            ids = answer["ids"]
        print(json.loads(running.get("/info"))["search"])
    names = snapshot.ids(truth.reshape(-1)).reshape(truth.shape)
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(names, ids, strict=True)])
    print(
        f"N = {items}, ef {effort}, recall@10 {recall:.4f}: faiss {512 / times['faiss']:.0f} qps, "
        f"over HTTP {512 / times['http']:.0f} qps = {times['faiss'] / times['http']:.3f}; server "
        f"CPU {1e6 * cpu:.0f} us a request of {BATCH}, faiss {1e6 * times['faiss'] / 8:.0f} us"
    )


def alternately(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


ECHO = """
import socket, sys, uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
app = FastAPI()
@app.post("/echo")
async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/x-npy")
listener = socket.create_server(("127.0.0.1", 0))
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("http://127.0.0.1:%d" % listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, access_log=False, log_config=None)
uvicorn.Server(config).run(sockets=[listener])
"""


def overhead(directory: Path, seconds: float) -> None:
    """C13: one query a request, a small gallery."""
    vectors, queries = clustered(1000), clustered(1, seed=5)
    state = state_in(directory, vectors)
    body = npy(queries)

    def cpu_us(running: Running, path: str, connections: int) -> float:
        wires = [request(body, "application/x-npy", path=path, accept="application/x-npz")]
        closed_loop(running.port, wires, connections=connections, seconds=0.3)
        before = running.cpu_s()
        load = closed_loop(running.port, wires, connections=connections, seconds=seconds)
        return 1e6 * (running.cpu_s() - before) / load.answers

    bundle = open_bundle(bundle_in(directory))
    gallery = LoggedGallery(state, bundle)
    gallery.close()
    faiss.omp_set_num_threads(1)
    began = time.process_time()
    for _ in range(2000):
        gallery.snapshot().search(queries, K)
    search = 1e6 * (time.process_time() - began) / 2000
    with (
        serving(["-c", ECHO]) as echo,
        serving(service(directory, state)) as running,
    ):
        for connections in (32, 1):
            found = [
                (
                    cpu_us(echo, "/echo", connections),
                    cpu_us(running, f"/neighbours?k={K}", connections),
                )
                for _ in range(5)
            ]
            theirs, ours = (median(column) for column in zip(*found, strict=True))
            print(
                f"{connections} connections: server CPU a request: FastAPI echo {theirs:.0f} us, "
                f"/neighbours {ours:.0f} us, of which the search {search:.0f} us: "
                f"{(ours - search) / theirs:.2f} x the echo"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["start", "http", "overhead"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--items", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.what == "start":
        start(options.directory, options.items or 1_000_000)
    elif options.what == "http":
        over_http(options.directory, options.items or 50_000, options.rounds)
    else:
        overhead(options.directory, options.seconds)
