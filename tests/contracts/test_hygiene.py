"""What must not be in the repository, and that its scripts can run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "deploy/setup",
    "deploy/quickstart",
    "deploy/backup",
    "deploy/restore",
    "deploy/train_multinode.sh",
    "tests/run",
    ".ci/run",
)

# Put together here, so that this file does not hold them itself.
MACHINE_PATHS = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/\\w", "/" + "tmp/")))
REGISTRIES = re.compile(
    "|".join(
        r"[\w.-]*" + name.replace(".", r"\.") + r"[\w/-]*"
        for name in (
            "pypi" + ".org",
            "python" + "hosted",
            "npmjs" + ".",
            "artifact" + "ory",
            "nexus" + ".",
            "index" + "-url",
            "regist" + "ry.",
        )
    ),
    re.IGNORECASE,
)
SECRETS = re.compile(
    "-----BEGIN [A-Z ]*PRIVATE" + " KEY|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}"
)
BINARY_SUFFIXES = (".png", ".jpg", ".webp", ".ico", ".npy")
# Their paths are those of a container, whichever machine it runs on.
IN_CONTAINERS = (
    "deploy/service.Dockerfile",
    "deploy/trainer.Dockerfile",
    "deploy/nginx/both.conf",
    "deploy/nginx/nginx.conf",
    "deploy/nginx/replicas.conf",
    "deploy/nginx/start",
)
LARGEST_BYTES = 1_000_000  # data sets and weights do not belong here


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no git clone: there is no list of tracked files")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in paths
        if path.suffix not in BINARY_SUFFIXES
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    "pattern", [MACHINE_PATHS, REGISTRIES, SECRETS], ids=["paths", "hosts", "secrets"]
)
def test_files__hold_nothing_of_one_machine(tracked: list[Path], pattern: re.Pattern[str]) -> None:
    machines = [path for path in tracked if str(path.relative_to(ROOT)) not in IN_CONTAINERS]
    assert lines_with(pattern, machines if pattern is MACHINE_PATHS else tracked) == []


def test_files__are_small(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.stat().st_size > LARGEST_BYTES] == []


def test_patterns__find_what_they_are_for() -> None:
    assert MACHINE_PATHS.search("see /" + "home/me/x")
    assert REGISTRIES.search("https://" + "pypi" + ".org/simple")
    assert SECRETS.search("-----BEGIN RSA PRIVATE" + " KEY-----")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts__are_executable_bash_without_errors(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ci__calls_the_one_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("exec ")
    assert "tests/run" in lines[1]
