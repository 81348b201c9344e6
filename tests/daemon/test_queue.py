"""The queue of packets, read until told to stop; the kernel's part of it has tests with traffic."""

from __future__ import annotations

import pytest

from nfmasq.daemon.queue import PacketQueue


class ScarceMemory:
    """A queue of the library that has too little memory for its first packets."""

    def __init__(self) -> None:
        self.runs = 0

    def run_socket(self, _: object) -> None:
        self.runs += 1
        if self.runs < 3:
            raise MemoryError


def test_where_memory_does_not_suffice_for_a_packet_the_next_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = PacketQueue.__new__(PacketQueue)
    scarce = ScarceMemory()
    monkeypatch.setattr(queue, "_queue", scarce, raising=False)
    queue.run()
    assert scarce.runs == 3
