"""Signals: what the first does, what a late one does, and the exit code where nothing is trained.

Run: pytest tests/trainer/test_interruption.py
"""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer import session
from trainer.interruption import StopRequest, Terminated, terminable
from trainer.run import main


def test_terminable__raises_at_the_first_one_and_leaves_the_next_to_the_system() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminable():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_terminable__in_a_finaliser_raises_once_more_outside_of_it() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)  # what is raised here, Python passes over

    def run() -> None:
        with terminable():
            Finalised()
            time.sleep(10)

    began = time.monotonic()
    with pytest.raises(Terminated):
        run()
    assert time.monotonic() - began < 5


def test_terminable__under_a_launcher_passes_over_the_next_ones() -> None:
    with terminable(alone=False):
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_stop_request__that_the_loop_did_not_see_is_sent_again() -> None:
    def run() -> None:
        with terminable(), StopRequest(speaks=False) as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.signum == signal.SIGTERM

    with pytest.raises(Terminated):
        run()


def test_stop_request__that_ended_the_loop_is_not_sent_again() -> None:
    def run() -> None:
        with terminable(), StopRequest(speaks=False):
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", ["survey_images", "export_bundle"])
def test_signal__outside_of_training_leaves_at_once_and_nothing_half_done(
    packed: Callable[..., Path],
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
    stage: str,
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        signal.raise_signal(signum)

    monkeypatch.setattr(session, stage, interrupted)
    output = tmp_path / "run"
    words = ["digits", "--data", str(packed(40)), "--output", str(output), *tiny_overrides]
    assert main([*words, "epochs=1"]) == code
    assert "interrupted while not training; nothing saved is lost" in capsys.readouterr().err
    assert not (output / "bundle").exists()
    if stage == "survey_images":
        assert list(output.iterdir()) == []
    else:
        assert [path.name for path in (output / "checkpoints").iterdir()] == [
            "epoch-0001-step-000003"
        ]
