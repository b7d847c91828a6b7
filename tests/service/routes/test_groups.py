"""POST /groups: equal to propagation on the exact graph of the whole gallery."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainer.representation.neighbours import exact_graph
from trainer.representation.propagation import propagate_paths


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


@pytest.mark.parametrize(("k", "steps"), [(4, 3), (1, 5), (3, 2)])
def test_groups__equal_propagation(shared_service: Any, k: int, steps: int) -> None:
    gallery = shared_service.bundle.gallery()
    anchors = np.asarray([2, 30])
    body = {"ids": [gallery.ids[a] for a in anchors], "k": k, "steps": steps, "order": "step"}
    document = shared_service.client.post("/groups", json=body).json()
    assert list(document) == ["model", "gallery_version", "results"]
    expected = propagate_paths(exact_graph(gallery.embeddings, k), anchors, steps)
    for group, ids, hops, via in zip(document["results"], *expected, strict=True):
        count = int((ids >= 0).sum())
        assert (group["reached"], group["truncated"]) == (count, False)
        assert [(m["id"], m["step"], m["via"]) for m in group["members"]] == [
            (gallery.ids[i], s, gallery.ids[v])
            for i, s, v in zip(ids[:count], hops[:count], via[:count], strict=True)
        ]


def test_groups__of_an_image_that_is_no_item(
    shared_service: Any, picture: Callable[..., bytes]
) -> None:
    answer = shared_service.client.post(
        "/groups?k=2&steps=2&order=step", files={"images": ("q.png", picture(1))}
    ).json()
    (group,) = answer["results"]
    assert [(m["step"], m["via"]) for m in group["members"][:2]] == [(1, None), (1, None)]
    direct = shared_service.client.post(
        "/neighbours?k=2", files={"images": ("q.png", picture(1))}
    ).json()
    assert [m["id"] for m in group["members"][:2]] == [h["id"] for h in direct["results"][0]]


def test_groups__are_cut_at_the_limit_and_say_so(shared_service: Any) -> None:
    body = {"ids": ["train/0000.png"], "limit": 2, "order": "hardest"}
    (group,) = shared_service.client.post("/groups", json=body).json()["results"]
    assert (len(group["members"]), group["truncated"]) == (2, True)
    assert group["reached"] > 2
    everything = {**body, "limit": 1000}
    (whole,) = shared_service.client.post("/groups", json=everything).json()["results"]
    assert group["members"] == whole["members"][:2]
    similarities = [m["similarity"] for m in whole["members"]]
    assert similarities == sorted(similarities)


def test_groups__are_the_same_with_and_without_the_kept_graph(
    start_service: Any, picture: Callable[..., bytes], tmp_path: Any
) -> None:
    answers = []
    for neighbours in (6, 0):
        for service in start_service(tmp_path / str(neighbours), graph_neighbours=neighbours):
            keeper = service.client.app.state.runtime.graph
            add = {"images": ("new.png", picture(3))}
            assert service.client.post("/items", files=add).status_code == 200
            service.client.delete("/items/train/0005.png")
            snapshot = service.client.app.state.runtime.gallery.snapshot()
            graph = keeper.wait_for(snapshot, 6, timeout_s=20)
            assert (graph is not None) == (neighbours == 6)
            told = service.client.get("/info").json()["gallery"]["graph"]
            assert (told["state"], told["neighbours"]) == ("ready" if graph else "off", neighbours)
            metrics = service.client.get("/metrics").text
            assert f"invprop_graph_version {float(snapshot.version if graph else 0)}" in metrics
            for body in (
                {"ids": ["train/0000.png", "new.png"], "k": 6, "steps": 2, "order": "step"},
                {"ids": ["train/0009.png"], "k": 7, "steps": 2},  # more than the graph has
                {"vectors": [[1.0] * 12], "k": 3},
            ):
                answers.append((neighbours, service.client.post("/groups", json=body).json()))
    half = len(answers) // 2
    assert [a for _, a in answers[:half]] == [a for _, a in answers[half:]]
    assert all(result["reached"] for _, answer in answers for result in answer["results"])


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"k": 0}, "k: "),
        ({"k": 51}, "50"),
        ({"steps": 0}, "steps: "),
        ({"steps": 7}, "6"),
        ({"order": "random"}, "order"),
        ({"limit": 0}, "limit"),
        ({"filter": {}}, "filter"),
    ],
)
def test_groups__say_what_is_wrong(
    shared_service: Any, options: dict[str, Any], detail: str
) -> None:
    answer = shared_service.client.post("/groups", json={"ids": ["train/0000.png"], **options})
    assert detail in problem(answer, 422, "invalid_request")["detail"]


def test_groups__bound_the_walk_over_all_anchors(start_service: Any, tmp_path: Any) -> None:
    for service in start_service(tmp_path, max_group_walk=168):
        ids = ["train/0000.png", "train/0001.png"]
        assert service.client.post("/groups", json={"ids": ids}).status_code == 200  # 2 x 84
        for body in ({"ids": [*ids, "train/0002.png"]}, {"ids": ids[:1], "k": 6}):
            document = problem(service.client.post("/groups", json=body), 422, "limit_exceeded")
            assert (document["limit"], document["setting"]) == (168, "max_group_walk")
