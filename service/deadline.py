"""The block of a request that must end in time.

In: seconds. Out: a deadline for those who work for the request, and a problem when it has passed.
"""

import asyncio
import time
from types import TracebackType

from service.errors import RETRY_AFTER_S, Problem


class Deadline:
    """`async with Deadline(allowed_s) as deadline:`, a moment on time.monotonic.

    A TimeoutError in the block, or the block's lasting longer, becomes a Problem:
    deadline_exceeded.
    """

    def __init__(self, allowed_s: float) -> None:
        self._allowed_s = allowed_s
        self._timeout = asyncio.timeout(allowed_s)

    async def __aenter__(self) -> float:
        await self._timeout.__aenter__()
        return time.monotonic() + self._allowed_s

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._passed() from None
        if isinstance(error, TimeoutError):
            raise self._passed() from None

    def _passed(self) -> Problem:
        allowed = self._allowed_s
        return Problem(
            "deadline_exceeded",
            f"there was no answer within {allowed:g} s; ask for less at a time, or try again "
            "when less is going on",
            retry_after_s=RETRY_AFTER_S,
            limit=allowed,
            setting="request_timeout_s",
        )
