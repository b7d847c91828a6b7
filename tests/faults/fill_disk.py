"""Fill the disk under a service, go on asking it, free the disk, kill it, compare.

    python tests/faults/fill_disk.py --directory /mnt/small        a small file system
    python tests/faults/fill_disk.py --limit-bytes 1000000         a limit of the size of files

Writes until changes are refused. They must be refused as such (507, or 503 where the system says
something else than "full"), while every search is answered; the service must start on the full
disk too; when there is room again, changes are taken without a restart. In the end everything that
was acknowledged must be there. Fails (exit 1) with what is wrong.
"""

import argparse
import resource
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.oracle import State, Stored, Writer, Wrong, check
from tests.faults.served import Served
from tests.service.conftest import DIM, build_bundle
from trainer.representation.bundle import open_bundle

BALLAST_BYTES = 2_000_000  # removed to make room again
REFUSALS = 20  # requests that are refused before there is room again
MOST_REQUESTS = 2000


def prove(folder: Path, disk: Path, limit_bytes: int, seed: int) -> Counter[str]:
    """Fill `disk`, or run into the limit; returns counts of what was seen."""
    seen = Counter[str]()
    bundle = build_bundle(folder / "bundle", images=6)
    gallery = open_bundle(bundle).gallery()
    bundled: State = {
        i: Stored(v, {}) for i, v in zip(gallery.ids, gallery.embeddings, strict=True)
    }
    writer = Writer(0, {}, seed=str(seed), dim=DIM, largest=500)
    ballast = disk / "ballast"
    if not limit_bytes:
        ballast.write_bytes(bytes(BALLAST_BYTES))

    def limit() -> None:
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    def start() -> Served:
        return Served(bundle, disk / "state", log=folder / "log", prepare=limit).start()

    def compare(served: Served) -> None:
        connection = served.connect()
        check(connection, [writer], bundled)
        connection.close()

    served = start()
    try:
        with _Searching(served) as searching:
            _write(served, writer, seen, until=lambda: seen["refused"] >= REFUSALS)
        seen["searches while it filled"] = searching.answers
        compare(served)
        served.kill()
        served = start()  # on a disk that is full
        compare(served)
        seen["refused"] = 0
        _write(served, writer, seen, until=lambda: seen["refused"] >= 1)
        if limit_bytes:
            most = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(served.pid, resource.RLIMIT_FSIZE, most)
        else:
            ballast.unlink()
        seen["refused"], answers = 0, writer.answers
        _write(served, writer, seen, until=lambda: writer.answers >= answers + 10)
        assert seen["refused"] == 0, "changes are refused although there is room"
        compare(served)
        served.kill()
        served = start()
        compare(served)
        assert served.stop() == 0, served.said()
    finally:
        served.kill()
    seen["items"] = len(writer.state)
    return seen


def _write(
    served: Served, writer: Writer, seen: Counter[str], *, until: Callable[[], bool]
) -> None:

    connection = served.connect()
    for _ in range(MOST_REQUESTS):
        if until():
            break
        answer = writer.work(connection)
        if answer.status == 200:
            seen["answered"] += 1
            continue
        problem = answer.json()
        if (answer.status, problem["code"]) not in ((507, "storage_full"), (503, "storage_failed")):
            raise Wrong(f"answered {answer.status}: {problem}")
        seen["refused"] += 1
        seen[f"refused with {answer.status}"] += 1
    else:
        raise Wrong(f"{MOST_REQUESTS} requests did not fill the disk")
    connection.close()


class _Searching:
    """Searches without a pause for as long as the block lasts; each must be answered."""

    def __init__(self, served: Served) -> None:
        self.answers = 0
        self._served = served
        self._ends = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._search)

    def __enter__(self) -> "_Searching":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _search(self) -> None:
        connection = self._served.connect()
        query = {"vectors": [[1.0] + [0.0] * (DIM - 1)], "k": 5}
        try:
            while not self._ends.wait(0.005):
                answer = connection.ask("POST", "/neighbours", query)
                if answer.status != 200:
                    raise Wrong(f"a search was answered {answer.status}: {answer.body[:300]!r}")
                self.answers += 1
        except BaseException as error:  # noqa: BLE001 - a thread's door: raised again at the end
            self._failure = error
        finally:
            connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="on a small file system, empty")
    parser.add_argument("--limit-bytes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    with tempfile.TemporaryDirectory() as folder:
        disk = options.directory or Path(folder)
        seen = prove(Path(folder), disk, options.limit_bytes, options.seed)
    sys.stdout.write(", ".join(f"{what}: {n}" for what, n in sorted(seen.items())))
    sys.stdout.write("\n0 lost, searches answered, changes taken again\n")


if __name__ == "__main__":
    main()
