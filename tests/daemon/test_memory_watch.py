"""Memory that runs out: entries take each other's place before it does."""

from __future__ import annotations

import pytest

from nfmasq.daemon.memory import RESERVE, MemoryWatch
from tests.daemon.flood import resident
from tests.gateway import INSIDE, NEIGHBOUR, SERVER, Gateway

ENOUGH = 1 << 40


@pytest.mark.parametrize("is_resident", [True, False])
def test_where_little_is_left_no_entry_is_added(
    is_resident: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway()
    gateway.flood(INSIDE[0], 80)
    little = resident() + RESERVE // 2 if is_resident else RESERVE
    watch = MemoryWatch(gateway.masq, *((ENOUGH, little) if is_resident else (little, None)))
    for _ in range(2):
        watch.look()
    assert gateway.sessions.room.max_entries == 70
    assert gateway.connects(NEIGHBOUR, SERVER)
    assert gateway.ended == {"evicted": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "memory runs out: there are no more than 70 entries now"
    ]


@pytest.mark.parametrize("limits", [(ENOUGH, None), (None, ENOUGH), (ENOUGH, ENOUGH)])
def test_where_enough_is_left_nothing_changes(limits: tuple[int | None, int | None]) -> None:
    gateway = Gateway()
    before = gateway.sessions.room.max_entries
    MemoryWatch(gateway.masq, *limits).look()
    assert gateway.sessions.room.max_entries == before
