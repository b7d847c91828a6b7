"""service.gallery.vectors: what may enter the gallery."""

import numpy as np
import pytest

from service.gallery.vectors import as_unit, as_unit_rows, cosine


def test_as_unit__brings_numbers_to_length_1() -> None:
    np.testing.assert_array_equal(as_unit([3, 0, 4], 3), np.float32([0.6, 0, 0.8]))


def test_as_unit__keeps_a_unit_vector_bit_for_bit() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        row = generator.standard_normal(128)
        row = (row / np.linalg.norm(row)).astype(np.float32)
        np.testing.assert_array_equal(as_unit(row.tolist(), 128), row)
        longer = row * np.float32(1.000005)  # as encoders on other devices may round
        np.testing.assert_array_equal(as_unit(longer.tolist(), 128), longer)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0, 2.0], "is 3 numbers, got 2"),
        ([], "is 3 numbers, got"),
        ([[1, 2, 3]], "no list of numbers"),
        ([1, [2], 3], "no list of numbers"),
        (["1", "2", "3"], "no list of numbers"),
        ([True, False, True], "no list of numbers"),
        ([None, 1, 2], "no list of numbers"),
        ("abc", "no list of numbers"),
        (None, "no list of numbers"),
        ([0, 0, 0], "length 0"),
        ([float("nan"), 0, 0], "NaN"),
        ([float("inf"), 0, 0], "NaN, infinity"),
        ([1e300, 1e300, 0], "beyond any embedding"),
        ([10**400, 0, 0], "no list of numbers"),
    ],
)
def test_as_unit__says_what_is_wrong(values: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_unit(values, 3)


def test_cosine__stays_within_its_range() -> None:
    row = np.float32([[0.70710683, 0.70710683]])  # a little longer than 1
    assert cosine(row, row)[0] == np.float32(1)
    assert cosine(row, -row)[0] == np.float32(-1)


@pytest.mark.parametrize("seed", range(3))
def test_as_unit_rows__gives_what_as_unit_gives_one_by_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((50, 7)).astype(np.float32)
    rows[::2] /= np.linalg.norm(rows[::2], axis=1, keepdims=True)  # kept bit for bit
    for given in (rows, rows.tolist(), rows[::2], np.arange(1, 15).reshape(2, 7)):
        found = as_unit_rows(given, 7)
        assert found is not None
        np.testing.assert_array_equal(found, np.stack([as_unit(row, 7) for row in given]))


@pytest.mark.parametrize(
    "wrong",
    [
        [1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [np.nan, 1.0, 0.0],
        [1e308, 1e308, 1e308],
        ["a", 0.0, 1.0],
        [True, False, True],
        3.0,
        None,
    ],
)
def test_as_unit_rows__leaves_it_to_as_unit_to_name_what_is_wrong(wrong: object) -> None:
    assert as_unit_rows([[1.0, 0.0, 0.0], wrong], 3) is None
