"""What the READMEs name exists: files, links, commands, flags, routes, Python.

tests/end_to_end/test_readme_examples.py runs the examples of the first pages.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("trainer", "service", "client", "deploy", "tests")
CHAPTERS = [ROOT / room / "README.md" for room in ROOMS]
PAGES = [ROOT / "README.md", *(chapter for chapter in CHAPTERS if chapter.is_file())]


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code(page: Path) -> list[str]:
    """Fenced and indented blocks line by line, and code between backticks."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)$", text, re.MULTILINE)
    return [*"".join(fenced).splitlines(), *indented, *re.findall(r"`([^`\n]+)`", text)]


@cache
def help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_pages__every_room_has_its_chapter() -> None:
    assert [title(chapter) for chapter in CHAPTERS if not chapter.is_file()] == []


def test_tree__names_every_room_and_no_other() -> None:
    table = (ROOT / "README.md").read_text().partition("## The tree")[2].partition("\n## ")[0]
    named = re.findall(r"^\| \[(\w+)/\]\((\w+)/README\.md\)", table, re.MULTILINE)
    assert sorted(name for name, _ in named) == sorted(ROOMS)
    assert all(name == target for name, target in named)
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} | {"deploy", "tests"}
    assert folders - {"build"} <= set(ROOMS)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links__lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_paths__exist(page: Path) -> None:
    rooms = "|".join(ROOMS)
    path = re.compile(rf"(?<![\w./-])(?:\./)?((?:{rooms})/[\w./-]*)")
    named = {name.rstrip(".") for text in code(page) for name in path.findall(text)}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_commands__are_executable(page: Path) -> None:
    scripts = {
        name for text in code(page) for name in re.findall(r"\./((?:deploy|tests)/\w+)", text)
    }
    assert all(os.access(ROOT / name, os.X_OK) for name in scripts)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_modules__and_their_flags_exist(page: Path) -> None:
    wrong = []
    for line in code(page):
        found = re.search(r"-m ((?:trainer|service|client)[\w.]*)(.*)", line)
        if found is None:
            continue
        module, rest = found.groups()
        if importlib.util.find_spec(module) is None:
            wrong.append(module)
            continue
        for flag in re.findall(r"(?<!\S)\[?(--[\w-]+)", rest):
            if not re.search(rf"{flag}(?![\w-])", help_of(module)):
                wrong.append(f"{module} {flag}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_urls__are_routes_of_the_service(page: Path) -> None:
    paths = json.loads((ROOT / "service" / "openapi.json").read_bytes())["paths"]
    served = {re.sub(r"\{.*", "", path).rstrip("/") for path in paths}
    served |= {"", "/docs", "/openapi.json"}
    named = re.findall(r"http://127\.0\.0\.1:8000([\w/-]*)", page.read_text())
    assert {name.rstrip("/") for name in named} <= served


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_python__compiles_and_its_imports_exist(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_recipe_values__are_keys_of_a_recipe() -> None:
    from trainer.config import recipe_keys

    named = set()
    for page in (ROOT / "README.md", ROOT / "deploy" / "README.md"):
        for text in code(page):
            named |= set(re.findall(r"(?<!\S)([a-z][a-z_.]*)=\d+(?!\S)", text))
    assert {"epochs", "batch_size"} <= named <= set(recipe_keys())
