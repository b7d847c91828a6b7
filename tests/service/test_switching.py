"""A new bundle is taken over while the service runs, or by service.switch while it does not."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import runtime, switch
from service.beside import Beside
from service.embedder import OnnxEmbedder
from service.gallery import successor
from service.gallery.database import Database
from service.gallery.protocol import Gallery
from service.gallery.rows import galleries_of
from service.serving import EmbedOriginals
from trainer.representation.bundle import Bundle, open_bundle

NDJSON = {"Content-Type": "application/x-ndjson"}
UNIT = [1.0, *[0.0] * 11]
Start = Callable[..., Iterator[Any]]
Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def new_bundle(
    make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Another model with the same training pictures and two more."""
    return open_bundle(make_bundle(tmp_path_factory.mktemp("new") / "b", seed=5, images=42))


@pytest.fixture
def link(bundle: Bundle, tmp_path: Path) -> Path:
    """A symlink to the old bundle, as an operator would have it."""
    path = tmp_path / "current"
    path.symlink_to(bundle.directory)
    return path


def move(link: Path, to: Path) -> None:
    beside = link.with_name("next")
    beside.symlink_to(to)
    beside.rename(link)


def reload(service: Any) -> None:
    service.client.portal.call(service.client.app.state.runtime.reload)


def ended(service: Any) -> dict[str, Any]:
    """Wait for the end of a switch; what /info says of it."""
    tick = threading.Event()
    for _ in range(3000):
        facts: dict[str, Any] = service.client.get("/info").json()["gallery"]["switch"]
        if facts["state"] not in ("none", "building"):
            return facts
        tick.wait(0.02)
    raise AssertionError("the switch did not end")


def add(service: Any, item_id: str, content: bytes) -> dict[str, Any]:
    answer = service.client.post("/items", files={"images": (item_id, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def vector_of(service: Any, item_id: str) -> Any:
    document = service.client.get(f"/items/{item_id}?include=vector").json()
    return np.asarray(document["vector"], np.float32)


def test_switch__takes_over_a_new_bundle_while_it_serves(
    start_service: Start, link: Path, new_bundle: Bundle, tmp_path: Path, picture: Picture
) -> None:
    for service in start_service(tmp_path / "state", of=open_bundle(link), originals="keep"):
        old = service.bundle.model_id
        assert add(service, "a", picture(1))["model"] == old
        before = vector_of(service, "a")
        reload(service)
        assert ended(service)["state"] == "unchanged"

        move(link, new_bundle.directory)
        reload(service)
        assert ended(service) == {
            "state": "done",
            "model": new_bundle.model_id,
            "done": 41,
            "total": 41,
        }
        found = service.client.post("/neighbours?k=1", files={"images": ("q", picture(1))}).json()
        assert found["model"] == new_bundle.model_id
        assert found["results"][0][0]["id"] == "a"
        assert found["results"][0][0]["similarity"] > 0.9999
        assert (vector_of(service, "a") != before).any()
        np.testing.assert_array_equal(
            vector_of(service, "train/0041.png"), new_bundle.gallery().embeddings[41]
        )
        line = json.dumps({"id": "v", "vector": UNIT, "model": old}).encode()
        refused = service.client.post("/items", content=line, headers=NDJSON)
        assert (refused.status_code, refused.json()["code"]) == (409, "model_mismatch")
        assert add(service, "b", picture(2))["added"] == 1
        assert service.client.get("/readyz").is_success
        metrics = service.client.get("/metrics").text
        assert f'model="{new_bundle.model_id}"' in metrics
        assert f'model="{old}"' not in metrics
    for service in start_service(tmp_path / "state", of=new_bundle):  # the next start
        assert service.client.get("/info").json()["gallery"]["items"] == 44


def test_switch__is_refused_with_the_reason_and_the_old_model_goes_on(
    start_service: Start, link: Path, new_bundle: Bundle, tmp_path: Path, picture: Picture
) -> None:
    for service in start_service(tmp_path / "state", of=open_bundle(link)):
        add(service, "a", picture(1))
        add(service, "b", picture(2))
        move(link, new_bundle.directory)
        reload(service)
        facts = ended(service)
        assert (facts["state"], facts["model"]) == ("refused", new_bundle.model_id)
        assert "2 of 42 items have no stored original" in facts["reason"]
        assert add(service, "c", picture(3))["model"] == service.bundle.model_id
        move(link, tmp_path)
        reload(service)
        assert "manifest.json" in ended(service)["reason"]
        assert service.client.get("/readyz").is_success


@pytest.mark.parametrize("fails", [False, True])
def test_switch__is_said_to_be_done_once_the_new_model_is_served(
    start_service: Start,
    link: Path,
    new_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    class Slow(Beside):
        def __init__(self, gallery: Gallery, *others: Any, **named: Any) -> None:
            super().__init__(gallery, *others, **named)
            if gallery.model_id == new_bundle.model_id:
                threading.Event().wait(0.5)
                if fails:
                    self.close()
                    raise RuntimeError("a defect")

    monkeypatch.setattr(runtime, "Beside", Slow)
    for service in start_service(tmp_path / "state", of=open_bundle(link), originals="keep"):
        old = service.bundle.model_id
        move(link, new_bundle.directory)
        reload(service)
        assert ended(service)["state"] == ("failed" if fails else "done")
        found = service.client.get("/info").json()["model"]
        assert found == (old if fails else new_bundle.model_id)
        assert service.client.get("/readyz").is_success


def test_switch__that_is_asked_for_before_all_is_loaded_is_done_afterwards(
    start_service: Start,
    link: Path,
    new_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    clear = runtime.clear_unfinished

    def gated(database: Database) -> None:
        assert gate.wait(60)
        clear(database)

    monkeypatch.setattr(runtime, "clear_unfinished", gated)
    for service in start_service(tmp_path / "state", of=open_bundle(link)):
        assert not service.client.app.state.runtime.loaded.is_set()
        move(link, new_bundle.directory)
        reload(service)
        gate.set()
        assert ended(service)["state"] == "done"


def test_requests__end_with_the_model_they_began_with(
    start_service: Start,
    link: Path,
    new_bundle: Bundle,
    tmp_path: Path,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, gate = threading.Event(), threading.Event()
    run = OnnxEmbedder.run

    def gated(self: OnnxEmbedder, batch: Any) -> Any:
        if self.model_id != new_bundle.model_id:
            entered.set()
            assert gate.wait(60)
        return run(self, batch)

    for service in start_service(tmp_path / "state", of=open_bundle(link)):
        monkeypatch.setattr(OnnxEmbedder, "run", gated)
        answers: dict[str, Any] = {}

        def ask(path: str, answers: dict[str, Any] = answers, service: Any = service) -> None:
            files = {"images": ("q", picture(1))}
            answers[path] = service.client.post(path, files=files)

        paths = ("/neighbours?k=40", "/embed", "/items")
        threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        assert entered.wait(60)
        service.client.portal.call(wait_for_admitted, service, 3)
        move(link, new_bundle.directory)
        reload(service)
        assert ended(service)["state"] == "done"
        gate.set()
        for thread in threads:
            thread.join()
        found = answers["/neighbours?k=40"].json()
        assert (found["model"], len(found["results"][0])) == (service.bundle.model_id, 40)
        assert answers["/embed"].json()["model"] == service.bundle.model_id
        # A change of the old gallery comes too late; it is refused so that it is sent again.
        late = answers["/items"]
        assert (late.status_code, late.json()["code"]) == (503, "gallery_retired")
        assert late.headers["retry-after"]
        assert (
            service.client.post("/neighbours", json={"vectors": [UNIT]}).json()["model"]
            == new_bundle.model_id
        )


async def wait_for_admitted(service: Any, count: int) -> None:
    import asyncio

    images = service.client.app.state.runtime.images
    while images._batcher.admitted < count:
        await asyncio.sleep(0.01)


def test_offline_switch__makes_the_new_model_the_active_one(
    start_service: Start,
    new_bundle: Bundle,
    tmp_path: Path,
    picture: Picture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INVPROP_DECODER_PROCESSES", "1")
    monkeypatch.setattr(switch, "configure_logging", lambda *_: None)  # for the whole process
    state = tmp_path / "state"
    arguments = ["--state", str(state), "--bundle", str(new_bundle.directory)]
    assert switch.main(arguments) == 1
    assert "holds no gallery yet" in capsys.readouterr().err
    for service in start_service(state, originals="keep"):
        add(service, "a", picture(1))
        line = json.dumps({"id": "v", "vector": UNIT}).encode()
        assert service.client.post("/items", content=line, headers=NDJSON).is_success
        assert switch.main(arguments) == 1
        assert "is in use by process" in capsys.readouterr().err
    assert switch.main(arguments) == 1
    said = capsys.readouterr().err
    assert "1 of 42 items have no stored original" in said
    assert "python -m service.switch --drop-missing" in said
    assert switch.main([*arguments, "--drop-missing"]) == 0
    said = capsys.readouterr().out
    assert f"43 items of model {new_bundle.model_id[:12]}" in said
    assert "(1 that it has no vector of were left out)" in said
    for service in start_service(state, of=new_bundle):
        np.testing.assert_allclose(
            vector_of(service, "a"), service.embedding(picture(1)), atol=1e-6
        )
    assert switch.main(arguments) == 1
    assert "is the active one already" in capsys.readouterr().err
    with monkeypatch.context() as other:
        other.setenv("INVPROP_GALLERY", "milvus://127.0.0.1:19530/photos")
        other.setenv("INVPROP_THUMBNAILS", "false")
        assert switch.main(arguments) == 1
        assert "a collection in Milvus belongs to its model" in capsys.readouterr().err
    with pytest.raises(AssertionError, match=r"python -m service\.switch"):
        next(start_service(state))  # with the old bundle


def test_two_services__on_one_database_switch_one_after_the_other(
    start_service: Start,
    bundle: Bundle,
    new_bundle: Bundle,
    tmp_path: Path,
    picture: Picture,
    new_database: Callable[[], str],
) -> None:
    url, links = new_database(), []
    for number in range(2):
        links.append(tmp_path / f"link-{number}")
        links[-1].symlink_to(bundle.directory)
    options = {"database": url, "originals": "keep", "follow_interval_s": 0.02}
    for one in start_service(tmp_path / "one", of=open_bundle(links[0]), **options):
        for two in start_service(tmp_path / "two", of=open_bundle(links[1]), **options):
            add(one, "a", picture(1))
            add(two, "b", picture(2))  # sees a
            assert two.client.get("/items/a").is_success
            move(links[0], new_bundle.directory)
            reload(one)
            assert ended(one)["state"] == "done"
            late = two.client.post("/items", files={"images": ("c", picture(3))})
            assert (late.status_code, late.json()["code"]) == (503, "gallery_retired")
            assert two.client.get("/info").json()["gallery"]["read_only"]
            found = two.client.post("/neighbours", json={"ids": ["a"]})
            assert found.json()["model"] == bundle.model_id
            move(links[1], new_bundle.directory)
            reload(two)
            assert ended(two)["state"] == "done"
            assert add(two, "c", picture(3))["model"] == new_bundle.model_id
            np.testing.assert_array_equal(vector_of(two, "b"), vector_of(one, "b"))


def states(state: Path) -> list[str]:
    database = Database(state)
    with database.reading() as connection:
        found = [row.state for row in galleries_of(connection)]
    database.close()
    return found


def test_switch__that_was_cut_short_by_the_end_of_the_service_goes_on_or_is_removed(
    start_service: Start,
    link: Path,
    bundle: Bundle,
    new_bundle: Bundle,
    tmp_path: Path,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(successor, "CHUNK", 2)
    monkeypatch.setattr(switch, "configure_logging", lambda *_: None)
    monkeypatch.setenv("INVPROP_DECODER_PROCESSES", "1")
    state, embed = tmp_path / "state", EmbedOriginals.__call__
    for last in (False, True):
        with monkeypatch.context() as held:
            for service in start_service(state, of=open_bundle(link), originals="keep"):
                assert states_of(service) == ["active"]  # what was left is removed
                for n in range(6):
                    add(service, f"p{n}", picture(n))
                entered = threading.Event()
                stopping = service.client.app.state.runtime._switch._stopping

                def slow(
                    self: EmbedOriginals,
                    contents: Any,
                    entered: threading.Event = entered,
                    stopping: threading.Event = stopping,
                ) -> Any:
                    if contents:
                        entered.set()
                        assert stopping.wait(60)
                    return embed(self, contents)

                held.setattr(EmbedOriginals, "__call__", slow)
                move(link, new_bundle.directory)
                reload(service)
                assert entered.wait(60)
        assert states(state) == ["active", "building"]
        if not last:
            move(link, bundle.directory)
    assert switch.main(["--state", str(state), "--bundle", str(link)]) == 0
    assert states(state) == ["retired", "active"]
    for service in start_service(state, of=new_bundle):
        for n in range(6):
            np.testing.assert_allclose(
                vector_of(service, f"p{n}"), service.embedding(picture(n)), atol=1e-6
            )


def states_of(service: Any) -> list[str]:
    runtime = service.client.app.state.runtime
    service.client.portal.call(runtime.loaded.wait)
    with runtime._database.reading() as connection:
        return [row.state for row in galleries_of(connection)]
