"""Memory that several processes write into, so that pixels need not be pickled and piped.

In: a number of bytes. Out: a block, and a name by which a child process finds it. No torch at
import: the decoding processes import this.

The memory is an anonymous file of the kernel's: unlike /dev/shm, of which containers give 64 MB, it
has no limit but the machine's memory, no name that a killed run would leave behind, and it is gone
with the last process that holds it.
"""

import errno
import functools
import itertools
import mmap
import os
import weakref
from pathlib import Path
from typing import NamedTuple

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
ATTACHED = 16  # blocks that a child keeps mapped; a run has a handful

_serials = itertools.count()


class NoMemoryError(Exception):
    """The kernel does not give so much memory; the message says how much was asked for."""


class BlockName(NamedTuple):
    """Where a child finds a block."""

    process: int
    descriptor: int
    serial: int  # descriptors are used again, serials never
    num_bytes: int


class SharedBlock:
    """`num_bytes` of shared memory, freed with this object and the views of its memory.

    Raises:
        NoMemoryError: there is not so much.
    """

    def __init__(self, num_bytes: int) -> None:
        free = available_bytes()
        if num_bytes > free:
            raise NoMemoryError(
                f"{num_bytes:,} bytes of shared memory are not to be had ({free:,} are free)"
            )
        descriptor = os.memfd_create("invprop-block", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        try:
            # Reserved now: a page that is missing later would kill whoever writes to it.
            os.posix_fallocate(descriptor, 0, num_bytes)
            self.memory = mmap.mmap(descriptor, num_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
                raise
            raise NoMemoryError(
                f"{num_bytes:,} bytes of shared memory are not to be had ({error.strerror})"
            ) from error
        self.name = BlockName(os.getpid(), descriptor, next(_serials), num_bytes)


def available_bytes() -> int:
    """What can be taken without swapping, of the machine and within the container's limit.

    Asked beforehand: a kernel that runs out of memory in the middle kills a process.
    """
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="ascii")))
    return free


@functools.lru_cache(maxsize=ATTACHED)
def attach(name: BlockName) -> mmap.mmap:
    """The memory of a block of the parent process.

    Raises:
        OSError: the parent or its block is gone.
    """
    with Path(f"/proc/{name.process}/fd/{name.descriptor}").open("r+b") as file:
        return mmap.mmap(file.fileno(), name.num_bytes)
