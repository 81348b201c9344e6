"""A packet that is refused changes nothing, for whatever reason it is refused."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from nfmasq.apps import helpers
from nfmasq.engine import TCP, UDP, Flags, IpMasq
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.helper.app import Packet, Session
from nfmasq.engine.table.tables import TABLE_REFERENCES
from nfmasq.engine.wire.header import Refused
from tests.gateway import GATEWAY, INSIDE, NEW_ADDRESS, SERVER, Gateway
from tests.packets import (
    ACK,
    ECHO,
    FIN,
    MORE_FRAGMENTS,
    RST,
    SYN,
    Endpoint,
    cut,
    error,
    number,
    query,
    tcp,
    udp,
    with_header,
)

FTP, SIP, TOLD, WEB = 21, 5060, 443, 80
INSIDE_HOST, OUTSIDE_HOST = INSIDE[0], SERVER[0]
FORWARDED_TO_TOLD, FORWARDED_TO_WEB, FORWARDED_TO_NOBODY = 500, 501, 502

ENDED_FOR_ANOTHER = "closed", "evicted", "address", "expired"
"""Reasons for which an entry ends while a packet is judged; it expires where the sweep is late."""

BECAUSE_OF_ITSELF = {
    *("malformed", "fragment", "unknown", "unsupported", "ip_option", "out_of_order"),
    *("unsolicited", "no_server", "exception"),
}
"""Reasons that lie in the packet, or in what it is sent to, and not in a limit."""


class Told:
    """A helper that does what the payload tells it to do."""

    name = "told"
    ports: tuple[int, ...] = (TOLD,)

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def bind(self, session: Session) -> None:
        """Prepare nothing."""

    def unbind(self, session: Session) -> None:
        """Forget nothing."""

    def packet_out(self, session: Session, packet: Packet) -> None:
        self._obey(packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        self._obey(packet)

    def _obey(self, packet: Packet) -> None:
        if packet.payload == b"refuse":
            raise Refused("malformed")
        if packet.payload == b"raise":
            raise ZeroDivisionError
        if packet.payload == b"grow":
            packet.payload = bytes(65_536)


class World(Gateway):
    """A gateway with helpers, forwards, and what else an entry may have."""

    def __init__(self, **settings: object) -> None:
        self.servers = {
            port: Server(number(INSIDE_HOST), there)
            for port, there in (
                (FORWARDED_TO_TOLD, TOLD),
                (FORWARDED_TO_WEB, WEB),
                (FORWARDED_TO_NOBODY, WEB + 1),
            )
        }
        forwards = [
            Forward(protocol, range(port, port + 1), [server])
            for port, server in self.servers.items()
            for protocol in (TCP, UDP)
        ]
        apps = {**helpers({"ftp": (FTP,), "sip": (SIP,)})}
        apps.update({(protocol, TOLD): Told(protocol) for protocol in (TCP, UDP)})
        super().__init__(apps=apps, forwards=Forwards(forwards), **settings)
        self.masq.inbound.maddrs = {number(GATEWAY), number(NEW_ADDRESS)}

    def opens(self, flags: int, protocol: int, mport: int, sport: int, dport: int) -> None:
        """Have an entry made with some values left open, as a person may."""
        daddr = 0 if flags & Flags.NO_DADDR else number(OUTSIDE_HOST)
        there = number(GATEWAY), mport, number(INSIDE_HOST), sport, daddr, dport
        ms = self.sessions.ip_masq_new(protocol, *there, flags)
        if ms is not None:
            self.sessions.ip_masq_put(ms)

    def judges(self, packet: bytes, inbound: bool) -> tuple[bytes | None, str]:
        """Return the verdict on a packet, and why it was dropped."""
        before = dict(self.errors)
        try:
            sent = self.into(packet) if inbound else self.out(packet)
        except ZeroDivisionError:
            return None, "exception"
        why = [reason for reason, n in self.errors.items() if n != before.get(reason, 0)]
        return sent, "".join(why)

    def seen(self) -> dict[str, object]:
        """Return all that can be seen of the tables."""
        sessions = self.sessions
        entries = {id(ms): entry_as_seen(ms) for ms in sessions.entries()}
        account = sessions.account()
        return {
            "entries": entries,
            "live": account.live,
            "over": sessions.over_counts(),
            "ports": {p: sessions.ports_free(p) for p in (TCP, UDP)},
            "hosts": sessions.hosts.entries_of(number(INSIDE_HOST)),
            "servers": {port: (s.active, s.inactive) for port, s in self.servers.items()},
            "endpoints": set(sessions.tables.holders),
        }

    @property
    def gave_way(self) -> int:
        """How many entries ended for another, or because their packets leave another way."""
        return sum(self.ended.get(reason, 0) for reason in ENDED_FOR_ANOTHER)

    def adds_up(self) -> bool:
        account = self.sessions.account()
        return all(
            account.created[row] == sum(ended.values()) + account.live[row]
            for row, ended in account.ended.items()
        )


def entry_as_seen(ms: IpMasq) -> tuple[object, ...]:
    assert ms.refcnt == TABLE_REFERENCES
    ends = ms.protocol, ms.maddr, ms.mport, ms.saddr, ms.sport, ms.daddr, ms.dport
    counts = ms.packets_out, ms.packets_in, ms.bytes_out, ms.bytes_in, ms.n_control
    return (*ends, ms.flags, ms.state, ms.timer, ms.timeout, ms.server, ms.app, ms.control, *counts)


def changes_nothing(world: World, packet: bytes, *, inbound: bool = False) -> str:
    """Have a packet judged; if it is refused because of itself, it must change nothing.

    One thing is not undone: what gave way to an entry that a helper has not let stand.
    """
    before, gave_way = world.seen(), world.gave_way
    sent, why = world.judges(packet, inbound)
    if sent is None and why in BECAUSE_OF_ITSELF and world.gave_way == gave_way:
        assert world.seen() == before
    assert world.adds_up()
    return why if sent is None else ""


# -- any packets ------------------------------------------------------------------------------

PAYLOADS = st.sampled_from(
    [
        *(b"", b"refuse", b"raise", b"grow", b"USER me\r\n", b"PORT 10,0,0,2,19,136\r\n"),
        *(b"OPTIONS sip:x SIP/2.0\r\n", b"OPTIONS sip:x SIP/2.0\r\n" + 600 * b",\n"),
    ]
)
FLAGS = st.sampled_from([SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK])
NUMBERS = st.sampled_from([1000, 1001, 1010, 2000, 2001, 90_000])
DAMAGE = st.sampled_from(["", "", "", "payload", "header", "fragment", "short"])
OUTSIDE_PORTS = st.sampled_from([FTP, SIP, TOLD, WEB])
INSIDE_PORTS = st.sampled_from([40000, TOLD, WEB])
MPORTS = st.sampled_from(
    [61000, 61001, 61002, FORWARDED_TO_TOLD, FORWARDED_TO_WEB, FORWARDED_TO_NOBODY, 600, 601]
)
PROTOCOLS = st.sampled_from([TCP, UDP])
OPEN = st.sampled_from(
    [
        Flags.USER | Flags.NO_DADDR | Flags.NO_DPORT,
        Flags.USER | Flags.NO_SPORT,
        Flags.USER | Flags.DLOOSE,
        Flags.NO_REPLY | Flags.NO_DPORT,
    ]
)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("packet"), st.booleans(), PROTOCOLS, OUTSIDE_PORTS, INSIDE_PORTS, MPORTS,
                  FLAGS, st.tuples(NUMBERS, NUMBERS), PAYLOADS, DAMAGE),
        st.tuples(st.just("opens"), OPEN, PROTOCOLS, st.sampled_from([600, 601]), INSIDE_PORTS),
        st.tuples(st.just("address"), st.sampled_from([GATEWAY, NEW_ADDRESS])),
        st.tuples(st.just("alive"), st.sampled_from([FORWARDED_TO_TOLD, FORWARDED_TO_NOBODY])),
        st.tuples(st.just("passes"), st.sampled_from([0.5, 30, 250])),
        st.tuples(st.just("other"), st.sampled_from(range(4))),
    ),
    max_size=25,
)  # fmt: skip


def damaged(packet: bytes, how: str) -> bytes:
    if how == "payload":
        return packet[:-1] + bytes([packet[-1] ^ 0x55])
    if how == "header":
        return b"\x44" + packet[1:]
    if how == "fragment":
        return with_header(packet, fragment=MORE_FRAGMENTS)
    return packet[:30] if how == "short" else packet


def built(
    inbound: bool, protocol: int, ends: tuple[int, int, int], flags: int, numbers: tuple[int, int],
    payload: bytes,
) -> bytes:  # fmt: skip
    outside_port, inside_port, mport = ends
    outside, inside = (OUTSIDE_HOST, outside_port), (INSIDE_HOST, inside_port)
    src, dst = (outside, (GATEWAY, mport)) if inbound else (inside, outside)
    if protocol == UDP:
        return udp(src, dst, payload)
    return tcp(src, dst, flags, payload, seq=numbers[0], ack=numbers[1])


OTHERS = (
    (query(INSIDE, OUTSIDE_HOST, 5), False),
    (error(INSIDE_HOST, OUTSIDE_HOST, cut(udp((OUTSIDE_HOST, 9), INSIDE))), False),
    (error(OUTSIDE_HOST, GATEWAY, cut(udp((GATEWAY, 61000), (OUTSIDE_HOST, WEB))))[:40], True),
    (query(INSIDE, OUTSIDE_HOST, ECHO, options=b"\7\7\4" + bytes(5)), False),
)


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "plain way"])
@given(steps=STEPS, ports=st.sampled_from([range(61000, 61003), range(61000, 65096)]))
def test_a_refused_packet_changes_nothing(fast: bool, steps: list[tuple], ports: range) -> None:  # type: ignore[type-arg]
    world = World(ports=ports, fast=fast)
    for what, *how in steps:
        if what == "packet":
            inbound, protocol, *ends, flags, numbers, payload, damage = how
            packet = built(inbound, protocol, tuple(ends), flags, numbers, payload)
            why = changes_nothing(world, damaged(packet, damage), inbound=inbound)
            event(f"refused: {why}")
        elif what == "other":
            packet, inbound = OTHERS[how[0]]
            changes_nothing(world, packet, inbound=inbound)
        elif what == "opens":
            flags, protocol, mport, sport = how
            world.opens(flags, protocol, mport, 0 if flags & Flags.NO_SPORT else sport, WEB)
        elif what == "address":
            world.address = how[0]
        elif what == "alive":
            world.servers[how[0]].alive ^= True
        else:
            world.passes(how[0])


# -- by name ----------------------------------------------------------------------------------

FTP_SERVER: Endpoint = (OUTSIDE_HOST, FTP)
TOLD_SERVER: Endpoint = (OUTSIDE_HOST, TOLD)


def spoilt(packet: bytes) -> bytes:
    return damaged(packet, "payload")


def test_a_damaged_syn_leaves_no_entry_and_takes_no_port() -> None:
    world = World()
    assert changes_nothing(world, spoilt(tcp(INSIDE, FTP_SERVER, SYN, b"x"))) == "malformed"
    told = (GATEWAY, FORWARDED_TO_TOLD)
    syn = spoilt(tcp(FTP_SERVER, told, SYN, b"x"))
    assert changes_nothing(world, syn, inbound=True) == "malformed"
    assert world.sessions.entries() == []
    assert world.sessions.account().created["tcp"] == 0


@pytest.mark.parametrize("payload", [b"refuse", b"raise", b"grow"])
def test_an_entry_whose_first_packet_a_helper_refuses_ends_again(payload: bytes) -> None:
    world = World()
    free = world.sessions.ports_free(UDP)
    assert changes_nothing(world, udp(INSIDE, TOLD_SERVER, payload))
    to_server = udp(TOLD_SERVER, (GATEWAY, FORWARDED_TO_TOLD), payload)
    assert world.judges(to_server, inbound=True)[0] is None
    assert world.sessions.entries() == []
    assert world.sessions.ports_free(UDP) == free
    assert world.ended == {"helper": 2}


@pytest.mark.parametrize("spoil", ["damaged", "out of order"])
def test_segments_that_are_dropped_keep_no_connection_alive(spoil: str) -> None:
    world = World()
    mapped = (GATEWAY, 61000)
    world.out(tcp(INSIDE, FTP_SERVER, SYN, seq=1000))
    world.passes(10)
    seq = 2001 if spoil == "damaged" else 2100
    packet = tcp(FTP_SERVER, mapped, ACK, b"220 Hello\r\n", seq=2001, ack=1001)
    if spoil == "out of order":
        world.into(tcp(FTP_SERVER, mapped, SYN | ACK, seq=2000, ack=1001))
        world.out(tcp(INSIDE, FTP_SERVER, ACK, seq=1001, ack=2001))
        packet = tcp(FTP_SERVER, mapped, ACK, b"220 Hello\r\n", seq=seq, ack=1001)
    else:
        packet = spoilt(packet)
    (ms,) = world.sessions.entries()
    was_unanswered = ms.flags & Flags.NO_REPLY
    world.passes(10)
    assert changes_nothing(world, packet, inbound=True)
    assert ms.flags & Flags.NO_REPLY == was_unanswered
    assert was_unanswered == (spoil == "damaged") * Flags.NO_REPLY


@pytest.mark.parametrize("payload", [b"refuse", b"raise"])
@pytest.mark.parametrize("flags", [Flags.NO_SPORT, Flags.DLOOSE, Flags.NO_DADDR | Flags.NO_DPORT])
def test_what_an_entry_leaves_open_stays_open_where_a_helper_refuses(
    payload: bytes, flags: int
) -> None:
    world = World()
    world.configure(apps={(UDP, 0): Told(UDP), (UDP, TOLD): Told(UDP)})
    world.opens(Flags.USER | flags, UDP, 600, 0 if flags & Flags.NO_SPORT else TOLD, WEB)
    assert [ms.app is not None for ms in world.sessions.entries()] == [True]
    assert changes_nothing(world, udp((INSIDE_HOST, TOLD), (OUTSIDE_HOST, WEB), payload))
    if not flags & Flags.NO_SPORT:
        elsewhere = udp(("198.51.100.9", 77), (GATEWAY, 600), payload)
        assert changes_nothing(world, elsewhere, inbound=True) or not flags & Flags.DLOOSE


@pytest.mark.parametrize("payload", [b"refuse", b"raise"])
def test_an_entry_moves_to_no_other_address_for_a_packet_that_is_refused(payload: bytes) -> None:
    world = World()
    world.out(udp(INSIDE, TOLD_SERVER, b"fine"))
    world.address = NEW_ADDRESS
    assert changes_nothing(world, udp(INSIDE, TOLD_SERVER, payload))
    (ms,) = world.sessions.entries()
    assert ms.maddr == number(GATEWAY)


def test_an_answered_session_does_not_end_for_a_damaged_packet_by_another_way() -> None:
    world = World()
    world.out(udp(INSIDE, TOLD_SERVER, b"fine"))
    world.into(udp(TOLD_SERVER, (GATEWAY, 61000), b"fine"))
    world.address = NEW_ADDRESS
    assert changes_nothing(world, spoilt(udp(INSIDE, TOLD_SERVER, b"fine"))) == "malformed"
    assert world.ended == {}


def test_an_unanswered_session_that_may_not_move_is_not_kept_alive() -> None:
    world = World(ports=(61000,), when_ports_run_out="refuse")
    world.out(udp(INSIDE, SERVER))
    world.address = NEW_ADDRESS
    world.out(udp(("10.0.0.3", 9), SERVER))
    before = world.seen()
    world.now += 1
    assert world.out(udp(INSIDE, SERVER)) is None
    assert world.seen() == before


def test_a_session_that_is_over_stays_where_no_server_takes_another() -> None:
    world = World()
    to_web = (GATEWAY, FORWARDED_TO_WEB)
    syn = tcp(SERVER, to_web, SYN)
    world.into(syn)
    world.out(tcp((INSIDE_HOST, WEB), SERVER, RST | ACK))
    world.servers[FORWARDED_TO_WEB].alive = False
    assert changes_nothing(world, syn, inbound=True) == "no_server"
    assert len(world.sessions.entries()) == 1
    world.servers[FORWARDED_TO_WEB].alive = True
    assert world.into(syn) is not None
    assert world.ended == {"replaced": 1}
