"""Path MTU discovery: a sender learns of a narrow link on the way, and transfers do not hang.

A link may be narrow in two places. Outside, a router's "fragmentation needed" has to reach the
inside sender. Inside, the gateway itself drops packets that are already rewritten, and has to quote
them to the outside sender as the sender has sent them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfmasq.lab import Lab
from tests.packets import (
    checksums_are_right,
    destination,
    header_checksum_is_right,
    quoted,
    source_address,
)
from tests.traffic.conftest import taking
from tests.traffic.servers import WEB_PORT, WebServer, web_server
from tests.traffic.wire import one_hop_further, without_offload

data_path = taking("queue", "no-gso", "routed", "direct")

FRAGMENTATION_NEEDED = "icmp[0] == 3 and icmp[1] == 4"
OUTSIDE_MTU, INSIDE_MTU = 1280, 1200
TEXT = b"Path MTU discovery.\n" * 100_000


@pytest.fixture(scope="module", autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    with lab.masquerading():
        yield


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        web.files["/text"] = TEXT
        yield web


@pytest.fixture(autouse=True)
def _nobody_knows_yet(lab: Lab) -> None:
    """Forget what the hosts have learned of paths."""
    for host in lab.hosts:
        host.ip("route flush cache")


@pytest.fixture
def _narrow_outside(lab: Lab) -> Iterator[None]:
    """Make the router's links narrow in both directions; no end of a connection knows."""
    lab.router.ip(f"link set net mtu {OUTSIDE_MTU}")
    lab.router.ip(f"route change 198.51.100.0/24 dev wan src 198.51.100.1 mtu {OUTSIDE_MTU}")
    yield
    lab.router.ip("link set net mtu 1500")
    lab.router.ip("route change 198.51.100.0/24 dev wan src 198.51.100.1")


@pytest.fixture
def _narrow_inside(lab: Lab) -> Iterator[None]:
    """Make the gateway's link toward the inside narrow; the inside hosts do not know."""
    lab.gateway.ip(f"link set lan mtu {INSIDE_MTU}")
    yield
    lab.gateway.ip("link set lan mtu 1500")


def downloaded(lab: Lab, web: WebServer) -> bytes:
    done = lab.inside[0].run(["curl", "-sSf", "--max-time", "30", f"{web.url}/text"])
    return done.stdout.encode()


def mtu_of_next_hop(error: bytes) -> int:
    return int.from_bytes(error[26:28], "big")


@pytest.mark.usefixtures("_narrow_outside")
def test_an_upload_through_a_narrow_hop_outside(lab: Lab, web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    upload = ["curl", "-sSf", "--max-time", "30", "-T", str(tmp_path / "text")]
    with lab.capture(lab.inside[0], "eth0", FRAGMENTATION_NEEDED) as errors:
        lab.inside[0].run([*upload, f"{web.url}/upload"])
    assert web.files["/upload"] == TEXT
    assert errors
    for error in errors:
        assert source_address(error.data) == "198.51.100.1"
        assert mtu_of_next_hop(error.data) == OUTSIDE_MTU
        assert checksums_are_right(error.data)
        assert source_address(quoted(error.data)) == lab.inside[0].address
        assert destination(quoted(error.data)) == (lab.outside[0].address, WEB_PORT)
        assert header_checksum_is_right(quoted(error.data))


@pytest.mark.usefixtures("_narrow_outside")
def test_a_download_through_a_narrow_hop_outside(lab: Lab, web: WebServer) -> None:
    with lab.capture(lab.outside[0], "eth0", FRAGMENTATION_NEEDED) as errors:
        assert downloaded(lab, web) == TEXT
    assert errors


@pytest.mark.usefixtures("_narrow_outside")
def test_ping_is_told_how_much_fits(lab: Lab) -> None:
    whole = ["ping", "-c", "2", "-i", "0.1", "-W", "10", "-M", "do", "-s", "1400"]
    told = lab.inside[0].run([*whole, lab.outside[0].address], check=False).stdout
    assert re.search(rf"From 198.51.100.1 .*mtu ?= ?{OUTSIDE_MTU}", told)


@pytest.mark.usefixtures("_narrow_inside")
def test_a_download_into_a_narrow_inside_network(lab: Lab, web: WebServer) -> None:
    """The gateway's own errors quote what the server has sent, and no inside address."""
    server = lab.outside[0]
    with (
        without_offload(server, "eth0"),
        lab.capture(server, "eth0", f"tcp port {WEB_PORT} and src {server.address}") as sent,
        lab.capture(server, "eth0", FRAGMENTATION_NEEDED) as errors,
    ):
        assert downloaded(lab, web) == TEXT
    assert errors
    as_they_came = [one_hop_further(packet.data) for packet in sent]  # past the router
    for error in errors:
        assert source_address(error.data) == "198.51.100.2"
        assert mtu_of_next_hop(error.data) == INSIDE_MTU
        assert checksums_are_right(error.data)
        assert bytes([10, 77, 0]) not in error.data
        assert any(packet.startswith(quoted(error.data)) for packet in as_they_came)


@pytest.mark.usefixtures("_narrow_inside")
def test_large_datagrams_into_a_narrow_inside_network(lab: Lab) -> None:
    ping = ["ping", "-c", "2", "-i", "0.1", "-W", "10", "-s", "4000", lab.outside[0].address]
    assert "2 received" in lab.inside[0].run(ping).stdout
