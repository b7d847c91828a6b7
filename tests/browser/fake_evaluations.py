"""The evaluation routes of http-api.md, faked in the browser: fixed answers, one job that runs."""

import json
import re
from typing import Any

DATASETS = [
    {
        "name": "digits",
        "kind": "folder",
        "state": "ready",
        "task": "single_label",
        "classes": 3,
        "class_names": ["a", "<b>", "c"],
        "counts": {"train": 120, "test": 60},
        "problem": None,
    },
    {
        "name": "voc",
        "kind": "voc",
        "state": "counting",
        "task": "multi_label",
        "classes": None,
        "class_names": None,
        "counts": None,
        "problem": None,
    },
]


def report(value: float, seed: int) -> dict[str, Any]:
    """A report of trainer.evaluation.report's shape, its interval 0.04 either way."""
    return {
        "schema": "invprop.evaluation/1",
        "protocol": "knn",
        "seed": seed,
        "settings": {"k": [20]},
        "model_id": "ab" * 32,
        "dataset": {
            "name": "digits",
            "kind": "folder",
            "fingerprint": "f" * 64,
            "class_names": ["a", "<b>", "c"],
            "splits": {"train": 120, "test": 60},
        },
        "headline": {
            "result": "k = 20, embedding",
            "metric": "top1",
            "value": value,
            "interval": [value - 0.04, value + 0.04],
            "untrained": 0.31,
            "gain": [0.4, 0.5],
        },
        "results": [
            {
                "name": "k = 20, embedding",
                "metrics": {"top1": value},
                "intervals": {"top1": [value - 0.04, value + 0.04]},
                "untrained": {"top1": 0.31},
                "per_class": [],
                "confusion": [[18, 2, 0], [1, 19, 0], [0, 3, 17]],
                "mistakes": [
                    {"id": "c/<7>.png", "row": 1, "label": "c", "predicted": "<b>", "margin": 0.2}
                ],
                "facts": {},
            }
        ],
        "curves": [
            {
                "title": "Accuracy by k",
                "unit": "%",
                "x": "k",
                "lines": {"embedding": [[1, 80.0], [20, 84.0], [200, 79.5]]},
            }
        ],
        "facts": {},
        "durations_s": {"features": 1.0},
        "environment": {"device": "cpu"},
    }


def job(name: str, status: str, **more: Any) -> dict[str, Any]:
    """One evaluation as GET /evaluations/{id} answers it."""
    return {
        "id": name,
        "protocol": "knn",
        "dataset": "digits",
        "settings": {},
        "seed": 0,
        "status": status,
        "progress": None,
        "attempts": 1,
        "created_at": 1795687200.25,
        "started_at": None,
        "finished_at": None,
        **more,
    }


class FakeEvaluations:
    """Answers for `page.route`; remembers what was asked."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.jobs = {
            "one": job("one", "succeeded", report=report(0.84, 0)),
            "two": job("two", "succeeded", report=report(0.87, 1)),
            "bad": job("bad", "failed", error={"code": "dataset_invalid", "message": "no <i>"}),
            "slow": job("slow", "running", progress={"stage": "features", "done": 1, "total": 4}),
        }

    def install(self, page: Any) -> None:
        """Answer the routes on a page."""
        page.route("**/datasets", lambda r: r.fulfill(json={"items": DATASETS, "next": None}))
        page.route(re.compile(r"/evaluations(/|\?|$)"), self._answer)

    def _answer(self, route: Any) -> None:
        request = route.request
        path = request.url.partition("/evaluations")[2].partition("?")[0].strip("/")
        name, _, rest = path.partition("/")
        if request.method == "POST":
            self.posted.append(json.loads(request.post_data))
            assert len(request.headers["idempotency-key"]) == 32
            self.jobs["new"] = job("new", "queued")
            route.fulfill(status=202, json={"id": "new", "status": "queued"})
        elif request.method == "DELETE":
            self.cancelled.append(name)
            self.jobs[name] = job(name, "cancelled")
            route.fulfill(json=self.jobs[name])
        elif rest == "events":
            route.fulfill(content_type="text/event-stream", body=self._events(name))
        elif not name:
            listed = [each | {"report": None} for each in self.jobs.values()]
            route.fulfill(json={"items": listed, "next": None})
        else:
            route.fulfill(json=self.jobs[name])

    def _events(self, name: str) -> str:
        """What a stream says before it ends: `new` runs and succeeds, `slow` goes on."""
        if name != "new":
            return ": still here\n\n"
        running = job("new", "running", progress={"stage": "features", "done": 3, "total": 4})
        self.jobs["new"] = job("new", "succeeded", report=report(0.9, 0))
        said = [running, job("new", "succeeded")]
        return "".join(f"event: state\r\ndata: {json.dumps(each)}\r\n\r\n" for each in said)
