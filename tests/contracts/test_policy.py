"""Every route of the application x every kind of credential: nothing is let in that should not be.

The expectations come from the contract's sentence (health and metrics open, what changes the
gallery wants `write`, everything else `read`), written here once more, not from the table that is
tested.
"""

import hashlib
import itertools
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.keys import PREFIX, RECHECK_S
from service.policy import POLICY, Role
from service.settings import Settings
from tests.service.conftest import build_bundle

KEYS = {name: PREFIX + name * 8 for name in ("reader", "writer", "revoked")}
OPEN = {
    "/livez", "/readyz", "/health", "/metrics", "/docs", "/openapi.json", "/",
    "/static/{version}/{name:path}",
}  # fmt: skip
WRITES = {
    ("POST", "/evaluations"),
    ("DELETE", "/evaluations/{evaluation}"),
    ("POST", "/items"),
    ("POST", "/items/delete"),
    ("DELETE", "/items/{item_id:path}"),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def line(name: str, role: str) -> str:
    return f"{name} {role} sha256:{hashlib.sha256(KEYS[name].encode()).hexdigest()}"


def credentials(kind: str) -> list[tuple[str, str]]:
    """The headers of one kind of caller."""
    bearer = {name: ("Authorization", f"Bearer {key}") for name, key in KEYS.items()}
    return {
        "none": [],
        "bad": [("Authorization", f"Bearer {PREFIX}{'x' * 43}")],
        "bad x-api-key": [("X-API-Key", "x")],
        "empty": [("Authorization", "Bearer ")],
        "empty x-api-key": [("X-API-Key", "")],
        "basic": [("Authorization", "Basic cmVhZGVyOnJlYWRlcg==")],
        "bare": [("Authorization", KEYS["writer"])],
        "the hash": [("X-API-Key", line("writer", "write").partition("sha256:")[2])],
        "in upper case": [("X-API-Key", KEYS["writer"].upper())],
        "with more": [("X-API-Key", KEYS["writer"] + "x")],
        "long": [("X-API-Key", KEYS["writer"] * 1000)],
        "not ascii": [("X-API-Key", "ü")],
        "revoked": [bearer["revoked"]],
        "two keys": [bearer["reader"], ("X-API-Key", KEYS["writer"])],
        "two headers": [bearer["revoked"], bearer["writer"]],
        "twice the same": [bearer["writer"], bearer["writer"]],
        "in a cookie": [("Cookie", f"api_key={KEYS['writer']}")],
        "reader": [bearer["reader"]],
        "reader who claims more": [
            bearer["reader"],
            ("X-HTTP-Method-Override", "GET"),
            ("X-Role", "write"),
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Original-URL", "/livez"),
        ],
        "writer": [bearer["writer"]],
        "writer by x-api-key": [("X-API-Key", KEYS["writer"])],
    }[kind]


KINDS = (
    "none", "bad", "bad x-api-key", "empty", "empty x-api-key", "basic", "bare", "the hash",
    "in upper case", "with more", "long", "not ascii", "revoked", "two keys", "two headers",
    "twice the same", "in a cookie", "reader", "reader who claims more", "writer",
    "writer by x-api-key",
)  # fmt: skip

SPELT_BY = ("none", "reader", "reader who claims more")  # whom another spelling might let in


def role_of(kind: str) -> Role:
    if kind.startswith("writer"):
        return Role.WRITE
    return Role.READ if kind.startswith("reader") else Role.OPEN


def wanted_role(method: str, template: str) -> Role:
    if template in OPEN or template.startswith("/v2/health/"):
        return Role.OPEN
    return Role.WRITE if (method, template) in WRITES else Role.READ


def routes_of(app: Any) -> Iterator[tuple[str, str]]:
    """(method, path template) of everything that the application's router knows."""
    pending = list(app.routes)
    while pending:
        route = pending.pop(0)
        if hasattr(route, "original_router"):  # an included router
            pending = [*route.original_router.routes, *pending]
            continue
        for method in getattr(route, "methods", None) or {"GET"}:  # a mount serves files
            yield method, route.path


def spellings(template: str) -> Iterator[str]:
    """Ways to write the path of a route, the plain one first."""
    path = template.replace("{item_id:path}", "train/0000.png").replace(":path", "")
    path = path.replace("{", "").replace("}", "")
    yield path
    yield path + "/"
    yield "/" + path
    yield path.replace("/", "//", 1)
    yield "/." + path
    yield "/livez/.." + path
    yield "/livez%2f.." + path
    yield path[:1] + f"%{ord(path[1]):02x}" + path[2:] if len(path) > 1 else path
    yield "/%2e" + path
    yield path.upper()
    yield path + "%00"
    yield path + "%0a"
    yield path + ";/livez"
    yield path + "?api_key=" + KEYS["writer"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service with keys, one of which was revoked while it ran."""
    state = tmp_path_factory.mktemp("guarded")
    bundle_directory = build_bundle(state / "bundle")
    file = state / "keys"
    both = [line("reader", "read"), line("writer", "write")]
    file.write_text("\n".join([*both, line("revoked", "write")]))
    settings = Settings(
        bundle=bundle_directory, state=state / "state", decoder_processes=1, api_keys_file=file
    )
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            assert app.state.runtime.failure is None
        headers = dict(credentials("revoked"))
        assert client.get("/info", headers=headers).status_code == 200
        file.write_text("\n".join(both))
        app.state.runtime.keys._checked_at -= RECHECK_S
        assert client.get("/info", headers=headers).status_code == 401
        yield client


def test_policy__has_one_line_for_each_route_and_no_other(tmp_path: Path) -> None:
    app = create_app(Settings(bundle=tmp_path, state=tmp_path))
    routes = {(method, path) for method, path in routes_of(app) if method != "HEAD"}
    missing = sorted(routes - set(POLICY))
    assert not missing, f"decide which role these want, in service/policy.py: {missing}"
    assert set(POLICY) <= routes, "lines for routes that are gone"


def test_policy__wants_what_the_contract_says() -> None:
    assert dict(POLICY) == {place: wanted_role(*place) for place in POLICY}


def test_route_without_a_line__is_not_served(tmp_path: Path) -> None:
    app = create_app(Settings(bundle=tmp_path, state=tmp_path))
    app.add_api_route("/new", lambda: "secret", methods=["GET"])
    app.add_api_route("/items", lambda: "secret", methods=["PATCH"])
    with TestClient(app) as client:
        assert client.get("/new").status_code == 404
        assert client.patch("/items").status_code == 405


@pytest.mark.parametrize("kind", KINDS)
def test_every_route__lets_in_whom_it_should(guarded: TestClient, kind: str) -> None:
    have, unexpected = role_of(kind), []
    templates = sorted({path for _, path in POLICY})
    for template, method in itertools.product(templates, METHODS):
        paths = list(spellings(template)) if kind in SPELT_BY else [next(spellings(template))]
        for number, path in enumerate(paths):
            status = ask(guarded, method, path, credentials(kind))
            wanted = role_wanted_at(path, method)
            if wanted is None:
                fine = status in (401, 404, 405)
            elif have < wanted:  # the route must not even see it
                fine = status == (403 if have is Role.READ else 401)
            else:
                fine = status < 500 and (number > 0 or status not in (401, 403, 405))
            if not fine:
                unexpected.append((method, path, status))
    assert not unexpected


def ask(client: TestClient, method: str, path: str, headers: list[tuple[str, str]]) -> int:
    """The status of one request, sent as a server would: nothing tidies the path up."""
    sent: list[Any] = []

    async def receive() -> Mapping[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    raw, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": urllib.parse.unquote(raw), "raw_path": raw.encode(),
        "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "state": {},
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }  # fmt: skip
    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send)  # type: ignore[arg-type]
    return int(sent[0]["status"])


def role_wanted_at(path: str, method: str) -> Role | None:
    """The role that a spelled path wants; None where nothing is served under it."""
    plain = urllib.parse.unquote(path.partition("?")[0])
    method = "GET" if method == "HEAD" else method
    wanted = [
        wanted_role(method, template)
        for served, template in POLICY
        if served == method and pattern_of(template).match(plain)
    ]
    return max(wanted, default=None)


def pattern_of(template: str) -> re.Pattern[str]:
    """A template as the framework reads it: one segment, or with `:path` any number of them."""
    anything = re.sub(r"\\{\w+:path\\}", ".*", re.escape(template))
    return re.compile("^" + re.sub(r"\\{\w+\\}", "[^/]+", anything) + "$")


def test_refusals__say_what_to_do(guarded: TestClient) -> None:
    answer = guarded.post("/embed")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == 'Bearer realm="invprop"'
    assert "Authorization: Bearer KEY" in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"
    answer = guarded.delete("/items/a", headers=dict(credentials("reader")))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert (answer.json()["role"], answer.json()["wanted"]) == ("read", "write")
    answer = guarded.put("/items", headers=dict(credentials("reader")))
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")


def test_refusals__come_before_the_body_is_read(guarded: TestClient) -> None:
    read: list[int] = []

    async def receive() -> Mapping[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed",
        "query_string": b"", "headers": [], "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    assert guarded.portal is not None
    guarded.portal.call(guarded.app, scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401
    assert not read


def test_openapi__is_the_same_for_everybody(guarded: TestClient) -> None:
    bare = guarded.get("/openapi.json").content
    assert KEYS["writer"] not in bare.decode()
    assert bare == guarded.get("/openapi.json", headers=dict(credentials("writer"))).content
