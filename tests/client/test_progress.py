import builtins
import io
from typing import Any

import pytest

from client import progress
from client.progress import Bar, Lines, meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines__now_and_then_and_at_the_end() -> None:
    now = [0.0]
    file = io.StringIO()
    lines = Lines("adding", file, monotonic=lambda: now[0])
    for done in range(1, 13):
        now[0] += 1
        lines(done, 2000)
    lines.close()
    assert file.getvalue().splitlines() == [
        "adding: 5 of 2,000",
        "adding: 10 of 2,000",
        "adding: 12 of 2,000",
    ]


def test_lines__nothing_happened() -> None:
    file = io.StringIO()
    Lines("adding", file).close()
    assert file.getvalue() == ""


def test_meter__a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    pytest.importorskip("tqdm")
    assert isinstance(meter("x", file=io.StringIO()), Lines)
    terminal = Terminal()
    bar = meter("adding", file=terminal)
    assert isinstance(bar, Bar)
    bar(3, 7)
    bar(7, 7)
    bar.close()
    assert "7/7" in terminal.getvalue()


def test_meter__without_tqdm_lines_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert isinstance(progress.meter("x", file=Terminal()), Lines)
