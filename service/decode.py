"""A bounded pool of decoder processes: an image that kills or stalls one costs only itself.

In: encoded images. Out: (S, S, 3) uint8 pixels, byte for byte what
trainer.representation.preprocess.prepare makes of them, or ImageRejected with the reason.

Each child has its own channel, limits of memory, CPU and wall time, and a thread here that feeds
it. A ready-made process pool is not used because it breaks as a whole when one worker dies.
Pictures that take much memory, and so long, are decoded one at a time: the other children stay
free.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from service.decoder_child import ChildLost, DecoderChild, DecoderUnavailable, Pictured, Pixels
from service.decoder_lanes import DecodeJob, Lanes
from trainer.representation.preprocess import ImageRejected, InputContract

# A large image behind those of others is refused when its turn comes later: with `timeout_s` for
# itself, nobody waits much longer than 2.5 s for an answer.
LARGE_WAIT_S = 1.0


class DecodersBusy(Exception):
    """A large image would wait behind more than `limit` others, or has waited for too long behind
    them; it may be sent again."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} large images wait already")
        self.limit = limit


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
        self._lanes = Lanes()
        self._closed = False
        children: list[DecoderChild] = []
        try:
            children.extend(DecoderChild(self._arguments) for _ in range(size))
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
        return self._put(DecodeJob(image, Future(), deadline, time.monotonic(), sender))

    def submit_pictured(
        self, image: bytes, *, deadline: float = math.inf, sender: object = None
    ) -> Future[Pictured]:
        """As `submit`, for the pixels and a thumbnail."""
        now = time.monotonic()
        return self._put(DecodeJob(image, Future(), deadline, now, sender, thumbnail=True))

    def _put(self, job: DecodeJob) -> Future[Any]:
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

    def _serve(self, first: DecoderChild) -> None:
        child: DecoderChild | None = first
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

    def _restarted(self) -> DecoderChild | None:
        """A new process; None when there is none to be had: the next job tries again and tells."""
        child = None
        try:
            child = DecoderChild(self._arguments)
            child.wait_until_ready()
        except DecoderUnavailable:
            if child is not None:
                child.kill()
            return None
        return child

    def _decode(self, job: DecodeJob, child: DecoderChild | None) -> DecoderChild | None:
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
                child = DecoderChild(self._arguments)
                child.wait_until_ready()
            decoded = child.decode(
                job.image, self._timeout_s, self._side, job.thumbnail, large=job.large
            )
        except ChildLost as lost:
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

    def _retire(self, child: DecoderChild | None, reason: str) -> None:
        if child is not None:
            child.kill()
            self._on_replaced(reason)
