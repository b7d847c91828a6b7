"""./tests/deploy/run where an engine is: the short form in CI, the whole with --long.

On a machine without one both are skipped; what needs no engine is in
tests/contracts/test_deployment.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run")
BUILD_S = 1800.0  # two images from nothing, over a slow line


@pytest.fixture(scope="module")
def engine() -> None:
    """Skips, with the reason, where no engine answers."""
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("docker is not installed")
    for words in (("compose", "version"), ("info",)):
        try:
            done = subprocess.run([docker, *words], capture_output=True, text=True, timeout=10)
        except subprocess.TimeoutExpired:
            pytest.skip(f"docker {' '.join(words)} does not answer")
        if done.returncode:
            pytest.skip(f"docker {' '.join(words)}: {done.stderr.strip()[-200:]}")


@pytest.mark.timeout(BUILD_S)
@pytest.mark.skipif(os.environ.get("CI") != "true", reason="takes minutes: in CI, or with --long")
def test_stack__in_short(engine: None) -> None:
    _passes("--short")


@pytest.mark.long
@pytest.mark.timeout(2 * BUILD_S)
def test_stack__whole(engine: None) -> None:
    _passes()


def _passes(*arguments: str) -> None:
    done = subprocess.run([sys.executable, RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
