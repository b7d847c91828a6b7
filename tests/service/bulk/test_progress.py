"""service.bulk.progress: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from service.bulk import progress
from service.bulk.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress__elsewhere_is_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = Progress("images", 1000, done=400, stream=stream)
    told.advance(100)
    now = 10.0
    told.advance(100)
    told.advance(100)
    now = 20.0
    told.end()
    assert stream.getvalue() == "600 of 1,000 images, 20/s\n700 of 1,000 images, 15/s\n"


def test_progress__on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = Terminal(), 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = Progress("images", 100, stream=stream)
    now = 1.0
    told.advance(50)
    told.end()
    first, second = stream.getvalue().split("\r")[1:]
    assert first == "[" + "#" * 15 + " " * 15 + "] 50 of 100 images, 50/s   "
    assert second.endswith("\n")
