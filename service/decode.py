"""A bounded pool of decoder processes: an image that kills or stalls one costs only itself.

In: encoded images. Out: (S, S, 3) uint8 pixels, byte for byte what
trainer.representation.preprocess.prepare makes of them, or ImageRejected with the reason.

The children are fresh interpreters (never forked: a fork after faiss or onnxruntime ran can hang),
each with its own channel, limits of memory, CPU and wall time, and a thread here that feeds it.
A ready-made process pool is not used because it breaks as a whole when one worker dies.
"""

import contextlib
import json
import math
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.decoder_process import PIXELS, READY, receive_frame, send_frame
from trainer.representation.preprocess import ImageRejected, InputContract

_START_TIMEOUT_S = 30.0  # an interpreter that imports numpy and Pillow takes about 0.3 s
_MAX_REASON_BYTES = 64 * 1024
_ROOT = Path(__file__).resolve().parent.parent

Pixels = NDArray[np.uint8]


class DecoderUnavailable(Exception):
    """No decoder process can be started on this machine; the image itself may be fine."""


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
        on_replaced: told "lifetime", "timeout" or "died" whenever a process is replaced.

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
        on_replaced: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._side = contract.size_px
        self._timeout_s = timeout_s
        self._lifetime_images = lifetime_images
        self._on_replaced = on_replaced
        self._arguments = {
            "contract": contract.as_dict(),
            "memory_bytes": memory_bytes,
            "max_pixels": max_pixels,
            "max_image_bytes": max_image_bytes,
            "cpu_s": math.ceil(timeout_s),
        }
        self._jobs: queue.SimpleQueue[tuple[bytes, Future[Pixels]] | None] = queue.SimpleQueue()
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

    def submit(self, image: bytes) -> Future[Pixels]:
        """Queue one image. The future may be cancelled as long as no process has taken it.

        Its errors: ImageRejected with a reason for the sender; DecoderUnavailable.
        """
        if self._closed:
            raise DecoderUnavailable("the decoders are shut down")
        future: Future[Pixels] = Future()
        self._jobs.put((image, future))
        return future

    def close(self) -> None:
        """End the processes; images still queued are refused with DecoderUnavailable."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job[1].set_running_or_notify_cancel():
                    job[1].set_exception(DecoderUnavailable("the decoders were shut down"))

    def _serve(self, first: "_Child") -> None:
        child: _Child | None = first
        while (job := self._jobs.get()) is not None:
            image, future = job
            if child is not None and child.has_ended():  # while idle: not this image's doing
                self._retire(child, "died")
                child = None
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if child is None:
                    child = _Child(self._arguments)
                    child.wait_until_ready()
                pixels = child.decode(image, self._timeout_s, self._side)
            except _ChildLost as lost:
                self._retire(child, lost.kind)
                child = None
                future.set_exception(ImageRejected(lost.reason))
            except DecoderUnavailable as error:
                self._retire(child, "died")
                child = None
                future.set_exception(error)
            except ImageRejected as rejection:
                future.set_exception(rejection)
            else:
                future.set_result(pixels)
            if child is not None and child.images >= self._lifetime_images:
                self._retire(child, "lifetime")
                child = None
        if child is not None:
            child.kill()

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

    def decode(self, image: bytes, timeout_s: float, side: int) -> Pixels:
        self.images += 1
        # The timeout counts between two pieces of a frame: in all at most a few times as long.
        self._channel.settimeout(timeout_s)
        try:
            send_frame(self._channel, b"I", image)
            kind, payload = receive_frame(self._channel, max(side * side * 3, _MAX_REASON_BYTES))
        except TimeoutError:
            raise _ChildLost(
                "timeout",
                f"decoding took longer than {timeout_s:g} s: save the image again as a plain file",
            ) from None
        except (EOFError, OSError):
            raise _ChildLost(
                "died", "the decoder gave up on it: the image is damaged or made to do harm"
            ) from None
        if kind != PIXELS:
            raise ImageRejected(payload.decode(errors="replace"))
        if len(payload) != side * side * 3:
            raise _ChildLost("died", "the decoder gave pixels of another size")
        return np.frombuffer(payload, np.uint8).reshape(side, side, 3)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()
