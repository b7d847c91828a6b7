"""One decoder process, seen from the service: started, fed an image at a time, killed.

In: an encoded image and how long it may take. Out: pixels, a rejection, or that the process is lost
and must be replaced. A fresh interpreter (never forked: a fork after faiss or onnxruntime ran can
hang), with limits of memory and CPU of its own; what it does is in service.decoder_process.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
from trainer.representation.preprocess import ImageRejected

_START_TIMEOUT_S = 30.0  # an interpreter that imports numpy and Pillow takes about 0.3 s
_MAX_REASON_BYTES = 64 * 1024
_MAX_THUMBNAIL_BYTES = 512 * 1024  # more than 256 x 256 pixels take in any form
_ROOT = Path(__file__).resolve().parent.parent

Pixels = NDArray[np.uint8]


class DecoderUnavailable(Exception):
    """No decoder process can be started on this machine; the image itself may be fine."""


class Pictured(NamedTuple):
    """What a picture becomes that is to be kept."""

    pixels: Pixels
    thumbnail: bytes  # a WebP of at most decoder_process.THUMBNAIL_PX


class ChildLost(Exception):
    """The process gave no answer, or none that makes sense: it must go."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class DecoderChild:
    """One decoder process and the channel to it.

    Args:
        arguments: of service.decoder_process, but for the descriptor of its channel.

    Raises:
        DecoderUnavailable: it cannot be started.
    """

    def __init__(self, arguments: dict[str, object]) -> None:
        self.images = 0  # that it has decoded or rejected
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
        """Wait until it takes images.

        Raises:
            DecoderUnavailable: it does not come to that.
        """
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
        """Whether the process is there no more."""
        return self._process.poll() is not None

    def decode(
        self, image: bytes, timeout_s: float, side: int, pictured: bool, *, large: bool
    ) -> Pixels | Pictured | None:
        """The pixels, with a thumbnail where `pictured`; None when the image takes more memory than
        those of which any number is decoded at a time, and was not allowed to be `large`.

        Raises:
            ImageRejected: by the process.
            ChildLost: there is no answer, or none that makes sense; the process must go.
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
            raise ChildLost(
                "timeout",
                f"decoding took longer than {timeout_s:g} s: save the image again as a plain file",
            ) from None
        except (EOFError, OSError):
            raise ChildLost(
                "died", "the decoder gave up on it: the image is damaged or made to do harm"
            ) from None
        if kind == LARGE and not large:
            return None
        self.images += 1
        if kind != PIXELS:
            raise ImageRejected(payload.decode(errors="replace"))
        if len(payload) != side * side * 3:
            raise ChildLost("died", "the decoder gave pixels of another size")
        pixels = np.frombuffer(payload, np.uint8).reshape(side, side, 3)
        return pixels if thumbnail is None else Pictured(pixels, bytes(thumbnail))

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
