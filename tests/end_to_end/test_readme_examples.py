"""The examples of README.md and client/README.md, run as they stand against a real service."""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from client import Client

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PYTHON = [
    (page, block) for page in ("README.md", "client/README.md") for block in blocks(page, "python")
]


@pytest.fixture(scope="module")
def url(
    serve: Callable[[Path, Path], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The digits, hardly trained, served."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "trainer.run", "digits", "epochs=1", "loss.warmup_epochs=0"]
    subprocess.run(
        [*command, "--data", "digits", "--output", str(folder / "run")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    with serve(folder / "run" / "bundle", folder / "state") as url:
        yield url


@pytest.fixture(scope="module")
def clone(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures that quickstart writes, written by its own last part."""
    clone = tmp_path_factory.mktemp("clone")
    samples = clone / "quickstart" / "digits" / "samples"
    samples.parent.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "deploy" / "first_look.py"), url]
    subprocess.run(
        [*command, "--pid", "1", "--python", sys.executable, "--samples", str(samples)],
        cwd=clone,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return clone


@pytest.mark.parametrize(
    "block", [block for _, block in PYTHON], ids=[f"{p}-{n}" for n, (p, _) in enumerate(PYTHON)]
)
def test_python__runs(url: str, clone: Path, block: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.replace(URL, url)],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.usefixtures("clone")
def test_first_look__gives_the_digits_their_pictures_and_adds_no_item(url: str) -> None:
    digits = load_digits().images * (255 / 16)
    with Client(url) as service:
        ids = {item.id for item in service.items()} & {f"{n:04d}" for n in range(len(digits))}
        assert len(ids) == 1347  # those that were trained on
        for item_id in sorted(ids)[::100]:
            with Image.open(io.BytesIO(service.image(item_id))) as picture:
                shown = np.asarray(picture.convert("L").resize((8, 8)), np.float64)
            assert np.abs(digits - shown).mean((1, 2)).argmin() == int(item_id)


def test_curl__answers(url: str, clone: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    (block,) = [block for block in blocks("README.md", "sh") if "curl" in block]
    commands = block.replace(URL, url).replace("curl ", "curl -sSf -w '\\n' ")
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=clone, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    embedding, neighbours, groups = done.stdout.splitlines()
    assert embedding.count(",") > 127
    assert neighbours.count('"similarity"') == 5
    assert '"members"' in groups
