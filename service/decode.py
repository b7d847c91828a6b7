"""A bounded pool of decoder processes: an image that kills or stalls one costs only itself.

In: encoded images. Out: (S, S, 3) uint8 pixels, byte for byte what
trainer.representation.preprocess.prepare makes of them, or ImageRejected with the reason.

The children are fresh interpreters (never forked: a fork after faiss or onnxruntime ran can hang),
each with its own channel, limits of memory, CPU and wall time, and a thread here that feeds it.
A ready-made process pool is not used because it breaks as a whole when one worker dies. Pictures
that take much memory, and so long, are decoded one at a time: the other children stay free.
"""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.decoder_process import (
    LARGE,
    LARGE_ALLOWED,
    PIXELS,
    READY,
    SMALL_ONLY,
    receive_frame,
    send_frame,
)
from trainer.representation.preprocess import ImageRejected, InputContract

_START_TIMEOUT_S = 30.0  # an interpreter that imports numpy and Pillow takes about 0.3 s
# A large image behind those of others is refused when its turn comes later: with `timeout_s` for
# itself, nobody waits much longer than 2.5 s for an answer.
LARGE_WAIT_S = 1.0
_MAX_REASON_BYTES = 64 * 1024
_MAX_THUMBNAIL_BYTES = 512 * 1024  # more than 256 x 256 pixels take in any form
_ROOT = Path(__file__).resolve().parent.parent

Pixels = NDArray[np.uint8]


class DecoderUnavailable(Exception):
    """No decoder process can be started on this machine; the image itself may be fine."""


class DecodersBusy(Exception):
    """A large image would wait behind more than `limit` others, or has waited for too long behind
    them; it may be sent again."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} large images wait already")
        self.limit = limit


class Pictured(NamedTuple):
    """What a picture becomes that is to be kept."""

    pixels: Pixels
    thumbnail: bytes  # a WebP of at most decoder_process.THUMBNAIL_PX


@dataclass(frozen=True)
class _Job:
    image: bytes
    future: Future[Any]  # of Pixels, or of Pictured where asked for
    deadline: float  # on time.monotonic
    arrived: float
    sender: object  # jobs of one sender do not count as queueing before each other
    large: bool = False  # found to be so; it is running already in the eyes of its future
    thumbnail: bool = False  # wanted too
    last_start: float = math.inf  # of a large one behind those of others; refused after it


class _Lanes:
    """Jobs in the order of their arrival; of the large ones only one is out at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._large: deque[_Job] = deque()
        self._large_out: _Job | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs) + len(self._large)

    def put(self, job: _Job) -> None:
        with self._changed:
            (self._large if job.large else self._jobs).append(job)
            self._changed.notify()

    def take(self) -> _Job | None:
        """Wait for a job; None when the lanes are closed."""
        with self._changed:
            while not self._closed:
                large = None if self._large_out or not self._large else self._large[0]
                if large and (not self._jobs or large.arrived <= self._jobs[0].arrived):
                    self._large_out = self._large.popleft()
                    return self._large_out
                if self._jobs:
                    return self._jobs.popleft()
                self._changed.wait()
            return None

    def large_before(self, job: _Job) -> tuple[int, bool]:
        """Large jobs of other senders that wait, and whether one of theirs is out."""
        with self._changed:
            out = self._large_out
            is_out = out is not None and out.sender is not job.sender
            return sum(other.sender is not job.sender for other in self._large), is_out

    def large_is_done(self) -> None:
        with self._changed:
            self._large_out = None
            self._changed.notify()

    def close(self) -> list[_Job]:
        """End every `take`; gives what was left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [*self._jobs, *self._large]
            self._jobs.clear()
            self._large.clear()
            return left


class DecoderPool:
    """`size` decoder processes behind one queue. `close` ends them.

    Args:
        contract: what the pixels must look like.
        size: how many processes.
        timeout_s: wall time of one image; past it its process is killed.
        memory_bytes: address space of a process.
        lifetime_images: a process is replaced after so many images.
        max_pixels: width x height allowed, read from the header.
        max_image_bytes: what the largest request may hold.
        max_large_waiting: large images of other senders that one may wait behind.
        on_replaced: told "lifetime", "timeout" or "died" whenever a process is replaced.
        on_decoded: told the seconds that an image waited and those it took.

    Raises:
        DecoderUnavailable: a process does not start.
    """

    def __init__(
        self,
        contract: InputContract,
        *,
        size: int,
        timeout_s: float,
        memory_bytes: int,
        lifetime_images: int,
        max_pixels: int,
        max_image_bytes: int,
        max_large_waiting: int,
        on_replaced: Callable[[str], None] = lambda reason: None,
        on_decoded: Callable[[float, float], None] = lambda waited, took: None,
    ) -> None:
        self._side = contract.size_px
        self._timeout_s = timeout_s
        self._lifetime_images = lifetime_images
        self._max_large_waiting = max_large_waiting
        self._on_replaced = on_replaced
        self._on_decoded = on_decoded
        self._arguments = {
            "contract": contract.as_dict(),
            "memory_bytes": memory_bytes,
            "max_pixels": max_pixels,
            "max_image_bytes": max_image_bytes,
            "cpu_s": math.ceil(timeout_s),
        }
        self._lanes = _Lanes()
        self._closed = False
        children: list[_Child] = []
        try:
            children.extend(_Child(self._arguments) for _ in range(size))
            for child in children:
                child.wait_until_ready()
        except DecoderUnavailable:
            for child in children:
                child.kill()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=(child,), name="decoder", daemon=True)
            for child in children
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images that no process has taken yet."""
        return len(self._lanes)

    def submit(
        self, image: bytes, *, deadline: float = math.inf, sender: object = None
    ) -> Future[Pixels]:
        """Queue one image. The future may be cancelled as long as no process has taken it.

        Its errors: ImageRejected with a reason for the sender; TimeoutError when `deadline` (on
        time.monotonic) passed before its turn; DecodersBusy when it is large and too many large
        ones of others than `sender` wait; DecoderUnavailable.
        """
        return self._put(_Job(image, Future(), deadline, time.monotonic(), sender))

    def submit_pictured(
        self, image: bytes, *, deadline: float = math.inf, sender: object = None
    ) -> Future[Pictured]:
        """As `submit`, for the pixels and a thumbnail."""
        now = time.monotonic()
        return self._put(_Job(image, Future(), deadline, now, sender, thumbnail=True))

    def _put(self, job: _Job) -> Future[Any]:
        if self._closed:
            raise DecoderUnavailable("the decoders are shut down")
        self._lanes.put(job)
        return job.future

    def close(self) -> None:
        """End the processes; images still queued are refused with DecoderUnavailable."""
        self._closed = True
        left = self._lanes.close()
        for thread in self._threads:
            thread.join()
        for job in (*left, *self._lanes.close()):  # an image may have turned out large meanwhile
            if job.large or job.future.set_running_or_notify_cancel():
                job.future.set_exception(DecoderUnavailable("the decoders were shut down"))

    def _serve(self, first: "_Child") -> None:
        child: _Child | None = first
        while True:
            if child is None and not self._closed:
                child = self._restarted()  # before a job is taken: another process may take it
            job = self._lanes.take()
            if job is None:
                break
            try:
                child = self._decode(job, child)
            finally:
                if job.large:
                    self._lanes.large_is_done()
        if child is not None:
            child.kill()

    def _restarted(self) -> "_Child | None":
        """A new process; None when there is none to be had: the next job tries again and tells."""
        child = None
        try:
            child = _Child(self._arguments)
            child.wait_until_ready()
        except DecoderUnavailable:
            if child is not None:
                child.kill()
            return None
        return child

    def _decode(self, job: _Job, child: "_Child | None") -> "_Child | None":
        """Settle one job; gives the process for the next, None where it has to be started."""
        begun = time.monotonic()
        if child is not None and child.has_ended():  # while idle: not this image's doing
            self._retire(child, "died")
            child = None
        if not job.large and not job.future.set_running_or_notify_cancel():
            return child
        if job.deadline <= begun:
            job.future.set_exception(TimeoutError("waited too long for a decoder"))
            return child
        if job.last_start <= begun:
            job.future.set_exception(DecodersBusy(self._max_large_waiting))
            return child
        try:
            if child is None:
                child = _Child(self._arguments)
                child.wait_until_ready()
            decoded = child.decode(
                job.image, self._timeout_s, self._side, job.thumbnail, large=job.large
            )
        except _ChildLost as lost:
            self._retire(child, lost.kind)
            child = None
            job.future.set_exception(ImageRejected(lost.reason))
        except DecoderUnavailable as error:
            self._retire(child, "died")
            child = None
            job.future.set_exception(error)
        except ImageRejected as rejection:
            job.future.set_exception(rejection)
        else:
            if decoded is None:
                waiting, is_out = self._lanes.large_before(job)
                if waiting >= self._max_large_waiting:
                    job.future.set_exception(DecodersBusy(self._max_large_waiting))
                else:
                    last = begun + LARGE_WAIT_S if waiting or is_out else math.inf
                    self._lanes.put(replace(job, large=True, last_start=last))
                return child
            job.future.set_result(decoded)
        self._on_decoded(begun - job.arrived, time.monotonic() - begun)
        if child is not None and child.images >= self._lifetime_images:
            self._retire(child, "lifetime")
            child = None
        return child

    def _retire(self, child: "_Child | None", reason: str) -> None:
        if child is not None:
            child.kill()
            self._on_replaced(reason)


class _ChildLost(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class _Child:
    """One decoder process and the channel to it."""

    def __init__(self, arguments: dict[str, object]) -> None:
        self.images = 0
        ours, theirs = socket.socketpair()
        self._channel = ours
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(_ROOT), os.environ.get("PYTHONPATH")) if part
        )
        with theirs:
            descriptor = theirs.fileno()
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "service.decoder_process",
                        json.dumps({**arguments, "descriptor": descriptor}),
                    ],
                    pass_fds=(descriptor,),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                )
            except OSError as error:
                ours.close()
                raise DecoderUnavailable(f"no decoder process can be started: {error}") from error

    def wait_until_ready(self) -> None:
        self._channel.settimeout(_START_TIMEOUT_S)
        try:
            kind, _ = receive_frame(self._channel, 0)
        except (EOFError, OSError) as error:
            raise DecoderUnavailable(
                f"a decoder process did not start within {_START_TIMEOUT_S:g} s or ended at once "
                f"(exit code {self._process.poll()}): its own message stands on stderr"
            ) from error
        if kind != READY:
            raise DecoderUnavailable(f"a decoder process said {kind!r} instead of being ready")

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def decode(
        self, image: bytes, timeout_s: float, side: int, pictured: bool, *, large: bool
    ) -> Pixels | Pictured | None:
        """The pixels, with a thumbnail where `pictured`; None when the image takes more memory than
        those of which any number is decoded at a time, and was not allowed to be `large`.

        Raises:
            ImageRejected: by the process.
            _ChildLost: there is no answer, or none that makes sense; the process must go.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._channel.settimeout(timeout_s)
            asked = LARGE_ALLOWED if large else SMALL_ONLY
            send_frame(self._channel, asked.lower() if pictured else asked, image)
            most = max(side * side * 3, _MAX_REASON_BYTES)
            kind, payload = receive_frame(self._channel, most, deadline)
            thumbnail = None
            if kind == PIXELS and pictured:
                _, thumbnail = receive_frame(self._channel, _MAX_THUMBNAIL_BYTES, deadline)
        except TimeoutError:
            raise _ChildLost(
                "timeout",
                f"decoding took longer than {timeout_s:g} s: save the image again as a plain file",
            ) from None
        except (EOFError, OSError):
            raise _ChildLost(
                "died", "the decoder gave up on it: the image is damaged or made to do harm"
            ) from None
        if kind == LARGE and not large:
            return None
        self.images += 1
        if kind != PIXELS:
            raise ImageRejected(payload.decode(errors="replace"))
        if len(payload) != side * side * 3:
            raise _ChildLost("died", "the decoder gave pixels of another size")
        pixels = np.frombuffer(payload, np.uint8).reshape(side, side, 3)
        return pixels if thumbnail is None else Pictured(pixels, bytes(thumbnail))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()
