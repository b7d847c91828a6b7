"""service.gallery.postings: a filter's rows, and that later filters do not read the items again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import pytest

from service.gallery import postings
from service.gallery.postings import Postings
from service.gallery.records import Blobs

ITEMS: list[dict[str, Any]] = [
    {"label": "cat", "size": 1},
    {"label": "dog", "size": 2.0, "tags": ["x"]},
    {"label": "cat", "size": True},
    {"size": "1", "tags": "x"},
    {"label": None, "size": 2},
]


def indexed(items: Sequence[Mapping[str, Any]]) -> Postings:
    return Postings(Blobs.of(orjson.dumps(item) for item in items))


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"label": ["cat"]}, [0, 2]),
        ({"label": ["cat", "dog", "cat", "bird"]}, [0, 1, 2]),
        ({"label": [None]}, [4]),
        ({"size": [1]}, [0]),
        ({"size": [True]}, [2]),
        ({"size": [2]}, [1, 4]),
        ({"size": ["1"]}, [3]),
        ({"tags": ["x"]}, [3]),  # a list is not the value in it
        ({"label": ["cat"], "size": [True, 7]}, [2]),
        ({"label": ["dog"], "size": [1]}, []),
        ({"colour": ["red"]}, []),
        ({"label": []}, []),
    ],
)
def test_matching__compares_as_json_does(wanted: dict[str, list[Any]], rows: list[int]) -> None:
    found = indexed(ITEMS).matching(wanted)
    assert found.tolist() == rows
    assert found.dtype == np.int64


def test_matching__equals_looking_at_every_item() -> None:
    seed = 7
    generator = np.random.default_rng(seed)
    items = [
        {f: int(generator.integers(4)) for f in "abc" if generator.random() < 0.7}
        for _ in range(300)
    ]
    index = indexed(items)
    for _ in range(50):
        wanted = {
            f: generator.integers(5, size=generator.integers(1, 4)).tolist()
            for f in generator.choice(list("abc"), size=2, replace=False)
        }
        expected = [r for r, i in enumerate(items) if all(i.get(f) in v for f, v in wanted.items())]
        assert index.matching(wanted).tolist() == expected, (seed, wanted)


def test_matching__reads_the_items_once_for_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postings, "MAX_FIELDS", 2)
    index = indexed([{"a": 1, "b": 2, "c": 3}] * 5)
    reads = []
    read = index._index
    monkeypatch.setattr(index, "_index", lambda name: reads.append(name) or read(name))
    for name in ("a", "b", "a", "c", "a", "b", "nowhere"):  # b made room for c
        index.matching({name: [1]})
    assert reads == ["a", "b", "c", "b"]
    assert index.fields() == ["a", "b"]
