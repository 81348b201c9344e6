"""What one inside host may have, and that no host can take what the others need."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EHOSTUNREACH
from pathlib import Path
from socket import AF_INET, IPPROTO_RAW, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, socket

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.packets import SYN, UNREACHABLE, destination, quoted, source, tcp, udp
from tests.traffic.clients import BRIEFLY, REFUSED, answered, connected, connection, echoed
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, TCP_PORT, udp_echo, web_server

SILENT = "192.0.2.1"
"""An address outside from which nothing ever comes back."""

PROHIBITED = 13

Masquerade = Callable[..., Daemon]


@pytest.fixture(scope="module", autouse=True)
def _servers(lab: Lab) -> Iterator[None]:
    lab.router.ip("route add blackhole 192.0.2.0/24")
    with udp_echo(lab.outside[0]):
        yield


@pytest.fixture
def client(lab: Lab, stack: ExitStack) -> Callable[[Host], socket]:
    """Return a function that connects a socket of an inside host to the UDP echo server."""

    def connect(host: Host) -> socket:
        return stack.enter_context(connected(host, SOCK_DGRAM, lab.outside[0], ECHO_PORT))

    return connect


def is_refused(client: socket) -> bool:
    """Say whether a program that has sent a datagram is told that its session is refused."""
    try:
        return client.recv(100) != b"hello"
    except OSError as error:
        return error.errno == EHOSTUNREACH


def errors(daemon: Daemon, reason: str) -> float:
    return figure(daemon, "nfmasq_errors_total", reason=reason)


def test_the_entries_of_a_host_are_limited_and_the_next_program_is_told(
    lab: Lab, masquerade: Masquerade, client: Callable[[Host], socket]
) -> None:
    daemon = masquerade("--max-entries-per-host", "3")
    first, second = lab.inside
    three = [client(first) for _ in range(3)]
    assert all(map(echoed, three))

    with pytest.raises(OSError, match=REFUSED):
        echoed(client(first))
    assert all(map(echoed, three))
    assert echoed(client(second))
    assert len(entries(daemon, saddr=first.address)) == 3
    assert errors(daemon, "host_entries") == 1


@pytest.mark.usefixtures("listener")
def test_a_tcp_connection_over_the_limit_fails_at_once(
    lab: Lab, masquerade: Masquerade, stack: ExitStack
) -> None:
    masquerade("--max-entries-per-host", "1")
    first, second = lab.inside
    outside = lab.outside[0]
    stack.enter_context(connected(first, SOCK_STREAM, outside, TCP_PORT))

    told = "icmp or tcp[tcpflags] & tcp-syn != 0"
    with (
        lab.capture(first, "eth0", told) as seen,
        pytest.raises(OSError, match=REFUSED),
        connected(first, SOCK_STREAM, outside, TCP_PORT),
    ):
        pass
    # The error is about the first SYN: no other SYN has the same identification.
    syn, error = seen[0].data, next(packet.data for packet in seen if packet.data[9] == 1)
    assert quoted(error)[4:6] == syn[4:6]
    stack.enter_context(connected(second, SOCK_STREAM, outside, TCP_PORT))


def test_the_ports_of_a_host_are_limited_and_not_what_goes_by_those_it_has(
    lab: Lab, masquerade: Masquerade, client: Callable[[Host], socket]
) -> None:
    daemon = masquerade("--max-ports-per-host", "2", "--mapping", "endpoint-independent")
    first, second = lab.inside
    two = [client(first) for _ in range(2)]
    assert all(map(echoed, two))

    with pytest.raises(OSError, match=REFUSED):
        echoed(client(first))
    assert echoed(client(second))
    assert errors(daemon, "host_ports") == 1

    two[0].connect((lab.outside[1].address, ECHO_PORT))
    two[0].send(b"elsewhere")
    assert eventually(lambda: len(entries(daemon, daddr=lab.outside[1].address)) == 1)
    assert len({entry["mport"] for entry in entries(daemon, saddr=first.address)}) == 2


def test_the_new_entries_of_a_host_are_limited_by_the_second(
    lab: Lab, masquerade: Masquerade, client: Callable[[Host], socket]
) -> None:
    """A host may make the entries of a second all at once, and as many in the next second."""
    daemon = masquerade("--max-new-per-host", "4")
    first, second = lab.inside
    many, late = [client(first) for _ in range(40)], client(first)

    # Sent one right after the other, whenever the answers come: 40 entries would take 9 seconds.
    for each in many:
        each.send(b"hello")
    sent = [not is_refused(each) for each in many]
    assert sent[:4] == [True] * 4
    assert not all(sent)
    assert echoed(client(second))
    assert errors(daemon, "host_rate") == sent.count(False)

    time.sleep(1)
    assert echoed(late)


def test_refusals_are_told_at_a_bounded_rate(lab: Lab, masquerade: Masquerade) -> None:
    """Of a thousand refused sessions, a hundred are told in a second."""
    daemon = masquerade("--max-entries-per-host", "1")
    first = lab.inside[0]
    with lab.capture(first, "eth0", "icmp") as told, first.socket(AF_INET, SOCK_DGRAM) as client:
        began = time.monotonic()
        for port in range(10_000, 11_000):
            client.sendto(b"x", (SILENT, port))
        assert eventually(lambda: errors(daemon, "host_entries") == 999)
        took = time.monotonic() - began
    assert 100 <= len(told) <= 100 * (1 + took)
    for error in told:
        assert error.data[20:22] == bytes([UNREACHABLE, PROHIBITED])
        assert destination(quoted(error.data))[0] == SILENT
        assert source(quoted(error.data))[0] == first.address


def test_without_cap_net_raw_the_refused_are_dropped_in_silence(
    lab: Lab, client: Callable[[Host], socket], stack: ExitStack, tmp_path: Path
) -> None:
    without = ["setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-all"]
    options = ["--config", os.devnull, "--control", str(tmp_path / "control"), "--metrics", "off"]
    line = [*without, sys.executable, "-m", "nfmasq", "run", *options]
    log = tmp_path / "log"
    lab.rules("up")
    stack.callback(lab.rules, "down")
    with log.open("w") as stderr:
        limited = [*line, "--max-entries-per-host", "1"]
        daemon = lab.gateway.popen(limited, cwd=Path(__file__).parents[2], stderr=stderr)
    stack.callback(daemon.wait, 30)
    stack.callback(daemon.terminate)
    assert eventually(lambda: "ready" in log.read_text())

    first = lab.inside[0]
    within = client(first)
    assert echoed(within)
    refused = client(first)
    refused.settimeout(BRIEFLY)
    assert not echoed(refused)
    assert echoed(within)
    assert "nobody is told of what is refused or ended: give CAP_NET_RAW" in log.read_text()


def test_when_the_table_is_full_unanswered_entries_go_and_established_ones_stay(
    lab: Lab, masquerade: Masquerade, listener: socket, stack: ExitStack
) -> None:
    daemon = masquerade("--max-entries", "30")
    first, second = lab.inside
    ends = [connection(stack, second, listener) for _ in range(10)]

    send(first, [udp((first.address, sport), (SILENT, 9)) for sport in range(10_000, 10_200)])
    assert eventually(lambda: figure(daemon, "nfmasq_entries_ended_total", reason="evicted") == 180)
    assert len(entries(daemon)) == 30

    ends += [connection(stack, second, listener) for _ in range(20)]
    assert all(answered(*both) for both in ends)
    assert len(entries(daemon, saddr=second.address)) == 30

    with pytest.raises(OSError, match=REFUSED):
        connection(stack, first, listener)
    assert all(answered(*both) for both in ends)
    assert errors(daemon, "no_room") == 1


def test_a_syn_flood_of_one_host_leaves_the_others_working(
    lab: Lab, masquerade: Masquerade, listener: socket, stack: ExitStack, tmp_path: Path
) -> None:
    """24,000 SYNs in four seconds, for which there are 4096 ports and 10,000 entries.

    Another host uploads meanwhile, and opens one connection after the other.
    """
    daemon = masquerade("--max-entries", "10000")
    first, second = lab.inside
    syns = [tcp((first.address, 1024 + n), (SILENT, 80), SYN) for n in range(24_000)]
    content = tmp_path / "content"
    content.write_bytes(os.urandom(12_000_000))
    with web_server(lab.outside[1]) as server:
        to = f"{server.url}/content"
        upload = second.popen(["curl", "-sS", "--limit-rate", "3M", "-T", content, to])
        began = time.monotonic()
        for sent in range(0, len(syns), 600):
            send(first, syns[sent : sent + 600])
            assert answered(*connection(stack, second, listener))
            time.sleep(max(0, began + sent / 6000 - time.monotonic()))
        assert upload.wait(100) == 0
        assert server.files["/content"] == content.read_bytes()
    assert len(entries(daemon, dport=TCP_PORT)) == 40
    assert errors(daemon, "no_port") > 10_000
    assert figure(daemon, "nfmasq_entries_ended_total", reason="evicted") >= 30


def send(host: Host, packets: list[bytes]) -> None:
    """Send whole packets from a host."""
    with host.socket(AF_INET, SOCK_RAW, IPPROTO_RAW) as raw:
        for packet in packets:
            raw.sendto(packet, (destination(packet)[0], 0))
