import io

import pytest

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
    for file in (io.StringIO(), Terminal()):
        meter("adding", file=file).close()
        assert file.getvalue() == ""


def test_meter__a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    assert isinstance(meter("x", file=io.StringIO()), Lines)
    assert isinstance(meter("x", file=Terminal()), Bar)


def test_bar__is_drawn_over_itself_with_speed_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    now = [0.0]
    file = Terminal()
    bar = Bar("adding", file, monotonic=lambda: now[0])
    for seconds, done in ((2, 500), (2.05, 510), (4, 1000), (8, 2000)):
        now[0] = seconds
        bar(done, 2000)
    bar.close()
    half = "=" * 12 + " " * 12
    assert file.getvalue().split("\r\x1b[K") == [
        "",
        f"adding [{'=' * 6}{' ' * 18}] 500 of 2,000, 250/s, 0:06 left",
        f"adding [{half}] 1,000 of 2,000, 250/s, 0:04 left",
        f"adding [{'=' * 24}] 2,000 of 2,000, 250/s\n",
    ]


def test_bar__without_a_total_and_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    now = [0.0]
    file = Terminal()
    bar = Bar("evaluating", file, monotonic=lambda: now[0])
    now[0] = 100.0
    bar.of("features")  # which begin now
    now[0] = 102.0
    bar(5, 0)
    bar.of("features")
    now[0] = 104.0
    bar(5, 50000)
    bar.close()
    assert file.getvalue().split("\r\x1b[K")[1:] == [
        "evaluating: features, 5, 2.5/s",
        f"evaluating [{' ' * 24}] features, 5 of 50,000, 1.2/s, 11:06:36 left\n",
    ]


def test_bar__is_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now = [0.0]
    file = Terminal()
    bar = Bar("x" * 200, file, monotonic=lambda: now[0])
    now[0] = 1.0
    bar(1, 2)
    assert len(file.getvalue().removeprefix("\r\x1b[K")) == 79
