"""One image decoder: a child process that may crash, hang or run out of memory without harm.

In: frames on the socket given as a file descriptor, each one encoded image. Out: for each a frame
with the pixels, and one with a thumbnail where asked for, or the reason of a refusal. Only bytes
cross, nothing is ever unpickled: the child handles what strangers send. Started by
service.decoder_child; imports nothing heavier than Pillow.
"""

import contextlib
import io
import json
import resource
import signal
import socket
import struct
import sys
import time
from typing import Any, TypedDict

from PIL import Image

from trainer.representation.preprocess import (
    ImageRejected,
    InputContract,
    LargeImage,
    decode,
    fit,
    prepare,
)

# What is asked: an image that may take only SMALL_BYTES of memory, or as much as the process has.
# In lower case: with a thumbnail, which comes in a frame behind the pixels.
SMALL_ONLY, LARGE_ALLOWED = b"I", b"L"
READY, PIXELS, REJECTED, LARGE, THUMBNAIL = b"R", b"P", b"X", b"L", b"T"
THUMBNAIL_PX = 256
_JPEG = b"\xff\xd8\xff"
# 16 Mpx of RGB in a PNG, any baseline JPEG (those are decoded at a fraction of their size).
SMALL_BYTES = 64 * 2**20
# Of the address space an interpreter with numpy and Pillow takes; not for pictures.
OWN_BYTES = 128 * 2**20
_LENGTH = struct.Struct("<Q")


def send_frame(channel: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send one byte of kind, the length, the payload; respects the socket's timeout.

    Together, so that the other side wakes once for both.
    """
    head = kind + _LENGTH.pack(len(payload))
    sent = channel.sendmsg([head, payload])
    if sent < len(head):
        channel.sendall(head[sent:])
        sent = len(head)
    if sent < len(head) + len(payload):
        channel.sendall(memoryview(payload)[sent - len(head) :])


def receive_frame(
    channel: socket.socket, limit_bytes: int, deadline: float | None = None
) -> tuple[bytes, bytearray]:
    """Receive what `send_frame` sent, all of it before `deadline` on time.monotonic.

    Raises:
        EOFError: the other side is gone, or announced more than `limit_bytes`.
        TimeoutError: the deadline passed; without one, the socket's timeout between two pieces.
    """
    head = _receive_exactly(channel, 1 + _LENGTH.size, deadline)
    (length,) = _LENGTH.unpack_from(head, 1)
    if length > limit_bytes:
        raise EOFError(f"a frame of {length} bytes, at most {limit_bytes} were expected")
    return bytes(head[:1]), _receive_exactly(channel, length, deadline)


def _receive_exactly(channel: socket.socket, count: int, deadline: float | None) -> bytearray:
    received = bytearray(count)
    view = memoryview(received)
    while len(view):
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            channel.settimeout(left)
        got = channel.recv_into(view)
        if not got:
            raise EOFError("the other side closed the channel")
        view = view[got:]
    return received


def main(arguments: dict[str, Any]) -> None:
    """Answer frames until the other side closes the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    channel = socket.socket(fileno=arguments["descriptor"])
    contract = InputContract.from_dict(arguments["contract"])
    memory_bytes = arguments["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    all_bytes = memory_bytes - OWN_BYTES
    send_frame(channel, READY, b"")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            asked, received = receive_frame(channel, arguments["max_image_bytes"])
            image = bytes(received)
            del received  # a large body need not be there twice
            _allow_cpu_seconds(arguments["cpu_s"])
            limits = Limits(
                max_pixels=arguments["max_pixels"],
                most_bytes=SMALL_BYTES if asked.upper() == SMALL_ONLY else all_bytes,
            )
            for frame in _decode(image, contract, limits, all_bytes, thumbnail=asked.islower()):
                send_frame(channel, *frame)


class Limits(TypedDict):
    """What `prepare` and `decode` are given."""

    max_pixels: int
    most_bytes: int


def _decode(
    image: bytes, contract: InputContract, limits: Limits, all_bytes: int, *, thumbnail: bool
) -> list[tuple[bytes, bytes]]:
    try:
        if not thumbnail:
            return [(PIXELS, prepare(image, contract, **limits).tobytes())]
        if image.startswith(_JPEG):  # may be decoded at a fraction: once for each size
            pixels = prepare(image, contract, **limits).tobytes()
            whole = decode(image, least_side_px=THUMBNAIL_PX, **limits)
        else:
            whole = decode(image, **limits)
            pixels = fit(whole, contract).tobytes()
        return [(PIXELS, pixels), (THUMBNAIL, _shrunk(whole))]
    except LargeImage as error:
        if error.takes_bytes <= all_bytes:
            return [(LARGE, b"")]
    except ImageRejected as error:
        if not isinstance(error.__cause__, MemoryError):
            return [(REJECTED, str(error).encode())]
    except MemoryError:
        pass
    return [(REJECTED, b"decoding needs more memory than one image may take: scale it down")]


def _shrunk(image: Image.Image) -> bytes:
    """The whole picture as a WebP of at most THUMBNAIL_PX in each direction."""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
    written = io.BytesIO()
    image.save(written, "WEBP", quality=80, method=2)
    return written.getvalue()


def _allow_cpu_seconds(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = int(used.ru_utime + used.ru_stime) + seconds + 1  # the kernel counts whole seconds
    resource.setrlimit(resource.RLIMIT_CPU, (total, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
