"""Memory that does not suffice for an entry: its packet is lost, and no entry is added any more."""

from __future__ import annotations

import pytest

from tests.gateway import INSIDE, SERVER, Gateway, endpoints
from tests.packets import udp


@pytest.mark.parametrize("fast", [True, False])
def test_an_entry_for_which_there_is_no_memory_is_the_last_to_be_added(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(fast=fast)

    def fail(*_: object) -> int:
        raise MemoryError

    first, last, *others = endpoints(INSIDE[0], 90)
    for inside in others:
        gateway.send(inside, SERVER)
    with monkeypatch.context() as scarce:
        scarce.setattr(gateway.sessions.tables, "ip_masq_hash", fail)
        with pytest.raises(MemoryError):
            gateway.out(udp(first, SERVER))
    gateway.send(last, SERVER)
    assert len(gateway.sessions.entries()) == 88
    assert gateway.ended == {"evicted": 1}
