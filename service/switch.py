"""Bring a stopped service's gallery to a new bundle:
python -m service.switch --state DIR --bundle NEW [--database URL] [--drop-missing]

Items are embedded again from their stored originals; trained ones take the new bundle's vectors. An
item with neither stands in the way, unless --drop-missing leaves all such items out. On success the
new gallery is active, and the service is to be started with the new bundle; otherwise nothing has
changed. Run again, it goes on where it was stopped. Exit code 0 or 1. INVPROP_DATABASE and the
settings of the encoder and the decoders are read from the environment as by the service.
"""

import argparse
import asyncio
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.admission import Rates
from service.decoder_child import DecoderUnavailable
from service.embedder import EmbedderError
from service.errors import Problem
from service.gallery.database import Database
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.successor import Progress, Successor, SwitchRefused, drop_building
from service.images import ImagePath
from service.metrics import Metrics
from service.observability import configure_logging
from service.serving import EmbedOriginals, load_embedder
from service.settings import Settings
from trainer.representation.bundle import Bundle, BundleError, open_bundle

_ERRORS = (
    BundleError,
    DecoderUnavailable,
    EmbedderError,
    GalleryError,
    StorageError,
    SwitchRefused,
    Problem,
)
_SAY_EVERY_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Switch; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.switch", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle to come")
    parser.add_argument("--state", type=Path, help="state directory of the stopped service")
    parser.add_argument("--database", help="its database, where it has one")
    parser.add_argument(
        "--drop-missing",
        action="store_true",
        help="leave out the items that have no stored original and are not in the new bundle",
    )
    given = parser.parse_args(arguments)
    values: dict[str, Any] = {"bundle": given.bundle, "state": given.state or Path()}
    if given.database is not None:
        values["database"] = given.database
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        return _fail("; ".join(f"{e['loc']}: {e['msg']}" for e in error.errors()))
    if settings.gallery is not None:
        return _fail(
            "INVPROP_GALLERY is set: a collection in Milvus belongs to its model; give another "
            "model another collection, and add the pictures there"
        )
    configure_logging(settings.log_level)
    if given.state is None and settings.database is None:
        return _fail("give --state DIR, --database URL or both, as the service has them")
    try:
        database = Database(given.state, settings.database_url())
    except GalleryError as error:
        return _fail(str(error))
    try:
        items, missing, model_id = asyncio.run(
            _switch(database, settings, drop_missing=given.drop_missing)
        )
    except _ERRORS as error:
        return _fail(str(error))
    finally:
        database.close()
    left_out = f" ({missing:,} that it has no vector of were left out)" if missing else ""
    sys.stdout.write(
        f"switched: {database.name} now holds {items:,} items of model {model_id[:12]}{left_out}; "
        f"start the service with --bundle {given.bundle}\n"
    )
    return 0


async def _switch(
    database: Database, settings: Settings, *, drop_missing: bool
) -> tuple[int, int, str]:
    """How many items there are now, how many were left out, and the model."""
    bundle = await asyncio.to_thread(open_bundle, settings.bundle)
    embedder = await asyncio.to_thread(load_embedder, bundle, settings)
    images = ImagePath(embedder, settings=settings, metrics=Metrics(), rates=Rates(settings))
    try:
        await images.start()
        embed = EmbedOriginals(images, asyncio.get_running_loop(), settings)
        successor = await asyncio.to_thread(_succeed, database, bundle, embed, drop_missing)
    finally:
        await images.close()
    return successor.items, successor.missing, bundle.model_id


def _succeed(
    database: Database, bundle: Bundle, embed: EmbedOriginals, drop_missing: bool
) -> Successor:
    with database.switching():
        successor = Successor(database, bundle, embed, drop_missing=drop_missing)
        done = threading.Event()
        saying = threading.Thread(target=_say, args=(successor.progress, done), daemon=True)
        saying.start()
        try:
            successor.finish()
        except SwitchRefused:
            drop_building(database)
            raise
        finally:
            done.set()
            saying.join()
        return successor


def _say(progress: Progress, done: threading.Event) -> None:
    while not done.wait(_SAY_EVERY_S):
        sys.stdout.write(f"{progress.done:,} of {progress.total:,} operations\n")
        sys.stdout.flush()


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
