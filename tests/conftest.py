"""What holds for all tests."""

import signal

# A run in the background of a shell begins with Ctrl-C ignored, and so would every process that the
# tests start and then interrupt. A handler of Python's own is not inherited: they begin as usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
