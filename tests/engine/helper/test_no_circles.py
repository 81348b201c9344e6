"""Nothing that ends leaves objects that refer to each other in a circle.

The daemon has full garbage collections come after millions of objects. Until then a circle holds
its memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from nfmasq.apps import helpers
from nfmasq.apps.dialogue import Dialogue
from nfmasq.engine import TCP
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.helper.app import Session
from nfmasq.engine.helper.stream import Stream
from nfmasq.engine.table.endings import DELETED
from tests.apps.connection import Connection
from tests.apps.pptp import CONNECTED, OUTGOING_REPLY, OUTGOING_REQUEST, data, message
from tests.gateway import GATEWAY, SERVER, Gateway
from tests.packets import ACK, FIN, RST, SYN, Endpoint, cut, error, number, tcp, udp

INSIDE, OUTSIDE = "10.0.0.2", "198.51.100.7"
CLIENT: Endpoint = (INSIDE, 40000)
PORTS = {"ftp": (21,), "irc": (6667,), "pptp": (1723,), "sip": (5060,), "tftp": (69,)}


def gateway(**settings: object) -> Gateway:
    there = Gateway(apps=helpers(PORTS), **settings)
    there.masq.inbound.maddrs = {number(GATEWAY)}
    return there


@contextmanager
def no_circles() -> Iterator[None]:
    """Fail if what is made within leaves a circle, or anything of a helper."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
        left = [type(o).__name__ for o in gc.get_objects() if isinstance(o, OF_HELPERS)]
        found = gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    assert left == []
    assert found == 0


FirstSeqs = tuple[int, int]
FIRST = (1000, 2000)

OF_HELPERS = Session, Dialogue, Stream


# -- sessions with something of everything ------------------------------------------------------


def plain(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    over.connects(CLIENT, SERVER)
    over.send(CLIENT, SERVER)


def ftp(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    at = Connection(over, CLIENT, (OUTSIDE, 21), first_seqs=first_seqs)
    at.say(at.client, b"USER me\r\nPORT 10,0,0,2,19,136\r\nPORT 10,0,0")
    at.say(at.server, b"331 Who?\r\n")
    assert at.goes(at.client, at.client.sent + 9, b"lost") is None
    (expected,) = over.expected
    over.into(tcp((OUTSIDE, 20), (GATEWAY, expected.mport), SYN))


def ftp_server_inside(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    outside, inside = (OUTSIDE, 50000), (INSIDE, 21)
    at = Connection(over, outside, inside, forwarded=21, first_seqs=first_seqs)
    at.say(at.client, b"PASV\r\n")
    at.say(at.server, b"227 Entering (10,0,0,2,19,136).\r\n")
    assert over.expected


def irc(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    at = Connection(over, CLIENT, (OUTSIDE, 6667), first_seqs=first_seqs)
    at.say(at.client, b"NICK me\r\nPRIVMSG you :\1DCC CHAT chat 167772162 5000\1\r\n")
    assert over.expected


def pptp(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    at = Connection(over, CLIENT, (OUTSIDE, 1723), first_seqs=first_seqs)
    request = at.say(at.client, message(OUTGOING_REQUEST, 7))
    ours = int.from_bytes(request[12:14], "big")
    at.say(at.server, message(OUTGOING_REPLY, 99, ours, result=CONNECTED))
    assert over.into(data(OUTSIDE, GATEWAY, ours)) is not None
    assert len(over.expected) == 2


def sip(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    body = b"v=0\r\nc=IN IP4 10.0.0.2\r\nm=audio 8000 RTP/AVP 0\r\n"
    over.send(
        CLIENT, (OUTSIDE, 5060), b"INVITE sip:x SIP/2.0\r\nContact: sip:10.0.0.2\r\n\r\n" + body
    )
    assert len(over.expected) == 2


def tftp(over: Gateway, first_seqs: FirstSeqs = FIRST) -> None:
    mapped = over.send(CLIENT, (OUTSIDE, 69), b"\0\1file\0octet\0")
    assert over.lets_in((OUTSIDE, 2000), mapped)


Scene = Callable[..., None]
SCENES = plain, ftp, ftp_server_inside, irc, pptp, sip, tftp


# -- how they end ------------------------------------------------------------------------------


def expire(over: Gateway, scene: Scene) -> None:
    for _ in range(20):
        over.passes(8000)


def are_removed(over: Gateway, scene: Scene) -> None:
    for ms in over.sessions.entries():
        over.sessions.remove(ms, DELETED)


def begin_anew(over: Gateway, scene: Scene) -> None:
    for ms in over.expected:
        over.sessions.remove(ms, DELETED)
    scene(over, (500_000, 600_000))
    are_removed(over, scene)


ENDS = expire, are_removed, begin_anew


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("end", ENDS)
def test_what_has_ended_needs_no_garbage_collector(
    scene: Scene, end: Callable[[Gateway, Scene], None]
) -> None:
    over = gateway()
    with no_circles():
        scene(over)
        end(over, scene)
        assert over.sessions.entries() == []
        # What does not end with the sessions: SYNs that are held, and what is due.
        over.masq.outbox.clear()


def test_sessions_that_make_room_for_each_other_leave_no_circle() -> None:
    over = gateway(max_entries=10)
    with no_circles():
        for n in range(100):
            for port in (21, 6667, 1723):
                over.out(tcp((INSIDE, 2000 + n), (OUTSIDE, port), SYN))
            over.out(udp((INSIDE, 2000 + n), (OUTSIDE, 5060), b"OPTIONS sip:x SIP/2.0\r\n"))
        are_removed(over, plain)
    assert over.ended["evicted"] > 300


def test_a_flood_on_a_forwarded_port_leaves_no_circle() -> None:
    forwards = Forwards([Forward(TCP, range(21, 22), [Server(number(INSIDE), 21)])])
    over = gateway(forwards=forwards, max_entries=50)
    with no_circles():
        for n in range(200):
            client = OUTSIDE, 2000 + n
            over.into(tcp(client, (GATEWAY, 21), SYN))
            if n % 3:
                over.out(tcp((INSIDE, 21), client, SYN | ACK, seq=5, ack=1001))
                over.into(tcp(client, (GATEWAY, 21), FIN | ACK, seq=1001, ack=6))
                over.out(tcp((INSIDE, 21), client, RST | ACK, seq=6, ack=1002))
                over.into(tcp(client, (GATEWAY, 21), SYN, seq=7000))
        over.passes(10_000)
        are_removed(over, plain)
    assert over.ended["replaced"] > 100


def test_packets_that_are_refused_and_errors_leave_no_circle() -> None:
    over = gateway(max_new_per_host=5)
    over.send(CLIENT, SERVER)
    with no_circles():
        for n in range(50):
            over.out(tcp((INSIDE, 2000 + n), SERVER, SYN)[:-1])
            over.out(tcp((INSIDE, 2000 + n), SERVER, SYN))
            over.out(tcp((INSIDE, 2000 + n), (OUTSIDE, 21), SYN)[:-1] + b"x")
            over.into(tcp((OUTSIDE, 2000 + n), (GATEWAY, 61001), SYN))
            over.out(error(INSIDE, OUTSIDE, cut(tcp((OUTSIDE, 3), (INSIDE, 3), SYN))))
            over.into(error(OUTSIDE, GATEWAY, cut(udp((GATEWAY, 61000 + n), SERVER))))
            over.masq.ip_fw_hairpin(udp(CLIENT, (GATEWAY, 61050)), number(GATEWAY), over.now)
        over.masq.outbox.clear()
        over.passes(10_000)
        are_removed(over, plain)


class Raising:
    """A helper that raises, and whose own data refer back to the session."""

    name = "raising"
    protocol = TCP
    ports = (443,)

    def __init__(self, where: str) -> None:
        self.where = where
        self.binds = 0

    def bind(self, session: Session) -> None:
        self.binds += 1
        session.data = [session]
        self._raise_in("bind")
        if self.binds > 1:
            self._raise_in("bind again")

    def unbind(self, session: Session) -> None:
        self._raise_in("unbind")

    def packet_out(self, session: Session, packet: object) -> None:
        self._raise_in("packet")

    def packet_in(self, session: Session, packet: object) -> None:
        self._raise_in("packet")

    def _raise_in(self, where: str) -> None:
        if self.where == where:
            raise ZeroDivisionError


@pytest.mark.parametrize("where", ["bind", "bind again", "unbind", "packet", "nowhere"])
def test_a_helper_that_raises_leaves_no_circle(where: str) -> None:
    over = Gateway(apps={(TCP, 443): Raising(where)})
    with no_circles():
        for seq in (1, 5000):
            with suppress(ZeroDivisionError):
                over.out(tcp(CLIENT, SERVER, SYN, seq=seq))
        while over.sessions.entries():
            with suppress(ZeroDivisionError):
                over.sessions.remove(over.sessions.entries()[0], DELETED)
    assert over.sessions.entries() == []
