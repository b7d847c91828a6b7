"""A folder of pictures, one of them broken, for the tests of bulk work."""

from pathlib import Path

import pytest

from tests.service.conftest import encoded

GOOD, BROKEN = 23, 2


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of three formats, one cut short, one whose format the service does not take."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(GOOD):
        format, size = ("PNG", "JPEG", "WEBP")[i % 3], (20 + 7 * i, 14 + 3 * i)
        path = root / f"{i % 2}" / f"{i:02d}.{format.lower()}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(i, format=format, size=size))
    (root / "0" / "cut.png").write_bytes(encoded(0)[:60])
    (root / "1" / "old.bmp").write_bytes(encoded(0, format="BMP"))
    return root
