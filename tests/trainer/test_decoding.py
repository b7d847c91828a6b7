"""The first pass over all images.

Run: pytest tests/trainer/test_decoding.py
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import decoding
from trainer.config import DataConfig, load_recipe
from trainer.datasets import DataError, open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all, survey
from trainer.representation.preprocess import InputContract


def _config(**changes: object) -> DataConfig:
    return load_recipe("folder").data.model_copy(update={"max_skipped": 0.5, **changes})


def _damage(root: Path, huge_png: bytes) -> None:
    """Five files that cannot be used, among others that can."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "whole.jpg")
    whole = (root / "whole.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "zero.png").write_bytes(b"")
    (root / "text.png").write_text("no image")
    (root / "huge.png").write_bytes(huge_png)
    (root / "gif.jpg").write_bytes(b"GIF89a" + bytes(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_survey__skips_what_cannot_be_used_and_says_why(
    pictures: Callable[..., Path], huge_png: bytes, workers: int
) -> None:
    root = pictures(12, nested=False)
    _damage(root, huge_png)
    seen: list[int] = []
    with DecodePool(workers) as pool:
        found = survey(open_source(str(root)), pool, _config(), size_px=8, advance=seen.append)
    assert sum(seen) == 18
    assert found.source.ids == (*(f"{i:03d}.png" for i in range(12)), "whole.jpg")
    reasons = {file.id: file.reason for file in found.skipped}
    assert set(reasons) == {"gif.jpg", "huge.png", "text.png", "truncated.jpg", "zero.png"}
    assert "at most 50,000,000 pixels are decoded" in reasons["huge.png"]
    assert "0 bytes" in reasons["zero.png"]
    assert "damaged or cut short" in reasons["truncated.jpg"]
    assert "no readable" in reasons["text.png"]
    assert found.stored is not None
    assert [image.shape for image in found.stored[:3]] == [(9, 9, 3), (10, 9, 3), (10, 9, 3)]
    assert found.sizes.tolist() == [list(image.shape[:2]) for image in found.stored]


def test_survey__of_a_file_that_cannot_be_opened(pictures: Callable[..., Path]) -> None:
    root = pictures(4, nested=False)
    source = open_source(str(root))
    (root / "001.png").unlink()
    with DecodePool(0) as pool:
        found = survey(source, pool, _config(), size_px=8)
    assert found.skipped[0].reason == "the file cannot be opened: No such file or directory"


def test_survey__more_skipped_than_allowed(pictures: Callable[..., Path], huge_png: bytes) -> None:
    root = pictures(12, nested=False)
    _damage(root, huge_png)
    told = r"5 of 18 images cannot be used, more than the 5% .*gif\.jpg: .*zero\.png: .*0 bytes"
    with DecodePool(0) as pool, pytest.raises(DataError, match=told):
        survey(open_source(str(root)), pool, _config(max_skipped=0.05), size_px=8)


def test_survey__exactly_as_many_skipped_as_allowed(pictures: Callable[..., Path]) -> None:
    root = pictures(20, nested=False)
    (root / "000.png").write_bytes(b"")
    with DecodePool(0) as pool:
        found = survey(open_source(str(root)), pool, _config(max_skipped=0.05), size_px=8)
    assert len(found.source) == 19


def test_survey__fingerprint_tells_which_were_skipped(pictures: Callable[..., Path]) -> None:
    root = pictures(8, nested=False)
    source = open_source(str(root))
    with DecodePool(0) as pool:
        whole = survey(source, pool, _config(), size_px=8).source.fingerprint
        content = bytearray((root / "000.png").read_bytes())
        content[40:60] = bytes(20)
        (root / "000.png").write_bytes(content)  # of the same size
        damaged = survey(source, pool, _config(), size_px=8).source.fingerprint
    assert whole != damaged


def test_prepare_all__is_the_sources_prepared(pictures: Callable[..., Path]) -> None:
    source, contract = open_source(str(pictures(20))), InputContract(size_px=8)
    with DecodePool(0) as pool:
        made = prepare_all(source, contract, pool)
        assert prepare_all(source.subset([]), contract, pool).shape == (0, 8, 8, 3)
    assert (made == source.prepared(range(20), contract)).all()


class Killer:
    """A picture in a shard on which the decoder dies, or hangs."""

    def __init__(self, how: str) -> None:
        self.how = how

    def read(self) -> bytes:
        if self.how == "hangs":
            time.sleep(30)
        if self.how == "exits":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGSEGV)
        return b""


def test_survey__picture_that_kills_or_hangs_its_decoder_costs_itself_alone(
    pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PICTURE_LIMIT_S", 1.0)
    monkeypatch.setattr(decoding, "EXAMINED_TOGETHER", 4)
    source = open_source(str(pictures(30, nested=False)))
    killers = {2: Killer("crashes"), 13: Killer("hangs"), 14: Killer("exits")}
    killers[29] = Killer("crashes")  # in the end, when nothing more is asked of the pool
    mixed = [killers.get(i, picture) for i, picture in enumerate(source.pictures)]
    seen: list[int] = []
    with DecodePool(2) as pool:
        whole = survey(source, pool, _config(), size_px=8)
        found = survey(
            replace(source, pictures=mixed), pool, _config(), size_px=8, advance=seen.append
        )
        again = list(pool.stream(abs, range(-9, 0)))
    assert {file.id: file.reason for file in found.skipped} == {
        "002.png": "its decoder process died (SIGSEGV)",
        "013.png": "its decoder took more than 1 s",
        "014.png": "its decoder process died (exit code 3)",
        "029.png": "its decoder process died (SIGSEGV)",
    }
    kept = [i for i in range(30) if i not in killers]
    assert found.source.ids == tuple(source.ids[i] for i in kept)
    assert found.stored is not None
    assert whole.stored is not None
    for image, i in zip(found.stored, kept, strict=True):
        assert (image == whole.stored[i]).all()
    assert sum(seen) == 30
    assert again == list(range(9, 0, -1))  # the pool lives


def test_survey__killers_count_towards_the_limit(pictures: Callable[..., Path]) -> None:
    source = open_source(str(pictures(10, nested=False)))
    mixed = [Killer("crashes"), *source.pictures[1:]]
    told = r"1 of 10 images cannot be used, more than the 5% .*000\.png: its decoder process died"
    with DecodePool(1) as pool, pytest.raises(DataError, match=told):
        survey(replace(source, pictures=mixed), pool, _config(max_skipped=0.05), size_px=8)


def test_survey__past_the_limit_keeps_sizes_only(pictures: Callable[..., Path]) -> None:
    source = open_source(str(pictures(20)))
    with DecodePool(1) as pool:
        held = survey(source, pool, _config(), size_px=8)
        # 20 images of at least 9 x 9 x 3 bytes do not fit 2,000 bytes.
        past = survey(source, pool, _config(resident_limit_bytes=2000), size_px=8)
    assert past.stored is None
    assert (past.sizes == held.sizes).all()
