"""The choice of a masquerade port: which ports a session may have, and which it may share.

How a free port is found is in `table/test_ports.py`, and pairs of ports are in `apps/test_sip.py`.
"""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import Mock, patch

import pytest

from nfmasq.engine import (
    BEHAVIOURS,
    PORT_SELECTIONS,
    UDP,
    Flags,
    IpMasq,
    Masquerade,
    Settings,
    port_choice,
)
from nfmasq.engine.port_choice import PortChoice
from nfmasq.engine.port_reuse import PortReuse
from nfmasq.engine.table.limits import InsideHosts
from nfmasq.engine.table.states import STATE_UDP
from nfmasq.engine.table.tables import Tables
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, SERVER, Gateway, masquerade_with
from tests.packets import number

EI, AD, APD = BEHAVIOURS
MADDR, HOST, OTHER_HOST, DADDR = map(number, (GATEWAY, INSIDE[0], NEIGHBOUR[0], SERVER[0]))
MANY = 128
SELECTIONS = pytest.mark.parametrize("selection", PORT_SELECTIONS)

# -- asked for ------------------------------------------------------------------------


def test_a_mport_that_another_inside_machine_has_is_not_to_be_had() -> None:
    masq = Masquerade()
    held = masq.sessions.ip_masq_new(UDP, MADDR, 0, HOST, 1024, DADDR, 53, 0)
    assert held is not None
    assert masq.sessions.ip_masq_new(UDP, MADDR, held.mport, OTHER_HOST, 1, DADDR, 53, 0) is None
    assert masq.sessions.counters.errors["no_port"] == 1


@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_open_ended_entries_of_two_inside_machines_cannot_have_one_mport(mapping: str) -> None:
    masq = masquerade_with(mapping=mapping)
    flags = int(Flags.NO_DADDR | Flags.NO_DPORT)
    assert masq.sessions.ip_masq_new(UDP, MADDR, 8080, HOST, 80, 0, 0, flags)
    assert not masq.sessions.ip_masq_new(UDP, MADDR, 8080, OTHER_HOST, 80, 0, 0, flags)


# -- shared ---------------------------------------------------------------------------


def test_a_flood_to_one_server_costs_one_search_a_second_for_a_port_to_share() -> None:
    gateway = Gateway(ports=range(61000, 61000 + MANY), mapping=APD)
    gateway.flood(INSIDE[0], MANY)
    looked_at = Mock(wraps=gateway.sessions.choice.ports.get_next_mport)
    with patch.object(gateway.sessions.choice.ports, "get_next_mport", looked_at):
        assert not any(gateway.flood(INSIDE[0], 5 * MANY)[MANY:])
    assert looked_at.call_count <= MANY


@SELECTIONS
def test_a_port_to_share_is_looked_for_among_so_many_and_the_next_search_goes_on(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapping is by destination.

    The outside endpoint has a session on each of 45 ports but one.
    """
    monkeypatch.setattr(port_choice, "MAX_SHARED_LOOK_UPS", 10)
    span = range(61000, 61045)
    masq = masquerade_with(ports=span, mapping=APD, port_selection=selection)
    for mport in span:
        dport = 53 if mport != 61044 else 54
        assert masq.sessions.ip_masq_new(UDP, MADDR, mport, HOST, mport, DADDR, dport, 0)
    looked_at = Mock(wraps=masq.sessions.choice.ports.get_next_mport)
    monkeypatch.setattr(masq.sessions.choice.ports, "get_next_mport", looked_at)

    def another() -> bool:
        looked_at.reset_mock()
        masq.sessions.now += port_choice.SEARCH_AGAIN
        ms = masq.sessions.ip_masq_new(UDP, MADDR, 0, OTHER_HOST, 5353, DADDR, 53, 0)
        assert looked_at.call_count <= 10
        return ms is not None and ms.mport == 61044

    tries = [another() for _ in range(5 if selection == "sequential" else 1000)]
    assert any(tries)
    assert not all(tries)


def test_random_ports_that_are_shared_do_not_follow_a_row() -> None:
    masq = masquerade_with(ports=range(61000, 61064), mapping=APD, port_selection="random")

    def mports(sessions: int, server: int) -> list[int]:
        made = [
            masq.sessions.ip_masq_new(UDP, MADDR, 0, n, 5353, server, 53, 0)
            for n in range(sessions)
        ]
        return [ms.mport for ms in made if ms is not None]

    assert len({*mports(64, DADDR)}) == 64
    shared = mports(8, DADDR + 1)
    assert len({*shared}) == 8
    assert len({after - before for before, after in pairwise(shared)}) > 3


def test_the_choice_by_itself_gives_what_is_mapped_else_what_is_free() -> None:
    """Without a masquerade: tables, the hosts' limits and settings are all that it needs."""
    hosts = InsideHosts()
    choice: PortChoice

    def taken(ms: IpMasq) -> None:
        choice.ports.take(ms.protocol, ms.maddr, ms.mport)
        hosts.took_port(ms.protocol, ms.saddr)

    tables = Tables(taken, lambda ms, holder: None)
    choice = PortChoice(tables, hosts, PortReuse(), Settings(ports=range(61000, 61002)))
    inside, neighbour, servers, timeouts = (1, 1000), (2, 1000), ((8, 53), (9, 53)), [300.0] * 20
    assert choice.choose(UDP, 3, (*inside, *servers[0]), 0) == 61000
    ms = IpMasq(UDP, 3, 61000, *inside, *servers[0], 0, timeouts, STATE_UDP)
    tables.ip_masq_hash(ms)
    assert choice.choose(UDP, 3, (*inside, *servers[1]), 0) == 61000
    assert not choice.may_use(UDP, 3, 61000, (*neighbour, *servers[1]), 0)
    assert choice.choose(UDP, 3, (*neighbour, *servers[1]), 0) == 61001
    hosts.limit(0, 1, 0)
    assert choice.choose(UDP, 3, (inside[0], 1001, *servers[1]), 0) is None
    assert choice.why_none(UDP, inside[0]) == "host_ports"
