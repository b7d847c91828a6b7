"""Run a command that ends with whoever started it: python -m service.tethered BYTES COMMAND...

In: the address space that the command may take, 0 for any, and the command. Out: its exit code, or
an end by the signal that ended it. Start it in a session of its own: when the process that started
it is gone, SIGKILL included, the whole group is killed, so that nothing works on for a job that
somebody else has taken over, and what the command has started goes with it.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_STARTER_GONE = signal.SIGHUP


def main(limit_bytes: int, command: Sequence[str]) -> int:
    """Start the command and wait for it."""
    starter = os.getppid()
    assert os.getpgrp() == os.getpid(), "wanted in a session of its own: it kills its group"
    signal.signal(_STARTER_GONE, lambda *_: os.killpg(0, signal.SIGKILL))
    for sent_to_all in (signal.SIGTERM, signal.SIGINT):  # the command has it too, and decides
        signal.signal(sent_to_all, lambda *_: None)
    _at_death_of_parent(_STARTER_GONE)
    if os.getppid() != starter:  # it went before the kernel knew
        return 1

    def prepare() -> None:  # between fork and exec; this process has one thread
        _at_death_of_parent(signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    code = subprocess.Popen(command, preexec_fn=prepare).wait()
    if code < 0:  # end as it did
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _at_death_of_parent(number: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
