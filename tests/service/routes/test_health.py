"""The routes for whoever watches: health, metrics, info, docs; and errors outside the routes."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.app import create_app
from service.embedder import Embedded
from service.routes import docs
from service.settings import Settings
from trainer.representation.bundle import open_bundle


def samples(client: TestClient) -> dict[str, float]:
    """Every metric as name{labels} -> value."""
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_health__is_ready_and_says_what_was_checked(shared_service: Any) -> None:
    assert shared_service.client.get("/livez").text == "ok\n"
    for path in ("/readyz", "/health"):
        assert shared_service.client.get(path).json() == {
            "status": "ready",
            "checks": {"model": "ok", "decoders": "ok", "gallery": "ok"},
        }


def test_health__names_the_check_that_fails(tmp_path: Any) -> None:
    settings = Settings.model_validate({"bundle": tmp_path / "none", "state": tmp_path / "s"})
    with TestClient(create_app(settings)) as client:
        while (answer := client.get("/readyz")).json()["checks"]["model"] == "loading":
            assert answer.headers["retry-after"] == "1"
        document = answer.json()
        assert (answer.status_code, document["code"]) == (503, "not_ready")
        assert "none/manifest.json is missing" in document["checks"]["model"]
        assert client.get("/livez").status_code == 200
        for method, path in [
            ("POST", "/embed"),
            ("POST", "/items"),
            ("GET", "/items"),
            ("GET", "/items/a"),
            ("DELETE", "/items/a"),
            ("POST", "/items/delete"),
            ("POST", "/neighbours"),
            ("POST", "/groups"),
            ("GET", "/groupings"),
            ("GET", "/info"),
        ]:
            refused = client.request(
                method, path, json={"ids": ["a"]} if method == "POST" else None
            )
            assert (refused.status_code, refused.json()["code"]) == (503, "loading"), path


def test_info__gives_facts_and_limits_with_their_settings(shared_service: Any) -> None:
    document = shared_service.client.get("/info").json()
    assert document["model"] == shared_service.bundle.model_id
    assert document["dims"] == {"embedding": 12, "features": 16}
    assert document["execution_provider"] == "CPUExecutionProvider"
    assert document["search"]["device"] in ("cpu", "gpu")
    gallery = document["gallery"]
    assert (gallery["items"], gallery["version"], gallery["read_only"]) == (40, 40, False)
    assert gallery["database"].startswith("sqlite 3.")
    assert gallery["graph"]["neighbours"] == shared_service.settings.graph_neighbours
    for name, entry in document["limits"].items():
        assert entry == {"limit": getattr(shared_service.settings, name), "setting": name}


def test_info__states_the_precision_and_how_far_it_is_from_fp32(
    varied_directory: Path, start_service: Any, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    varied = open_bundle(varied_directory)
    for service in start_service(tmp_path, of=varied, precision="int8"):
        document = service.client.get("/info").json()
        assert document["precision"] == "int8"
        assert document["variants"]["int8"]["cosine"]["min"] == 0.9991
        assert document["variants"]["fp16"]["reason"] == "its smallest cosine to fp32 is 0.9"
        assert document["speed"]["runs"][0]["images_per_s"]["int8"] == 35.0
        build = [name for name in samples(service.client) if "build_info" in name]
        assert "('precision', 'int8')" in build[0]
        # One model, whatever the precision: what it stores is served by the others too.
        assert document["model"] == varied.model_id
        assert service.client.post("/items", files={"images": ("a", picture())}).json()["added"]
    for service in start_service(tmp_path, of=varied):
        assert service.client.get("/info").json()["precision"] == "fp32"
        assert service.client.get("/items/a").status_code == 200


def test_info__of_a_bundle_without_variants(shared_service: Any) -> None:
    document = shared_service.client.get("/info").json()
    assert (document["precision"], document["variants"], document["speed"]) == ("fp32", {}, None)


def test_metrics__count_requests_batches_and_items(
    service: Any, picture: Callable[..., bytes]
) -> None:
    client = service.client
    client.post("/embed", files=[("images", ("a", picture())), ("images", ("b", b"no"))])
    client.post("/items", files={"images": ("secret-name", picture())})
    client.get("/items/secret-name")
    client.get("/no/such/route/secret")
    found = samples(client)
    route = "[('method', '{}'), ('route', '{}'), ('status', '{}')]"
    assert found["invprop_requests_total" + route.format("POST", "/embed", 422)] == 1
    assert found["invprop_requests_total" + route.format("GET", "/items/{item_id:path}", 200)] == 1
    assert found["invprop_requests_total" + route.format("GET", "unmatched", 404)] == 1
    assert found["invprop_images_rejected_total[]"] == 1
    assert found["invprop_batch_size_sum[]"] == 2
    assert found["invprop_index_vectors[]"] == 41
    assert found["invprop_gallery_version[]"] == 41
    assert found["invprop_queue_size[]"] == 0
    assert not any("secret" in name for name in found)
    (build,) = [name for name in found if name.startswith("invprop_build_info")]
    assert service.bundle.model_id in build


def test_docs__names_are_set_as_code_and_markup_is_text() -> None:
    described = {"description": "Parts `images` <b>&", "responses": {}}
    document = {
        "info": {"title": "t", "version": "1", "description": "with a `code`"},
        "paths": {"/embed": {"post": described}},
        "components": {"schemas": {}},
    }
    shown = docs.page(document)
    assert "Parts <code>images</code> &lt;b&gt;&amp;" in shown
    assert "with a <code>code</code>" in shown


def test_docs__load_nothing_from_elsewhere(shared_service: Any) -> None:
    page = shared_service.client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in shared_service.client.get("/openapi.json").json()["paths"]:
        assert path in page.text
    assert not re.findall(r"""(?:src|href)=["'](?!#|/openapi\.json)""", page.text)
    assert "<script" not in page.text


@pytest.mark.parametrize(
    "path", ["/index.html", "/embed/", "/ITEMS", "//items", "/grouping", "/v1/nothing"]
)
def test_unknown_routes__are_problems(shared_service: Any, path: str) -> None:
    answer = shared_service.client.get(f"http://testserver{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "not_found"


def test_request_id__is_kept_when_harmless(shared_service: Any) -> None:
    def sent(request_id: str) -> str:
        headers = {"X-Request-Id": request_id}
        return str(shared_service.client.get("/livez", headers=headers).headers["x-request-id"])

    assert sent("abc-1.2_3") == "abc-1.2_3"
    for harmful in ("a b", "", "x" * 129, '"}'):
        assert re.fullmatch(r"[0-9a-f]{32}", sent(harmful))


def test_defect__is_answered_without_its_trace(
    start_service: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in start_service(tmp_path):

        def broken(self: Any, raw: Embedded) -> Embedded:
            raise RuntimeError("a secret of the implementation")

        monkeypatch.setattr("service.embedder.OnnxEmbedder.finish", broken)
        npy = io.BytesIO()
        np.save(npy, np.zeros((1, 8, 8, 3), np.uint8))
        headers = {"Content-Type": "application/x-npy"}
        answer = service.client.post("/embed", content=npy.getvalue(), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"]
