"""What a recipe may say: pydantic models, read once at the door, never defaulted anywhere else.

In: a recipe's name or YAML path and `key=value` overrides. Out: a frozen `Recipe`, whose sections
are handed to the components; `as_dict` of it is stored with every checkpoint and bundle.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"

# What a resumed run may be given anew: these change neither the numbers (but for the rounding of
# sums, where rows are divided among processes otherwise) nor what they mean.
OPERATIONAL_KEYS = frozenset(
    {
        "data.workers",
        "data.resident_limit_bytes",
        "data.device_limit_bytes",
        "checkpoint.every_epochs",
        "checkpoint.keep",
        "checkpoint.keep_every_epochs",
        "bank.sharded",
        "export.variants",
        "export.calibration_images",
        "distributed.timeout_s",
        "speed.graph",
    }
)

Fraction = Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """A part of a recipe: read-only, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """How images are read and which are kept from training."""

    holdout: Annotated[float, Field(ge=0, le=0.5)]  # share kept for the kNN monitor, by class
    crop_fraction: Annotated[float, Field(gt=0, le=1)]  # of the short side, at evaluation
    max_skipped: Fraction  # share of unreadable files that a run accepts
    resident_limit_bytes: Annotated[int, Field(ge=0)]  # images held in memory; past it: decoded
    device_limit_bytes: Annotated[int, Field(ge=0)]  # and on a GPU; past it: copied batch by batch
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"]  # decoding processes
    decoder: Literal["pillow", "nvjpeg"]  # nvjpeg: on the GPU, anew for each batch


class AugmentConfig(Section):
    """The training view: one independent draw for every image."""

    crop_scale_min: Annotated[float, Field(gt=0, le=1)]  # least share of the area that is kept
    crop_scale_max: Annotated[float, Field(gt=0, le=1)]
    crop_ratio_max: Annotated[float, Field(ge=1, le=4)]  # width / height in [1 / this, this]
    flip: Fraction  # the probabilities of each; left and right
    vertical_flip: Fraction
    quarter_turns: Fraction  # of a turn by 0, 1, 2 or 3 quarters, each as likely
    jitter: Fraction
    gray: Fraction
    blur: Fraction
    brightness: Fraction  # factor drawn from [1 - this, 1 + this]
    contrast: Fraction
    saturation: Fraction
    hue: Annotated[float, Field(ge=0, le=0.5)]  # turn of the colour circle, in [-this, this]
    blur_sigma_min_px: Annotated[float, Field(gt=0, le=10)]
    blur_sigma_max_px: Annotated[float, Field(gt=0, le=10)]

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentConfig":
        for low, high in (
            ("crop_scale_min", "crop_scale_max"),
            ("blur_sigma_min_px", "blur_sigma_max_px"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}"
                )
        return self


class EncoderConfig(Section):
    """The network that is trained: backbone, projection head, size of its input."""

    backbone: Literal["small", "resnet18", "resnet50"]
    image_size_px: Annotated[int, Field(ge=8, le=512)]  # side of the square input
    head: Literal["linear", "mlp"]
    dim: Annotated[int, Field(ge=2, le=4096)] = 128  # D, of the embedding; the paper's
    normalise: bool  # batch norm without affine before the unit-length step (small sets collapse)


class BankConfig(Section):
    """The memory bank and its neighbour graph."""

    num_neighbours: Annotated[int, Field(ge=1, le=64)]  # k
    momentum: Annotated[float, Field(ge=0, lt=1)]  # share of the old row that is kept
    sharded: bool  # rows are divided among the processes, for banks that do not fit one GPU


class ObjectiveConfig(Section):
    """The two losses and how they are joined."""

    temperature: Annotated[float, Field(gt=0, le=10)]  # tau
    num_background: Annotated[int, Field(ge=1, le=1_048_576)]  # M, hard negatives
    steps: Annotated[int, Field(ge=1, le=8)]  # l, hops of propagation
    num_positives: Annotated[int, Field(ge=1, le=65_536)]  # P, hard positives
    mode: Literal["paper", "official"]
    positives: Literal["hard", "easy"]
    exclusive: bool  # official mode: the anchor is left out of the invariance denominator
    invariance_weight: Annotated[float, Field(ge=0, le=100)]  # lambda
    warmup_epochs: Annotated[int, Field(ge=0, le=100_000)]  # T, without the invariance loss


class OptimConfig(Section):
    """Stochastic gradient descent; the learning rate is a function of the epoch."""

    lr: Annotated[float, Field(gt=0, le=10)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    schedule: Literal["cosine", "official_cosine", "step"]  # trainer/schedule.py has the formulas
    milestones: tuple[Annotated[int, Field(ge=1)], ...]  # step: epochs after which lr falls
    gamma: Annotated[float, Field(gt=0, le=1)]  # step: to this share


class MonitorConfig(Section):
    """What is watched while training."""

    every_epochs: Annotated[int, Field(ge=1)]  # kNN accuracy, besides before and after training
    knn_k: Annotated[int, Field(ge=1, le=100_000)]  # neighbours that vote, where N allows
    knn_temperature: Annotated[float, Field(ge=0.01, le=10)]  # a vote weighs exp(similarity / this)
    knn_on: Literal["embedding", "features"]  # of the head (D), or of the backbone (F)
    max_images: Annotated[int, Field(ge=2)]  # bounds the cost: at most so many vote, and are asked
    max_anchors: Annotated[int, Field(ge=0)]  # whose propagation is looked at; 0: none
    collapse_patience: Annotated[int, Field(ge=1)]  # collapsed epochs in a row that stop the run


class CheckpointConfig(Section):
    """When the state is saved and how many are kept."""

    every_epochs: Annotated[int, Field(ge=1)]
    keep: Annotated[int, Field(ge=1, le=1000)]  # the newest so many, damaged ones not counted
    keep_every_epochs: Annotated[int, Field(ge=0)]  # of every so many epochs, for good; 0: none


class ExportConfig(Section):
    """What a bundle carries besides the float32 graph."""

    variants: tuple[Literal["fp16", "int8"], ...]  # the graph in other precisions
    calibration_images: Annotated[int, Field(ge=1, le=4096)]  # that set the ranges of int8


class DistributedConfig(Section):
    """Training with several processes; with one these change nothing."""

    sync_batchnorm: bool  # statistics of the joined batch instead of each process's share
    timeout_s: Annotated[int, Field(ge=1, le=86_400)]  # a process that is silent so long is lost


class SpeedConfig(Section):
    """How steps are launched; the off switches of what may fail on a machine."""

    compile: bool  # the encoder, by torch.compile: rounds in another way
    graph: Literal["auto", "off"]  # auto: one process on a GPU replays its steps as CUDA graphs


class Recipe(Section):
    """Everything that decides what a run computes."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=2, le=65_536)]
    # model_id of the bundle whose weights the run begins with; --warm-start writes it here
    warm_start: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    data: DataConfig
    augment: AugmentConfig
    encoder: EncoderConfig
    bank: BankConfig
    loss: ObjectiveConfig
    optim: OptimConfig
    monitor: MonitorConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    distributed: DistributedConfig
    speed: SpeedConfig

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as it stands in YAML and JSON."""
        return self.model_dump(mode="json")

    def by_key(self) -> dict[str, Any]:
        """The plain values by their dotted keys."""
        return dict(_leaves(self.as_dict(), ""))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides, whose values are read as YAML.

    Args:
        name_or_path: one of `recipe_names()`, or the path of a YAML file with every field.
        overrides: such as `epochs=5` or `loss.temperature=0.1`.

    Raises:
        RecipeError: no such recipe, an unknown or missing key, a value out of range.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if str(name_or_path) not in recipe_names():
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe {str(name_or_path)!r}: give one of {', '.join(recipe_names())}"
                " or the path of a YAML file"
            )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, origin=str(name_or_path))


def parse_recipe(values: Mapping[str, Any], *, origin: str) -> Recipe:
    """Check plain values against the models; `origin` says in messages where they came from."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors(include_url=False)]
        raise RecipeError(f"recipe {origin}: " + "; ".join(lines)) from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_keys() -> list[str]:
    """Every key of a recipe in dotted form."""
    return [key for key, _ in _fields(Recipe, "")]


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ and may not, when a run is resumed."""
    first, second = one.by_key(), other.by_key()
    return [key for key in first if first[key] != second[key] and key not in OPERATIONAL_KEYS]


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override is written key=value, got {override!r}")
    if key not in recipe_keys():
        raise RecipeError(f"{override!r}: {_unknown(key)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is no YAML: {error}") from error
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{override!r}: {section} is no section in this recipe")
    values[last] = value


def _explain(problem: Any) -> str:
    # A union adds the tag of its branch to the location; the key is the part that is a field.
    keys = recipe_keys()
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(parts)
    while parts and key not in keys and ".".join(parts[:-1]) in keys:
        parts.pop()
        key = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return _unknown(key)
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f"={problem['input']!r}"
    allowed = _allowed(key)
    return f"{key}{shown}: {message}" + (f" (allowed: {allowed})" if allowed else "")


def _unknown(key: str) -> str:
    keys = recipe_keys()
    same_end = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = same_end or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"there is no key {key!r}; did you mean {near[0]!r}?"


def _allowed(key: str) -> str:
    """The range of a field in words, read from its JSON schema; empty where it has none."""
    schema: Any = dict(_fields(Recipe, "")).get(key)
    if schema is None:
        return ""
    words = [_range(option) for option in schema.get("anyOf", [schema])]
    return " or ".join(word for word in words if word)


def _range(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "items" in schema:
        return f"each {_range(schema['items'])}"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    found = [f"{word} {schema[name]}" for name, word in bounds.items() if name in schema]
    return " and ".join(found)


def _fields(model: type[Section], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, properties[name]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
