"""GET /datasets: the labelled data sets that the operator registered. Names no path."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.answers import json_bytes, json_response
from service.dataset_file import RegisteredDataset
from service.openapi import problems
from service.routes.access import runtime_of
from service.runtime import Runtime
from service.schemas.evaluations import DatasetList

router = APIRouter(tags=["evaluations"])


@router.get(
    "/datasets",
    response_model=DatasetList,
    responses=problems(429, 503),
    summary="List the labelled data sets",
)
async def list_datasets(request: Request) -> Response:
    """Answers at once, whatever is known: a data set that was never opened is `counting`."""
    runtime = runtime_of(request)
    answer = await runtime.compute(_listed, runtime)  # looks at a file
    return json_response(json_bytes(answer))


def _listed(runtime: Runtime) -> dict[str, Any]:
    registered = runtime.datasets
    items = [_described(runtime, dataset) for dataset in registered.all()]
    return {"items": items, "problem": registered.problem, "next": None}


def _described(runtime: Runtime, dataset: RegisteredDataset) -> dict[str, Any]:
    known = runtime.dataset_counts.look(dataset)
    found = known.description
    return {
        "name": dataset.name,
        "kind": dataset.kind,
        "state": known.state,
        "task": found and found.task,
        "classes": found and found.classes,
        "class_names": found and found.class_names,
        "counts": found and found.counts,
        "divided_by_seed": found and found.divided_by_seed,
        "fingerprint": found and found.fingerprint,
        "problem": known.problem,
    }
