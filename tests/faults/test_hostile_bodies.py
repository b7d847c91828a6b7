"""tests/faults/hostile_bodies.py: some hundred in the suite, all of them in its long form."""

from pathlib import Path

import pytest

from tests.faults.hostile_bodies import check, generate, report, run

SEED = 20261126


@pytest.mark.parametrize(
    "count", [300, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_hostile_requests__harm_nobody(tmp_path: Path, count: int) -> None:
    seen = run(generate(SEED, count), tmp_path)
    print(report(seen, SEED))  # noqa: T201 - with the failure
    check(seen)


def test_generator__is_repeatable_and_makes_every_kind() -> None:
    first, again = generate(5, 400), generate(5, 400)
    assert [h.pieces[0] for h in first] == [h.pieces[0] for h in again]
    assert {h.kind for h in first} == {
        "broken json", "mutated json", "ndjson", "multipart", "npy", "picture", "query", "wire",
        "raw tensors", "large",
    }  # fmt: skip
