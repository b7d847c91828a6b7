"""The document that every error is."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ProblemDocument(BaseModel):
    """RFC 9457; further members depend on the code."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    limit: int | float | None = None
    setting: str | None = None
    errors: list[dict[str, Any]] | None = None
