"""No packet leaves with an inside address: without a handler, or among many malformed packets.

A capture on the router sees all that the gateway sends, whatever source it names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from itertools import chain, count, islice
from socket import AF_INET, SOCK_DGRAM
from threading import Event, Thread
from typing import Any

import pytest

from nfmasq.config import Configuration
from nfmasq.daemon.queue_table import queue_row
from nfmasq.lab import Host, Lab, Packet
from tests.packets import (
    ACK,
    PSH,
    SYN,
    error,
    header_length,
    query,
    quoted,
    reply,
    source_address,
    tcp,
    udp,
)
from tests.traffic.clients import BRIEFLY, PATIENCE
from tests.traffic.malformed import malformed
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, WEB_PORT, WebServer, udp_echo, web_server
from tests.traffic.wire import mac, sender

GATEWAY = "198.51.100.2"
INSIDE = IPv4Network("10.77.0.0/24")
ICMP_ERRORS = {3, 4, 5, 11, 12}

NUMBER = 20_000  # malformed packets from each side, at least
AT_ONCE = 100
PAUSE = 0.005  # seconds after each lot of packets; the handler is busy then
QUEUE_LENGTH = Configuration().queue_length
HOST_PORTS = range(40_000, 40_008)


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        web.files["/page"] = b"Here I am.\n" * 10_000
        yield web


@pytest.fixture(scope="module", autouse=True)
def _echo(lab: Lab) -> Iterator[None]:
    with udp_echo(lab.outside[0]):
        yield


@contextmanager
def sent_by_the_gateway(lab: Lab) -> Iterator[list[Packet]]:
    """Capture all that the gateway sends to the outside within the block."""
    with lab.capture(lab.router, "wan", f"ip and ether src {mac(lab, 'wan')}") as sent:
        yield sent


def from_inside(host: Host, server: Host, port: int) -> list[bytes]:
    """Return well-formed packets of three sessions of an inside host, and an error about one."""
    here, web, echo = (host.address, port), (server.address, WEB_PORT), (server.address, ECHO_PORT)
    return [
        tcp(here, web, SYN, tcp_options=bytes([2, 4, 5, 180])),
        tcp(here, web, ACK | PSH, b"GET /page HTTP/1.1"),
        udp(here, echo, b"hello" * 10),
        query(here, server.address, payload=b"hello" * 10),
        error(host.address, server.address, udp(echo, here, b"hello" * 10)),
    ]


def from_outside(entry: dict[str, Any]) -> list[bytes]:
    """Return well-formed packets to the gateway: an answer and an error that an entry expects."""
    server, gateway = (entry["daddr"], entry["dport"]), (entry["maddr"], entry["mport"])
    if entry["protocol"] == "tcp":
        question, answer = tcp(gateway, server), tcp(server, gateway)
    elif entry["protocol"] == "udp":
        question, answer = udp(gateway, server), udp(server, gateway)
    else:
        question, answer = query(gateway, server[0]), reply(server[0], gateway)
    return [answer, error(server[0], gateway[0], question)]


# ---- without a handler --------------------------------------------------------------------------


def echoed(host: Host, server: Host, patience: float = PATIENCE) -> bool:
    """Say whether a datagram from a new port comes back."""
    with host.socket(AF_INET, SOCK_DGRAM) as client:
        client.settimeout(patience)
        client.sendto(b"hello", (server.address, ECHO_PORT))
        with suppress(TimeoutError):
            return client.recv(100) == b"hello"
    return False


def test_when_the_handler_is_killed_nothing_leaves_until_there_is_another(lab: Lab) -> None:
    inside, outside = lab.inside[0], lab.outside[0]
    send = sender(lab, inside, "eth0", "lan")
    with lab.masquerading() as daemon, inside.socket(AF_INET, SOCK_DGRAM) as talking:
        talking.connect((outside.address, ECHO_PORT))
        talking.send(b"before")
        assert talking.recv(100) == b"before"

        daemon.kill()
        daemon.wait()
        with sent_by_the_gateway(lab) as sent:
            talking.send(b"after")
            send(from_inside(inside, outside, HOST_PORTS[0]))
            assert not echoed(inside, outside, BRIEFLY)
        assert sent == []

        successor = lab.nfmasq()
        assert echoed(inside, outside)
        successor.stop()


# ---- malformed packets --------------------------------------------------------------------------


def comes_from_inside(packet: bytes) -> bool:
    return IPv4Address(packet[12:16]) in INSIDE


def quotes_an_inside_address(packet: bytes) -> bool:
    """Say whether a packet is an ICMP error about a packet from or to an inside address."""
    if packet[9] != 1 or packet[header_length(packet)] not in ICMP_ERRORS:
        return False
    addresses = quoted(packet)[12:16], quoted(packet)[16:20]
    return any(IPv4Address(address) in INSIDE for address in addresses if len(address) == 4)


def page(host: Host, web: WebServer) -> bytes:
    """Return what `curl` gets of the page; TCP sends again what is lost on the way."""
    return host.run(["curl", "-sS", "--max-time", "50", f"{web.url}/page"]).stdout.encode()


@contextmanager
def fetching(host: Host, web: WebServer) -> Iterator[list[bytes]]:
    """Fetch the page again and again within the block; yields the list of what came."""
    fetched: list[bytes] = []
    enough = Event()

    def fetch() -> None:
        while not enough.is_set():
            fetched.append(page(host, web))

    thread = Thread(target=fetch)
    thread.start()
    try:
        yield fetched
    finally:
        enough.set()
        thread.join()


def endlessly(packets: list[bytes], seed: int) -> Iterator[bytes]:
    """Yield malformed packets without end, in lots of which no two are alike."""
    return chain.from_iterable(malformed(packets, NUMBER, n) for n in count(seed, 2))


def waiting(lab: Lab) -> int:
    """Return how many packets wait for the handler, which is slow on a busy machine."""
    row = lab.gateway.call(queue_row, 0)
    assert row
    return row.waiting


@pytest.mark.parametrize("option", ["-R", "-T=tsonly", "-T=tsandaddr"])
def test_ip_options_that_record_the_way_do_not_go_out(lab: Lab, option: str) -> None:
    with lab.masquerading() as daemon, sent_by_the_gateway(lab) as sent:
        ping = ["ping", "-c", "1", "-W", "1", *option.split("="), lab.outside[0].address]
        lab.inside[0].run(ping, check=False)
        dropped = partial(figure, daemon, "nfmasq_errors_total", reason="ip_option")
        assert eventually(lambda: dropped() == 1)
        lab.inside[0].run(["ping", "-c", "1", "-W", "10", lab.outside[0].address])
    assert sent
    assert [packet.data for packet in sent if bytes((10, 77, 0)) in packet.data] == []


def test_malformed_packets_from_both_sides(lab: Lab, web: WebServer) -> None:
    inside, outside = lab.inside[1], lab.outside[0]
    send_out = sender(lab, inside, "eth0", "lan")
    send_in = sender(lab, lab.router, "wan", "wan")
    with lab.masquerading() as daemon, sent_by_the_gateway(lab) as sent:
        questions = [p for port in HOST_PORTS for p in from_inside(inside, outside, port)]
        send_out(questions)
        assert eventually(lambda: len(entries(daemon)) == 3 * len(HOST_PORTS))
        answers = list(chain.from_iterable(map(from_outside, entries(daemon))))

        outward, inward = endlessly(questions, seed=1), endlessly(answers, seed=2)
        with fetching(lab.inside[0], web) as fetched:
            sent_so_far = 0
            while sent_so_far < NUMBER or len(fetched) <= 5:
                send_out(islice(outward, AT_ONCE))
                send_in(islice(inward, AT_ONCE))
                sent_so_far += AT_ONCE
                time.sleep(PAUSE)
                assert eventually(lambda: waiting(lab) < QUEUE_LENGTH / 4)
        assert fetched == [web.files["/page"]] * len(fetched)
        assert page(inside, web) == web.files["/page"]

        # The kernel drops the worst packets itself; the figures count what it let through.
        assert figure(daemon, "nfmasq_packets_total", direction="out") > NUMBER / 3
        assert figure(daemon, "nfmasq_packets_total", direction="in") > NUMBER / 3
        assert figure(daemon, "nfmasq_errors_total", reason="malformed") > NUMBER / 20
        assert figure(daemon, "nfmasq_errors_total", reason="exception") == 0
        assert daemon.poll() is None
        log = daemon.log.read_text()
        assert "Traceback" not in log
        assert "ERROR" not in log

    assert sum(source_address(packet.data) == GATEWAY for packet in sent) > NUMBER / 4
    assert [packet.data for packet in sent if comes_from_inside(packet.data)] == []
    assert [packet.data for packet in sent if quotes_an_inside_address(packet.data)] == []
