"""What this process may use of the machine, or of its container."""

import contextlib
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def usable_memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max", or another version of cgroups
            limits.append(int(Path(path).read_text()))
    return min(limits)
