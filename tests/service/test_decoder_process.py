"""The processes that decode: their frames arrive whole, the pool outlives what kills them and
leaves none behind."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from service.decode import DecoderPool
from service.decoder_child import DecoderUnavailable
from service.decoder_process import receive_frame, send_frame
from tests.service.decoder_pools import CONTRACT, WAIT_S, make_pool
from trainer.representation.preprocess import ImageRejected, prepare


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


def test_receive_frame__pieces_that_come_in_time_do_not_extend_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"P" + (8).to_bytes(8, "little") + b"some")
        with pytest.raises(TimeoutError):
            receive_frame(ours, 8, time.monotonic() + 0.05)
        theirs.sendall(b"more")
        with pytest.raises(TimeoutError):  # there is something to read, but it is too late
            receive_frame(ours, 8, time.monotonic())


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
