"""What each command does. In: a client and parsed arguments. Out: text, files and the exit code."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from client.blocking import Client
from client.errors import Rejected
from client.facts_file import read_facts
from client.models import Evaluation, Json
from client.output import Rows, rows_file
from client.paths import local_path, pictures_in
from client.progress import Meter, meter

# Pictures of one call: enough to keep several parts on their way.
PICTURES_AT_ONCE = 512


def info(service: Client, given: argparse.Namespace) -> int:
    found = service.info()
    if given.json:
        _json(dataclasses.asdict(found))
        return 0
    _line(f"service    {given.url}, invprop {found.versions.get('invprop', 'unknown')}")
    _line(f"model      {found.model}")
    _line(f"embedding  {found.dims['embedding']} numbers, features {found.dims['features']}")
    _line(f"runs on    {found.execution_provider}, {found.precision}")
    _line(f"gallery    {found.gallery['items']} items, version {found.gallery_version}")
    for name, limit in found.limits.items():
        _line(f"  {name:<28} {format(limit.limit, ',') if limit.limit else 'none':>14}")
    return 0


def embed(service: Client, given: argparse.Namespace) -> int:
    output = "features" if given.features else "embedding"
    failed = 0
    with _writer(given) as write, _metered("embedding") as told:
        done = 0
        files = _pictures(given.pictures)
        while part := list(islice(files, PICTURES_AT_ONCE)):
            names, contents = _read(part)
            failed += len(part) - len(names)
            if contents:
                found = service.embed(contents, output=output, on_error="skip")  # type: ignore[arg-type]
                failed += _complain(names, found.errors)
                bad = {error.index for error in found.errors}
                good = [n for n in range(len(names)) if n not in bad]
                write([names[n] for n in good], [found.embeddings[n] for n in good], None)
            done += len(part)
            told(done - failed, 0)
    return 1 if failed else 0


def add(service: Client, given: argparse.Namespace) -> int:
    facts = {} if given.metadata is None else read_facts(local_path(given.metadata))
    unused = set(facts)

    def facts_of(item_id: str) -> Json | None:
        unused.discard(item_id)
        return facts.get(item_id)

    code = _add(service, given, facts_of if facts else None)
    if unused:
        said = f"{len(unused)} of its {len(facts)} ids are of no picture that was given"
        _complaint(given.metadata, f"{said}, such as {min(unused)!r}")
    return 1 if unused else code


def _add(
    service: Client, given: argparse.Namespace, facts_of: Callable[[str], Json | None] | None
) -> int:
    if len(given.pictures) == 1 and given.pictures[0] != "-":
        folder = local_path(given.pictures[0])
        if folder.is_dir():
            with _metered("adding") as told:
                done = service.add_folder(
                    folder, journal=given.journal, metadata=facts_of, progress=told
                )
            for file in done.refused:
                _complaint(file.id, file.reason)
            if given.json:
                _json(dataclasses.asdict(done))
            else:
                _line(
                    f"added {done.added}, updated {done.updated}, already there {done.already}, "
                    f"refused {len(done.refused)}; gallery version {done.gallery_version}"
                )
            return 1 if done.refused else 0
    if given.journal:
        raise ValueError("--journal is for one folder")
    failed = added = updated = version = 0
    seen: set[str] = set()
    files = _pictures(given.pictures)
    while part := list(islice(files, PICTURES_AT_ONCE)):
        if twice := [name for name, _ in part if name in seen or seen.add(name)]:  # type: ignore[func-returns-value]
            raise ValueError(f"{twice[0]!r} is there twice")
        names, contents = _read(part)
        failed += len(part) - len(names)
        if contents:
            facts = None if facts_of is None else [facts_of(name) for name in names]
            answer = service.add(contents, ids=names, metadata=facts)
            added, updated = added + answer.added, updated + answer.updated
            version = answer.gallery_version
            for refused in answer.rejected:
                failed += 1
                _complaint(refused.id or "?", refused.reason)
    if given.json:
        counts = {"added": added, "updated": updated, "refused": failed, "gallery_version": version}
        _json(counts)
    else:
        _line(f"added {added}, updated {updated}, refused {failed}; gallery version {version}")
    return 1 if failed else 0


def neighbours(service: Client, given: argparse.Namespace) -> int:
    names, query = _query(given)
    wanted = _filter(given.filter)
    found = service.neighbours(**query, k=given.k, filter=wanted)
    for name, row in zip(names, found.results, strict=True):
        if given.json:
            near = [{"id": n.id, "similarity": n.similarity} for n in row]
            _json({"query": name, "exact": found.exact, "neighbours": near})
        else:
            for n in row:
                _line(f"{name}\t{n.similarity:.4f}\t{n.id}")
    return 0


def groups(service: Client, given: argparse.Namespace) -> int:
    names, query = _query(given)
    found = service.groups(
        **query, k=given.k, steps=given.steps, order=given.order, limit=given.limit
    )
    for name, group in zip(names, found.results, strict=True):
        if given.json:
            _json({"anchor": name, **dataclasses.asdict(group)})
        else:
            for m in group.members:
                _line(f"{name}\t{m.step}\t{m.similarity:.4f}\t{m.id}\t{m.via or ''}")
    return 0


def evaluate(service: Client, given: argparse.Namespace) -> int:
    if given.protocol is None:
        for dataset in service.datasets():
            if given.json:
                _json(dataclasses.asdict(dataset))
            else:
                _line(f"{dataset.name}\t{dataset.state}\t{dataset.task or dataset.problem or ''}")
        return 0
    if given.dataset is None:
        raise ValueError("name a data set too; `invprop evaluate` alone lists them")
    settings = dict(_pair(text, json.loads) for text in given.set)
    found = service.evaluations.submit(
        given.protocol, given.dataset, settings=settings, seed=given.seed
    )
    sys.stderr.write(f"evaluation {found.id}\n")
    if not given.no_wait:
        with _metered("evaluating") as told:
            for now in service.evaluations.events(found.id):
                found = now
                progress = now.progress or {}
                told.of(str(progress.get("stage") or now.status))
                told(int(progress.get("done") or 0), int(progress.get("total") or 0))
        found = service.evaluations.get(found.id)  # events leave the report out
    return _report(found, as_json=given.json)


def export(service: Client, given: argparse.Namespace) -> int:
    if given.no_vectors and (given.npy or given.parquet):
        raise ValueError("--no-vectors goes with JSON only")
    wanted = _filter(given.filter)
    items = service.items(filter=wanted, include_vectors=not given.no_vectors, page_size=1000)
    with _writer(given) as write, _metered("exporting") as told:
        done = 0
        while page := list(islice(items, 1000)):
            vectors = [] if given.no_vectors else [i.vector for i in page]
            write([i.id for i in page], vectors, [i.metadata for i in page])
            done += len(page)
            told(done, 0)
    return 0


def delete(service: Client, given: argparse.Namespace) -> int:
    ids: Iterable[str] = _from_stdin() if given.ids == ["-"] else given.ids
    done = service.delete_items(ids)
    for missing in done.missing:
        _complaint(missing, "no such item")
    _line(f"deleted {done.deleted}; gallery version {done.gallery_version}")
    return 1 if done.missing else 0


COMMANDS: dict[str, Callable[[Client, argparse.Namespace], int]] = {
    "info": info,
    "embed": embed,
    "add": add,
    "neighbours": neighbours,
    "groups": groups,
    "evaluate": evaluate,
    "export": export,
    "delete": delete,
}


def _report(found: Evaluation, *, as_json: bool) -> int:
    if as_json:
        _json(dataclasses.asdict(found))
    else:
        _line(f"{found.id}\t{found.status}")
        for name, value in _headline(found.report or {}):
            _line(f"  {name:<28} {value}")
        if found.error:
            _line(f"  {found.error}")
    return 1 if found.ended and found.status != "succeeded" else 0


def _headline(report: Json) -> Iterator[tuple[str, str]]:
    """What a report comes down to; --json has all of it."""
    head = report.get("headline") or {}
    if "value" not in head:
        return
    name = f"{head.get('metric', 'result')} ({head.get('result', report.get('protocol', ''))})"
    yield name, f"{head['value']:.4f}{_interval(head.get('interval'))}"
    if head.get("untrained") is not None:
        yield "of an untrained encoder", f"{head['untrained']:.4f}"
    if head.get("gain"):
        yield "gain", _interval(head["gain"]).strip()


def _interval(ends: Sequence[float] | None) -> str:
    return f"  {ends[0]:.4f} .. {ends[1]:.4f}" if ends else ""


class _writer:
    """Where rows go: a file, or JSON lines on stdout."""

    def __init__(self, given: argparse.Namespace) -> None:
        path = given.npy or given.parquet
        self._file = rows_file(Path(path), "npy" if given.npy else "parquet") if path else None

    def __enter__(self) -> Callable[[list[str], list[Any], list[Any] | None], None]:
        if self._file is None:
            return _write_lines
        rows: Rows = self._file.__enter__()
        return rows.write

    def __exit__(self, *failure: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*failure)


class _metered:
    """Progress on stderr, ended in any case."""

    def __init__(self, what: str) -> None:
        self._meter = meter(what)

    def __enter__(self) -> Meter:
        return self._meter

    def __exit__(self, *failure: Any) -> None:
        self._meter.close()


def _write_lines(ids: list[str], vectors: list[Any], metadata: list[Any] | None) -> None:
    for number, item_id in enumerate(ids):
        line: dict[str, Any] = {"id": item_id}
        if vectors:
            line["vector"] = [float(value) for value in vectors[number]]
        if metadata is not None:
            line["metadata"] = metadata[number]
        _json(line)


def _pictures(given: list[str]) -> Iterator[tuple[str, Path]]:
    """The name and place of each picture: as written, or that of its folder and its path in it."""
    for name in given:
        if name == "-":
            yield from _pictures(list(_from_stdin()))
            continue
        path = local_path(name)
        if path.is_dir():
            for file in pictures_in(path):
                yield Path(name, file.id).as_posix(), file.path
        else:
            yield path.as_posix(), path


def _from_stdin() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _read(files: list[tuple[str, Path]]) -> tuple[list[str], list[bytes]]:
    """Names and contents of those that can be read; the others are complained of."""
    names, contents = [], []
    for name, path in files:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            _complaint(name, f"cannot be read: {error.strerror or error}")
        else:
            names.append(name)
    return names, contents


def _query(given: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    if bool(given.ids) == bool(given.pictures):
        raise ValueError("give pictures, or items with --id")
    if given.ids:
        return given.ids, {"ids": given.ids}
    files = list(_pictures(given.pictures))
    return [name for name, _ in files], {"images": [path for _, path in files]}


def _filter(pairs: list[str]) -> dict[str, Any] | None:
    """FIELD=VALUE; a value that is JSON is taken as such, others as text."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return dict(_pair(text, value) for text in pairs) or None


def _pair(text: str, value: Callable[[str], Any]) -> tuple[str, Any]:
    name, sign, rest = text.partition("=")
    if not sign:
        raise ValueError(f"wanted NAME=VALUE, got {text!r}")
    return name, value(rest)


def _complain(names: list[str], errors: tuple[Rejected, ...]) -> int:
    for error in errors:
        _complaint(names[error.index], error.reason)
    return len(errors)


def _complaint(name: str, reason: str) -> None:
    sys.stderr.write(f"{name}: {reason}\n")


def _json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
