"""service.gallery.vectors: what may enter the gallery."""

import numpy as np
import pytest

from service.gallery.vectors import as_unit, cosine


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
