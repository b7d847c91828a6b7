"""Read your writes over several services on one log: a request waits for the version that it names.

In: the header X-Min-Gallery-Version (a `gallery_version` that some service has answered) and every
new snapshot. Out: the gallery holds that version, or the problem gallery_behind. Without the header
nothing is waited for.
"""

import asyncio
import contextlib
import re
from typing import Any

from fastapi import Request

from service.errors import RETRY_AFTER_S, Problem
from service.gallery.protocol import Gallery, Snapshot

HEADER = "X-Min-Gallery-Version"
_RAW_HEADER = HEADER.lower().encode()
MAX_DIGITS = 18  # fits 64 bits
_VERSION = re.compile(rf"[0-9]{{1,{MAX_DIGITS}}}")

# In the OpenAPI document, of every route that reads the gallery.
PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "required": False,
            "description": "A `gallery_version` that was answered before, by this or another "
            "service of the same gallery: the answer is of that version or a later one. Waits up "
            "to `max_catch_up_s`, then 503 `gallery_behind`.",
            "schema": {"type": "integer", "minimum": 0, "maximum": 10**MAX_DIGITS - 1},
        }
    ]
}


def min_version_of(request: Request) -> int | None:
    """The version that a request names, None where it names none.

    Raises:
        Problem: invalid_request: it is no version.
    """
    # Most requests have none, and this is cheaper than a look at `request.headers`.
    given = [value for name, value in request.scope["headers"] if name == _RAW_HEADER]
    if not given:
        return None
    text = given[0].decode("latin-1").strip()
    if len(given) > 1 or not _VERSION.fullmatch(text):
        got = "several" if len(given) > 1 else repr(text[:40])
        raise Problem(
            "invalid_request",
            f"header {HEADER}: wanted one number of 1 to {MAX_DIGITS} digits, a `gallery_version`, "
            f"got {got}",
        )
    return int(text)


class CatchUp:
    """The requests that wait for a version of the gallery.

    Args:
        max_wait_s: how long one waits; the request's own deadline may end it sooner.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._waiting: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def note(self, _: Snapshot) -> None:
        """Listen to a gallery with this: runs in the thread of its writer."""
        if self._waiting and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    async def wait(self, gallery: Gallery, version: int) -> None:
        """Return once the gallery's snapshot is of this version or a later one.

        Raises:
            Problem: gallery_behind: it did not come in time.
        """
        if gallery.snapshot().version >= version:
            return
        self._loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        self._waiting.add(changed)  # before the next look: nothing is missed between the two
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._max_wait_s):
                    gallery.refresh()
                    while gallery.snapshot().version < version:
                        await changed.wait()
                        changed.clear()
        finally:
            self._waiting.discard(changed)
        held = gallery.snapshot().version
        if held < version:
            raise Problem(
                "gallery_behind",
                f"this service holds gallery version {held:,} of model {gallery.model_id[:12]} and "
                f"waited {self._max_wait_s:g} s for {version:,}, which {HEADER} asks for: send "
                "the request again, or without the header where an older answer will do. Versions "
                "of another model's gallery mean nothing here",
                retry_after_s=RETRY_AFTER_S,
                held=held,
                limit=self._max_wait_s,
                setting="max_catch_up_s",
            )

    def _wake(self) -> None:
        for changed in self._waiting:
            changed.set()
