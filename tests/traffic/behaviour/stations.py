"""Stations: hosts of a lab that send and receive packets just as a test writes them.

A kernel would answer what it did not expect (a reset for a handshake that is not its own), and
send nothing that is odd. So a station's kernel is deaf while the station is there: it still
answers ARP, and all else is the test's to send and to receive.
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
"""A port of the first inside host, and one of the first outside host."""

_ETH_P_IP = 0x0800
_MULTICAST = 224
_DEAF = ["-t", "raw", "-i", "eth0", "-j", "DROP"]


class Station:
    """One host, with its address. Packets are whole IPv4 packets."""

    def __init__(self, host: Host, next_hop: str) -> None:
        self.address = host.address
        self._line = host.socket(AF_PACKET, SOCK_DGRAM)
        self._line.bind(("eth0", _ETH_P_IP))
        self._to = ("eth0", _ETH_P_IP, 0, 0, bytes.fromhex(next_hop.replace(":", "")))

    def port(self, number: int) -> Endpoint:
        """A port of this host."""
        return self.address, number

    def send(self, packet: bytes) -> None:
        """Send a packet to the next router."""
        self._line.sendto(packet, self._to)

    def receive(self) -> bytes:
        """The next packet that comes, or came. Raises TimeoutError where none does.

        What goes to a group does not count: bridges speak of groups whenever they like.
        """
        while (packet := self._line.recv(65535))[16] >= _MULTICAST:
            pass
        return packet

    def receive_until(self, end: bytes) -> bytes:
        """The next packet with this end. Raises TimeoutError where none comes."""
        while not (packet := self.receive()).endswith(end):
            pass
        return packet

    def forget(self) -> None:
        """Receive and forget all that came."""
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
        """What a packet arrives as. Raises TimeoutError where it does not arrive."""
        sender.send(packet)
        return receiver.receive()

    def heard_nothing(self, station: Station) -> bool:
        """Whether nothing has come: a ping, or its answer, sent now, is what comes next."""
        mark = os.urandom(16)
        if station in self.outside:
            asked = query(self.inside[0].port(9), station.address, payload=mark)
            return self.passed(asked, self.inside[0], station).endswith(mark)
        self._ping(station, mark)
        return station.receive().endswith(mark)

    def settle(self) -> None:
        """Wait until all that was sent is through, and forget it."""
        mark = os.urandom(16)
        self._ping(self.inside[0], mark)
        self.inside[0].receive_until(mark)
        for station in (*self.inside, *self.outside):
            station.forget()

    def _ping(self, asker: Station, mark: bytes) -> None:
        """Ping an outside host, which answers; the asker has still to receive that."""
        answerer = self.outside[0]
        asker.send(query(asker.port(9), answerer.address, payload=mark))
        asked = answerer.receive_until(mark)
        answerer.send(reply(answerer.address, source(asked), payload=mark))


@contextmanager
def stations(lab: Lab) -> Iterator[Stations]:
    """The hosts of a lab as stations, within the block."""
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
    """Whether two packets are the same but for what routers change, and are right in that.

    Those are the hops left, the identification, and the checksum over both.
    """
    return _constant(packet) == _constant(other) and header_checksum_is_right(packet)


def _constant(packet: bytes) -> bytes:
    return packet[:4] + packet[6:8] + packet[9:10] + packet[12:]


def _mac(host: Host, interface: str) -> str:
    return host.run(["cat", f"/sys/class/net/{interface}/address"]).stdout.strip()
