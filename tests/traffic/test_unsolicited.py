"""A SYN from outside that nobody asked for gets an ICMP error, but only after six seconds.

It gets none where an inside host opens the same connection meanwhile (RFC 5382, REQ-4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from socket import AF_INET, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

import pytest

from nfmasq.lab import Daemon, Host, Lab, Packet
from tests.packets import SYN, UNREACHABLE, checksums_are_right, destination, quoted, source
from tests.traffic.clients import answered
from tests.traffic.observed import eventually, figure

MADDR = "198.51.100.2"
PORT_UNREACHABLE = 3
HOLD = 6.0

Masquerade = Callable[..., Daemon]


@contextmanager
def tcp_socket(host: Host, port: int = 0) -> Iterator[socket]:
    """Open a TCP socket of a host, bound to a port, within the block."""
    with host.socket(AF_INET, SOCK_STREAM) as opened:
        opened.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        opened.bind(("", port))
        yield opened


@contextmanager
def listening(host: Host, port: int) -> Iterator[socket]:
    """Open a TCP socket of a host that listens, within the block."""
    with tcp_socket(host, port) as listener:
        listener.listen()
        yield listener


def is_syn(packet: Packet) -> bool:
    return packet.data[9] == 6 and packet.data[33] == SYN


def test_the_sender_hears_nothing_for_six_seconds_and_then_that_the_port_is_unreachable(
    lab: Lab, masquerade: Masquerade
) -> None:
    """Even where a program of the gateway listens on the port."""
    daemon = masquerade()
    outside = lab.outside[0]
    with (
        listening(lab.gateway, 61500),
        tcp_socket(outside) as client,
        lab.capture(outside, "eth0", f"host {MADDR}") as seen,
    ):
        client.settimeout(30)
        with pytest.raises(ConnectionRefusedError):
            client.connect((MADDR, 61500))

    *syns, error = seen
    assert all(map(is_syn, syns))
    assert len(syns) > 1, "it was to try again meanwhile"
    # The times are the kernel's; nfmasq looks four times a second, and later on a busy machine.
    assert HOLD <= error.time - syns[0].time < HOLD + 4
    assert error.data[20:22] == bytes([UNREACHABLE, PORT_UNREACHABLE])
    assert checksums_are_right(error.data)
    assert source(error.data)[0] == MADDR
    assert destination(quoted(error.data)) == (MADDR, 61500)
    assert figure(daemon, "nfmasq_errors_total", reason="unsolicited") == len(syns)


def test_both_sides_may_open_the_same_connection_at_the_same_time(
    lab: Lab, masquerade: Masquerade
) -> None:
    """The outside host's SYN comes first and is dropped; the inside host's begins the session."""
    daemon = masquerade("--port-selection", "preserve")
    inside, outside = lab.inside[0], lab.outside[0]
    with (
        tcp_socket(outside, 7000) as theirs,
        tcp_socket(inside, 61600) as ours,
        lab.capture(outside, "eth0", "icmp") as errors,
    ):
        theirs.setblocking(False)
        theirs.connect_ex((MADDR, 61600))
        unsolicited = partial(figure, daemon, "nfmasq_errors_total", reason="unsolicited")
        assert eventually(lambda: unsolicited() >= 1)
        came = time.monotonic()
        ours.connect((outside.address, 7000))
        theirs.settimeout(20)
        assert answered(ours, theirs)
        time.sleep(max(0, came + HOLD + 1 - time.monotonic()))
        assert answered(ours, theirs)
    assert not errors


def test_the_gateway_takes_the_syn_where_nfmasq_is_told_to_accept_it(
    lab: Lab, masquerade: Masquerade
) -> None:
    daemon = masquerade("--unsolicited", "accept")
    with listening(lab.gateway, 61700) as listener, tcp_socket(lab.outside[0]) as client:
        client.connect((MADDR, 61700))
        with listener.accept()[0] as server:
            assert answered(client, server)
    with tcp_socket(lab.outside[0]) as client, pytest.raises(ConnectionRefusedError):
        client.connect((MADDR, 61701))
    assert figure(daemon, "nfmasq_errors_total", reason="unsolicited") == 0


def test_ports_that_are_not_the_masquerade_s_are_the_gateway_s_own(
    lab: Lab, masquerade: Masquerade
) -> None:
    masquerade()
    with listening(lab.gateway, 8080), tcp_socket(lab.outside[0]) as client:
        client.connect((MADDR, 8080))
    with tcp_socket(lab.outside[0]) as client, pytest.raises(ConnectionRefusedError):
        client.connect((MADDR, 8081))
