"""The file of labelled data sets that an operator writes, read and checked.

In: a YAML file, name -> {kind, root, ...}: the keys of a job's `dataset`, checked against
evaluation_job.schema.json, which is written from the trainer's own models. Out: the data sets by
name, as plain values for job.json; relative paths start at the file's folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import yaml

SCHEMA = Path(__file__).with_name("evaluation_job.schema.json")
MAX_BYTES = 2**20  # of the file
MAX_DATASETS = 1000
PATHS = ("root", "images")  # the keys that hold paths


class RegistryError(Exception):
    """A file that registers nothing; says which entry and key, what was got and is wanted."""


@dataclass(frozen=True)
class RegisteredDataset:
    """One data set, as registered.

    Attributes:
        values: a job's `dataset` with absolute paths.
    """

    name: str
    kind: str
    values: Mapping[str, Any]

    def spec(self) -> dict[str, Any]:
        """The `dataset` of a job.json: plain values, of the caller's own."""
        copied: dict[str, Any] = orjson.loads(orjson.dumps(dict(self.values)))
        return copied


def read_registry(file: Path) -> dict[str, RegisteredDataset]:
    """The data sets of a file by name. Whether their data are there is not looked at.

    Raises:
        RegistryError: no such file, no YAML, an unknown or missing key, a value out of range.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RegistryError(f"{file} has more than {MAX_BYTES:,} bytes")
        entries = yaml.load(content, Loader=_Once)
    except OSError as error:
        raise RegistryError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise RegistryError(f"{file} is no YAML: {error}") from error
    if entries is None:
        return {}
    if not isinstance(entries, dict) or len(entries) > MAX_DATASETS:
        raise RegistryError(
            f"{file}: wanted at most {MAX_DATASETS} data sets, `name: {{kind: ..., root: ...}}`, "
            f"got {len(entries) if isinstance(entries, dict) else type(entries).__name__}"
        )
    start = file.absolute().parent
    return {str(name): _registered(file, name, entry, start) for name, entry in entries.items()}


def _registered(file: Path, name: Any, entry: Any, start: Path) -> RegisteredDataset:
    where = f"{file}: data set {name!r}"
    if not isinstance(name, str):
        raise RegistryError(f"{where}: a name is a text; put it into quotes")
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise RegistryError(f"{where}: wanted keys with values, kind and root at least")
    if "name" in entry:
        raise RegistryError(f"{where}: there is no key 'name': the entry has its name already")
    kinds = _kinds()
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        got = "kind is missing" if kind is None else f"kind={kind!r}"
        raise RegistryError(f"{where}: {got}; wanted one of {', '.join(sorted(kinds))}")
    values = {"name": name, **entry}
    for key in PATHS:
        if isinstance(values.get(key), str):
            values[key] = str(start / values[key])
    problems = [_explain(problem, kinds[kind].known) for problem in _problems(kind, values)]
    if problems:
        raise RegistryError(f"{where}: {'; '.join(problems)}")
    return RegisteredDataset(name, kind, values)


@dataclass(frozen=True)
class _Kind:
    """What the schema says of a kind of data set."""

    known: tuple[str, ...]  # the keys it takes
    validator: jsonschema_rs.Draft202012Validator


@cache
def _kinds() -> Mapping[str, _Kind]:
    """Every kind that the trainer's models have."""
    definitions = orjson.loads(SCHEMA.read_bytes())["$defs"]
    return {
        model["properties"]["kind"]["const"]: _Kind(
            tuple(sorted(model["properties"].keys() - {"name"})),
            jsonschema_rs.Draft202012Validator(
                {"$ref": f"#/$defs/{title}", "$defs": definitions},
            ),
        )
        for title, model in definitions.items()
        if "const" in model["properties"].get("kind", {})
    }


def _problems(kind: str, values: Mapping[str, Any]) -> list[jsonschema_rs.ValidationError]:
    try:
        return list(_kinds()[kind].validator.iter_errors(values))
    except ValueError as error:  # YAML knows dates, JSON does not
        raise RegistryError(f"data set {values['name']!r}: {error}") from None


def _explain(problem: jsonschema_rs.ValidationError, known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in problem.instance_path)
    kinds = jsonschema_rs.ValidationErrorKind
    if isinstance(problem.kind, kinds.AnyOf):  # what may also be null: told as if it might not
        (branch, *_) = problem.kind.context
        return "; ".join(_explain(each, known) for each in branch)
    if isinstance(problem.kind, kinds.AdditionalProperties):
        strange = ", ".join(map(repr, problem.kind.unexpected))
        inside = f" in {key}" if key else ""
        takes = "" if key else f"; this kind takes {', '.join(known)}"
        return f"there is no key {strange}{inside}{takes}"
    if isinstance(problem.kind, kinds.Required):
        return f"{problem.kind.property} is missing"
    return f"{key}: {problem.message}"


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice; yaml would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
