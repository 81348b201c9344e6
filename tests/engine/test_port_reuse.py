"""What the outside remembers of a connection whose entry has gone."""

from __future__ import annotations

from nfmasq.engine import TCP, UDP, IpMasq
from nfmasq.engine.port_reuse import MOST, REMEMBERED, PortReuse
from nfmasq.engine.table.states import TIME_WAIT
from nfmasq.engine.table.timeouts import Timeouts

SERVER = 0xC6336407, 443
MADDR = 0xCB007101
NOW = 1000.0


def closed(mport: int, seconds_ago: float) -> IpMasq:
    table = Timeouts().table()
    ms = IpMasq(TCP, MADDR, mport, 0x0A000002, 4000, *SERVER, 0, table, TIME_WAIT)
    ms.timer = NOW - seconds_ago + ms.timeout
    return ms


def test_a_connection_is_remembered_for_a_minute_after_it_was_closed() -> None:
    reuse = PortReuse()
    for mport, seconds_ago in ((1, 0), (2, REMEMBERED - 1), (3, REMEMBERED)):
        reuse.ended(closed(mport, seconds_ago), NOW)
    assert [mport for mport in range(5) if reuse.is_remembered(TCP, MADDR, mport, SERVER)] == [1, 2]
    assert not reuse.is_remembered(UDP, MADDR, 1, SERVER)
    assert not reuse.is_remembered(TCP, MADDR, 1, (SERVER[0], 80))
    reuse.forget(NOW + REMEMBERED, 10)
    assert not reuse.until


def test_of_too_many_connections_the_newest_are_known() -> None:
    reuse = PortReuse()
    for mport in range(MOST + 10):
        reuse.ended(closed(mport, 0), NOW)
    assert len(reuse.until) == MOST
    assert not reuse.is_remembered(TCP, MADDR, 9, SERVER)
    assert reuse.is_remembered(TCP, MADDR, 10, SERVER)
