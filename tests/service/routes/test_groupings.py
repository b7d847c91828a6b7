"""/groupings: from the request to the last page of members."""

import time
from typing import Any

import pytest

from service.groups import walk_width


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


def grouped(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Ask, follow Location until it has succeeded."""
    accepted = client.post("/groupings", json=body)
    assert accepted.status_code == 202, accepted.text
    until = time.monotonic() + 20
    while time.monotonic() < until:
        document: dict[str, Any] = client.get(accepted.headers["Location"]).json()
        if document["state"] == "succeeded":
            return document
    raise AssertionError(document)


def test_groupings__are_paged_to_the_last_member(shared_service: Any) -> None:
    client = shared_service.client
    document = grouped(client, {"k": 3, "steps": 2, "min_size": 2})
    assert sum(document["sizes"]) + document["ungrouped"] == document["items"] == 40
    assert sum(document["sizes"]) == document["grouped"]
    assert (document["model"], document["gallery_version"]) == (shared_service.bundle.model_id, 40)
    place = f"/groupings/{document['id']}/groups"
    groups: list[Any] = []
    after: str | None = "0"
    while after is not None:
        page = client.get(place, params={"limit": 2, "cursor": after}).json()
        groups += page["items"]
        after = page["next"]
    assert [g["size"] for g in groups] == document["sizes"]
    assert [g["group"] for g in groups] == list(range(document["groups"]))
    for group in groups:
        members: list[Any] = []
        after = "0"
        while after is not None:
            url = f"{place}/{group['group']}"
            page = client.get(url, params={"limit": 3, "cursor": after}).json()
            assert (page["size"], page["representative"]) == (
                group["size"],
                group["representative"],
            )
            members += page["items"]
            after = page["next"]
        assert members[:9] == group["members"]
        assert members[0]["id"] == group["representative"]
        assert len({m["id"] for m in members}) == group["size"]


def test_groupings__of_equal_parameters_are_one(shared_service: Any) -> None:
    client = shared_service.client
    first = grouped(client, {"k": 4, "steps": 3, "min_size": 3})
    again = client.post("/groupings", json={})  # the defaults
    assert (again.status_code, again.json()["id"]) == (202, first["id"])
    listed = client.get("/groupings").json()
    assert listed["next"] is None
    assert [g["id"] for g in listed["items"]].count(first["id"]) == 1


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"k": 0}, "k: "),
        ({"k": 51}, "50"),
        ({"steps": 7}, "6"),
        ({"min_size": 0}, "min_size"),
        ({"method": "k-means"}, "method"),
        ([], "dictionary"),
    ],
)
def test_groupings__say_what_is_wrong(shared_service: Any, body: Any, detail: str) -> None:
    answer = shared_service.client.post("/groupings", json=body)
    assert detail in problem(answer, 422, "invalid_request")["detail"]


def test_groupings__bound_the_walk(start_service: Any, tmp_path: Any) -> None:
    for service in start_service(tmp_path, max_grouping_walk=40 * walk_width(2, 2)):
        assert service.client.post("/groupings", json={"k": 2, "steps": 2}).status_code == 202
        answer = service.client.post("/groupings", json={"k": 3, "steps": 2})
        document = problem(answer, 422, "limit_exceeded")
        assert (document["limit"], document["setting"]) == (240, "max_grouping_walk")


def test_groupings__that_are_not_there_or_not_ready(
    start_service: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in start_service(tmp_path, groupings_pending=1, max_page=5):
        client = service.client
        monkeypatch.setattr(client.app.state.runtime.groupings, "_compute", lambda *_: None)
        running = client.post("/groupings", json={})
        name = running.json()["id"]
        assert running.headers["Retry-After"] == "1"
        document = problem(
            client.get(f"/groupings/{name}/groups?limit=5"), 409, "grouping_not_ready"
        )
        assert document["state"] in ("queued", "running")
        document = problem(client.post("/groupings", json={"k": 1}), 429, "queue_full")
        assert (document["limit"], document["setting"]) == (1, "groupings_pending")
        for path in ("/groupings/x", "/groupings/x/groups", "/groupings/x/groups/0"):
            problem(client.get(path), 404, "grouping_not_found")
        too_many = client.get(f"/groupings/{name}/groups?limit=6")
        assert problem(too_many, 422, "limit_exceeded")["setting"] == "max_page"
        problem(client.get(f"/groupings/{name}/groups?limit=1&cursor=x"), 422, "invalid_request")
        problem(client.get(f"/groupings/{name}/groups/x"), 422, "invalid_request")
        problem(client.post("/groupings", content=b"x"), 415, "unsupported_media_type")


def test_group__that_is_not_there(shared_service: Any) -> None:
    document = grouped(shared_service.client, {"min_size": 2})
    for number in (-1, document["groups"]):
        answer = shared_service.client.get(f"/groupings/{document['id']}/groups/{number}")
        assert str(number) in problem(answer, 404, "grouping_not_found")["detail"]
