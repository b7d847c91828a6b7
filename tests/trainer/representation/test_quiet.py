"""A block without warnings, entered and left by several threads at a time.

Run: pytest tests/trainer/representation/test_quiet.py
"""

import threading
import warnings

import pytest

from trainer.representation.quiet import without_warnings


def test_without_warnings__lasts_until_the_last_thread_has_left() -> None:
    filters = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with without_warnings():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    try:
        with without_warnings():
            thread.start()
            inside.wait()
        # The first one has left: the other one is still not warned.
        warnings.warn("meant for nobody", UserWarning, stacklevel=1)
    finally:
        leave.set()
        thread.join()
    assert warnings.filters == filters
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_without_warnings__is_left_by_an_error_too() -> None:
    filters = list(warnings.filters)
    with pytest.raises(KeyError), without_warnings():
        raise KeyError
    assert warnings.filters == filters


def test_without_warnings__of_many_threads_leaves_no_trace() -> None:
    filters = list(warnings.filters)

    def work() -> None:
        for _ in range(300):
            with without_warnings():
                warnings.warn("meant for nobody", UserWarning, stacklevel=1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == filters
