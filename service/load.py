"""Load vectors into the gallery of a stopped service:
python -m service.load DIR --bundle BUNDLE --state STATE [--database URL]

DIR: what python -m service.embed wrote. Items come to the others, or replace those of the same id;
what is there with the same vector is left alone, so that a load may be run again at any time.
INVPROP_DATABASE is read from the environment as by the service. Exit code 0 done, 1 it failed and
can be run again, 2 for what the caller can put right, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.bulk.loading import Loaded, Loader, check_loadable
from service.bulk.parts import Manifest, OutputError, read_manifest, read_parts
from service.bulk.progress import Progress
from service.gallery.changes import imported
from service.gallery.database import Database
from service.gallery.oplog import open_active
from service.gallery.protocol import GalleryError, StorageError
from service.settings import from_environment
from trainer.representation.bundle import Bundle, BundleError, open_bundle

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Load; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.load",
        description="Load what service.embed wrote into the gallery of a stopped service. What is "
        "there with the same vector is left alone: run it again after a stop.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="output of service.embed")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle of the gallery")
    parser.add_argument("--state", type=Path, help="state directory of the stopped service")
    parser.add_argument("--database", help="its postgresql:// URL, where it has one")
    given = parser.parse_args(arguments)
    url = given.database or from_environment("database")
    if from_environment("gallery") is not None:
        return _fail(
            "INVPROP_GALLERY is set: a gallery in Milvus has no log to load into; add its items "
            "through the service (python -m client add)",
            WRONG_USE,
        )
    if given.state is None and url is None:
        return _fail("give --state DIR, --database URL or both, as the service has them", WRONG_USE)
    try:
        manifest = read_manifest(given.directory)
        bundle = open_bundle(given.bundle)
        database = Database(given.state, url)
        try:
            loaded, total = _load(given.directory, manifest, bundle, database)
        finally:
            database.close()
    except (BundleError, OutputError, GalleryError) as error:
        return _fail(str(error), WRONG_USE)
    except (StorageError, OSError) as error:
        return _fail(f"{error}: put this right and run it again", FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; run it again to go on", INTERRUPTED)
    sys.stdout.write(
        f"{database.name}: {loaded.added:,} items added, {loaded.updated:,} updated, "
        f"{loaded.unchanged:,} were there; {total:,} operations in the log\n"
    )
    return DONE


def _load(
    directory: Path, manifest: Manifest, bundle: Bundle, database: Database
) -> tuple[Loaded, int]:
    log = open_active(
        database,
        model_id=bundle.model_id,
        dim=bundle.embedding_dim,
        first=lambda: imported(bundle.gallery()),
    )
    check_loadable(manifest, log, str(directory))
    progress = Progress("vectors", sum(part["rows"] for part in manifest.parts.values()))
    loader = Loader(log, progress.advance)
    loaded = Loaded()
    for part in read_parts(directory, manifest):
        loaded = loaded.plus(loader.load(part))
    progress.end()
    return loaded, log.last_seq


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
