"""Work in another thread, beside what a test does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_the_background(work: Callable[[], object]) -> Iterator[None]:
    """Do some work again and again, in a thread, within the block; raises what the work raises."""
    done = threading.Event()
    failures: list[BaseException] = []

    def repeat() -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    for failure in failures:
        raise failure
