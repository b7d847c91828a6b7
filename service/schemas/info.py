"""What the service says of itself: GET /info and whether it is ready."""

from typing import Any

from pydantic import BaseModel, Field


class Readiness(BaseModel):
    """What the service waits for."""

    status: str
    checks: dict[str, str]


class LimitInfo(BaseModel):
    """A limit of requests."""

    limit: int | float
    setting: str


class InfoAnswer(BaseModel):
    """What is running here."""

    model: str
    gallery_version: int
    dims: dict[str, int]
    input: dict[str, Any]
    training: dict[str, Any] | None
    parity: dict[str, Any] | None
    execution_provider: str
    precision: str = Field(description="Of the graph that embeds: fp32, fp16 or int8.")
    variants: dict[str, Any] = Field(
        description="The bundle's other precisions: how far each is from fp32, or why it is absent."
    )
    speed: dict[str, Any] | None = Field(
        description="Images per second of each precision, timed at the export on its machine."
    )
    search: dict[str, Any]
    gallery: dict[str, Any]
    limits: dict[str, LimitInfo]
    versions: dict[str, str]
