"""Floods against a running nfmasq: its memory stays what the table allows, and comes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from socket import AF_INET, IPPROTO_RAW, SOCK_RAW
from time import monotonic

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.packets import SYN, dotted, number, tcp
from tests.traffic.observed import eventually, figure

SECONDS = 8
TABLE = 500
FORWARDED = 8080
SILENT = "192.0.2.1"
STRANGERS = number("198.18.0.0")


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """A flood of SYNs is the same with superpackets and without."""
    return ()


def memory(daemon: Daemon) -> int:
    """Return the bytes of memory that a process has."""
    pages = int(Path("/proc", str(daemon.pid), "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def syns(daddr: str, dport: int, saddr: str = "") -> Iterator[bytes]:
    """Yield SYNs without end, each from another address, or from another port of `saddr`."""
    for n in count():
        yield tcp(
            (saddr or dotted(STRANGERS + n % 100_000), 1024 + n % 60_000), (daddr, dport), SYN
        )


def flood(host: Host, packets: Iterator[bytes], seconds: float) -> None:
    """Send whole packets from a host, as fast as it can, for some seconds."""
    end = monotonic() + seconds
    with host.socket(AF_INET, SOCK_RAW, IPPROTO_RAW) as raw:
        for packet in packets:
            raw.sendto(packet, (dotted(int.from_bytes(packet[16:20], "big")), 0))
            if monotonic() > end:
                return


def made(daemon: Daemon) -> float:
    return figure(daemon, "nfmasq_entries_created_total", protocol="tcp")


def left(daemon: Daemon) -> float:
    return figure(daemon, "nfmasq_entries", protocol="tcp")


def test_a_flood_against_a_forwarded_port_takes_no_more_memory_than_the_table(
    lab: Lab, masquerade: Callable[..., Daemon]
) -> None:
    """Each SYN takes the place of another, which leaves nothing behind."""
    daemon = masquerade(
        *("--forward", f"tcp:{FORWARDED}={lab.inside[0].address}:80"),
        *("--max-entries", str(TABLE)),
        rules=["--forward", f"tcp:{FORWARDED}"],
    )
    packets = syns(lab.gateway.address, FORWARDED)
    flood(lab.outside[0], packets, 2)
    before, made_before = memory(daemon), made(daemon)
    flood(lab.outside[0], packets, SECONDS)
    assert made(daemon) > made_before + 10 * TABLE, "no flood"
    assert memory(daemon) < 1.1 * before


def test_what_a_flood_took_is_there_for_the_next_flood(
    lab: Lab, masquerade: Callable[..., Daemon], tmp_path: Path
) -> None:
    """What the engine gives back to the system, `daemon/test_memory.py` says.

    Here packets, metrics and netlink messages share the memory with the entries, and keep some of
    it from going back. But no flood adds to what the flood before it took.
    """
    file = tmp_path / "nfmasq.toml"
    file.write_text("[timeouts]\ntcp-syn-sent = 3\n")
    daemon = masquerade("--config", str(file), ports="1024-65535")
    host = lab.inside[0]
    lab.router.ip("route add blackhole 192.0.2.0/24")

    def both() -> Iterator[bytes]:
        """Half of the SYNs go to the port of a helper."""
        for port in zip(syns(SILENT, 21, host.address), syns(SILENT, 9, host.address), strict=True):
            yield from port

    def most_in_a_flood() -> int:
        flood(host, both(), SECONDS)
        most = memory(daemon)
        assert eventually(lambda: not left(daemon))
        return most

    first = most_in_a_flood()
    assert most_in_a_flood() < 1.3 * first
