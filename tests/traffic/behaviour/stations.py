"""Stations: hosts of a lab that send and receive packets just as a test writes them.

A kernel answers packets that it does not expect (a handshake that is not its own gets a reset), and
sends no odd packets. So the kernel of a station drops all IP packets that come while the station is
there. It still answers ARP; everything else is sent and received by the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from socket import AF_PACKET, SOCK_DGRAM

from nfmasq.lab import Host, Lab
from tests.packets import Endpoint, header_checksum_is_right, query, reply, source

GATEWAY = "198.51.100.2"
"""The masquerade address of a lab."""

CLIENT: Endpoint = ("10.77.0.11", 40_000)
SERVER: Endpoint = ("203.0.113.11", 5000)
"""An endpoint on the first inside host, and an endpoint on the first outside host."""

_ETH_P_IP = 0x0800
_MULTICAST = 224
_DEAF = ["-t", "raw", "-i", "eth0", "-j", "DROP"]


class Station:
    """A host that sends and receives whole IPv4 packets as a test writes them."""

    def __init__(self, host: Host, next_hop: str) -> None:
        self.address = host.address
        self._line = host.socket(AF_PACKET, SOCK_DGRAM)
        self._line.bind(("eth0", _ETH_P_IP))
        self._to = ("eth0", _ETH_P_IP, 0, 0, bytes.fromhex(next_hop.replace(":", "")))

    def port(self, number: int) -> Endpoint:
        """Return the endpoint of this host that has a port number."""
        return self.address, number

    def send(self, packet: bytes) -> None:
        """Send a packet to the next router."""
        self._line.sendto(packet, self._to)

    def receive(self) -> bytes:
        """Return the next packet that has come or comes. Raises TimeoutError where none comes.

        Packets to a multicast group are left out: bridges send them whenever they like.
        """
        while (packet := self._line.recv(65535))[16] >= _MULTICAST:
            pass
        return packet

    def receive_until(self, end: bytes) -> bytes:
        """Return the next packet that ends with `end`. Raises TimeoutError where none comes."""
        while not (packet := self.receive()).endswith(end):
            pass
        return packet

    def forget(self) -> None:
        """Receive and forget all packets that have come."""
        self._line.setblocking(False)
        try:
            while self._line.recv(65535):
                pass
        except BlockingIOError:
            self._line.settimeout(5)

    def close(self) -> None:
        self._line.close()


class Stations:
    """All inside and all outside hosts of a lab."""

    def __init__(self, inside: list[Station], outside: list[Station]) -> None:
        self.inside = inside
        self.outside = outside

    def passed(self, packet: bytes, sender: Station, receiver: Station) -> bytes:
        """Send a packet; returns it as it arrives. Raises TimeoutError where it does not arrive."""
        sender.send(packet)
        return receiver.receive()

    def heard_nothing(self, station: Station) -> bool:
        """Say whether nothing has come: a ping that is sent now, or its answer, comes next."""
        mark = os.urandom(16)
        if station in self.outside:
            asked = query(self.inside[0].port(9), station.address, payload=mark)
            return self.passed(asked, self.inside[0], station).endswith(mark)
        self._ping(station, mark)
        return station.receive().endswith(mark)

    def settle(self) -> None:
        """Wait until all packets that were sent have arrived, and forget them."""
        mark = os.urandom(16)
        self._ping(self.inside[0], mark)
        self.inside[0].receive_until(mark)
        for station in (*self.inside, *self.outside):
            station.forget()

    def _ping(self, asker: Station, mark: bytes) -> None:
        """Ping an outside host, which answers; the asker has still to receive the answer."""
        answerer = self.outside[0]
        asker.send(query(asker.port(9), answerer.address, payload=mark))
        asked = answerer.receive_until(mark)
        answerer.send(reply(answerer.address, source(asked), payload=mark))


@contextmanager
def stations(lab: Lab) -> Iterator[Stations]:
    """Make stations of the hosts of a lab, within the block."""
    gateway, router = _mac(lab.gateway, "lan"), _mac(lab.router, "net")
    with ExitStack() as stack:

        def station(host: Host, next_hop: str) -> Station:
            host.run(["iptables", "-A", "PREROUTING", *_DEAF])
            stack.callback(host.run, ["iptables", "-D", "PREROUTING", *_DEAF])
            station = Station(host, next_hop)
            stack.callback(station.close)
            return station

        yield Stations(
            [station(host, gateway) for host in lab.inside],
            [station(host, router) for host in lab.outside],
        )


def is_like(packet: bytes, other: bytes) -> bool:
    """Say whether two packets differ only in what routers change, and `packet` is right there.

    Routers change the number of hops left, the identification, and the header checksum over both.
    """
    return _constant(packet) == _constant(other) and header_checksum_is_right(packet)


def _constant(packet: bytes) -> bytes:
    return packet[:4] + packet[6:8] + packet[9:10] + packet[12:]


def _mac(host: Host, interface: str) -> str:
    return host.run(["cat", f"/sys/class/net/{interface}/address"]).stdout.strip()
