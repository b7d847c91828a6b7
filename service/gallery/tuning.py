"""What was measured on a gallery, as a file of its state directory, read at the service's start.

In: figures of service.tune and the choice made of them. Out: the choice, where the file is whole
and the gallery still the one that was measured; else None, with a line in the log that says why.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from service.gallery.choice import Choice
from service.gallery.rows import GalleryRow

FILE_NAME = "tuning.json"
SCHEMA = "invprop.tuning/1"
STALE_FACTOR = 2  # the figures hold for galleries up to so many times larger or smaller

_log = structlog.get_logger("service.gallery")


def write_tuning(
    state: Path,
    gallery: GalleryRow,
    *,
    items: int,
    choice: Choice,
    figures: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the report, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    report = {
        "schema": SCHEMA,
        "log_id": gallery.log_id,
        "model_id": gallery.model_id,
        "items": items,
        "choice": {"kind": choice.kind, "effort": choice.effort},
        "figures": list(figures),
    }
    content = {"sha256": _digest(report), "report": report}
    path, beside = state / FILE_NAME, state / f".{FILE_NAME}.new"
    with beside.open("wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return path


def read_tuning(state: Path, gallery: GalleryRow, items: int) -> Choice | None:
    """The choice that was measured for this gallery of so many items, None where there is none."""
    try:
        content = orjson.loads((state / FILE_NAME).read_bytes())
        report = content["report"]
        if content["sha256"] != _digest(report) or report["schema"] != SCHEMA:
            raise ValueError("it does not match its sha256, or is of another version")
        strange = _strange(report, gallery, items)
        if strange is not None:
            raise ValueError(strange)
        return Choice(report["choice"]["kind"], report["choice"]["effort"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning(
            "tuning_ignored", file=FILE_NAME, reason=str(error), advice="run service.tune again"
        )
        return None


def _strange(report: Mapping[str, Any], gallery: GalleryRow, items: int) -> str | None:
    if (report["log_id"], report["model_id"]) != (gallery.log_id, gallery.model_id):
        return "it is of another gallery"
    measured = report["items"]
    if not measured / STALE_FACTOR <= items <= measured * STALE_FACTOR:
        return f"it was measured at {measured} items, there are {items}"
    return None


def _digest(report: Any) -> str:
    return hashlib.sha256(orjson.dumps(report, option=orjson.OPT_SORT_KEYS)).hexdigest()
