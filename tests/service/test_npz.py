"""service.answers: numpy reads what we write, as it reads its own."""

import io
import zipfile

import numpy as np
import pytest
from numpy.typing import NDArray

from service.answers import npy_bytes, npz_bytes

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.empty((0, 4), np.float32),
    np.arange(5, dtype=np.int64),
    np.float64(3.5).reshape(()),
    np.asarray([["a", "größer"], ["", "x/y"]]),
    np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not in C order
    np.zeros((1, 2, 3, 4, 5), np.uint8),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_npy__is_what_numpy_writes(array: NDArray[np.generic]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    assert npy_bytes(array) == buffer.getvalue()


def test_npz__is_a_sound_archive_of_the_arrays() -> None:
    content = npz_bytes({f"a{n}": array for n, array in enumerate(ARRAYS)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"a{n}.npy" for n in range(len(ARRAYS))]
    with np.load(io.BytesIO(content), allow_pickle=False) as read:
        for number, array in enumerate(ARRAYS):
            np.testing.assert_array_equal(read[f"a{number}"], array)
            assert read[f"a{number}"].dtype == array.dtype
