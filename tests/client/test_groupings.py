"""What is computed of a whole gallery, and asked for until it is there: groupings and the map."""

import json
from typing import Any

import httpx2
import numpy as np

from tests.client.fake_answers import GROUPING


def test_groupings__are_asked_for_and_looked_at(fake: Any, service: Any) -> None:
    fake.on("POST", "/groupings", httpx2.Response(202, json=GROUPING | {"state": "queued"}))
    fake.on("GET", "/groupings", httpx2.Response(200, json={"items": [GROUPING], "next": None}))
    fake.on("GET", "/groupings/g1", httpx2.Response(200, json=GROUPING | {"sizes": [2, 2]}))
    assert service.start_grouping(k=5).state == "queued"
    (request,) = fake.asked("/groupings")
    assert json.loads(request.content) == {"k": 5, "steps": 3, "min_size": 3}
    (listed,) = service.groupings()
    assert (listed.items, listed.sizes) == (5, None)
    assert service.grouping("g1").sizes == (2, 2)


def test_groupings__pages_are_followed(fake: Any, service: Any) -> None:
    member = {"id": "a", "similarity": 0.5}
    group = {"group": 0, "size": 1, "representative": "a", "members": [member]}

    def paged(entry: dict[str, Any]) -> Any:
        def answer(request: httpx2.Request) -> httpx2.Response:
            after = None if "cursor" in request.url.params else "1"
            return httpx2.Response(200, json={"items": [entry], "next": after})

        return answer

    fake.on("GET", "/groupings/g1/groups", paged(group))
    fake.on("GET", "/groupings/g1/groups/3", paged(member))
    groups = list(service.grouping_groups("g1"))
    assert [(g.size, g.representative, g.members[0].id) for g in groups] == [(1, "a", "a")] * 2
    assert [m.similarity for m in service.grouping_members("g1", 3)] == [0.5, 0.5]


def test_map__comes_at_once_or_later(fake: Any, service: Any) -> None:
    facts = {"model": "m1", "gallery_version": 7, "method": "umap"}
    points = {"items": 9, "ids": ["a", "b"], "coordinates": [[0, 1], [2, 3]]}

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "version" in request.url.params:
            return httpx2.Response(200, json=facts | points)
        return httpx2.Response(202, json=facts | {"state": "computing"})

    fake.on("GET", "/map", answer)
    pending = service.map("umap", sample=2)
    assert (pending.gallery_version, pending.state) == (7, "computing")
    assert dict(fake.asked("/map")[0].url.params) == {"method": "umap", "sample": "2"}
    found = service.map("umap", version=pending.gallery_version)
    assert (found.items, found.ids) == (9, ("a", "b"))
    np.testing.assert_array_equal(found.coordinates, [[0, 1], [2, 3]])
