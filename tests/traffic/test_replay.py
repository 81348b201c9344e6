"""`nfmasq replay` over a capture gives the packets that the live path gave, byte for byte.

Real traffic goes through a masquerade, and both sides of its gateway are captured. The packets that
came to the gateway on either side are given to `nfmasq replay`. Its result is compared with the
packets that the gateway sent on either side, which differ only by the kernel's forwarding: a hop.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import filterfalse
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM

import dpkt
import pytest

from nfmasq.lab import Lab, Packet
from tests.packets import source_address
from tests.traffic.servers import ECHO_PORT, udp_echo, web_server
from tests.traffic.wire import one_hop_further, without_offload

GATEWAY = "198.51.100.2"
DF = 0x40
RAW_IP = 101
CLOSED_PORT = 9
PAGE = 1_000_000  # bytes
SEGMENT = 1460  # bytes of it in a packet, at most


@pytest.fixture(scope="module")
def captures(lab: Lab) -> tuple[list[Packet], list[Packet]]:
    """Return what was seen on the gateway's lan and on its wan, from the first packet on."""
    with (
        without_offload(lab.inside[0], "eth0"),
        without_offload(lab.outside[0], "eth0"),
        lab.masquerading(),
        lab.capture(lab.gateway, "lan", f"ip and not host {lab.gateway.interfaces['lan']}") as lan,
        lab.capture(lab.gateway, "wan") as wan,
    ):
        traffic(lab)
    return lan, wan


def traffic(lab: Lab) -> None:
    """Make sessions of each protocol, and errors about them."""
    inside, outside = lab.inside[0], lab.outside[0]
    with web_server(outside) as web:
        web.files["/page"] = os.urandom(PAGE)
        inside.run(["curl", "-sSf", "-o", os.devnull, f"{web.url}/page"])
        inside.run(["curl", "-sSf", "-T", sys.executable, f"{web.url}/upload"])
    with udp_echo(outside), inside.socket(AF_INET, SOCK_DGRAM) as client:
        for size in (0, 1, 100, 1472):
            client.sendto(bytes(size), (outside.address, ECHO_PORT))
            client.recv(65535)
    with inside.socket(AF_INET, SOCK_DGRAM) as client:
        client.connect((outside.address, CLOSED_PORT))
        client.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)
    inside.run(["ping", "-c", "3", "-i", "0.1", outside.address])
    # The first hop is left out: there the gateway itself answers, and nothing is masqueraded. One
    # probe is sent at a time: unanswered probes would still be on their way at the end.
    for probes in ("-U", "-I", "-T"):
        way = ["traceroute", "-n", "-f", "2", "-q", "1", "-N", "1", probes]
        inside.run([*way, outside.address])
    # Packets still on their way come before the last ping, and are captured on both sides.
    time.sleep(0.2)
    inside.run(["ping", "-c", "1", outside.address])


def from_gateway(packet: bytes) -> bool:
    return source_address(packet) == GATEWAY


def from_inside(packet: bytes) -> bool:
    return source_address(packet).startswith("10.77.0.")


def replayed(packets: Iterable[Packet], folder: Path) -> Iterator[bytes]:
    """Yield what `nfmasq replay` makes of packets."""
    source, target = folder / "in.pcap", folder / "out.pcap"
    with source.open("wb") as file:
        writer = dpkt.pcap.Writer(file, snaplen=65535, linktype=RAW_IP)
        for packet in packets:
            writer.writepkt(packet.data, packet.time)
    nets = ["--inside", "10.77.0.0/24", "--masquerade-address", GATEWAY]
    subprocess.run(
        [sys.executable, "-m", "nfmasq", "replay", *nets, source, target],
        cwd=Path(__file__).parents[2],
        check=True,
    )
    with target.open("rb") as file:
        for _, packet in dpkt.pcap.Reader(file):
            yield packet


def comparable(packet: bytes) -> bytes:
    """Return the packet without its identification, if that is new and so differs each time."""
    if packet[6] & DF:
        return packet
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]


def difference(ones: Iterable[bytes], others: Iterable[bytes]) -> list[str]:
    """Return the packets that only one of two lots has, in hexadecimal digits."""
    one, other = (Counter(map(comparable, packets)) for packets in (ones, others))
    return [packet.hex() for packet in ((one - other) + (other - one)).elements()]


def test_the_packets_are_those_of_the_live_path(
    captures: tuple[list[Packet], list[Packet]], tmp_path: Path
) -> None:
    lan, wan = captures
    arrivals = [packet for packet in lan if from_inside(packet.data)]
    arrivals += [packet for packet in wan if not from_gateway(packet.data)]
    sent_outside = [packet.data for packet in wan if from_gateway(packet.data)]
    sent_inside = [packet.data for packet in lan if not from_inside(packet.data)]

    sent = [one_hop_further(packet) for packet in replayed(sorted(arrivals), tmp_path)]

    # More than the page's segments: how many acknowledgements there are is up to the receiver.
    assert len(sent) == len(arrivals) > PAGE / SEGMENT
    assert {packet[9] for packet in sent} == {1, 6, 17}
    # The order is not compared: with several processors, packets overtake each other in the kernel.
    assert difference(filter(from_gateway, sent), sent_outside) == []
    assert difference(filterfalse(from_gateway, sent), sent_inside) == []
