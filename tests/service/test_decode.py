"""service.decode: the pool gives the pixels of `prepare` and outlives what kills its children."""

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import psutil
import pytest
from PIL import Image

from service import decode as decode_module
from service.decode import DecoderPool, DecodersBusy, DecoderUnavailable
from service.decoder_process import receive_frame, send_frame
from trainer.representation.preprocess import ImageRejected, InputContract, prepare

CONTRACT = InputContract(size_px=8, crop_fraction=0.875)
WAIT_S = 30


def make_pool(contract: InputContract = CONTRACT, **options: object) -> DecoderPool:
    defaults: dict[str, object] = {
        "size": 1,
        "timeout_s": 20.0,
        "memory_bytes": 2**30,
        "lifetime_images": 500,
        "max_pixels": 1_000_000,
        "max_image_bytes": 2**24,
        "max_large_waiting": 4,
    }
    return DecoderPool(contract, **(defaults | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = make_pool()
    yield pool
    pool.close()


def children() -> list[psutil.Process]:
    """The live decoder processes of this test process."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "service.decoder_process" in child.cmdline()
    ]


def pool_with_its_child(**options: object) -> tuple[DecoderPool, psutil.Process]:
    """A pool of one, and its process (pools of other tests may be alive too)."""
    before = {child.pid for child in children()}
    pool = make_pool(**options)  # type: ignore[arg-type]
    (child,) = [child for child in children() if child.pid not in before]
    return pool, child


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "JPEG"),
        ("RGB", "PNG"),
        ("RGB", "WEBP"),
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
    ],
)
def test_pool__gives_the_pixels_of_prepare(
    pool: DecoderPool, picture: Callable[..., bytes], mode: str, format: str
) -> None:
    if mode == "I;16":
        grey = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "PNG")
        image = buffer.getvalue()
    else:
        image = picture(3, mode=mode, size=(61, 40), format=format)
    np.testing.assert_array_equal(
        pool.submit(image).result(WAIT_S), prepare(image, CONTRACT), strict=True
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pool__turns_as_exif_says(
    pool: DecoderPool, picture: Callable[..., bytes], orientation: int
) -> None:
    source = Image.open(io.BytesIO(picture(4, size=(30, 21))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    source.save(buffer, "PNG", exif=exif)
    pixels = pool.submit(buffer.getvalue()).result(WAIT_S)
    np.testing.assert_array_equal(pixels, prepare(buffer.getvalue(), CONTRACT))
    if orientation == 3:  # half a turn, by hand
        turned = io.BytesIO()
        source.rotate(180).save(turned, "PNG")
        np.testing.assert_array_equal(pixels, prepare(turned.getvalue(), CONTRACT))


@pytest.mark.parametrize(
    ("image", "reason"),
    [(b"", "empty"), (b"GIF89a" + b"\0" * 40, "no readable"), (b"no picture", "no readable")],
)
def test_pool__refuses_what_is_no_picture(pool: DecoderPool, image: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason):
        pool.submit(image).result(WAIT_S)


def test_pool__refuses_a_truncated_picture(
    pool: DecoderPool, picture: Callable[..., bytes]
) -> None:
    with pytest.raises(ImageRejected, match="damaged or cut short"):
        pool.submit(picture(5, format="JPEG")[:-60]).result(WAIT_S)


def test_pool__believes_the_header_before_decoding(pool: DecoderPool) -> None:
    buffer = io.BytesIO()
    Image.new("1", (1001, 1000)).save(buffer, "PNG")
    with pytest.raises(ImageRejected, match=r"1001 x 1000 = 1,001,000 pixels; at most 1,000,000"):
        pool.submit(buffer.getvalue()).result(WAIT_S)


def test_pool__says_when_an_image_needs_too_much_memory() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (5000, 5000)).save(buffer, "PNG")  # 100 MB for each of its copies
    pool = make_pool(memory_bytes=2**28, max_pixels=100_000_000)
    try:
        with pytest.raises(ImageRejected, match="needs more memory"):
            pool.submit(buffer.getvalue()).result(WAIT_S)
    finally:
        pool.close()


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
    real = decode_module._Child.decode

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
        patch.setattr(decode_module._Child, "decode", watched)
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
    real = decode_module._Child.decode

    def held(child: object, *arguments: object, large: bool) -> object:
        if large:
            entered.set()
            assert gate.wait(WAIT_S)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_module._Child, "decode", held)
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
    real = decode_module._Child.decode

    def held(child: object, *arguments: object, large: bool) -> object:
        if large and not entered.is_set():
            entered.set()
            assert gate.wait(WAIT_S)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    put = decode_module._Lanes.put

    def noted(lanes: decode_module._Lanes, job: decode_module._Job) -> None:
        put(lanes, job)
        if job.large and entered.is_set():
            queued.set()

    monkeypatch.setattr(decode_module._Child, "decode", held)
    monkeypatch.setattr(decode_module._Lanes, "put", noted)
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


def test_frames__arrive_whole_whatever_the_channel_takes_at_a_time() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    payload = bytes(range(256)) * 8192  # 2 MiB
    with ours, theirs:
        ours.settimeout(WAIT_S)
        sender = threading.Thread(target=send_frame, args=(ours, b"I", payload))
        sender.start()
        assert receive_frame(theirs, len(payload)) == (b"I", payload)
        sender.join()


def test_pool__refuses_before_decoding_what_no_decoder_has_the_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    real = decode_module._Child.decode

    def noted(child: object, *arguments: object, large: bool) -> object:
        asked.append(large)
        return real(child, *arguments, large=large)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_module._Child, "decode", noted)
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
    lanes = decode_module._Lanes()

    def job(arrived: float, *, large: bool = False) -> decode_module._Job:
        made = decode_module._Job(b"", Future(), 0.0, arrived, None, large)
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


def test_pool__drops_what_passed_its_deadline_before_a_decoder_sees_it(
    pool: DecoderPool, picture: Callable[..., bytes]
) -> None:
    late = pool.submit(picture(3), deadline=time.monotonic())
    with pytest.raises(TimeoutError, match="waited too long"):
        late.result(WAIT_S)
    assert pool.submit(picture(3), deadline=time.monotonic() + WAIT_S).result(WAIT_S) is not None


def test_receive_frame__pieces_that_come_in_time_do_not_extend_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"P" + (8).to_bytes(8, "little") + b"some")
        with pytest.raises(TimeoutError):
            receive_frame(ours, 8, time.monotonic() + 0.05)
        theirs.sendall(b"more")
        with pytest.raises(TimeoutError):  # there is something to read, but it is too late
            receive_frame(ours, 8, time.monotonic())


def test_pool__tells_how_long_images_waited_and_took(picture: Callable[..., bytes]) -> None:
    told: list[tuple[float, float]] = []
    pool = make_pool(on_decoded=lambda waited, took: told.append((waited, took)))
    try:
        pool.submit(picture(1)).result(WAIT_S)
        with pytest.raises(ImageRejected):
            pool.submit(b"no picture").result(WAIT_S)
    finally:
        pool.close()
    assert len(told) == 2
    assert all(waited >= 0 and took > 0 for waited, took in told)


def test_pool__kills_a_decoder_that_overruns_and_serves_the_next_image(
    picture: Callable[..., bytes],
) -> None:
    replaced: list[str] = []
    pool, stalled = pool_with_its_child(timeout_s=1.0, on_replaced=replaced.append)
    try:
        stalled.suspend()
        with pytest.raises(ImageRejected, match="longer than 1 s"):
            pool.submit(picture(6)).result(WAIT_S)
        assert pool.submit(picture(6)).result(WAIT_S).shape == (8, 8, 3)
        assert replaced == ["timeout"]
        assert stalled.pid not in [child.pid for child in children()]
    finally:
        pool.close()


def test_pool__rejects_only_the_image_that_kills_its_decoder(
    picture: Callable[..., bytes],
) -> None:
    replaced: list[str] = []
    pool, victim = pool_with_its_child(on_replaced=replaced.append)
    try:
        victim.suspend()
        deadly, next_one = pool.submit(picture(7)), pool.submit(picture(8))
        while not deadly.running():
            os.sched_yield()
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(ImageRejected, match="gave up"):
            deadly.result(WAIT_S)
        np.testing.assert_array_equal(next_one.result(WAIT_S), prepare(picture(8), CONTRACT))
        assert replaced == ["died"]
    finally:
        pool.close()


def test_pool__does_not_blame_an_image_for_a_decoder_that_died_idle(
    picture: Callable[..., bytes],
) -> None:
    pool, victim = pool_with_its_child()
    try:
        victim.kill()
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            os.sched_yield()
        assert pool.submit(picture(9)).result(WAIT_S).shape == (8, 8, 3)
    finally:
        pool.close()


def test_pool__replaces_a_decoder_after_its_lifetime(picture: Callable[..., bytes]) -> None:
    replaced: list[str] = []
    pool = make_pool(lifetime_images=2, on_replaced=replaced.append)
    try:
        futures = [pool.submit(picture(seed)) for seed in range(5)]
        for seed, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(WAIT_S), prepare(picture(seed), CONTRACT))
        assert replaced == ["lifetime", "lifetime"]
    finally:
        pool.close()


def test_pool__leaves_no_process_behind(picture: Callable[..., bytes]) -> None:
    before = {child.pid for child in children()}
    pool = make_pool(size=2)
    started = [child for child in children() if child.pid not in before]
    assert len(started) == 2
    pool.submit(picture(1)).result(WAIT_S)
    pool.close()
    assert {child.pid for child in children()} == before
    with pytest.raises(DecoderUnavailable):
        pool.submit(picture(1))


def test_pool__says_when_no_decoder_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DecoderUnavailable, match="did not start"):
        make_pool()


@pytest.mark.parametrize(
    ("format", "size", "expected"),
    [
        ("PNG", (600, 300), (256, 128)),
        ("JPEG", (1200, 600), (256, 128)),
        ("WEBP", (300, 600), (128, 256)),
        ("PNG", (20, 14), (20, 14)),  # never enlarged
        ("PNG", (5000, 3), (256, 1)),
    ],
)
def test_thumbnail__shows_the_whole_picture_beside_the_same_pixels(
    format: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (size[1], size[0])).copy()).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    pool = make_pool()
    plain = pool.submit(buffer.getvalue()).result(WAIT_S)
    pictured = pool.submit_pictured(buffer.getvalue()).result(WAIT_S)
    pool.close()
    np.testing.assert_array_equal(pictured.pixels, plain)
    thumbnail = Image.open(io.BytesIO(pictured.thumbnail))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", expected)
    row = np.asarray(thumbnail.convert("L"), np.float64)[0]
    wanted = np.linspace(0, 255, expected[0])
    assert np.abs(row - wanted).max() < 12


def test_thumbnail__is_upright() -> None:
    image = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    pool = make_pool()
    thumbnail = pool.submit_pictured(buffer.getvalue()).result(WAIT_S).thumbnail
    with pytest.raises(ImageRejected):
        pool.submit_pictured(b"no picture").result(WAIT_S)
    pool.close()
    assert Image.open(io.BytesIO(thumbnail)).size == (40, 80)
