"""What every route needs: the retry policy, the service's facts, parts that are sent together.

In: requests. Out: steps, see client.retry; nothing happens until a client runs them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from client import answers
from client.answers import fields_of, reading
from client.errors import (
    ConnectionFailed,
    IncompatibleVersion,
    RouteNotFound,
    ServiceError,
    problem,
)
from client.models import Info, Readiness
from client.retry import Answer, Attempt, Request, RetryPolicy, Route, Steps, Together, exchange
from client.routes import INFO, LIVE, READY
from client.version import VERSION, compatible

# Of one part where several are on their way at once: enough pictures to fill the service's
# batches, few enough bytes that what is in flight stays small.
PART_IMAGES = 32
PART_BYTES = 8 * 1024 * 1024


class Session:
    """Asks and remembers for the other rooms: each of them adds the methods of its routes."""

    def __init__(self, policy: RetryPolicy, *, concurrency: int, service: str) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {concurrency}")
        self._policy = policy
        self._concurrency = concurrency
        self._service = service  # its URL, without a password
        self._info: Info | None = None

    def live(self) -> Steps[bool]:
        try:
            answer = yield from self._probe(LIVE)
        except ConnectionFailed:
            return False
        return answer.status < 300

    def ready(self) -> Steps[Readiness]:
        try:
            answer = yield from self._probe(READY)
        except ConnectionFailed as error:
            return Readiness("unreachable", {"connection": str(error)})
        if answer.status >= 400 and answer.status != 503:
            raise problem(answer.status, answer.headers, answer.body, now=self._policy.clock.now())
        with reading(READY):
            return answers.readiness(answer)

    def info(self) -> Steps[Info]:
        answer = yield from self._exchange(Request(INFO, INFO.path))
        with reading(INFO):
            self._info = answers.info(fields_of(answer))
        return self._info

    def _limits(self) -> Steps["LimitOf"]:
        """The service's limits, asked for once; a service of another API is refused here."""
        info = self._info or (yield from self.info())
        served = info.versions.get("invprop", "unknown")
        if not compatible(served):
            self._info = None  # it may be replaced while this client lives
            raise IncompatibleVersion(
                f"the service is invprop {served}, this client {VERSION}: they do not understand "
                f"each other; install the client of the service: pip install 'invprop=={served}'"
            )
        return LimitOf(info)

    def _most(self, limit: int) -> int:
        """Pictures of one part."""
        return limit if self._concurrency == 1 else min(limit, PART_IMAGES)

    def _most_bytes(self, limit: int) -> int:
        """Bytes of one part; a single larger picture goes alone."""
        return limit if self._concurrency == 1 else min(limit, PART_BYTES)

    def _together(self, parts: Iterator[Callable[[], Steps[None]]]) -> Steps[None]:
        """Run the parts, several at once where the client may."""
        yield Together(parts, self._concurrency)

    def _probe(self, route: Route) -> Steps[Answer]:
        """Ask once: "not ready" is an answer here, not a reason to ask again."""
        answer = yield Attempt(Request(route, route.path), self._policy.timeout_s)
        assert answer is not None  # an Attempt is answered or thrown at
        return answer

    def _exchange(self, request: Request) -> Steps[Answer]:
        try:
            return (yield from exchange(request, self._policy))
        except RouteNotFound as error:
            error.add_note(
                f"is the URL right? A service older than this client ({VERSION}) may be without "
                f"{request.route.method} {request.route.path}; info().versions says which it is"
            )
            raise


class LimitOf(NamedTuple):
    """The service's limits by name."""

    info: Info

    def __call__(self, name: str) -> int:
        with reading(INFO):
            return int(self.info.limits[name].limit)


@contextmanager
def counting_from(offset: int) -> Iterator[None]:
    """Let the problems of one part count the pictures as the caller counts them."""
    try:
        yield
    except ServiceError as error:
        raise error.shifted(offset) from None


def in_order(parts: dict[int, Any]) -> list[Any]:
    """What parts left under their number, first to last."""
    return [parts[number] for number in sorted(parts)]
