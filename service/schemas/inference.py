"""/v2: the Open Inference Protocol: server, model, tensors."""

from typing import Any

from pydantic import BaseModel

from service.schemas.fields import Vector


class Liveness(BaseModel):
    """The process is alive."""

    live: bool


class ModelReady(BaseModel):
    """The model answers."""

    ready: bool


class ServerMetadata(BaseModel):
    """What serves here."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or output; -1 for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model's inputs, of which a request gives one, and its outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferOutput(BaseModel):
    """One output; its values stand in `data` or, by binary_data_size, behind the JSON part."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Vector | None = None


class InferAnswer(BaseModel):
    """The answer of an inference."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]
