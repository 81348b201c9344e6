"""A flush: all entries end at one stroke, and what is left of them goes step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from nfmasq.apps import helpers
from nfmasq.engine import TCP, UDP, Flags, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.endings import ADDRESS, DELETED
from tests.engine.test_sessions import adds_up
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, SERVER, Gateway
from tests.packets import ACK, FIN, PSH, RST, SYN, dotted, number, source, tcp, udp

FTP, FORWARDED = 21, 8080
CLIENT = ("198.51.100.9", 5000)


def forwarding() -> Forwards:
    server = Server(number(NEIGHBOUR[0]), 80)
    return Forwards([Forward(TCP, range(FORWARDED, FORWARDED + 1), [server])])


def busy() -> Gateway:
    """Make a gateway with entries of all kinds, in all structures that have entries."""
    gateway = Gateway(
        max_entries_per_host=1000, apps=helpers({"ftp": [FTP]}), forwards=forwarding()
    )
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    for n in range(20):
        mapped = gateway.send(("10.0.0.4", 3000 + n % 3), (dotted(number("192.0.2.0") + n), 53))
        gateway.lets_in((dotted(number("192.0.2.0") + n), 53), mapped)
    assert gateway.connects(INSIDE, SERVER)
    gateway.out(tcp(INSIDE, SERVER, RST))
    gateway.into(tcp(CLIENT, (GATEWAY, FORWARDED), SYN))
    sent = gateway.out(tcp(INSIDE, (SERVER[0], FTP), SYN, seq=99))
    assert sent is not None
    mapped = source(sent)
    gateway.into(tcp((SERVER[0], FTP), mapped, SYN | ACK, seq=199, ack=100))
    line = b"PORT 10,0,0,2,19,136\r\n"
    gateway.out(tcp(INSIDE, (SERVER[0], FTP), ACK | PSH, line, seq=100, ack=200))
    assert gateway.expected
    flags = int(Flags.NO_DADDR | Flags.NO_DPORT | Flags.NO_REPLY)
    ms = gateway.sessions.ip_masq_new(UDP, number(GATEWAY), 0, number(INSIDE[0]), 9, 0, 0, flags)
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    return gateway


def structure(held: Any, seen: dict[int, str], path: str) -> Iterator[tuple[str, object]]:
    """Yield what an object holds, to the last: names, and plain values."""
    if isinstance(held, (int, float, str, bytes, type(None), range)):
        yield path, held
    elif callable(held):
        yield path, type(held)
    elif id(held) in seen:
        yield path, seen[id(held)]
    elif isinstance(held, dict):
        for key, value in held.items():
            yield from structure(value, seen, f"{path}[{key!r:.40}]")
    elif isinstance(held, (list, tuple, set, frozenset, deque)):
        for place, value in enumerate(held):
            yield from structure(value, seen, f"{path}[{place}]")
    else:
        seen[id(held)] = path
        slots = (name for kind in type(held).__mro__ for name in getattr(kind, "__slots__", ()))
        for name in sorted({*slots, *getattr(held, "__dict__", ())}):
            if hasattr(held, name):
                yield from structure(getattr(held, name), seen, f"{path}.{name}")


GOES_ON = "_index", "masq_port", "_forwards", "_genuine"
"""What a flush leaves as it is: an index that was asked for, the next port, how often a server was
chosen, which hosts have shown that they are there."""


def parts(gateway: Gateway) -> set[str]:
    """Return all that the parts of a masquerade hold that have entries, except what GOES_ON."""
    sessions = gateway.sessions
    held = [sessions.tables, sessions.hosts, sessions.room, sessions.roll, sessions._controlled]
    found = structure([*held, sessions._kept_until, sessions._remains], {}, "")
    lines = {f"{path} = {value}" for path, value in found}
    return {line for line in lines if not any(name in line for name in GOES_ON)}


def test_what_is_left_after_a_flush_is_a_masquerade_without_entries() -> None:
    """Each part is as it was in the beginning; so no part that may be added is forgotten."""
    gateway = busy()
    new = Gateway(max_entries_per_host=1000, apps=helpers({"ftp": [FTP]}), forwards=forwarding())
    gateway.sessions.flush()
    gateway.passes(0)
    assert parts(gateway) == parts(new)
    assert not any(
        any(index.values())
        for index in (gateway.sessions.tables.in_index, gateway.sessions.tables.out_index)
    )
    assert gateway.sessions.ports_free(UDP) == new.sessions.ports_free(UDP)


def test_a_flush_ends_all_at_one_stroke() -> None:
    gateway = busy()
    entries = gateway.sessions.entries()
    server = gateway.sessions.forwards.all[0].servers[0]
    assert server.active + server.inactive == 1

    assert gateway.masq.flush() == len(entries)

    assert gateway.sessions.entries() == []
    assert adds_up(gateway)
    assert gateway.ended == {"flushed": len(entries)}
    assert not any(ms.flags & Flags.HASHED for ms in entries)
    assert server.active + server.inactive == 0
    assert gateway.sessions.ports_free(UDP) == 4096
    answer = udp((dotted(number("192.0.2.1")), 53), (GATEWAY, 61000))
    assert gateway.into(answer) is answer


def test_the_next_packet_begins_a_new_session() -> None:
    gateway = busy()
    before = gateway.sessions.entries()
    gateway.masq.flush()
    mapped = gateway.send(("10.0.0.4", 3000), ("192.0.2.0", 53))
    (ms,) = gateway.sessions.entries()
    assert ms not in before
    assert gateway.lets_in(("192.0.2.0", 53), mapped)
    gateway.passes(0)
    assert gateway.lets_in(("192.0.2.0", 53), mapped)
    assert gateway.sessions.entries() == [ms]
    gateway.passes(10_000)
    assert gateway.sessions.entries() == []
    assert adds_up(gateway)


@pytest.mark.parametrize("step", range(8))
def test_whoever_still_has_a_flushed_entry_changes_nothing(step: int) -> None:
    """A thread may be walking over the entries, and a packet may be in hand."""
    gateway = busy()
    walk = gateway.sessions.walk(4)
    of_host = gateway.sessions.walk_host(number("10.0.0.4"))
    held = [next(walk) for _ in range(4)] + [next(of_host)]
    gateway.masq.flush()
    if step % 2:
        gateway.passes(0)
    new = gateway.send(INSIDE, SERVER)
    sessions = gateway.sessions
    for ms in [*held, *walk, *of_host]:
        sessions.ip_masq_enter(ms, ms.state, gateway.now)
        sessions.ip_masq_replied(ms)
        sessions.ip_masq_refresh(ms, gateway.now)
        sessions.ip_masq_keep(ms, gateway.now + 9)
        sessions.ip_masq_retime(ms, gateway.now)
        sessions.ip_masq_follow_forward(ms)
        assert not sessions.ip_masq_control(ms, ms)
        assert not sessions.remove(ms, DELETED)
        assert not gateway.masq.masq_address_gone(ms, gateway.now)
        sessions.masq_expire(ms)
    assert adds_up(gateway)
    assert gateway.lets_in(SERVER, new)
    gateway.passes(10_000)
    assert not sessions.entries()
    assert ADDRESS not in gateway.ended


def test_new_entries_and_what_a_flush_has_left_are_no_more_than_the_full_table() -> None:
    """Before each new entry, more than one that is left goes."""
    gateway = Gateway(mapping="address-and-port-dependent", ports=range(1024, 65536))
    many = 2000
    for n in range(many):
        gateway.send(("10.0.0.5", 2000), (dotted(number("192.0.2.0") + n), 53))
    gateway.masq.flush()
    told: list[IpMasq] = []
    gateway.sessions.watch.ended += (lambda ms, _: told.append(ms),)
    for n in range(1, many // 2 + 1):
        gateway.send(("10.0.0.5", 2000), (dotted(number("192.0.2.0") + n), 53))
        assert len(told) == 2 * n
    gateway.send(INSIDE, SERVER)
    assert len(told) == many


def test_a_flush_of_nothing_is_no_fault() -> None:
    gateway = Gateway()
    assert gateway.masq.flush() == 0
    assert gateway.masq.flush() == 0
    gateway.passes(0)
    assert gateway.out(tcp(INSIDE, SERVER, FIN)) is None or adds_up(gateway)
