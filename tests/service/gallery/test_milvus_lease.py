"""service.gallery.milvus_lease: one holder at a time, and another one when that falls silent."""

from typing import Any

from service.gallery.milvus_lease import LEASE_S, Lease


class Facts:
    """The facts of a store, in a dict."""

    facts = "facts"

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def query(self, collection: str, expression: str, fields: Any) -> list[dict[str, Any]]:
        row = self.rows.get(expression.split('"')[1])
        return [] if row is None else [row]

    def upsert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        self.rows.update((row["name"], row) for row in rows)

    def delete(self, collection: str, expression: str) -> None:
        del self.rows[expression.split('"')[1]]


def test_lease__has_one_holder_and_goes_on_when_that_gives_no_sign_of_life() -> None:
    facts: Any = Facts()
    now = [100.0]

    def lease() -> Lease:
        return Lease(facts, clock=lambda: now[0], sleep=lambda seconds: None)

    one, two = lease(), lease()
    assert not one.keep()
    assert one.take()
    assert not two.take()
    assert "process" in two.holder
    for _ in range(5):  # alive: it counts up
        now[0] += LEASE_S * 0.9
        assert one.keep()
        assert not two.take()
    now[0] += LEASE_S * 0.99
    assert not two.take()
    now[0] += LEASE_S * 0.02
    assert two.take()
    assert not one.keep()  # it comes back, and sees that it was given up
    assert not one.is_held
    assert not one.take()
    two.release()
    assert one.take()


def test_lease__taken_by_two_at_once_is_the_last_ones() -> None:
    facts: Any = Facts()
    two = Lease(facts, sleep=lambda seconds: None)
    taken = []
    one = Lease(facts, sleep=lambda seconds: taken.append(two._write()))
    assert not one.take()
    assert two._confirm(0.0)
