"""TCP through the masquerade as it is by default, packet by packet (RFC 5382, RFC 7857)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nfmasq.lab import Daemon, Lab
from tests.packets import (
    ACK,
    FIN,
    PARAMETER_PROBLEM,
    PSH,
    RST,
    SOURCE_QUENCH,
    SYN,
    TIME_EXCEEDED,
    UNREACHABLE,
    Endpoint,
    error,
    source,
    tcp,
)
from tests.traffic.behaviour.stations import (
    CLIENT,
    GATEWAY,
    SERVER,
    Station,
    Stations,
    is_like,
)
from tests.traffic.observed import entries

FOUR_MINUTES = 240
TWO_HOURS_AND_FOUR_MINUTES = 7440


class Connection:
    """A connection of CLIENT to SERVER; what one end sends arrives at the other end."""

    def __init__(self, net: Stations, daemon: Daemon) -> None:
        self.net = net
        self.daemon = daemon
        self.inside, self.outside = net.inside[0], net.outside[0]
        self.mapped: Endpoint = (GATEWAY, 0)

    def client_sends(self, flags: int, payload: bytes = b"") -> None:
        seen = self.net.passed(tcp(CLIENT, SERVER, flags, payload), self.inside, self.outside)
        self.mapped = source(seen)
        assert is_like(seen, tcp(self.mapped, SERVER, flags, payload))

    def server_sends(self, flags: int, payload: bytes = b"", seq: int | None = None) -> None:
        sent = tcp(SERVER, self.mapped, flags, payload, seq=seq)
        seen = self.net.passed(sent, self.outside, self.inside)
        assert is_like(seen, tcp(SERVER, CLIENT, flags, payload, seq=seq))

    def opens(self) -> None:
        self.client_sends(SYN)
        self.server_sends(SYN | ACK)
        self.client_sends(ACK)

    def entry(self) -> dict[str, Any]:
        (entry,) = entries(self.daemon, protocol="tcp")
        return entry

    def is_in(self, state: str, timeout: float) -> bool:
        """Say whether the entry is in a state, and its timer was just set to `timeout` seconds."""
        entry = self.entry()
        left: float = entry["expires"]
        return entry["state"] == state and timeout - 2 < left <= timeout


@pytest.fixture
def connection(net: Stations, daemon: Daemon) -> Connection:
    return Connection(net, daemon)


# ---- mapping and filtering ----------------------------------------------------------------------


def test_one_inside_endpoint_is_the_same_to_every_outside_endpoint(
    net: Stations, connection: Connection, inside: Station
) -> None:
    connection.opens()
    for outside in net.outside:
        for port in (80, 443):
            seen = net.passed(tcp(CLIENT, outside.port(port), SYN), inside, outside)
            assert is_like(seen, tcp(connection.mapped, outside.port(port), SYN))


def test_two_inside_hosts_never_share_a_port(
    net: Stations, connection: Connection, outside: Station
) -> None:
    connection.opens()
    other = net.inside[1]
    seen = net.passed(tcp(other.port(CLIENT[1]), SERVER, SYN), other, outside)
    assert source(seen) != connection.mapped
    answer = net.passed(tcp(SERVER, source(seen), SYN | ACK), outside, other)
    assert is_like(answer, tcp(SERVER, other.port(CLIENT[1]), SYN | ACK))


def test_an_outside_host_that_was_sent_to_may_connect_from_any_port(
    net: Stations, connection: Connection, inside: Station, outside: Station
) -> None:
    connection.opens()
    caller = outside.port(6000)
    seen = net.passed(tcp(caller, connection.mapped, SYN), outside, inside)
    assert is_like(seen, tcp(caller, CLIENT, SYN))
    for flags in (SYN | ACK, ACK | PSH, FIN | ACK):
        seen = net.passed(tcp(CLIENT, caller, flags), inside, outside)
        assert is_like(seen, tcp(connection.mapped, caller, flags))
        seen = net.passed(tcp(caller, connection.mapped, ACK), outside, inside)
        assert is_like(seen, tcp(caller, CLIENT, ACK))


@pytest.mark.parametrize(
    "flags",
    [SYN, SYN | ACK, ACK, FIN | ACK, RST],
    ids=["SYN", "SYN-ACK", "ACK", "FIN", "RST"],
)
def test_a_stranger_gets_nothing_in_and_keeps_nothing_alive(
    net: Stations, connection: Connection, inside: Station, stranger: Station, flags: int
) -> None:
    connection.opens()
    time.sleep(0.3)
    before = connection.entry()
    stranger.send(tcp(stranger.port(5000), connection.mapped, flags))
    assert net.heard_nothing(inside)
    after = connection.entry()
    assert after.pop("expires") <= before.pop("expires")
    assert after == before


# ---- from the first segment to the last ---------------------------------------------------------


def test_a_connection_runs_through_its_states_and_their_timeouts(connection: Connection) -> None:
    """Opening and closing have 4 minutes each; while one side is open, the long timeout holds."""
    connection.client_sends(SYN)
    assert connection.is_in("SYN_SENT", FOUR_MINUTES)
    connection.server_sends(SYN | ACK)
    connection.client_sends(ACK)
    connection.server_sends(ACK | PSH, b"hello")
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)
    connection.client_sends(FIN | ACK)
    connection.server_sends(ACK)
    assert connection.is_in("FIN_WAIT", TWO_HOURS_AND_FOUR_MINUTES)
    connection.server_sends(ACK | PSH, b"and another thing")
    connection.client_sends(ACK)
    assert connection.is_in("FIN_WAIT", TWO_HOURS_AND_FOUR_MINUTES)
    connection.server_sends(FIN | ACK)
    assert connection.is_in("TIME_WAIT", FOUR_MINUTES)
    connection.client_sends(ACK)
    assert connection.is_in("TIME_WAIT", FOUR_MINUTES)


def test_the_server_may_close_first_and_still_be_sent_to(connection: Connection) -> None:
    connection.opens()
    connection.server_sends(FIN | ACK)
    connection.client_sends(ACK | PSH, b"not so fast")
    connection.server_sends(ACK)
    assert connection.is_in("CLOSE_WAIT", TWO_HOURS_AND_FOUR_MINUTES)
    connection.client_sends(FIN | ACK)
    connection.server_sends(ACK)
    assert connection.is_in("TIME_WAIT", FOUR_MINUTES)


def test_both_sides_may_close_at_once(connection: Connection) -> None:
    connection.opens()
    connection.client_sends(FIN | ACK)
    connection.server_sends(FIN | ACK)
    connection.client_sends(ACK)
    connection.server_sends(ACK)
    assert connection.is_in("TIME_WAIT", FOUR_MINUTES)


def test_both_sides_may_open_at_once(connection: Connection) -> None:
    """Each side has sent its SYN before the SYN of the other came (RFC 9293, figure 7)."""
    connection.client_sends(SYN)
    connection.server_sends(SYN)
    connection.client_sends(SYN | ACK)
    connection.server_sends(SYN | ACK)
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)
    connection.client_sends(ACK | PSH, b"hello")
    connection.server_sends(ACK | PSH, b"hello")


def test_a_connection_that_is_closed_can_be_opened_anew(connection: Connection) -> None:
    connection.opens()
    connection.client_sends(FIN | ACK)
    connection.server_sends(FIN | ACK)
    connection.client_sends(ACK)
    before = connection.mapped
    connection.client_sends(SYN)
    assert connection.is_in("SYN_SENT", FOUR_MINUTES)
    connection.server_sends(SYN | ACK)
    connection.client_sends(ACK)
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)
    assert connection.mapped == before


# ---- resets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [RST, RST | ACK], ids=["RST", "RST-ACK"])
def test_a_reset_from_outside_comes_in_and_its_entry_stays_for_four_minutes(
    connection: Connection, flags: int
) -> None:
    connection.opens()
    connection.server_sends(flags)
    assert connection.is_in("CLOSE", FOUR_MINUTES)


@pytest.mark.parametrize("flags", [RST, RST | ACK], ids=["RST", "RST-ACK"])
def test_a_reset_from_inside_goes_out_and_its_entry_stays_for_four_minutes(
    connection: Connection, flags: int
) -> None:
    connection.opens()
    connection.client_sends(flags)
    assert connection.is_in("CLOSE", FOUR_MINUTES)


def test_a_reset_that_is_sent_again_comes_through_and_keeps_nothing_alive(
    connection: Connection,
) -> None:
    connection.opens()
    connection.server_sends(RST | ACK)
    time.sleep(1)
    before = connection.entry()["expires"]
    connection.server_sends(RST | ACK)
    connection.client_sends(RST)
    assert connection.entry()["expires"] <= before


@pytest.mark.parametrize("packets", [1, 40], ids=["young", "lasting"])
def test_what_is_forged_comes_in_and_changes_nothing(connection: Connection, packets: int) -> None:
    """With a flow cache, the kernel has carried most of the 40 packets each way."""
    connection.opens()
    for _ in range(packets):
        connection.client_sends(ACK)
        connection.server_sends(ACK)
    for flags in (RST, RST | ACK, FIN | ACK, SYN, SYN | ACK, 0):
        connection.server_sends(flags, seq=900_000_000)
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)
    connection.server_sends(RST)
    assert connection.is_in("CLOSE", FOUR_MINUTES)


def test_a_connection_that_goes_on_after_a_reset_is_established(connection: Connection) -> None:
    """Somebody forged the reset, and its receiver did not believe it."""
    connection.opens()
    connection.server_sends(RST)
    assert connection.is_in("CLOSE", FOUR_MINUTES)
    connection.server_sends(ACK | PSH, b"are you there?")
    assert connection.is_in("CLOSE", FOUR_MINUTES)
    connection.client_sends(ACK | PSH, b"still here")
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)


def test_a_connection_that_was_reset_can_be_opened_anew(connection: Connection) -> None:
    connection.opens()
    connection.server_sends(RST | ACK)
    connection.opens()
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)


def test_resets_that_answer_what_comes_in_keep_nothing_alive(connection: Connection) -> None:
    """The inside host no longer knows the connection; only the outside host goes on with it."""
    connection.opens()
    connection.client_sends(RST)
    time.sleep(1)
    before = connection.entry()["expires"]
    connection.client_sends(RST)
    assert connection.entry()["expires"] <= before


# ---- unsolicited --------------------------------------------------------------------------------


def test_a_syn_that_nobody_asked_for_is_dropped_in_silence_where_the_firewall_wants_it(
    lab: Lab, net: Stations, connection: Connection, stranger: Station
) -> None:
    """Without the firewall's rule, the sender would be told after six seconds."""
    connection.opens()
    firewall = ["OUTPUT", "-p", "icmp", "--icmp-type", "port-unreachable", "-j", "DROP"]
    lab.gateway.run(["iptables", "-A", *firewall])
    stranger.forget()  # what an earlier SYN was answered with
    try:
        stranger.send(tcp(stranger.port(5000), connection.mapped, SYN))
        time.sleep(6.5)
    finally:
        lab.gateway.run(["iptables", "-D", *firewall])
    assert net.heard_nothing(stranger)
    assert net.heard_nothing(connection.inside)


# ---- ICMP errors --------------------------------------------------------------------------------

ERRORS = [
    *((UNREACHABLE, code) for code in range(16)),
    (TIME_EXCEEDED, 0),
    (TIME_EXCEEDED, 1),
    (PARAMETER_PROBLEM, 0),
    (SOURCE_QUENCH, 0),
]


@pytest.mark.parametrize("established", [False, True], ids=["opening", "established"])
def test_no_icmp_error_ends_a_connection(connection: Connection, established: bool) -> None:
    connection.client_sends(SYN)
    if established:
        connection.server_sends(SYN | ACK)
    net, inside, outside = connection.net, connection.inside, connection.outside
    for kind, code in ERRORS:
        sent, answered = tcp(connection.mapped, SERVER), tcp(SERVER, CLIENT)
        outside.send(error(outside.address, GATEWAY, sent, kind, code))
        inside.send(error(inside.address, outside.address, answered, kind, code))
    net.settle()
    connection.server_sends(SYN | ACK)
    connection.client_sends(ACK)
    assert connection.is_in("ESTABLISHED", TWO_HOURS_AND_FOUR_MINUTES)


# ---- payloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [554, 1720, 1723, 5060, 6667])
def test_no_payload_is_looked_into(net: Stations, daemon: Daemon, port: int) -> None:
    """Not even on the ports of protocols whose payloads name addresses."""
    inside, outside = net.inside[0], net.outside[0]
    net.passed(tcp(CLIENT, outside.port(port), SYN), inside, outside)
    names = b"INVITE sip:me@10.77.0.11:40000\r\nPORT 10,77,0,11,156,64\r\n"
    seen = net.passed(tcp(CLIENT, outside.port(port), ACK | PSH, names), inside, outside)
    assert is_like(seen, tcp(source(seen), outside.port(port), ACK | PSH, names))
