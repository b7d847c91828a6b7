"""A block in which nobody is warned, for libraries whose warnings are answered here already.

`warnings.catch_warnings` alone will not do where threads work side by side: it exchanges the one
list of the whole process, and who leaves first takes away what the others asked for, or leaves it
for ever.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_before = warnings.catch_warnings()


@contextmanager
def without_warnings() -> Iterator[None]:
    """No thread is warned before the last one of those inside has left."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = warnings.catch_warnings()
            _before.__enter__()
            warnings.simplefilter("ignore")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _before.__exit__(None, None, None)
