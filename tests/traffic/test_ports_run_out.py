"""Few masquerade ports, and more sessions: who gets a port, and that the others go on undisturbed.

What is over gives its port up at once. What is alive shares: one port serves several hosts, each
with other destinations, unless this is to be refused. A session that can have no port is refused
until a port comes back, at the latest when its entry expires, within a second of its time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from socket import SOCK_DGRAM, SOCK_STREAM, socket

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.clients import REFUSED, answered, connected, connection, echoed
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, TCP_PORT, nginx, tcp_listener

FOUR_PORTS = "61000-61003"
SHORT_CONNECTIONS = ["wrk", "-t1", "-c16", "--header", "Connection: close"]

Masquerade = Callable[..., Daemon]


def timeouts(folder: Path, **seconds: float) -> list[str]:
    """Return the options of `nfmasq run` that set timeouts, by a file in the folder."""
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in seconds.items()]
    file = folder / "nfmasq.toml"
    file.write_text("\n".join(["[timeouts]", *lines]))
    return ["--config", str(file)]


def without_port(daemon: Daemon) -> float:
    return figure(daemon, "nfmasq_errors_total", reason="no_port")


@pytest.mark.usefixtures("visitors")
def test_a_fifth_udp_session(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, tmp_path: Path
) -> None:
    # Seconds in which ten datagrams go back and forth, on a busy machine too.
    daemon = masquerade(*timeouts(tmp_path, udp=5), ports=FOUR_PORTS)
    *four, fifth = [
        stack.enter_context(connected(lab.inside[n % 2], SOCK_DGRAM, lab.outside[0], ECHO_PORT))
        for n in range(5)
    ]
    with lab.capture(lab.gateway, "wan", f"udp dst port {ECHO_PORT}") as sent:
        assert [echoed(client) for client in four] == [True] * 4
        assert figure(daemon, "nfmasq_ports_free", protocol="udp") == 0
        with pytest.raises(OSError, match=REFUSED):
            echoed(fifth)
        assert [echoed(client) for client in four] == [True] * 4
    assert len(sent) == 8
    assert without_port(daemon) == 1

    assert eventually(lambda: entries(daemon) == [])
    assert figure(daemon, "nfmasq_ports_free", protocol="udp") == 4
    assert echoed(fifth)
    assert without_port(daemon) == 1


def test_a_fifth_tcp_connection(
    lab: Lab, masquerade: Masquerade, listener: socket, stack: ExitStack, tmp_path: Path
) -> None:
    daemon = masquerade(*timeouts(tmp_path, tcp_close=1), ports=FOUR_PORTS)

    first, *others = [connection(stack, lab.inside[n % 2], listener) for n in range(4)]
    assert all(answered(*ends) for ends in (first, *others))

    with pytest.raises(OSError, match=REFUSED):
        connection(stack, lab.inside[0], listener)
    assert without_port(daemon) == 1
    assert all(answered(*ends) for ends in (first, *others))

    first[0].close()  # by a reset
    assert eventually(lambda: "CLOSE" in {entry["state"] for entry in entries(daemon)})
    assert answered(*connection(stack, lab.inside[0], listener))
    assert all(answered(*ends) for ends in others)
    assert len(entries(daemon)) == 4


@pytest.mark.usefixtures("listener")
def test_a_fifth_connection_to_another_server_shares_a_port(
    lab: Lab, masquerade: Masquerade, listener: socket, stack: ExitStack
) -> None:
    daemon = masquerade(ports=FOUR_PORTS)
    other_listener = stack.enter_context(tcp_listener(lab.outside[1]))
    four = [connection(stack, lab.inside[0], listener) for _ in range(4)]
    fifth = connection(stack, lab.inside[1], other_listener)
    assert all(answered(*ends) for ends in (*four, fifth))
    assert figure(daemon, "nfmasq_ports_free", protocol="tcp") == 0
    assert figure(daemon, "nfmasq_entries_overlapping_total", protocol="tcp") == 1
    assert fifth[1].getpeername() in [server.getpeername() for _, server in four]
    assert without_port(daemon) == 0


def test_a_fifth_connection_is_refused_where_no_port_may_be_shared(
    lab: Lab, masquerade: Masquerade, listener: socket, stack: ExitStack
) -> None:
    daemon = masquerade("--when-ports-run-out", "refuse", ports=FOUR_PORTS)
    other_listener = stack.enter_context(tcp_listener(lab.outside[1]))
    four = [connection(stack, lab.inside[0], listener) for _ in range(4)]
    with pytest.raises(OSError, match=REFUSED):
        connection(stack, lab.inside[1], other_listener)
    assert all(answered(*ends) for ends in four)
    assert without_port(daemon) == 1


def test_one_host_opens_thousands_of_short_connections_to_one_server(
    lab: Lab, masquerade: Masquerade, tmp_path: Path
) -> None:
    """Sixty-four ports: each is used again while the server remembers the last connection."""
    daemon = masquerade(ports="61000-61063")
    with nginx(lab.outside[0], tmp_path) as address:
        told = lab.inside[0].run([*SHORT_CONNECTIONS, "--duration", "3s", f"http://{address}/"])
        done = re.search(r"(\d+) requests in", told.stdout)
        assert done
        assert int(done[1]) > 20 * 64
        assert "Socket errors" not in told.stdout, told.stdout
        lab.inside[1].run(["curl", "-sS", "--max-time", "20", f"http://{address}/"])
    assert without_port(daemon) == 0
    assert figure(daemon, "nfmasq_entries_overlapping_total", protocol="tcp") == 0


@pytest.mark.usefixtures("visitors", "listener")
def test_an_entry_expires_at_its_time(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, tmp_path: Path
) -> None:
    """Each timeout runs from the last packet, which comes between `began` and `ended`.

    The entries are listed again and again. An entry was still there when the last list that has it
    was asked for, and was gone when the first list without it came. It may be late by as much as a
    list can take on this machine now.
    """
    seconds = {"udp": 1.5, "icmp": 2.0, "tcp": 2.5}
    options = timeouts(tmp_path, udp=1.5, icmp=2.0, tcp_established=2.5)
    daemon = masquerade(*options)
    inside, outside = lab.inside[0], lab.outside[0]

    began = time.monotonic()
    assert echoed(stack.enter_context(connected(inside, SOCK_DGRAM, outside, ECHO_PORT)))
    inside.run(["ping", "-c", "1", outside.address])
    stack.enter_context(connected(inside, SOCK_STREAM, outside, TCP_PORT))
    ended = time.monotonic()

    there, gone, slowest = dict.fromkeys(seconds, ended), dict[str, float](), 0.0
    while len(gone) < len(seconds):
        asked = time.monotonic()
        listed = {entry["protocol"] for entry in entries(daemon)}
        told = time.monotonic()
        there |= dict.fromkeys(listed, asked)
        gone |= dict.fromkeys(seconds.keys() - gone.keys() - listed, told)
        assert told < ended + 30, listed
        time.sleep(0.02)
        slowest = max(slowest, time.monotonic() - asked)
    for protocol, timeout in seconds.items():
        assert began + timeout <= gone[protocol]
        assert there[protocol] <= ended + timeout + 1 + slowest
