"""How routes describe, in the OpenAPI document, the bodies and problems that FastAPI does not see.

The checked-in copy of the document is written by service.write_openapi.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from service.errors import MEDIA_TYPE, PROBLEMS
from service.policy import Policy, Role
from service.schemas.problem import ProblemDocument

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_FILES = {
    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
}
_MULTIPART = {
    "type": "object",
    "required": ["images"],
    "properties": _IMAGE_FILES,
    "additionalProperties": False,
}


def body_of(model: type[BaseModel], accepted: Sequence[str]) -> dict[str, Any]:
    """The requestBody of a route: `model` for the JSON kinds, binary for the others."""
    schema = model.model_json_schema()
    content: dict[str, Any] = {}
    for kind in accepted:
        if kind.startswith("multipart/"):
            content[kind] = {"schema": _with_metadata(schema)}
        elif "json" in kind:
            content[kind] = {"schema": schema}
        else:
            content[kind] = _BINARY
    return {"requestBody": {"required": True, "content": content}}


def _with_metadata(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The form; /items also takes metadata beside the images."""
    if "metadata" not in schema["properties"]:
        return _MULTIPART
    described = {
        "type": "string",
        "minLength": 2,
        "description": "JSON list aligned with the images",
    }
    return {**_MULTIPART, "properties": {**_IMAGE_FILES, "metadata": described}}


def describe_admission(document: dict[str, Any]) -> None:
    """Add what every route may answer before it is reached, and the key that it wants."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    policy = Policy()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            role = policy.place(path).roles.get(method.upper(), Role.WRITE)
            statuses = {400, 408, 414, 415, 429, 431, 503}
            if role is not Role.OPEN:
                statuses |= {401, 403}
                # Either key; none, where the operator has configured none.
                operation["security"] = [{"bearer": []}, {"header": []}, {}]
                operation["x-role"] = role.name.lower()
            if "requestBody" in operation:
                statuses |= {413}
            responses = operation["responses"]
            for status, described in problems(*statuses).items():
                responses.setdefault(str(status), described)


def problems(
    *statuses: int, alternatives: Mapping[int, Iterable[str]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, with the codes that each status may carry.

    Args:
        alternatives: status -> further media types of a good answer, binary.
    """
    described: dict[int | str, dict[str, Any]] = {}
    schema = {"$ref": f"#/components/schemas/{ProblemDocument.__name__}"}
    for status in statuses:
        codes = [code for code, (at, _) in PROBLEMS.items() if at == status]
        described[status] = {
            "description": f"Problem: {', '.join(codes)}",
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
    for status, kinds in (alternatives or {}).items():
        described[status] = {"content": dict.fromkeys(kinds, _BINARY)}
    return described
