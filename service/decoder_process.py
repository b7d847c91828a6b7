"""One image decoder: a child process that may crash, hang or run out of memory without harm.

In: frames on the socket given as a file descriptor, each one encoded image. Out: for each a frame
with the pixels or with the reason of a refusal. Only bytes cross, nothing is ever unpickled: the
child handles what strangers send. Started by service.decode; imports nothing heavier than Pillow.
"""

import contextlib
import json
import resource
import signal
import socket
import struct
import sys
from typing import Any

from trainer.representation.preprocess import ImageRejected, InputContract, prepare

READY, PIXELS, REJECTED = b"R", b"P", b"X"
_LENGTH = struct.Struct("<Q")


def send_frame(channel: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send one byte of kind, the length, the payload; respects the socket's timeout."""
    channel.sendall(kind + _LENGTH.pack(len(payload)))
    channel.sendall(payload)


def receive_frame(channel: socket.socket, limit_bytes: int) -> tuple[bytes, bytearray]:
    """Receive what `send_frame` sent.

    Raises:
        EOFError: the other side is gone, or announced more than `limit_bytes`.
        TimeoutError: the socket's timeout passed between two pieces.
    """
    head = _receive_exactly(channel, 1 + _LENGTH.size)
    (length,) = _LENGTH.unpack_from(head, 1)
    if length > limit_bytes:
        raise EOFError(f"a frame of {length} bytes, at most {limit_bytes} were expected")
    return bytes(head[:1]), _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, count: int) -> bytearray:
    received = bytearray(count)
    view = memoryview(received)
    while len(view):
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
    send_frame(channel, READY, b"")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _, image = receive_frame(channel, arguments["max_image_bytes"])
            _allow_cpu_seconds(arguments["cpu_s"])
            send_frame(channel, *_decode(bytes(image), contract, arguments["max_pixels"]))


def _decode(image: bytes, contract: InputContract, max_pixels: int) -> tuple[bytes, bytes]:
    try:
        return PIXELS, prepare(image, contract, max_pixels=max_pixels).tobytes()
    except ImageRejected as error:
        if not isinstance(error.__cause__, MemoryError):
            return REJECTED, str(error).encode()
    except MemoryError:
        pass
    return REJECTED, b"decoding needs more memory than one image may take: scale it down"


def _allow_cpu_seconds(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = int(used.ru_utime + used.ru_stime) + seconds + 1  # the kernel counts whole seconds
    resource.setrlimit(resource.RLIMIT_CPU, (total, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
