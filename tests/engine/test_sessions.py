"""The life of an entry where something goes wrong in it, or two threads meet over it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from nfmasq.apps import helpers
from nfmasq.engine import TCP, UDP, IpMasq, Timeouts, Watcher
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.endings import DELETED
from nfmasq.engine.table.entry import NO_DPORT
from nfmasq.engine.table.timers import SLOTS, TICK
from nfmasq.engine.watch import Identity
from tests.gateway import GATEWAY, INSIDE, NEIGHBOUR, NEW_ADDRESS, OTHER_SERVER, SERVER, Gateway
from tests.packets import ACK, SYN, Endpoint, number, source, tcp, udp

FTP = 21
INSIDE_SERVER: Endpoint = ("10.0.0.8", 80)


class Log(Watcher):
    """What is told, in its order, as (what, reason)."""

    def __init__(self, gateway: Gateway) -> None:
        self.told: list[tuple[str, str]] = []
        gateway.sessions.watch.subscribe(self)

    def made(self, ms: IpMasq) -> None:
        self.told.append(("made", ""))

    def answered(self, ms: IpMasq) -> None:
        self.told.append(("answered", ""))

    def ended(self, ms: IpMasq, reason: str) -> None:
        self.told.append(("ended", reason))

    def refused(self, session: object, reason: str) -> None:
        self.told.append(("refused", reason))

    def dropped(self, packet: object, reason: str) -> None:
        self.told.append(("dropped", reason))


def adds_up(gateway: Gateway) -> bool:
    """Say whether the counts of entries agree with each other and with the tables."""
    account = gateway.sessions.account()
    entries = gateway.sessions.entries()
    return len(entries) == sum(account.live.values()) and all(
        account.created[name] == sum(ended.values()) + account.live[name]
        for name, ended in account.ended.items()
    )


def test_an_entry_that_ends_before_its_answer_is_seen_is_not_answered_any_more() -> None:
    """The fast path finds an entry without the lock; another thread may end it right then."""
    gateway = Gateway()
    log = Log(gateway)
    gateway.send(INSIDE, SERVER)
    (ms,) = gateway.sessions.entries()
    gateway.sessions.remove(ms, DELETED)
    gateway.sessions.ip_masq_replied(ms)
    gateway.sessions.ip_masq_refresh(ms, gateway.now)
    assert log.told == [("made", ""), ("ended", DELETED)]
    assert ms.timer is None


def test_an_entry_that_finds_no_port_on_a_new_address_is_refused_for_want_of_a_port() -> None:
    """And not for its host's limit, which its own port fills."""
    gateway = Gateway(ports=(61000,), max_ports_per_host=1)
    gateway.send(INSIDE, SERVER)
    gateway.address = NEW_ADDRESS
    gateway.send(NEIGHBOUR, SERVER)
    log = Log(gateway)
    assert gateway.out(udp(INSIDE, SERVER)) is None
    assert log.told == [("refused", "no_port")]
    assert gateway.errors == {"no_port": 1}
    assert adds_up(gateway)


class _Failing:
    """A helper that fails where it is told to."""

    name = "failing"
    protocol = TCP
    ports: tuple[int, ...] = (FTP,)

    def __init__(self, where: str) -> None:
        self.where = where
        self.binds = 0

    def bind(self, session: object) -> None:
        self.binds += 1
        if self.where == "bind again" and self.binds > 1:
            raise ZeroDivisionError

    def unbind(self, session: object) -> None:
        if self.where == "unbind":
            raise ZeroDivisionError

    def packet_out(self, session: object, packet: object) -> None:
        """Look at nothing."""

    def packet_in(self, session: object, packet: object) -> None:
        """Look at nothing."""


def test_a_move_that_a_failing_helper_interrupts_loses_no_entry() -> None:
    """To find a port for the moving entry, another entry is evicted, whose helper fails."""
    ports = range(61000, 61066)
    gateway = Gateway(ports=ports, apps={(TCP, FTP): _Failing("unbind")})
    gateway.out(tcp(INSIDE, SERVER, SYN))
    gateway.address = NEW_ADDRESS
    for n in range(len(ports)):
        gateway.out(tcp((NEIGHBOUR[0], 1000 + n), (SERVER[0], FTP), SYN))
    gateway.now += 11
    with pytest.raises(ZeroDivisionError):
        gateway.out(tcp(INSIDE, SERVER, SYN))
    assert adds_up(gateway)
    assert [ms.saddr for ms in gateway.sessions.entries()].count(number(INSIDE[0])) == 1


def test_an_entry_ends_whose_helper_cannot_begin_anew() -> None:
    gateway = Gateway(apps={(TCP, FTP): _Failing("bind again")})
    server = (SERVER[0], FTP)
    gateway.out(tcp(INSIDE, server, SYN, seq=1))
    log = Log(gateway)
    with pytest.raises(ZeroDivisionError):
        gateway.out(tcp(INSIDE, server, SYN, seq=5_000))
    assert log.told == [("ended", "helper")]
    assert gateway.sessions.entries() == []
    assert adds_up(gateway)


@pytest.mark.parametrize("where", ["unbind", "nowhere"])
def test_what_an_entry_controls_ends_with_it_though_its_helper_fails(where: str) -> None:
    gateway = Gateway(apps={(TCP, FTP): _Failing(where)})
    gateway.out(tcp(INSIDE, (SERVER[0], FTP), SYN))
    for inside in (NEIGHBOUR, INSIDE):
        gateway.out(tcp(inside, SERVER, SYN))
    control, *others = gateway.sessions.entries()
    for ms in others:
        assert gateway.sessions.ip_masq_control(ms, control)
    with nullcontext() if where == "nowhere" else pytest.raises(ZeroDivisionError):
        gateway.sessions.remove(control, DELETED)
    assert gateway.sessions.entries() == []
    assert adds_up(gateway)


@pytest.mark.parametrize("settings", [{"max_entries_per_host": 1}, {"max_entries": 2}], ids=str)
def test_a_session_with_a_forwarded_server_that_is_refused_is_counted_once(
    settings: dict[str, int],
) -> None:
    server = Server(number(INSIDE_SERVER[0]), INSIDE_SERVER[1])
    forwards = Forwards([Forward(TCP, range(80, 81), [server])])
    gateway = Gateway(forwards=forwards, **settings)
    gateway.masq.inbound.maddrs = {number(GATEWAY)}
    for client in (SERVER, OTHER_SERVER):
        gateway.into(tcp(client, (GATEWAY, 80), SYN))
        gateway.out(tcp(INSIDE_SERVER, client, SYN | ACK))
        gateway.into(tcp(client, (GATEWAY, 80), ACK))
    log = Log(gateway)
    assert gateway.into(tcp(("198.51.100.9", 9), (GATEWAY, 80), SYN)) is None
    assert [what for what, _ in log.told] == ["refused"]
    before = sum(gateway.errors.values())
    assert gateway.into(tcp(("198.51.100.9", 9), (GATEWAY, 80), SYN)) is None
    assert sum(gateway.errors.values()) == before + 1


def test_a_session_from_outside_for_which_there_is_no_room_is_counted_and_told() -> None:
    gateway = Gateway(max_entries=2, filtering="endpoint-independent")
    mapped = gateway.send(INSIDE, SERVER)
    assert gateway.lets_in(SERVER, mapped)
    assert gateway.lets_in(OTHER_SERVER, mapped)
    gateway.send(INSIDE, OTHER_SERVER)
    assert gateway.lets_in(OTHER_SERVER, mapped)
    log = Log(gateway)
    assert not gateway.lets_in(("198.51.100.9", 9), mapped)
    assert log.told == [("refused", "no_room")]
    assert gateway.errors == {"no_room": 1}


@pytest.fixture
def long_lived() -> Gateway:
    """An entry in a far slot of the wheel, whose timeout becomes a short one."""
    gateway = Gateway(timeouts=Timeouts(udp=2 * SLOTS * TICK))
    gateway.send(INSIDE, SERVER)
    gateway.configure(timeouts=Timeouts(udp=5))
    return gateway


def test_a_timeout_that_becomes_shorter_counts_though_a_packet_comes_in_between(
    long_lived: Gateway,
) -> None:
    """Another thread retimes the entry; the packet sets the timer just before it looks."""
    (ms,) = long_lived.sessions.entries()
    ms.timer = long_lived.now + 5
    long_lived.sessions.ip_masq_retime(ms, long_lived.now)
    long_lived.passes(6)
    assert long_lived.sessions.entries() == []


class _Kept(Gateway):
    """A gateway with a session over UDP that is kept for an hour; its timeout is 300 seconds."""

    def __init__(self) -> None:
        super().__init__(apps={(UDP, SERVER[1]): _Failing("nowhere")})
        self.send(INSIDE, SERVER)
        (self.ms,) = self.sessions.entries()
        self.keep(3600)

    def keep(self, seconds: float) -> None:
        self.sessions.now = self.now
        self.sessions.ip_masq_keep(self.ms, self.now + seconds)

    @property
    def lives(self) -> float:
        assert self.ms.timer is not None
        return self.ms.timer - self.now


def test_an_entry_lives_until_its_timeout_and_who_keeps_it_are_over() -> None:
    gateway = _Kept()
    assert gateway.lives == 3600
    gateway.passes(3599)
    assert gateway.sessions.entries() == [gateway.ms]
    gateway.send(INSIDE, SERVER)
    assert gateway.lives == 300
    gateway.passes(301)
    assert gateway.sessions.entries() == []
    assert gateway.sessions._kept_until == {}


def test_a_reload_leaves_an_entry_as_long_as_it_is_kept() -> None:
    gateway = _Kept()
    for seconds in (5, 1000, 7200, 5):
        gateway.configure(timeouts=Timeouts(udp=seconds))
        gateway.sessions.ip_masq_retime(gateway.ms, gateway.now)
        assert gateway.lives == 3600
    gateway.passes(3000)
    gateway.send(INSIDE, SERVER)
    assert gateway.lives == 600
    gateway.keep(0)
    assert gateway.lives == 5


@pytest.mark.parametrize("seconds", [0, -1])
def test_an_entry_that_is_kept_no_more_has_its_usual_timeout(seconds: float) -> None:
    gateway = _Kept()
    gateway.passes(10)
    gateway.keep(seconds)
    assert gateway.lives == 300
    gateway.passes(301)
    assert gateway.sessions.entries() == []


def test_keeping_an_entry_for_less_than_its_timeout_takes_nothing_from_it() -> None:
    gateway = _Kept()
    gateway.keep(0)
    gateway.passes(100)
    gateway.keep(50)
    assert gateway.lives == 200


def test_an_entry_that_has_ended_is_not_kept() -> None:
    gateway = _Kept()
    gateway.sessions.remove(gateway.ms, DELETED)
    gateway.keep(3600)
    assert gateway.sessions._kept_until == {}
    assert gateway.ms.timer is None


def test_an_entry_in_use_is_kept_when_it_is_given_back() -> None:
    gateway = _Kept()
    sessions = gateway.sessions
    gateway.keep(0)
    ends = number(INSIDE[0]), INSIDE[1], number(SERVER[0]), SERVER[1]
    assert sessions.ip_masq_out_get(UDP, *ends) is gateway.ms
    gateway.keep(3600)
    assert gateway.ms.timer is None
    sessions.ip_masq_put(gateway.ms)
    assert gateway.lives == 3600


def test_other_ports_take_nothing_of_protocols_without_ports() -> None:
    gateway = Gateway(ports=range(61000, 61004), other_protocols="by-address")
    gre = 47
    ms = gateway.sessions.ip_masq_new(gre, number(GATEWAY), 61001, 1, 2, 3, 4, 0)
    assert ms is not None
    gateway.sessions.ip_masq_put(ms)
    gateway.configure(ports=range(61000, 61008), other_protocols="by-address")
    assert gateway.sessions.ports_free(gre) == gateway.sessions.ports_free(UDP) == 8


def test_a_watcher_sees_what_a_moved_entry_leaves_open() -> None:
    """The server's answer to a TFTP request is expected, from a port that is not known yet."""
    gateway = Gateway(apps=helpers({"tftp": [69]}), filtering="address-and-port-dependent")
    moved: list[tuple[int, int]] = []

    class Moves(Watcher):
        def moved(self, ms: IpMasq, before: Identity) -> None:
            moved.append((before.left_open, ms.dport))

    gateway.sessions.watch.subscribe(Moves())
    sent = gateway.out(udp(INSIDE, (SERVER[0], 69), b"\0\1file\0octet\0"))
    assert sent is not None
    gateway.into(udp((SERVER[0], 5000), source(sent), b"data"))
    ((left_open, dport),) = moved
    assert left_open == NO_DPORT
    assert dport == 5000
