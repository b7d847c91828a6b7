"""What /embed costs besides the network, and beside other servers.

    python tests/benchmarks/embed.py runner raw jpeg idle http others [--seconds 4] [--rounds 5]

runner: our runner against a bare session (goal >= 0.98 of its speed). raw, jpeg: processor time of
the server and its decoders for an image with 32 connections, against the session's alone (goal
>= 0.95 fp32, 0.85 int8) or against the session's and the decoder's (>= 0.90). idle: latency of one
connection (<= session + 1.5 ms) and p99 at 32 (<= 2 x connections / throughput). http: a network
that costs nothing, against FastAPI (<= 1.3) and bare ASGI (<= 1.5). others: images a processor
second against LitServe (>= 1.2) and FastAPI without batches. References are run in turns with it,
medians of the rounds; processor time, so that other work on the machine counts little.
"""

import argparse
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.embedder import OnnxEmbedder
from tests.benchmarks.served_models import Other, jpeg, photo, random_bundle, session
from tests.benchmarks.wire import closed_loop, form, npy, request
from tests.faults.started import Started
from tests.service.conftest import SIDE, build_bundle
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import InputContract, prepare

CONNECTIONS = 32
ONE_CORE = {
    "inference_threads": 1,
    "decoder_processes": 1,
    "search_threads": 1,
    "max_queue_wait_s": 60.0,  # 32 connections wait on one core: that is wanted here
}
say = sys.stdout.write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundles: dict[int, Path] = {}
        if set(options.parts) - {"http"}:
            bundles = {size: random_bundle(Path(folder), size) for size in options.sizes}
        for part in options.parts:
            PARTS[part](Path(folder), bundles, options)
            sys.stdout.flush()


def runner(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    for size, directory in bundles.items():
        bundle = open_bundle(directory)
        for precision in ("fp32", "int8"):
            embedder = OnnxEmbedder(bundle, execution_provider="cpu", precision=precision)
            bare = session(bundle.encoder_onnx(precision))
            for batch in (1, 8):
                rows = list(images(size, batch))
                stacked = np.stack(rows)

                def ours(e: Any = embedder, r: Any = rows) -> object:
                    return e.finish(e.run(e.prepare(r)))

                def theirs(b: Any = bare, s: Any = stacked) -> object:
                    return b.run(["features", "embedding"], {"images": s})

                of_ours, of_theirs = in_turns((ours, theirs), options)
                say(
                    f"runner {size} px {precision} b={batch}: {1e3 * of_ours:.2f} ms, bare session "
                    f"{1e3 * of_theirs:.2f} ms, {of_theirs / of_ours:.3f} of its speed\n"
                )


def in_turns(
    calls: Sequence[Callable[[], object]], options: argparse.Namespace, least_s: float = 0.4
) -> list[float]:
    """Median processor seconds of one call, the calls in turns."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(3 * options.rounds):
        for kept, call in zip(found, calls, strict=True):
            begun, count = time.process_time(), 0
            while (taken := time.process_time() - begun) < least_s / 3:
                call()
                count += 1
            kept.append(taken / count)
    return [statistics.median(kept) for kept in found]


def images(size: int, count: int) -> Any:
    return np.stack([photo(n, size, size) for n in range(count)])


def raw(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    for size in bundles:
        wires = [request(npy(row[None]), "application/x-npy") for row in images(size, 32)]
        against_the_session(folder, bundles[size], "raw", wires, size, options)


def jpegs(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    files = [jpeg(photo(n, 500, 375)) for n in range(32)]
    wires = [request(file, "image/jpeg") for file in files]
    for size in bundles:
        against_the_session(folder, bundles[size], "jpeg 500x375", wires, size, options, files[0])


def against_the_session(
    folder: Path,
    directory: Path,
    what: str,
    wires: Sequence[bytes],
    size: int,
    options: argparse.Namespace,
    file: bytes | None = None,
) -> None:
    bundle = open_bundle(directory)
    for precision in ("fp32", "int8"):
        bare = session(bundle.encoder_onnx(precision))
        batch = images(size, 16)
        contract = InputContract(size_px=size)
        state = folder / f"state {what} {size} {precision}"
        ratios, servers, references = [], [], []
        with Started(
            directory, state, log=folder / "log", precision=precision, **ONE_CORE
        ) as service:
            closed_loop(service.port, wires, connections=CONNECTIONS, seconds=1)
            for _ in range(options.rounds):
                before = service.cpu_s()
                load = closed_loop(
                    service.port, wires, connections=CONNECTIONS, seconds=options.seconds
                )
                server = (service.cpu_s() - before) / load.answers
                again, count = time.process_time(), 0
                while time.process_time() - again < 1:
                    bare.run(["features", "embedding"], {"images": batch})
                    count += len(batch)
                reference = (time.process_time() - again) / count
                if file is not None:
                    again, count = time.process_time(), 0
                    while time.process_time() - again < 0.5:
                        prepare(file, contract)
                        count += 1
                    reference += (time.process_time() - again) / count
                servers.append(server)
                references.append(reference)
                ratios.append(reference / server)
        say(
            f"{what} {size} px {precision}: server {1e6 * statistics.median(servers):.0f} us of "
            f"CPU an image, reference {1e6 * statistics.median(references):.0f} us, efficiency "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})\n"
        )
        sys.stdout.flush()


def idle(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    for size, directory in bundles.items():
        bundle = open_bundle(directory)
        bare = session(bundle.encoder_onnx("fp32"))
        one = images(size, 1)
        wires = [request(npy(one), "application/x-npy")]
        more, saturated = [], []
        with Started(directory, folder / f"idle {size}", log=folder / "log", **ONE_CORE) as service:
            closed_loop(service.port, wires, connections=1, seconds=1)
            for _ in range(options.rounds):
                lone = closed_loop(service.port, wires, connections=1, seconds=2)
                took = []
                for _ in range(max(5, lone.answers // 2)):
                    begun = time.perf_counter()
                    bare.run(["features", "embedding"], {"images": one})
                    took.append(time.perf_counter() - begun)
                more.append(lone.percentile_ms(50) - 1000 * statistics.median(took))
                full = closed_loop(
                    service.port, wires, connections=CONNECTIONS, seconds=options.seconds
                )
                fair_ms = 1000 * CONNECTIONS * full.seconds / full.answers
                saturated.append(full.percentile_ms(99) / fair_ms)
        say(
            f"idle {size} px: p50 is the session's + {statistics.median(more):.2f} ms; saturated: "
            f"p99 is {statistics.median(saturated):.2f} x connections / throughput\n"
        )


def http(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    directory = build_bundle(folder / "tiny")
    row = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    wires = [request(npy(row), "application/x-npy")]
    bare = session(open_bundle(directory).encoder_onnx())
    others = {kind: Other(kind) for kind in ("raw", "echo")}
    found: dict[str, list[float]] = {name: [] for name in ("ours", "network", *others)}
    try:
        with Started(directory, folder / "http", log=folder / "log", **ONE_CORE) as service:
            for _ in range(options.rounds):
                for name, server in {**others, "ours": service}.items():
                    closed_loop(server.port, wires, connections=CONNECTIONS, seconds=0.3)
                    before = server.cpu_s()
                    load = closed_loop(
                        server.port, wires, connections=CONNECTIONS, seconds=options.seconds
                    )
                    found[name].append(1e6 * (server.cpu_s() - before) / load.answers)
                begun, count = time.process_time(), 0
                batch = np.repeat(row, 16, axis=0)
                while time.process_time() - begun < 0.3:
                    bare.run(["features", "embedding"], {"images": batch})
                    count += 16
                found["network"].append(1e6 * (time.process_time() - begun) / count)
    finally:
        for server in others.values():
            server.stop()
    median = {name: statistics.median(values) for name, values in found.items()}
    ours = median["ours"] - median["network"]
    say(
        f"http: ours {median['ours']:.0f} us of CPU a request, of which the network "
        f"{median['network']:.0f}; FastAPI echo {median['echo']:.0f} us "
        f"({ours / median['echo']:.2f} x), bare ASGI {median['raw']:.0f} us "
        f"({ours / median['raw']:.2f} x)\n"
    )


def others(folder: Path, bundles: dict[int, Path], options: argparse.Namespace) -> None:
    files = [jpeg(photo(n, 500, 375)) for n in range(32)]
    wires = [request(*form(file)) for file in files]
    for size, directory in bundles.items():
        graph = folder / f"{size}.onnx"
        graph.write_bytes(open_bundle(directory).encoder_onnx("fp32"))
        servers = {kind: Other(kind, graph, size) for kind in ("litserve", "plain")}
        found: dict[str, list[float]] = {name: [] for name in ("ours", *servers)}
        try:
            with Started(
                directory, folder / f"others {size}", log=folder / "log", **ONE_CORE
            ) as service:
                wait_for(servers["litserve"].port)
                for _ in range(options.rounds):
                    for name, server in {**servers, "ours": service}.items():
                        closed_loop(server.port, wires, connections=CONNECTIONS, seconds=1)
                        before = server.cpu_s()
                        load = closed_loop(
                            server.port, wires, connections=CONNECTIONS, seconds=options.seconds
                        )
                        found[name].append(load.answers / (server.cpu_s() - before))
        finally:
            for server in servers.values():
                server.stop()
        median = {name: statistics.median(values) for name, values in found.items()}
        say(
            f"others {size} px fp32, JPEG 500x375 in a form: images a CPU second: ours "
            f"{median['ours']:.1f}, LitServe {median['litserve']:.1f} "
            f"({median['ours'] / median['litserve']:.2f} x), FastAPI without batches "
            f"{median['plain']:.1f} ({median['ours'] / median['plain']:.2f} x)\n"
        )


def wait_for(port: int) -> None:
    """Until something listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


PARTS = {
    "runner": runner,
    "raw": raw,
    "jpeg": jpegs,
    "idle": idle,
    "http": http,
    "others": others,
}

if __name__ == "__main__":
    main()
