"""Which role each route wants: the table, and how a request finds its line. Default deny.

In: method and path. Out: the role, or the methods that are served there. What has no line is not
served, whatever the router knows; tests/contracts/test_policy.py compares the two.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starlette.routing import BaseRoute, compile_path


class Role(enum.IntEnum):
    """What a caller may do; each role includes those before it."""

    OPEN = 0  # no key wanted
    READ = 1
    WRITE = 2


# Open are what watches the service, and what is the same in every installation: a browser sends no
# key when it opens an address.
POLICY: Mapping[tuple[str, str], Role] = {
    ("GET", "/livez"): Role.OPEN,
    ("GET", "/readyz"): Role.OPEN,
    ("GET", "/health"): Role.OPEN,
    ("GET", "/metrics"): Role.OPEN,
    ("GET", "/"): Role.OPEN,
    ("GET", "/static/{version}/{name:path}"): Role.OPEN,
    ("GET", "/docs"): Role.OPEN,
    ("GET", "/openapi.json"): Role.OPEN,
    ("GET", "/v2/health/live"): Role.OPEN,
    ("GET", "/v2/health/ready"): Role.OPEN,
    ("GET", "/v2"): Role.READ,
    ("GET", "/v2/models/{name}"): Role.READ,
    ("GET", "/v2/models/{name}/ready"): Role.READ,
    ("GET", "/v2/models/{name}/versions/{version}"): Role.READ,
    ("GET", "/v2/models/{name}/versions/{version}/ready"): Role.READ,
    ("POST", "/v2/models/{name}/infer"): Role.READ,
    ("POST", "/v2/models/{name}/versions/{version}/infer"): Role.READ,
    ("GET", "/v1/models"): Role.READ,
    ("GET", "/v1/models/{name}"): Role.READ,
    ("POST", "/v1/embeddings"): Role.READ,
    ("GET", "/info"): Role.READ,
    ("POST", "/embed"): Role.READ,
    ("POST", "/neighbours"): Role.READ,
    ("POST", "/groups"): Role.READ,
    ("POST", "/groupings"): Role.READ,
    ("GET", "/groupings"): Role.READ,
    ("GET", "/groupings/{grouping}"): Role.READ,
    ("GET", "/groupings/{grouping}/groups"): Role.READ,
    ("GET", "/groupings/{grouping}/groups/{group}"): Role.READ,
    ("GET", "/map"): Role.READ,
    ("GET", "/datasets"): Role.READ,
    ("POST", "/evaluations"): Role.WRITE,
    ("GET", "/evaluations"): Role.READ,
    ("GET", "/evaluations/{evaluation}"): Role.READ,
    ("DELETE", "/evaluations/{evaluation}"): Role.WRITE,
    ("GET", "/evaluations/{evaluation}/report"): Role.READ,
    ("GET", "/evaluations/{evaluation}/events"): Role.READ,
    ("GET", "/items"): Role.READ,
    ("POST", "/items"): Role.WRITE,
    ("POST", "/items/delete"): Role.WRITE,
    ("GET", "/items/{item_id:path}"): Role.READ,
    ("DELETE", "/items/{item_id:path}"): Role.WRITE,
    ("GET", "/images/{item_id:path}"): Role.READ,
}


@dataclass(frozen=True)
class Place:
    """What the table says of one path."""

    roles: Mapping[str, Role]  # method -> role; HEAD is served where GET is

    @property
    def allow(self) -> str:
        """The Allow header."""
        return ", ".join(sorted(self.roles))


class Policy:
    """The table, ready to be asked."""

    def __init__(self, table: Mapping[tuple[str, str], Role] = POLICY) -> None:
        self._lines = [
            (compile_path(path)[0], method, role) for (method, path), role in table.items()
        ]
        self._table = set(table)
        fixed = {path for _, path in table if "{" not in path}
        self._fixed = {path: self._place(path) for path in fixed}

    def place(self, path: str) -> Place:
        """What is served at a path; no roles where nothing is."""
        found = self._fixed.get(path)
        return self._place(path) if found is None else found

    def covers(self, route: BaseRoute) -> bool:
        """Whether every method of a route has its line; what has none is not served."""
        methods = getattr(route, "methods", None) or {"GET"}  # a mount serves files
        path = getattr(route, "path", "")
        return {(method, path) for method in methods if method != "HEAD"} <= self._table

    def _place(self, path: str) -> Place:
        return Place(_strictest((m, role) for regex, m, role in self._lines if regex.match(path)))


def _strictest(lines: Iterable[tuple[str, Role]]) -> Mapping[str, Role]:
    """Where several lines fit, the strictest counts: an order of routes cannot weaken it."""
    roles: dict[str, Role] = {}
    for method, role in lines:
        roles[method] = max(role, roles.get(method, Role.OPEN))
        if method == "GET":
            roles["HEAD"] = roles[method]
    return roles
