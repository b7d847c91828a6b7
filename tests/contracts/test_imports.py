"""Who may import whom: the table of rooms, executed over every source file.

A line that is missing here is a decision to be made, not a test to be mended.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Room:
    """What the files of a room may import besides the standard library."""

    own: tuple[str, ...]  # packages of this repository, with everything below them
    outside: frozenset[str]  # top-level names


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The longest matching path decides.
ROOMS = {
    "trainer/representation": Room(
        ("trainer.representation",), names("numpy PIL array_api_compat")
    ),
    "trainer": Room(
        ("trainer",),
        names(
            "torch torchvision kornia numpy PIL pydantic yaml onnx onnxruntime sklearn "
            "torchmetrics pycocotools safetensors rich tqdm tensorboard webdataset pyarrow datasets"
        ),
    ),
    "service": Room(
        ("service", "trainer.representation"),
        names(
            "fastapi starlette uvicorn pydantic pydantic_settings onnxruntime faiss celery kombu "
            "jsonschema_rs sqlalchemy numpy PIL prometheus_client yaml orjson structlog limits "
            "psycopg pyarrow sklearn umap"
        ),
    ),
    "service/doorbell.py": Room(("service",), names("celery kombu amqp redis structlog")),
    "service/gallery/milvus.py": Room(
        ("service", "trainer.representation"), names("pymilvus numpy")
    ),
    "client": Room(("client",), names("numpy PIL")),
    "client/output.py": Room(("client",), names("pyarrow")),
    "client/tables.py": Room(("client",), names("pandas")),
    "client/transport.py": Room(("client",), names("httpx2")),
}
SOURCES = sorted(
    path.relative_to(ROOT)
    for room in ("trainer", "service", "client")
    for path in (ROOT / room).rglob("*.py")
)


def room_of(path: Path) -> Room:
    fitting = [name for name in ROOMS if path.is_relative_to(name)]
    return ROOMS[max(fitting, key=len)]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file, wherever it stands: at the top, in a function, for types only."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                parent = path.parents[node.level - 1]
                package = ".".join((*parent.parts, *filter(None, [package])))
            # `from trainer import export` is trainer.export, `from numpy import array` is numpy.
            for alias in node.names:
                below = ROOT.joinpath(*package.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield node.lineno, f"{package}.{alias.name}" if is_module else package


def allowed(module: str, room: Room) -> bool:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in room.outside:
        return True
    return any(module == own or module.startswith(own + ".") for own in room.own)


def test_sources__are_found() -> None:
    assert {path.parts[0] for path in SOURCES} == {"trainer", "service", "client"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports__are_in_the_table(path: Path) -> None:
    room = room_of(path)
    wrong = [
        f"{path}:{line} imports {name}" for line, name in imported(path) if not allowed(name, room)
    ]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports__go_by_no_other_way(path: Path) -> None:
    hidden = [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr)
        in ("__import__", "import_module")
    ]
    assert not hidden


def test_trainer_package__is_empty() -> None:
    assert (ROOT / "trainer" / "__init__.py").read_bytes().strip() == b""


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("service.app", {"torch", "torchvision", "httpx2", "pymilvus"}),
        ("service.run", {"torch", "torchvision", "httpx2"}),
        ("trainer.representation.propagation", {"torch", "pydantic", "onnxruntime"}),
        ("trainer.run", {"torch"}),  # decoding processes are spawned from it
        ("client", {"torch", "numpy", "PIL", "pydantic"}),
    ],
)
def test_import__does_not_reach(module: str, unwanted: set[str]) -> None:
    code = f"import {module}, sys; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_pixel_mean_and_std__stand_in_one_place() -> None:
    # ImageNet's and CIFAR's first channels: whoever writes a mean down writes one of these.
    known = re.compile(r"0\.485\b|0\.229\b|0\.4914|0\.2023|0\.2470|123\.675|58\.395")
    found = [
        f"{path}: {line.strip()}"
        for room in ("trainer", "service", "client", "deploy")
        for path in sorted((ROOT / room).rglob("*"))
        if path.suffix in (".py", ".yaml", ".yml", ".json", ".sh", "") and path.is_file()
        for line in path.read_text().splitlines()
        if known.search(line)
    ]
    assert len(found) == 2, found  # one line for the mean, one for the standard deviation
    assert all("trainer/encoder.py" in line for line in found)
