"""The command line of a run of a second, and what it wrote down that equal runs agree in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.readings import PARTS
from trainer.representation.bundle import open_bundle

TIMINGS = ("images_per_s", *(f"{part}_share" for part in PARTS))


def tiny_run(overrides: Sequence[str], data: Path | str, output: Path, *more: str) -> list[str]:
    return ["digits", "--data", str(data), "--output", str(output), *overrides, *more]


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: v for name, v in line.items() if name not in TIMINGS} for line in lines]


def published_by(output: Path) -> dict[str, Any]:
    """The hashes of what the bundle publishes; its card names the commit, which may move on, and
    timings never repeat."""
    files = open_bundle(output / "bundle").manifest["files"]
    return {name: files[name] for name in files if name not in ("README.md", "speed.json")}
