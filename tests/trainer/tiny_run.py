"""The command line of a run of a second, and what it wrote down that equal runs agree in."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.readings import PARTS
from trainer.representation.bundle import open_bundle

_TIMINGS = ("images_per_s", *(f"{part}_share" for part in PARTS))


def tiny_run(overrides: Sequence[str], data: Path | str, output: Path, *more: str) -> list[str]:
    return ["digits", "--data", str(data), "--output", str(output), *overrides, *more]


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [without_timings(line) for line in lines]


def without_timings(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without what no two runs agree in."""
    return {name: value for name, value in line.items() if name not in _TIMINGS}


def published_by(output: Path) -> dict[str, Any]:
    """The hashes of what the bundle publishes; its card names the commit, which may move on, and
    timings never repeat."""
    files = open_bundle(output / "bundle").manifest["files"]
    return {name: files[name] for name in files if name not in ("README.md", "speed.json")}
