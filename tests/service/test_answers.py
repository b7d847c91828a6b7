"""service.answers: what is written by hand equals what numpy writes."""

import io

import numpy as np
import pytest

from service.answers import npy_bytes


@pytest.mark.parametrize("shape", [(0, 12), (1, 128), (3, 7), (100_000, 1), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["<f4", "<i8", "|u1"])
def test_npy_bytes__equal_numpys(shape: tuple[int, ...], dtype: str) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, values)
    written = npy_bytes(values)
    assert written == buffer.getvalue()
    np.testing.assert_array_equal(np.load(io.BytesIO(written)), values)


def test_npy_bytes__of_a_view_in_another_order() -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(np.load(io.BytesIO(npy_bytes(values))), values)
