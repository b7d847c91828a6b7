"""Files behind a URL, fetched once into a folder of this machine.

In: an http or https URL. Out: the path of a whole local copy: it has its name only when every byte
the server announced is on the disk. A copy that is there is never asked for again.
"""

import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from trainer.datasets.source import DataError

CACHE_VARIABLE = "INVPROP_CACHE"
TIMEOUT_S = 60.0  # without a byte; a slow transfer that goes on is not cut off
BLOCK_BYTES = 1 << 20


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where fetched files are kept: INVPROP_CACHE, else ~/.cache/invprop."""
    named = environment.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "invprop"


def fetch(url: str, folder: Path) -> Path:
    """Copy a file into `folder`, unless it is there; several processes may do so at once.

    Raises:
        DataError: it cannot be fetched whole, or not be kept; what was there stays.
    """
    target = folder / unquote(urlsplit(url).path.rpartition("/")[2])
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as part:
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                    # A body shorter than the Content-Length ends like a whole one.
                    announced = answer.headers.get("Content-Length")
                    shutil.copyfileobj(answer, part, BLOCK_BYTES)
                if announced is not None and part.tell() != int(announced):
                    raise DataError(
                        f"{shown(url)} ended after {part.tell():,} of {int(announced):,} bytes: "
                        "run again, what is fetched already is kept"
                    )
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).replace(target)
            finally:
                Path(part.name).unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer, too
        raise DataError(
            f"{shown(url)} was answered with {error.code} {error.reason}: check the URL, its range "
            "and who may read it"
        ) from error
    # URLError, a time-out and a full disk are OSErrors.
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{shown(url)} could not be fetched into {folder} ({error}): check the address, the "
            f"network and the room on the disk ({CACHE_VARIABLE} names another folder), and run "
            "again; what is fetched already is kept"
        ) from error
    return target


def shown(url: str) -> str:
    """A URL as messages show it: without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
