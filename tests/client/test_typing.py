"""What a type checker says of a program that somebody writes with the installed package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import asyncio
from pathlib import Path

from client import AsyncClient, Client, ImageRejected, Neighbour
from client.progress import meter


def facts(item_id: str) -> dict[str, str]:
    return {"class": Path(item_id).parts[0]}


def best(service: Client, picture: Path) -> list[Neighbour]:
    found = service.neighbours(images=picture, k=5, filter={"class": ["a", "b"]})
    return [neighbour for row in found.results for neighbour in row]


with Client("http://127.0.0.1:8000", api_key="key") as service:
    told = meter("adding")
    done = service.add_folder("photos", metadata=facts, progress=told)
    told.close()
    version: int = done.gallery_version
    for neighbour in best(service, Path("photos/1.jpg")):
        group = service.groups(ids=neighbour.id, steps=2, min_gallery_version=version).results[0]
        print(neighbour.similarity + 1.0, group.members[0].via, group.reached)
    try:
        service.embed(["photos/1.jpg", b"bytes", Path("2.jpg").open("rb")])
    except ImageRejected as error:
        print(error.status, error.errors)
    ended = service.evaluations.wait(service.evaluations.submit("knn", "birds").id)
    print(ended.status.upper(), ended.report)


async def ask() -> int:
    async with AsyncClient("http://127.0.0.1:8000") as service:
        return len([item.id async for item in service.items()])


print(asyncio.run(ask()))
"""
WRONG = """\
from client import Client

service = Client("http://127.0.0.1:8000", key="x")
service.neighbours(ids=3)
service.groups(ids="a", order="closest")
"""


@pytest.mark.long
def test_typing__a_strict_checker_takes_a_program_and_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
    ]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path}", "right.py", "wrong.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    wrong = [line.split(": ")[0] for line in done.stdout.splitlines() if ": error:" in line]
    assert wrong == ["wrong.py:3", "wrong.py:4", "wrong.py:5"], done.stdout + done.stderr
