"""Chance that a fuzzer steers: whatever is drawn is read from a string of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest.mock import patch

from nfmasq.engine.helper import calls
from nfmasq.engine.table import ports
from nfmasq.engine.wire import identification


class Steering(Random):
    """A source of chance that reads bytes, the first byte first, and zeros after the last.

    Another byte is another draw, and mostly leaves the later draws alone. So a fuzzer can vary a
    program step by step.
    """

    def __new__(cls, steering: bytes) -> Steering:
        return super().__new__(cls)

    def __init__(self, steering: bytes) -> None:
        super().__init__(0)
        self._bytes = steering
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Whether all bytes have been read."""
        return self._at >= len(self._bytes)

    def taken(self, size: int) -> bytes:
        """Read bytes as they are; fewer where fewer are left."""
        read = self._bytes[self._at : self._at + size]
        self._at += size
        return read

    def random(self) -> float:
        return self._below(256) / 256

    def choice(self, seq: Any) -> Any:
        return seq[self._below(len(seq))]

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        numbers = range(start)[::step] if stop is None else range(start, stop, step)
        return numbers[self._below(len(numbers))]

    def sample(self, population: Any, k: int, *, counts: object = None) -> Any:
        left = list(population)
        return [left.pop(self._below(len(left))) for _ in range(k)]

    def _below(self, limit: int) -> int:
        """Read a number below a limit, of a byte where a byte will do."""
        size = 1 if limit <= 256 else 2
        return int.from_bytes(self.taken(size), "big") % limit


@contextmanager
def nothing_left_to_chance() -> Iterator[None]:
    """Have the engine draw zeros in the block, so that a program does what it did before."""
    with ExitStack() as stack:
        for module in (ports, calls):
            stack.enter_context(patch.object(module, "_random", Steering(b"")))
        stack.enter_context(patch.object(identification, "SystemRandom", lambda: Random(0)))
        stack.enter_context(patch.object(identification, "_COUNTERS", 16))
        yield
