"""Run a command that ends with whoever started it: python -m service.tethered BYTES COMMAND...

In: the address space that the command may take, 0 for any, and the command. Out: nothing of its
own: it becomes the command. When the process that started it is gone, SIGKILL included, the kernel
kills it, so that nothing works on for a job that somebody else has taken over.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(limit_bytes: int, command: list[str]) -> None:
    """Become the command."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")
    if os.getppid() != parent:  # it went before the kernel knew
        sys.exit(1)
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
