"""Answers as pandas tables."""

import builtins
from typing import Any

import numpy as np
import pytest

from client import (
    Embeddings,
    Group,
    Groups,
    Map,
    Member,
    Neighbour,
    Neighbours,
)


@pytest.fixture(autouse=True)
def pandas() -> Any:
    return pytest.importorskip("pandas")


def test_embeddings__a_column_for_each_dimension() -> None:
    rows = np.float32([[1, 2], [3, 4], [5, 6]])
    table = Embeddings("m", "embedding", 2, rows).to_pandas()
    assert table.shape == (3, 2)
    np.testing.assert_array_equal(table.to_numpy(), rows)


def test_embeddings__lists_with_a_skipped_picture() -> None:
    table = Embeddings("m", "embedding", 2, [[1.0, 2.0], None]).to_pandas()
    np.testing.assert_array_equal(table.to_numpy(), [[1, 2], [np.nan, np.nan]])


def test_neighbours__a_row_for_each() -> None:
    rows = ((Neighbour("a", 0.5), Neighbour("b", 0.25)), (), (Neighbour("c", 1.0, {"x": 1}),))
    table = Neighbours("m", 7, True, rows).to_pandas()
    assert list(table.columns) == ["query", "rank", "id", "similarity", "metadata"]
    assert list(table["id"]) == ["a", "b", "c"]
    assert list(table["query"]) == [0, 0, 2]
    assert list(table["rank"]) == [0, 1, 0]
    assert table["metadata"].iloc[2] == {"x": 1}


def test_groups__a_row_for_each_member() -> None:
    group = Group((Member("b", 1, "a", 0.5), Member("c", 2, "b", 0.25)), 2, False)
    table = Groups("m", 7, (group, group)).to_pandas()
    assert list(table["anchor"]) == [0, 0, 1, 1]
    assert list(table["via"]) == ["a", "b", "a", "b"]
    assert list(table["step"]) == [1, 2, 1, 2]


def test_map__points() -> None:
    table = Map("m", 7, "pca", 9, ("a", "b"), np.float32([[0, 1], [2, 3]])).to_pandas()
    assert [tuple(row) for row in table.itertuples(index=False)] == [("a", 0, 1), ("b", 2, 3)]


def test_to_pandas__without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        Neighbours("m", 7, True, ()).to_pandas()
