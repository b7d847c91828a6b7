"""deploy/quickstart as a person calls it: arguments, port, working directory, Ctrl-C."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from client import Client

ROOT = Path(__file__).parents[2]
TINY = (
    "epochs=1",
    "batch_size=16",
    "loss.warmup_epochs=0",
    "loss.num_background=24",
    "bank.num_neighbours=3",
    "encoder.backbone=small",
    "encoder.image_size_px=32",
    "data.workers=0",
)
START_S = 90  # training and start of the service; it takes 15


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose set-up is done: the scripts, and this Python as .venv/bin/python."""
    clone = tmp_path / "a clone"
    (clone / "deploy").mkdir(parents=True)
    for name in ("quickstart", "first_look.py", "labelled_data.py"):
        shutil.copy2(ROOT / "deploy" / name, clone / "deploy" / name)
    executable(clone / "deploy" / "setup", "#!/bin/sh\necho setup was called\n")
    (clone / ".venv" / "bin").mkdir(parents=True)
    executable(clone / ".venv" / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return clone


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def call(
    clone: Path, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "deploy" / "quickstart", *arguments],
        cwd=cwd or clone.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such folder"], "there is no folder 'no such folder'"),
        (["--epochs", "3"], "there is no option --epochs"),
        ([".", ".."], "one folder at a time"),
    ],
)
def test_quickstart__wrong_arguments_are_said_before_the_set_up(
    clone: Path, arguments: list[str], message: str
) -> None:
    done = call(clone, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", ""])
def test_quickstart__a_port_that_is_none(clone: Path, port: str) -> None:
    done = call(clone, INVPROP_PORT=port or " ")
    assert done.returncode == 2
    assert "wanted a number in 1..65535" in done.stderr


def test_quickstart__a_port_in_use_is_said_before_the_set_up(clone: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = call(clone, INVPROP_PORT=port)
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert done.stdout == ""


def test_quickstart__help_is_its_own_head(clone: Path) -> None:
    done = call(clone, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("From pictures to answered queries")
    assert "./deploy/quickstart [FOLDER] [key=value ...]" in done.stdout


def test_quickstart__a_wrong_recipe_key_is_the_trainers_error(
    clone: Path, pictures: Path, port: int
) -> None:
    done = call(clone, str(pictures), "epochz=3", INVPROP_PORT=str(port))
    assert done.returncode == 2
    assert "did you mean 'epochs'" in done.stderr
    assert not list((clone / "quickstart").rglob("recipe.yaml"))


class Started:
    """A running quickstart, its output in a file."""

    def __init__(self, clone: Path, port: int, *arguments: str, cwd: Path) -> None:
        self.output = clone.parent / "output.txt"
        with self.output.open("w") as file:
            self.process = psutil.Popen(
                [str(clone / "deploy" / "quickstart"), *arguments],
                cwd=cwd,
                env=os.environ | {"INVPROP_PORT": str(port)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, words: str) -> str:
        deadline = time.monotonic() + START_S
        while words not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        return self.output.read_text()

    def interrupt(self) -> tuple[int, list[psutil.Process]]:
        """Ctrl-C: the exit code, and the processes that are left."""
        family = self.process.children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=40)
        _, left = psutil.wait_procs(family, timeout=2)
        return code, left


@pytest.fixture
def start(clone: Path, port: int) -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def begin(*arguments: str, cwd: Path) -> Started:
        running.append(Started(clone, port, *arguments, cwd=cwd))
        return running[-1]

    yield begin
    for started in running:
        if started.process.poll() is None:
            for process in [*started.process.children(recursive=True), started.process]:
                process.kill()
            started.process.wait()


def test_quickstart__from_a_relative_folder_to_answers_and_again(
    clone: Path, pictures: Path, port: int, start: Callable[..., Started]
) -> None:
    first = start(f"./{pictures.name}", *TINY, cwd=pictures.parent)
    said = first.wait_for("the service runs until Ctrl-C")
    assert "48 pictures, a SHORT schedule for a first look: 200 epochs" in said
    assert "-m trainer.run folder --data" in said
    with Client(f"http://127.0.0.1:{port}") as service:
        assert service.info().gallery["items"] == 48
        assert service.image("bars/00.png").startswith(b"RIFF")  # for the page
    if shutil.which("curl") is not None:
        begins = said.index("# the embedding")
        commands = said[begins : said.index("quickstart: adding the pictures", begins)]
        done = subprocess.run(
            ["bash", "-e", "-c", commands], cwd="/", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        embedding, neighbours, groups, shape, result = done.stdout.splitlines()
        assert embedding.startswith('{"model"')
        assert neighbours.count('"similarity"') == 5
        assert '"reached"' in groups
        assert shape == "(1, 128)"
        assert result.startswith("(Neighbour(id=")
    with Client(f"http://127.0.0.1:{port}") as service:
        service.delete("bars/00.png")
    code, left = first.interrupt()
    assert (code, left) == (0, [])

    again = start(str(pictures), cwd=Path("/"))
    said = again.wait_for("the service runs until Ctrl-C")
    assert "this run is finished" in said
    assert f"to start afresh: rm -r {str(clone).replace(' ', chr(92) + ' ')}/quickstart/" in said
    with Client(f"http://127.0.0.1:{port}") as service:
        assert service.info().gallery["items"] == 47
    code, left = again.interrupt()
    assert (code, left) == (0, [])

    other = call(clone, str(pictures), "optim.lr=0.7", INVPROP_PORT=str(port))
    assert other.returncode == 2
    assert "another recipe; these keys differ: optim.lr" in other.stderr
    assert "to start afresh: rm -r" in other.stderr


def test_quickstart__interrupted_in_training_leaves_nothing_and_goes_on(
    pictures: Path, start: Callable[..., Started]
) -> None:
    first = start(str(pictures), *TINY, "epochs=4000", cwd=pictures)
    first.wait_for("epoch 3/4000")
    code, left = first.interrupt()
    assert (code, left) == (130, [])
    assert "the same command goes on from here" in first.output.read_text()

    again = start(str(pictures), cwd=pictures)
    again.wait_for("going on from")
    assert "beginning anew" not in again.output.read_text()
    code, left = again.interrupt()
    assert (code, left) == (130, [])
