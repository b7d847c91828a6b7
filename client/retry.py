"""When a request is sent again. In: a request and what became of its last attempt. Out: the next
effect, to try or to wait. No socket and no clock of its own: both clients run these same steps.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from client.errors import ConnectionFailed, InvpropError, ServiceError, problem

IDEMPOTENCY_KEY = "Idempotency-Key"

# 429: over a quota; 502, 503, 504: a proxy or the service could not, this time.
RETRIED_STATUSES = frozenset({429, 502, 503, 504})

# Full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015): uniform in 0..FIRST * 2^n.
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 8.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Route:
    """A path of the service, as in its OpenAPI file."""

    method: str
    path: str  # with {parameters}
    repeatable: bool = True  # doing it twice is the same as doing it once


@dataclass(frozen=True)
class Request:
    """All of one HTTP request but where the service is."""

    route: Route
    path: str  # parameters filled in and percent-encoded
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def repeatable(self) -> bool:
        """Whether sending it again can do no harm."""
        return self.route.repeatable or IDEMPOTENCY_KEY in self.headers


class Answer(NamedTuple):
    """An HTTP answer that was read to its end."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Attempt(NamedTuple):
    """Effect: send the request; send the Answer back, or throw ConnectionFailed."""

    request: Request
    timeout_s: float


class Wait(NamedTuple):
    """Effect: do nothing for a while; send None back."""

    seconds: float


class Together(NamedTuple):
    """Effect: run the steps that the parts make, up to `at_once` at a time; send None back when
    all have ended, or throw what the first of them (in their order) failed with.

    Parts are drawn one by one, in order, when there is room. Each keeps its own result. A part that
    fails because the service is busy is made and run again with fewer beside it.
    """

    parts: "Iterator[Callable[[], Steps[None]]]"
    at_once: int


Steps = Generator[Attempt | Wait | Together, Answer | None, Result]


@dataclass(frozen=True)
class Clock:
    """Time and dice: an argument, so that tests can hold them."""

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    uniform: Callable[[float, float], float] = random.uniform
    sleep: Callable[[float], None] = time.sleep
    sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True)
class RetryPolicy:
    """How often and for how long a request is tried."""

    timeout_s: float = 30.0  # of each attempt
    max_retries: int = 3
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {self.timeout_s}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {self.max_retries}")

    @property
    def total_s(self) -> float:
        """The deadline of one request with all its attempts and waits."""
        return self.timeout_s * (self.max_retries + 1)

    def delay_s(self, attempt: int, failure: InvpropError) -> float:
        """How long to wait after attempt 1, 2, ...: never less than the service asked for."""
        longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (attempt - 1))
        asked = getattr(failure, "retry_after_s", None) or 0.0
        # Jitter on top of Retry-After too: all the clients that were sent away got the same one.
        return float(asked + self.clock.uniform(0, longest))


def exchange(request: Request, policy: RetryPolicy) -> Steps[Answer]:
    """Send a request until it is answered, cannot be, or the total deadline is near.

    Returns:
        the answer, of a status below 400.

    Raises:
        ConnectionFailed, ServiceError: of the last attempt.
    """
    deadline = policy.clock.monotonic() + policy.total_s
    attempt = 1
    while True:
        remaining_s = deadline - policy.clock.monotonic()
        failure: ConnectionFailed | ServiceError
        try:
            answer = yield Attempt(request, min(policy.timeout_s, remaining_s))
        except ConnectionFailed as error:
            failure = error
        else:
            assert answer is not None  # an Attempt is answered or thrown at
            if answer.status < 400:
                return answer
            failure = problem(answer.status, answer.headers, answer.body, now=policy.clock.now())
            if answer.status not in RETRIED_STATUSES:
                raise failure
        if not request.repeatable or attempt > policy.max_retries:
            raise failure
        delay_s = policy.delay_s(attempt, failure)
        if policy.clock.monotonic() + delay_s >= deadline:
            raise failure
        yield Wait(delay_s)
        attempt += 1
