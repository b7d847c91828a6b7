"""service.auth inside the application; all routes x all credentials are in tests/contracts."""

from pathlib import Path
from typing import Any

import pytest

from service.keys import RECHECK_S, make_key
from service.policy import Policy, Role

KEY, LINE = make_key("laptop", "write")
HEADERS = {"Authorization": f"Bearer {KEY}"}


def test_keys_file__that_breaks_is_named_by_readyz_and_lets_nobody_in(
    start_service: Any, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(LINE)
    for service in start_service(tmp_path / "state", api_keys_file=file):
        client, keys = service.client, service.client.app.state.runtime.keys
        assert client.get("/info", headers=HEADERS).status_code == 200
        file.write_text("half a li")
        keys._checked_at -= RECHECK_S
        answer = client.get("/info", headers=HEADERS)
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "1"
        assert str(file) not in answer.text
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "keys cannot be read" in ready.json()["checks"]["keys"]
        assert client.get("/livez").status_code == 200
        file.write_text(LINE)
        keys._checked_at -= RECHECK_S
        assert client.get("/info", headers=HEADERS).status_code == 200
        assert client.get("/readyz").status_code == 200


def test_key__never_reaches_the_log(
    start_service: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for service in start_service(tmp_path / "state", api_keys=LINE):
        service.client.get("/info", headers=HEADERS)
        service.client.get(f"/items?key={KEY}", headers={"X-API-Key": KEY + "x"})
    written = capsys.readouterr()
    assert "request" in written.out + written.err
    assert KEY not in written.out + written.err


@pytest.mark.parametrize("path", ["/livez", "/docs", "/items", "/items/a/b"])
def test_head__is_served_where_get_is(shared_service: Any, path: str) -> None:
    get, head = shared_service.client.get(path), shared_service.client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]


def test_methods__that_are_not_served_are_told_which_are(shared_service: Any) -> None:
    answer = shared_service.client.options("/items")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert "access-control-allow-origin" not in answer.headers
    assert shared_service.client.put("/items/a").headers["allow"] == "DELETE, GET, HEAD"


def test_policy__takes_the_strictest_line_that_fits() -> None:
    lines = {
        ("GET", "/a/{rest:path}"): Role.WRITE,
        ("GET", "/a/b"): Role.OPEN,
        ("GET", "/a/{one}/c"): Role.READ,
    }
    policy = Policy(lines)
    assert policy.place("/a/b").roles == {"GET": Role.WRITE, "HEAD": Role.WRITE}
    assert policy.place("/a/x/c").roles["GET"] is Role.WRITE
    assert policy.place("/b").roles == {}
