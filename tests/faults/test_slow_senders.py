"""tests/faults/slow_senders.py with few sockets and short deadlines; its long form has 500."""

from pathlib import Path

import pytest

from tests.faults.slow_senders import check, report, run


@pytest.mark.parametrize(
    ("sockets", "flags"),
    [
        (60, {"header_timeout_s": 1, "body_timeout_s": 1}),
        pytest.param(500, {}, marks=[pytest.mark.long, pytest.mark.timeout(300)]),
    ],
)
def test_slow_sockets__are_closed_and_harm_nobody(
    tmp_path: Path, sockets: int, flags: dict[str, object]
) -> None:
    seen = run(sockets, tmp_path, quiet_s=0.5, **flags)
    print(report(seen))  # noqa: T201 - with the failure
    check(seen)
