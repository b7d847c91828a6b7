"""The labelled data sets that an operator registered: the only ones an evaluation may name.

In: the operator's YAML file, see service.dataset_file. Out: a `Registry` of plain values for
job.json. `python -m service.datasets check` opens every data set and reads its images.
"""

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from service.dataset_description import Description, describe
from service.dataset_file import RegisteredDataset, RegistryError, read_registry
from service.settings import Settings, from_environment

RECHECK_S = 1.0  # how often the file is looked at, at most
SOUND, PROBLEMS, UNREADABLE, INTERRUPTED = 0, 1, 2, 130

__all__ = ["RegisteredDataset", "Registry", "RegistryError", "UnknownDataset", "open_registry"]

_log = structlog.get_logger("service.datasets")


class UnknownDataset(LookupError):
    """No data set of this name is registered; says which are."""


class Registry:
    """The registered data sets; the file is read again when it changes.

    A change that cannot be read leaves what was registered before, is logged, and stands in
    `problem` (GET /datasets shows it) until the file is right again: evaluations of sets that
    nobody touched go on.

    Args:
        file: None registers nothing.
        clock: monotonic seconds.

    Raises:
        RegistryError: the file cannot be read now.
    """

    def __init__(self, file: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._checked_at = clock()
        self._stamp: Hashable = None
        self._datasets: Mapping[str, RegisteredDataset] = {}
        self._problem: str | None = None
        if file is not None:
            self._stamp = _stamp(file)
            self._datasets = read_registry(file)

    def names(self) -> tuple[str, ...]:
        """Of all data sets, sorted."""
        self._refresh()
        return tuple(sorted(self._datasets))

    def get(self, name: str) -> RegisteredDataset:
        """The data set of that name.

        Raises:
            UnknownDataset: none is registered under it.
        """
        self._refresh()
        found = self._datasets.get(name)
        if found is None:
            known = ", ".join(sorted(self._datasets)[:20]) or "none: the service has no datasets"
            raise UnknownDataset(f"no data set {name[:64]!r} is registered; there are {known}")
        return found

    def all(self) -> tuple[RegisteredDataset, ...]:
        """All data sets, sorted by name."""
        return tuple(self._datasets[name] for name in self.names())

    @property
    def problem(self) -> str | None:
        """Why the file's last change was not taken over; None where it was. Names no path."""
        self._refresh()
        return self._problem

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked_at < RECHECK_S:
            return
        self._checked_at = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._datasets = read_registry(self._file)
        except RegistryError as error:
            _log.error("datasets_unreadable", reason=str(error))
            self._problem = (
                "the file of data sets was changed to something that cannot be read, what was "
                "registered before is kept; the service's log says why"
            )
            return
        self._problem = None
        _log.info("datasets_loaded", datasets=len(self._datasets))


def open_registry(file: Path | None) -> Registry:
    """What a file registers; None registers nothing.

    Raises:
        RegistryError: the file cannot be read, or an entry is wrong.
    """
    return Registry(file)


def _stamp(file: Path) -> Hashable:
    try:
        status = file.stat()
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_size, status.st_ino


def main(arguments: Sequence[str] | None = None) -> int:
    """Open every registered data set and read its images; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.datasets",
        description="Open every registered data set and decode every image. Exit code 0: all can "
        "be evaluated on, 1: one cannot, 2: the file is wrong.",
    )
    parser.add_argument("command", choices=("check",))
    parser.add_argument("--datasets", type=Path, metavar="FILE", help="default: INVPROP_DATASETS")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--no-images", action="store_true", help="do not decode images")
    given = parser.parse_args(arguments)
    file = given.datasets or from_environment("datasets")
    if file is None:
        return _fail("give --datasets FILE or set INVPROP_DATASETS")
    try:
        datasets = open_registry(Path(file)).all()
    except RegistryError as error:
        return _fail(str(error))
    try:
        return _check(datasets, images=not given.no_images, as_json=given.json)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _check(datasets: Sequence[RegisteredDataset], *, images: bool, as_json: bool) -> int:
    found = []
    for dataset in datasets:
        found.append(_checked(dataset, images=images))
        if not as_json:
            sys.stdout.write(_line(found[-1]))
            sys.stdout.flush()
    sound = all(each["problem"] is None for each in found)
    if as_json:
        answer = orjson.dumps({"sound": sound, "datasets": found}, option=orjson.OPT_APPEND_NEWLINE)
        sys.stdout.write(answer.decode())
    return SOUND if sound else PROBLEMS


def _checked(dataset: RegisteredDataset, *, images: bool) -> dict[str, Any]:
    asked = from_environment("dataset_memory_bytes")
    default: int = Settings.model_fields["dataset_memory_bytes"].default
    found = describe(
        dataset.spec(),
        timeout_s=None,  # a person waits, and has Ctrl-C
        memory_bytes=default if asked is None else int(asked),
        images=images,
    )
    facts: dict[str, Any] = {"name": dataset.name, "kind": dataset.kind, "problem": None}
    if not isinstance(found, Description):
        return {**facts, "problem": found.reason}
    over = [
        f"{broken['count']:,} of the {found.counts[split]:,} images of {split} are broken, more "
        f"than max_skipped = {found.max_skipped:g} allows"
        for split, broken in (found.broken or {}).items()
        if broken["count"] > found.max_skipped * found.counts[split]
    ]
    return {**facts, **found.as_dict(), "problem": "; ".join(over) or None}


def _line(facts: Mapping[str, Any]) -> str:
    lines = []
    if "counts" in facts:
        counts = ", ".join(f"{count:,} {split}" for split, count in facts["counts"].items())
        seed = " (divided by seed)" if facts["divided_by_seed"] else ""
        lines.append(
            f"{facts['name']}: {facts['kind']}, {facts['classes']:,} classes, {counts}{seed}"
        )
        for split, broken in (facts["broken"] or {}).items():
            lines.append(f"  {broken['count']:,} broken images in {split}")
            lines += [f"    {image['id']}: {image['reason']}" for image in broken["first"]]
    if facts["problem"] is not None:
        lines.append(f"PROBLEM: {facts['name']}: {facts['problem']}")
    return "\n".join(lines) + "\n"


def _fail(message: str, code: int = UNREADABLE) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
