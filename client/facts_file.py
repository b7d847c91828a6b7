"""Metadata of pictures from a file: CSV with a column `id`, or JSON lines {"id", "metadata"}.

In: a path. Out: id -> metadata. JSON lines are what `invprop export --no-vectors` writes.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.models import Json


def read_facts(path: Path) -> dict[str, Json]:
    """The metadata of each id. Of CSV every value is text, and an empty one is left out.

    Raises:
        ValueError: names the line that is wrong.
        OSError: the file cannot be read.
    """
    rows = _of_csv(path) if path.suffix.lower() == ".csv" else _of_lines(path)
    found: dict[str, Json] = {}
    for number, item_id, facts in rows:
        if item_id in found:
            raise ValueError(f"{path}, line {number}: {item_id!r} is there twice")
        found[item_id] = facts
    return found


def _of_csv(path: Path) -> Iterator[tuple[int, str, Json]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # a spreadsheet writes a mark first
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or ()
            if "id" not in names or len(set(names)) < len(names):
                raise ValueError(
                    f"{path}: wanted a first line of names, each once, with `id` among them; "
                    f"got {', '.join(names) or 'nothing'}"
                )
            for row in reader:
                item_id = row.pop("id")
                if not item_id or None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: wanted an id and {len(names)} values"
                    )
                yield (
                    reader.line_num,
                    item_id,
                    {name: value for name, value in row.items() if value},
                )
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None


def _of_lines(path: Path) -> Iterator[tuple[int, str, Json]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry: Any = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            facts = entry.get("metadata", {}) if isinstance(entry, dict) else None
            if not isinstance(facts, dict) or not isinstance(entry.get("id"), str):
                raise ValueError(
                    f'{path}, line {number}: wanted {{"id": "...", "metadata": {{...}}}}; '
                    f"got {line[:80].decode(errors='replace').strip()}"
                )
            yield number, entry["id"], facts
