"""neighbours() and groups(): a result for each query, in order, in as many requests as it takes."""

import base64
import json
from typing import Any

import httpx2
import numpy as np
import pytest

from client import Group, Groups, ImageRejected, Member, Neighbour, Neighbours, Rejected
from tests.client.fake_answers import groups_of_each, neighbours_of_each


def test_neighbours__by_ids(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    found = service.neighbours(ids=["a", "b"], k=3)
    results = ((Neighbour("near a", 0.5),), (Neighbour("near b", 0.5),))
    assert found == Neighbours("m1", 7, True, results)
    assert fake.bodies("/neighbours") == [{"ids": ["a", "b"], "k": 3}]


def test_neighbours__by_images_and_by_vectors(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    service.neighbours(images=[b"abc"])
    service.neighbours(vectors=np.float32([[0.5, 0.25]]))
    service.neighbours(vectors=[0.5, 0.25])
    assert fake.bodies("/neighbours") == [
        {"images": [base64.b64encode(b"abc").decode()], "k": 10},
        {"vectors": [[0.5, 0.25]], "k": 10},
        {"vectors": [[0.5, 0.25]], "k": 10},
    ]


def test_neighbours__options_are_sent_when_given(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    service.neighbours(ids="a", filter={"kind": "cat"}, exact=False, include=["metadata", "vector"])
    assert fake.bodies("/neighbours") == [
        {
            "ids": ["a"],
            "k": 10,
            "filter": {"kind": "cat"},
            "exact": False,
            "include": ["metadata", "vector"],
        }
    ]


def test_neighbours__with_metadata_and_vector(fake: Any, service: Any) -> None:
    entry = {"id": "b", "similarity": 0.25, "metadata": {"x": 1}, "vector": [1.0, 0.0]}
    answer = {"model": "m1", "gallery_version": 7, "exact": True, "results": [[entry]]}
    fake.on("POST", "/neighbours", httpx2.Response(200, json=answer))
    ((found,),) = service.neighbours(ids="a", include=["metadata", "vector"]).results
    assert (found.id, found.similarity, found.metadata) == ("b", 0.25, {"x": 1})
    assert found.vector.dtype == np.float32


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"max_rows": 2}, [2, 2, 1]),
        ({"max_results": 30}, [3, 2]),  # of k = 10 each
        ({"max_results": 5}, [1, 1, 1, 1, 1]),  # the service says what it thinks of k
    ],
)
def test_neighbours__in_parts_and_in_order(
    fake: Any, service: Any, limits: dict[str, int], parts: list[int]
) -> None:
    fake.limits |= limits
    fake.on("POST", "/neighbours", neighbours_of_each)
    found = service.neighbours(ids=list("abcde"))
    assert [row[0].id for row in found.results] == [f"near {i}" for i in "abcde"]
    assert [len(body["ids"]) for body in fake.bodies("/neighbours")] == parts


@pytest.mark.parametrize("given", [{}, {"ids": ["a"], "vectors": [[1, 0]]}])
def test_neighbours__not_exactly_one_kind_of_query(service: Any, given: Any) -> None:
    with pytest.raises(ValueError, match="exactly one of images, vectors and ids; got"):
        service.neighbours(**given)


def test_neighbours__no_queries(service: Any) -> None:
    with pytest.raises(ValueError, match="got no ids"):
        service.neighbours(ids=[])


def test_groups__defaults_are_the_papers(fake: Any, service: Any) -> None:
    fake.on("POST", "/groups", groups_of_each)
    group = Group((Member("b", 1, "a", 0.5),), 4, True)
    assert service.groups(ids="a") == Groups("m1", 7, (group,))
    assert fake.bodies("/groups") == [
        {"ids": ["a"], "k": 4, "steps": 3, "order": "nearest", "limit": 200}
    ]


def test_groups__parts_stay_below_the_walks_of_one_request(fake: Any, service: Any) -> None:
    fake.limits["max_group_walk"] = 30  # k + k^2 with k = 3: 12 of each anchor
    fake.on("POST", "/groups", groups_of_each)
    found = service.groups(ids=list("abcde"), k=3, steps=2, order="hardest", limit=5)
    assert [group.members[0].via for group in found.results] == list("abcde")
    assert [len(body["ids"]) for body in fake.bodies("/groups")] == [2, 2, 1]


def test_groups__nonsense_is_left_to_the_service(fake: Any, service: Any) -> None:
    document = {"code": "invalid_request", "detail": "k: no"}
    fake.on("POST", "/groups", httpx2.Response(422, json=document))
    for k, steps in [(0, 3), (-1, 3), (4, 0), (4, 10**9)]:
        with pytest.raises(Exception, match="k: no"):
            service.groups(ids="a", k=k, steps=steps)


def test_neighbours__rejected_pictures_are_numbered_as_the_caller_counts(
    fake: Any, service: Any
) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        bad = base64.b64encode(b"x").decode()
        images = json.loads(request.content)["images"]
        if bad not in images:
            return neighbours_of_each(request)
        errors = [{"index": images.index(bad), "reason": "cut"}]
        document = {"code": "image_rejected", "detail": "1 rejected", "errors": errors}
        return httpx2.Response(422, json=document)

    fake.limits["max_images"] = 2
    fake.on("POST", "/neighbours", handler)
    with pytest.raises(ImageRejected) as raised:
        service.neighbours(images=[b"1", b"2", b"3", b"4", b"5", b"x"])
    assert raised.value.errors == (Rejected(5, "cut"),)
