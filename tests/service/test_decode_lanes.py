"""service.decode: large images are decoded one at a time, small ones pass them, and those who send
too many wait or are refused."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image

from service import decode as decode_module
from service.decode import DecodersBusy
from service.decoder_child import DecoderChild
from service.decoder_lanes import DecodeJob, Lanes
from tests.service.decoder_pools import CONTRACT, WAIT_S, make_pool
from trainer.representation.preprocess import ImageRejected, prepare


def large_picture(shade: int) -> bytes:
    """A picture that takes 72 MB to decode, more than are decoded in any number at a time."""
    buffer = io.BytesIO()
    Image.new("RGBA", (3000, 3000), (shade, 0, 0, 255)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_pool__large_images_are_decoded_one_at_a_time_and_small_ones_pass_them(
    picture: Callable[..., bytes],
) -> None:
    large = [large_picture(shade) for shade in (10, 20)]
    pool = make_pool(size=2, max_pixels=10_000_000)
    lock, busy, most, large_out = threading.Lock(), set(), [0], [0]
    real = DecoderChild.decode

    def watched(child: object, image: bytes, *arguments: object, large: bool) -> object:
        with lock:
            if large:
                busy.add(id(child))
                most[0] = max(most[0], len(busy))
                large_out[0] += 1
        try:
            return real(child, image, *arguments, large=large)  # type: ignore[arg-type]
        finally:
            with lock:
                busy.discard(id(child))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderChild, "decode", watched)
        try:
            futures = [pool.submit(image) for image in (*large, *large, picture(1), picture(2))]
            for future, shade in zip(futures, (10, 20, 10, 20), strict=False):
                assert (future.result(WAIT_S)[..., 0] == shade).all()
            for seed, future in enumerate(futures[4:], start=1):
                np.testing.assert_array_equal(
                    future.result(WAIT_S), prepare(picture(seed), CONTRACT)
                )
        finally:
            pool.close()
    assert (most[0], large_out[0]) == (1, 4)


def test_pool__refuses_a_large_image_behind_too_many_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, gate = threading.Event(), threading.Event()
    real = DecoderChild.decode

    def held(child: object, *arguments: object, large: bool) -> object:
        if large:
            entered.set()
            assert gate.wait(WAIT_S)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderChild, "decode", held)
    pool = make_pool(size=2, max_pixels=10_000_000, max_large_waiting=1)
    alice, bob = object(), object()
    try:
        first = [pool.submit(large_picture(1), sender=alice)]
        assert entered.wait(WAIT_S)
        # Those of one sender wait together: they are before nobody else's.
        first += [pool.submit(large_picture(shade), sender=alice) for shade in (2, 3)]
        with pytest.raises(DecodersBusy) as busy:
            pool.submit(large_picture(4), sender=bob).result(WAIT_S)
        assert busy.value.limit == 1
        gate.set()
        assert [future.result(WAIT_S)[0, 0, 0] for future in first] == [1, 2, 3]
        assert pool.submit(large_picture(4), sender=bob).result(WAIT_S)[0, 0, 0] == 4
    finally:
        gate.set()
        pool.close()


@pytest.mark.parametrize(("longest_wait_s", "refused"), [(0.0, True), (3600.0, False)])
def test_pool__refuses_a_large_image_that_waited_too_long_behind_others(
    monkeypatch: pytest.MonkeyPatch, longest_wait_s: float, refused: bool
) -> None:
    entered, gate = threading.Event(), threading.Event()
    queued = threading.Event()
    real = DecoderChild.decode

    def held(child: object, *arguments: object, large: bool) -> object:
        if large and not entered.is_set():
            entered.set()
            assert gate.wait(WAIT_S)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    put = Lanes.put

    def noted(lanes: Lanes, job: DecodeJob) -> None:
        put(lanes, job)
        if job.large and entered.is_set():
            queued.set()

    monkeypatch.setattr(DecoderChild, "decode", held)
    monkeypatch.setattr(Lanes, "put", noted)
    monkeypatch.setattr(decode_module, "LARGE_WAIT_S", longest_wait_s)
    pool = make_pool(size=2, max_pixels=10_000_000, max_large_waiting=1)
    try:
        first = pool.submit(large_picture(1), sender=object())
        assert entered.wait(WAIT_S)
        second = pool.submit(large_picture(2), sender=object())
        assert queued.wait(WAIT_S)
        gate.set()
        assert first.result(WAIT_S)[0, 0, 0] == 1
        if refused:
            with pytest.raises(DecodersBusy):
                second.result(WAIT_S)
        else:
            assert second.result(WAIT_S)[0, 0, 0] == 2
    finally:
        gate.set()
        pool.close()


def test_pool__refuses_before_decoding_what_no_decoder_has_the_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    real = DecoderChild.decode

    def noted(child: object, *arguments: object, large: bool) -> object:
        asked.append(large)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderChild, "decode", noted)
    pool = make_pool(memory_bytes=2**28, max_pixels=100_000_000)
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(buffer, "WEBP", method=0, lossless=True)  # 162 MB of 134
    try:
        with pytest.raises(ImageRejected, match="needs more memory"):
            pool.submit(buffer.getvalue()).result(WAIT_S)
    finally:
        pool.close()
    assert asked == [False]  # it never came to the lane of the large ones


def test_lanes__the_oldest_that_may_start() -> None:
    lanes = Lanes()

    def job(arrived: float, *, large: bool = False) -> DecodeJob:
        made = DecodeJob(b"", Future(), 0.0, arrived, None, large)
        lanes.put(made)
        return made

    first, second = job(1, large=True), job(2, large=True)
    small, late = job(1.5), job(3)
    assert lanes.take() is first
    assert lanes.take() is small
    assert lanes.take() is late  # the second large one is older, but one is out
    lanes.large_is_done()
    assert lanes.take() is second
    waiting = job(4)
    assert len(lanes) == 1
    assert lanes.close() == [waiting]
    assert lanes.take() is None
