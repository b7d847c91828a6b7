"""Answers as pandas tables, pandas being imported when asked for. In: columns. Out: a DataFrame."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame


def frame(columns: Mapping[str, Sequence[Any]]) -> "DataFrame":
    """A table of these columns.

    Raises:
        ImportError: pandas is not installed.
    """
    return _pandas().DataFrame(dict(columns))


def matrix(rows: Any, *, dim: int) -> "DataFrame":
    """A table with a column 0, 1, ... for each dimension."""
    return _pandas().DataFrame(rows, columns=range(dim))


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from None
    return pandas
