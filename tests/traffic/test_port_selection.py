"""The masquerade port and address that a session gets, as a server outside sees them.

RFC 4787, REQ-2, REQ-3a and REQ-4; RFC 6056; RFC 7857, sections 4, 8 and 9.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from socket import AF_INET, SO_LINGER, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket
from struct import pack

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.packets import source_address
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.servers import Visitor

SERVER_PORT = 4000
SECOND_ADDRESS = "198.51.100.3"

Masquerade = Callable[..., Daemon]

TRANSPORTS = pytest.mark.parametrize("kind", [SOCK_DGRAM, SOCK_STREAM], ids=["udp", "tcp"])


class Server:
    """A host outside that is asked over UDP and TCP, and answers."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self.address = (host.address, SERVER_PORT)
        self._stack = stack
        self._datagrams = self._bound(host, SOCK_DGRAM)
        self._listener = self._bound(host, SOCK_STREAM)
        self._listener.listen()

    def sees(self, client: Host, kind: int, sport: int = 0, patience: float = PATIENCE) -> Visitor:
        """Return the endpoint that a client's new session comes from; the client keeps its port."""
        self._datagrams.settimeout(patience)
        asking = self._socket(client, kind)
        asking.bind((client.address, sport))
        asking.connect(self.address)
        asking.send(b"question")
        if kind == SOCK_DGRAM:
            question, visitor = self._datagrams.recvfrom(100)
            self._datagrams.sendto(b"answer", visitor)
        else:
            connection, visitor = self._listener.accept()
            question = self._stack.enter_context(connection).recv(100)
            connection.send(b"answer")
        assert (question, asking.recv(100)) == (b"question", b"answer")
        return visitor[0], visitor[1]

    def sees_port(self, client: Host, kind: int, sport: int = 0) -> int:
        """Return the port that a client's new session comes from."""
        return self.sees(client, kind, sport)[1]

    def _bound(self, host: Host, kind: int) -> socket:
        opened = self._socket(host, kind)
        opened.bind(self.address)
        return opened

    def _socket(self, host: Host, kind: int) -> socket:
        opened = self._stack.enter_context(host.socket(AF_INET, kind))
        opened.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        # An orderly end could go on into the next test, and make an entry there.
        opened.setsockopt(SOL_SOCKET, SO_LINGER, pack("@ii", 1, 0))
        return opened


@pytest.fixture
def server(lab: Lab, masquerade: Masquerade) -> Iterator[Server]:
    """Yield a server; its sockets and the clients' close while the test's masquerade still runs."""
    with ExitStack() as stack:
        yield Server(lab.outside[0], stack)


@pytest.fixture
def pool(lab: Lab) -> Iterator[list[str]]:
    """Give the gateway a second address; yields the options to masquerade with both addresses."""
    lab.gateway.ip(f"address add {SECOND_ADDRESS}/24 dev wan")
    first = lab.gateway.address
    yield ["--masquerade-address", first, "--masquerade-address", SECOND_ADDRESS]
    lab.gateway.ip(f"address delete {SECOND_ADDRESS}/24 dev wan")


# -- preserve -------------------------------------------------------------------------


@TRANSPORTS
def test_preserve_the_outside_sees_the_source_port_itself(
    lab: Lab, masquerade: Masquerade, server: Server, kind: int
) -> None:
    masquerade("--port-selection", "preserve", ports="600-1023,40000-40999")
    for sport in (600, 1023, 40000, 40999):
        assert server.sees(lab.inside[0], kind, sport) == (lab.gateway.address, sport)


@TRANSPORTS
@pytest.mark.parametrize("sport", [40000, 40001])
def test_preserve_two_inside_hosts_with_the_same_source_port_have_ports_of_its_parity(
    lab: Lab, masquerade: Masquerade, server: Server, kind: int, sport: int
) -> None:
    """RTP on the even port and RTCP on the odd port need this."""
    masquerade("--port-selection", "preserve", ports="600-1023,40000-40999")
    assert server.sees_port(lab.inside[0], kind, sport) == sport
    other = server.sees_port(lab.inside[1], kind, sport)
    assert other in range(40000, 41000)
    assert other != sport
    assert other % 2 == sport % 2


@TRANSPORTS
def test_preserve_a_source_port_below_1024_stays_below_1024_and_one_above_above(
    lab: Lab, masquerade: Masquerade, server: Server, kind: int
) -> None:
    masquerade("--port-selection", "preserve", ports="600-1023,40000-40999")
    assert server.sees_port(lab.inside[0], kind, 700) == 700
    for taken_or_outside_the_ranges in (700, 512, 22):
        port = server.sees_port(lab.inside[1], kind, taken_or_outside_the_ranges)
        assert port in range(600, 1024, 2)
    assert server.sees_port(lab.inside[1], kind, 1024) in range(40000, 41000, 2)
    assert server.sees_port(lab.inside[1], kind, 65535) in range(40001, 41000, 2)


def test_preserve_gives_up_parity_before_class_and_class_before_the_session(
    lab: Lab, masquerade: Masquerade, server: Server
) -> None:
    masquerade("--port-selection", "preserve", ports="1000-1001,40000-40003")
    seen = [server.sees_port(lab.inside[0], SOCK_DGRAM, sport) for sport in (900, 902, 904)]
    assert seen[:2] == [1000, 1001]
    assert seen[2] in (40000, 40002)


# -- several ranges -------------------------------------------------------------------


@TRANSPORTS
def test_several_ranges_are_used_one_after_the_other_and_answers_come_back_to_each(
    lab: Lab, masquerade: Masquerade, server: Server, kind: int
) -> None:
    masquerade("--port-selection", "sequential", ports="600-601,50000-50000,61000-61001")
    seen = [server.sees_port(lab.inside[n % 2], kind) for n in range(5)]
    assert seen == [600, 601, 50000, 61000, 61001]


def test_rules_and_doctor_agree_with_nfmasq_on_several_ranges(
    lab: Lab, masquerade: Masquerade
) -> None:
    ranges = "600-1023,61000-65095"
    daemon = masquerade(ports=ranges)
    assert lab.rules("status", "--ports", ranges, check=False).returncode == 0
    findings = json.loads(daemon.ask("doctor", "--json"))
    assert [finding for finding in findings if finding["level"] == "problem"] == []
    assert "the rules are loaded, and agree with nfmasq" in [f["what"] for f in findings]
    apart = f"masquerade ports {ranges} are apart from this machine's own ports"
    assert apart in [finding["what"] for finding in findings]


# -- random ---------------------------------------------------------------------------


@TRANSPORTS
def test_random_ports_of_consecutive_sessions_do_not_follow_a_row(
    lab: Lab, masquerade: Masquerade, server: Server, kind: int
) -> None:
    masquerade("--port-selection", "random", ports="600-1023,40000-59999")
    seen = [server.sees_port(lab.inside[0], kind, 30000 + n) for n in range(12)]
    assert all(port in range(600, 1024) or port in range(40000, 60000) for port in seen)
    assert len({*seen}) == 12
    assert len({after - before for before, after in pairwise(seen)}) > 6


# -- two masquerade addresses ---------------------------------------------------------


def test_paired_pooling_an_inside_host_keeps_its_outside_address_over_sessions_and_protocols(
    lab: Lab, masquerade: Masquerade, server: Server, pool: list[str]
) -> None:
    masquerade(*pool)
    seen: list[set[str]] = []
    for host in lab.inside:
        visitors = [server.sees(host, kind) for kind in [SOCK_DGRAM, SOCK_STREAM] * 5]
        with lab.capture(lab.outside[1], "eth0", "icmp[icmptype] == icmp-echo") as echoes:
            host.run(["ping", "-c", "2", "-i", "0.2", lab.outside[1].address])
        assert len(echoes) == 2
        seen.append(
            {address for address, _ in visitors} | {source_address(echo.data) for echo in echoes}
        )
    # Each host has one address, and the two hosts have different addresses.
    assert sorted(map(sorted, seen)) == [[lab.gateway.address], [SECOND_ADDRESS]]


def test_paired_pooling_is_kept_where_the_address_runs_out_of_ports(
    lab: Lab, masquerade: Masquerade, server: Server, pool: list[str]
) -> None:
    """RFC 7857, section 4: the session is refused, though the other address has a port free."""
    masquerade(*pool, ports="61000-61000")
    address, _ = server.sees(lab.inside[0], SOCK_DGRAM)
    with pytest.raises(TimeoutError):
        server.sees(lab.inside[0], SOCK_DGRAM, patience=BRIEFLY)
    assert {address, server.sees(lab.inside[1], SOCK_DGRAM)[0]} == {
        lab.gateway.address,
        SECOND_ADDRESS,
    }
