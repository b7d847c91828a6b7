"""/evaluations: what is accepted ends, what cannot be run is refused by name."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs import Jobs

ASKED = {"protocol": "knn", "dataset": "flowers", "settings": {"k": [1]}, "seed": 3}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("rose", "tulip"):
        (folder / "flowers" / name).mkdir(parents=True)
    (folder / "datasets.yaml").write_text("flowers: {kind: folder, root: flowers}\n")
    return folder / "datasets.yaml"


@pytest.fixture
def service(
    start_service: Callable[..., Iterator[Any]], datasets: Path, tmp_path: Path
) -> Iterator[Any]:
    yield from start_service(tmp_path / "state", datasets=datasets, evaluation_streams=1)


@pytest.fixture
def jobs(service: Any, tmp_path: Path) -> Iterator[Jobs]:
    """A worker's view of the table."""
    opened = Jobs(tmp_path / "state")
    yield opened
    opened.close()


def refused(answer: Any, status: int, code: str) -> dict[str, Any]:
    document: dict[str, Any] = answer.json()
    assert (answer.status_code, document["code"]) == (status, code), document
    return document


def test_evaluation__from_the_request_to_the_report(service: Any, jobs: Jobs) -> None:
    client = service.client
    answer = client.post("/evaluations", json=ASKED)
    accepted = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/evaluations/{accepted['id']}"
    expected = {
        **ASKED,
        "status": "queued",
        "model": service.bundle.model_id,
        "queue": "cpu",
        "attempts": 0,
        "progress": None,
        "report": None,
        "error": None,
        "started_at": None,
        "waiting_for": "a worker of the queue cpu",
    }
    assert {name: accepted[name] for name in expected} == expected
    where = f"/evaluations/{accepted['id']}"
    assert client.get(where).json() == accepted
    not_ready = refused(client.get(f"{where}/report"), 409, "evaluation_not_ready")
    assert not_ready["state"] == "queued"

    jobs.seen("worker", ["cpu"])
    lease = jobs.lease(accepted["id"], "worker")
    assert lease is not None
    assert jobs.beat(accepted["id"], lease.fence, {"stage": "fit", "done": 1, "total": 4}).held
    running = client.get(where).json()
    assert (running["status"], running["waiting_for"]) == ("running", None)
    assert running["progress"] == {"stage": "fit", "done": 1, "total": 4}
    assert jobs.succeed(accepted["id"], lease.fence, b'{"top1": 0.5}', b"<p>done</p>")
    ended = client.get(where).json()
    assert (ended["status"], ended["report"]) == ("succeeded", {"top1": 0.5})
    page = client.get(f"{where}/report")
    assert (page.text, page.headers["content-type"]) == ("<p>done</p>", "text/html; charset=utf-8")
    assert "sandbox" in page.headers["content-security-policy"]
    assert "script" not in page.headers["content-security-policy"]
    (listed,) = client.get("/evaluations?status=succeeded").json()["items"]
    assert listed == {**ended, "report": None}


def test_evaluations__stay_in_the_database_beside_a_gallery_in_milvus(
    start_service: Callable[..., Iterator[Any]],
    new_collection: Callable[[], str],
    new_database: Callable[[], str],
    datasets: Path,
    tmp_path: Path,
) -> None:
    """Two services of different hosts on one collection, and a worker that sees the database."""
    url = new_database()
    shared = {
        "database": url,
        "datasets": datasets,
        "gallery": new_collection(),
        "thumbnails": False,
        "follow_interval_s": 0.02,
    }
    jobs = Jobs(tmp_path / "worker", url)
    for one in start_service(tmp_path / "one", **shared):
        for two in start_service(tmp_path / "two", **shared):
            accepted = one.client.post("/evaluations", json=ASKED).json()
            where = f"/evaluations/{accepted['id']}"
            assert two.client.get(where).json()["status"] == "queued"
            lease = jobs.lease(accepted["id"], "worker")
            assert lease is not None
            assert jobs.succeed(accepted["id"], lease.fence, b'{"top1": 0.5}', b"<p>done</p>")
            for service in (one, two):
                assert service.client.get(where).json()["report"] == {"top1": 0.5}
                assert not (service.state / "evaluations.sqlite3").exists()
    jobs.close()


def test_events__are_the_evaluation_until_it_has_ended(service: Any, jobs: Jobs) -> None:
    accepted = service.client.post("/evaluations", json=ASKED).json()
    lease = jobs.lease(accepted["id"], "worker")
    assert lease is not None
    seen = []
    with service.client.stream("GET", f"/evaluations/{accepted['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
                if len(seen) == 1:  # only now: the state before it was seen
                    error = {"code": "killed", "message": "x", "log": "y"}
                    assert jobs.fail(accepted["id"], lease.fence, error)
    assert [each["status"] for each in seen] == ["running", "failed"]
    assert seen[-1]["error"] == {"code": "killed", "message": "x", "log": "y"}
    # One stream at a time is allowed here; the first one has ended.
    with service.client.stream("GET", f"/evaluations/{accepted['id']}/events") as answer:
        assert len([line for line in answer.iter_lines() if line.startswith("data")]) == 1
    refused(service.client.get("/evaluations/none/events"), 404, "evaluation_not_found")


def test_cancel__ends_what_nobody_works_on(service: Any) -> None:
    accepted = service.client.post("/evaluations", json=ASKED).json()
    where = f"/evaluations/{accepted['id']}"
    assert service.client.delete(where).json()["status"] == "cancelled"
    assert service.client.delete(where).json()["status"] == "cancelled"
    refused(service.client.delete("/evaluations/none"), 404, "evaluation_not_found")


def test_cancel__ends_what_a_dead_worker_holds(
    service: Any, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.CANCEL_S", 0.3)  # the sweep is due in 15 s
    accepted = service.client.post("/evaluations", json=ASKED).json()
    lease = jobs.lease(accepted["id"], "dead")
    assert lease is not None
    where = f"/evaluations/{accepted['id']}"
    assert service.client.delete(where).json()["status"] == "running"
    with service.client.stream("GET", f"{where}/events") as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    ended = json.loads(lines[-1].removeprefix("data: "))
    assert (ended["status"], ended["error"]) == ("cancelled", None)
    assert ended["finished_at"] - ended["started_at"] < 10
    assert not jobs.succeed(accepted["id"], lease.fence, b"{}", b"")


def test_key__gives_the_same_evaluation(service: Any) -> None:
    def post(body: Any) -> Any:
        return service.client.post("/evaluations", json=body, headers={"Idempotency-Key": "k"})

    first, again = post(ASKED), post(ASKED)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    refused(post({**ASKED, "seed": 4}), 409, "idempotency_conflict")


def test_list__is_paged(service: Any) -> None:
    ids = [service.client.post("/evaluations", json=ASKED).json()["id"] for _ in range(3)]
    first = service.client.get("/evaluations?limit=2").json()
    assert [each["id"] for each in first["items"]] == ids[:0:-1]
    last = service.client.get(f"/evaluations?limit=2&cursor={first['next']}").json()
    assert ([each["id"] for each in last["items"]], last["next"]) == (ids[:1], None)
    refused(service.client.get("/evaluations?status=asleep"), 422, "invalid_request")
    refused(service.client.get("/evaluations?limit=100000"), 422, "limit_exceeded")


@pytest.mark.parametrize(
    ("change", "status", "code", "detail"),
    [
        ({"protocol": "magic"}, 422, "invalid_request", "there are detection, knn, linear_probe"),
        ({"dataset": "birds"}, 404, "dataset_not_found", "there are flowers"),
        ({"dataset": "../flowers"}, 404, "dataset_not_found", "'../flowers'"),
        ({"settings": {"k": [0]}}, 422, "invalid_request", "settings.k.0: 0 is less than"),
        ({"settings": {"K": [1]}}, 422, "invalid_request", "there is no key 'K'"),
        ({"settings": {"temperature": 99}}, 422, "invalid_request", "settings.temperature: 99"),
        ({"settings": {"k": [1, 1]}}, 422, "invalid_request", "settings.k: [1,1] has non-unique"),
        ({"settings": {"k": "7" * 70_000}}, 413, "body_too_large", "more than 65,536"),
        ({"seed": -1}, 422, "invalid_request", "seed"),
        ({"seed": 2**32}, 422, "invalid_request", "seed"),
        ({"bundle": "/etc"}, 422, "invalid_request", "bundle"),
        ({"device": "cuda"}, 409, "no_such_worker", "-Q gpu"),
    ],
)
def test_submit__refuses_by_name(
    service: Any, change: dict[str, Any], status: int, code: str, detail: str
) -> None:
    found = refused(service.client.post("/evaluations", json={**ASKED, **change}), status, code)
    assert detail in found["detail"]
    assert service.client.get("/evaluations").json()["items"] == []


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ('{"protocol": "knn", "dataset": "flowers", "seed": 1, "seed": 2}', "the key 'seed' twice"),
        (
            '{"protocol": "knn", "dataset": "flowers", "settings": {"k": [1], "k": [2]}}',
            "the key 'k' twice",
        ),
        (
            '{"protocol": "knn", "dataset": "flowers", "settings": {"k": '
            + "[" * 1015
            + "]" * 1015
            + "}}",
            "nested too deeply",
        ),
    ],
)
def test_submit__refuses_what_is_said_twice(service: Any, text: str, detail: str) -> None:
    json_type = {"Content-Type": "application/json"}
    answer = service.client.post("/evaluations", content=text, headers=json_type)
    assert detail in refused(answer, 400, "bad_request")["detail"]
    assert service.client.get("/evaluations").json()["items"] == []


def test_gpu__is_accepted_where_a_worker_of_it_was_seen(service: Any, jobs: Jobs) -> None:
    jobs.seen("there", ["gpu"])
    asked = {**ASKED, "device": "cuda"}
    assert service.client.post("/evaluations", json=asked).json()["queue"] == "gpu"


def test_pending__are_bounded(
    start_service: Callable[..., Iterator[Any]], datasets: Path, tmp_path: Path
) -> None:
    for service in start_service(tmp_path / "state", datasets=datasets, evaluations_pending=1):
        assert service.client.post("/evaluations", json=ASKED).status_code == 202
        found = refused(service.client.post("/evaluations", json=ASKED), 429, "queue_full")
        assert found["setting"] == "evaluations_pending"


def test_broker__that_is_away_makes_nobody_wait(
    start_service: Callable[..., Iterator[Any]], datasets: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        _check_broker(start_service, datasets, tmp_path, silent.getsockname()[1])


def _check_broker(start_service: Any, datasets: Path, tmp_path: Path, port: int) -> None:
    broker = f"redis://:secret@127.0.0.1:{port}/0"
    for service in start_service(tmp_path / "state", datasets=datasets, broker=broker):
        accepted = service.client.post("/evaluations", json=ASKED)
        assert (accepted.status_code, accepted.json()["status"]) == (202, "queued")
        assert service.client.get("/evaluations").json()["items"][0]["id"] == accepted.json()["id"]
