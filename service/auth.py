"""Who may do what, decided before a byte of the body is read: an ASGI layer.

In: a request's method, path and headers. Out: 404, 405, 401 or 403 as problems, or the request
passed on with its caller in the scope. Routes without a line in service.policy are not served.
"""

from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import RETRY_AFTER_S, Problem
from service.keys import MAX_KEY_LENGTH, ApiKeys, Key, KeysError
from service.policy import Policy, Role

CALLER = "invprop.caller"  # in the scope: Caller
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="invprop"'}


class Caller(NamedTuple):
    """Who sends a request."""

    key: str | None  # the key's name; None without keys and on open routes
    address: str
    is_open: bool  # the route asks nobody who they are

    @property
    def identity(self) -> str:
        """What the caller's requests are counted under."""
        return f"address {self.address}" if self.key is None else f"key {self.key}"


class Authorise:
    """ASGI layer: the role of the caller against the role that the policy wants."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, policy: Policy) -> None:
        self._app = app
        self._keys = keys
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key, is_open = self._admit(scope)
        except _Refused as refused:
            await refused.problem.response(refused.headers)(scope, receive, send)
            return
        client = scope.get("client")
        scope[CALLER] = Caller(
            None if key is None else key.name, client[0] if client else "", is_open
        )
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> tuple[Key | None, bool]:
        method, path = scope["method"], scope["path"]
        place = self._policy.place(path)
        wanted = place.roles.get(method)
        if wanted is Role.OPEN:
            return None, True
        key = self._identify(scope) if self._keys.configured else None
        if wanted is None and place.roles:
            raise _Refused(
                Problem(
                    "method_not_allowed",
                    f"{method[:16]} is not served here; allowed: {place.allow}.",
                ),
                {"Allow": place.allow},
            )
        if wanted is None:
            raise _Refused(
                Problem(
                    "not_found", f"Nothing is served at {path[:200]!r}; /docs lists the routes."
                )
            )
        if key is not None and key.role < wanted:
            raise _Refused(
                Problem(
                    "forbidden",
                    f"the key has the role {key.role.name.lower()}, {method} {path[:200]!r} wants "
                    f"{wanted.name.lower()}; ask the operator for a key with that role",
                    role=key.role.name.lower(),
                    wanted=wanted.name.lower(),
                ),
            )
        return key, False

    def _identify(self, scope: Scope) -> Key:
        presented = _presented(Headers(scope=scope))
        if presented is None:
            raise _unauthenticated(
                "this service wants an API key: send `Authorization: Bearer KEY` or "
                "`X-API-Key: KEY`"
            )
        if len(presented) > MAX_KEY_LENGTH:
            raise _unauthenticated("the API key is not known")
        try:
            key = self._keys.identify(presented)
        except KeysError:
            raise _Refused(
                Problem(
                    "not_ready",
                    "the service cannot read its API keys just now; its operator finds the reason "
                    "in the log and at /readyz",
                    retry_after_s=RETRY_AFTER_S,
                )
            ) from None
        if key is None:
            raise _unauthenticated("the API key is not known; it may have been revoked")
        return key


class _Refused(Exception):
    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.headers = headers


def _unauthenticated(detail: str) -> _Refused:
    return _Refused(Problem("unauthenticated", detail), CHALLENGE)


def _presented(headers: Headers) -> str | None:
    """The one key of a request; None when there is none.

    Raises:
        _Refused: there are several, or Authorization is of another kind.
    """
    found = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, key = value.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthenticated("Authorization: wanted `Bearer KEY`")
        found.append(key.strip())
    if len(found) > 1:  # whoever sits in between may have checked another one
        raise _unauthenticated("the request carries more than one API key; send one")
    return found[0] if found else None
