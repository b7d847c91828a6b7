"""GET / and /static/...: what a browser is sent, and what it may keep."""

import gzip
import re
from typing import Any

from service.routes.page import CONTENT_SECURITY_POLICY

PLAIN = {"Accept-Encoding": "identity"}


def app_script(service: Any) -> str:
    """The address of app.js, as the page names it."""
    page = service.client.get("/").text
    found = re.search(r'src="(static/\w+/app\.js)"', page)
    assert found is not None
    return "/" + found[1]


def test_index__is_asked_for_again_and_strict(shared_service: Any) -> None:
    answer = shared_service.client.get("/", headers=PLAIN)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers.get_list("content-security-policy") == [CONTENT_SECURITY_POLICY]
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    again = shared_service.client.get(
        "/", headers={**PLAIN, "If-None-Match": answer.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


def test_index__names_only_relative_addresses(shared_service: Any) -> None:
    page = shared_service.client.get("/").text
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert len(addresses) > 5
    assert all(not address.startswith(("/", "http")) for address in addresses)


def test_static__may_be_kept_for_ever_in_either_form(shared_service: Any) -> None:
    path = app_script(shared_service)
    plain = shared_service.client.get(path, headers=PLAIN)
    packed = shared_service.client.get(path, headers={"Accept-Encoding": "br, gzip;q=0.5"})
    refused = shared_service.client.get(path, headers={"Accept-Encoding": "gzip;q=0"})
    assert plain.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) == len(gzip.compress(plain.content, 9, mtime=0))
    assert packed.content == plain.content == refused.content
    assert "content-encoding" not in refused.headers
    assert plain.headers["etag"] != packed.headers["etag"]


def test_static__of_another_version_or_name__is_gone(shared_service: Any) -> None:
    path = app_script(shared_service)
    version = path.split("/")[2]
    for wrong in (
        "/static/0000000000000000/app.js",
        f"/static/{version}/index.html",
        f"/static/{version}/../app.py",
        f"/static/{version}/%2e%2e/app.py",
        f"/static/{version}/",
    ):
        answer = shared_service.client.get(wrong)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), wrong


def test_head__has_no_body(shared_service: Any) -> None:
    answer = shared_service.client.head(app_script(shared_service))
    assert (answer.status_code, answer.content) == (200, b"")
