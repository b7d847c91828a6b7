"""`Client.embed` of photographs against a bare load generator, on one server.

    python tests/benchmarks/client_embed.py --photos FOLDER [--bundle DIR] [--count 2000]
        [--rounds 5] [--contenders Client parts]

In: a folder of pictures, and a bundle (a ResNet-18 of random weights at 64 pixels without one).
Each contender embeds the same files in a fresh process, in turns: Client and AsyncClient given
paths, and two load generators over bare sockets that have the bytes in memory and read no answer
but its status: `single` posts one JPEG a request over 32 connections, `parts` posts ready-made
forms of 32 over 4. Out: images a second, the ratio of each round to the faster load generator of
that round (goal >= 0.9), processor time of the asking process and of the service, the same ratio
by their sum (what the wall would say on a machine with nothing else to do), and how much the asking
process's memory grew.
"""

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from client import AsyncClient, Client
from client.bodies import multipart
from client.paths import pictures_in
from tests.benchmarks.wire import Connection, request
from tests.faults.started import ROOT, Started

BARE = ("single", "parts")
PART = 32
say = sys.stdout.write


def of_client(url: str, files: list[Path]) -> Callable[[], object]:
    """The SDK: it reads the files itself, decodes the answer, and orders the rows."""
    service = Client(url)
    service.embed(files[:PART])
    return lambda: service.embed(files)


def of_async_client(url: str, files: list[Path]) -> Callable[[], object]:
    async def embed() -> object:
        async with AsyncClient(url) as service:
            return await service.embed(files)

    return lambda: asyncio.run(embed())


def of_single(url: str, files: list[Path]) -> Callable[[], object]:
    wires = [request(file.read_bytes(), "image/jpeg") for file in files]
    return lambda: posted(url, wires, connections=32)


def of_parts(url: str, files: list[Path]) -> Callable[[], object]:
    wires = []
    for first in range(0, len(files), PART):
        media_type, body = multipart([file.read_bytes() for file in files[first : first + PART]])
        wires.append(request(body, media_type))
    return lambda: posted(url, wires, connections=4)


def posted(url: str, wires: Sequence[bytes], *, connections: int) -> None:
    """Send all of them, as many at once as there are connections."""
    left = iter(wires)

    async def drain() -> None:
        connection = await Connection.open(int(url.rpartition(":")[2]))
        for wire in left:
            answer = await connection.ask(wire)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {answer.body[:300]!r}")
        connection.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(drain() for _ in range(connections)))

    asyncio.run(all_of_them())


CONTENDERS: dict[str, Callable[[str, list[Path]], Callable[[], object]]] = {
    "Client": of_client,
    "AsyncClient": of_async_client,
    "single": of_single,
    "parts": of_parts,
}


def child(kind: str, url: str, folder: str, count: int) -> None:
    """One contender, once; figures as JSON on stdout."""
    files = [file.path for file in pictures_in(Path(folder))][:count]
    call = CONTENDERS[kind](url, files)
    before = psutil.Process().memory_info().rss
    began, cpu = time.perf_counter(), time.process_time()
    call()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    say(json.dumps({"rate": len(files) / took, "cpu_s": cpu, "grown": max(0, grown)}))


def run(kind: str, url: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--url", url]
    command += ["--photos", str(options.photos), "--count", str(options.count)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(url: str, options: argparse.Namespace, served: Started | None = None) -> None:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.contenders}
    run("parts", url, options)  # warms the server up
    for number in range(options.rounds):
        kinds = options.contenders
        for kind in kinds if number % 2 else reversed(kinds):
            before = served.cpu_s() if served else 0.0
            figures = run(kind, url, options)
            figures["served_s"] = served.cpu_s() - before if served else 0.0
            found[kind].append(figures)
    bare = [found[kind] for kind in BARE if kind in found]
    least = min(processor(runs) for runs in bare)
    fastest = [max(runs[n]["rate"] for runs in bare) for n in range(options.rounds)]
    for kind, runs in found.items():
        ratios = [run["rate"] / best for run, best in zip(runs, fastest, strict=True)]
        say(
            f"{kind}: {median(runs, 'rate'):.0f} images/s, {statistics.median(ratios):.3f} of the "
            f"faster load generator ({min(ratios):.3f}..{max(ratios):.3f}); "
            f"{1e3 * median(runs, 'cpu_s') / options.count:.3f} ms of processor an image, the "
            f"service {1e3 * median(runs, 'served_s') / options.count:.3f}, by their sum "
            f"{least / processor(runs):.3f}; memory grew by {median(runs, 'grown') / 1e6:.1f} MB\n"
        )


def processor(runs: Sequence[dict[str, Any]]) -> float:
    """Seconds of both sides of one run."""
    return median(runs, "cpu_s") + median(runs, "served_s")


def median(runs: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--url", help="a service that runs; one is started without it")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.url, options.photos, options.count)
        return
    if options.url:
        compare(options.url, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            from tests.benchmarks.served_models import random_bundle  # torch, where it is needed

            bundle = random_bundle(Path(folder), 64, variants=())
        with Started(bundle, Path(folder) / "state", log=Path(folder) / "log") as service:
            compare(f"http://127.0.0.1:{service.port}", options, service)


if __name__ == "__main__":
    main()
