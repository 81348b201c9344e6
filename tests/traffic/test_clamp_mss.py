"""`nfmasq-rules up --clamp-mss`: TCP segments fit, even where no error tells of those that do not.

The gateway's uplink is narrow, as with PPPoE, and the router on its other side keeps silent about
packets that it cannot send on. So a server never learns why its segments do not arrive.
"""

from __future__ import annotations

from collections.abc import Iterator

import dpkt
import pytest

from nfmasq.lab import Lab, Packet
from tests.packets import checksums_are_right
from tests.traffic.conftest import taking
from tests.traffic.servers import WEB_PORT, WebServer, web_server
from tests.traffic.wire import without_offload

data_path = taking("queue", "no-gso", "routed")

UPLINK_MTU = 1280
TEXT = b"Maximum segment size.\n" * 20_000
SILENT = ["OUTPUT", "-p", "icmp", "--icmp-type", "fragmentation-needed", "-j", "DROP"]
TIMED_OUT = 28  # curl's exit status


@pytest.fixture(scope="module", autouse=True)
def _narrow_and_silent(lab: Lab) -> Iterator[None]:
    lab.set_mtu("wan", UPLINK_MTU)
    lab.router.run(["iptables", "-A", *SILENT])
    daemon = lab.nfmasq()
    yield
    daemon.stop()
    lab.router.run(["iptables", "-D", *SILENT])
    lab.set_mtu("wan", 1500)


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        web.files["/text"] = TEXT
        yield web


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    command: str = request.param
    yield command
    lab.rules("down", IPTABLES=command)


def download(lab: Lab, web: WebServer, seconds: int = 30) -> tuple[int, str]:
    """Run curl, which gives up after `seconds`; returns its exit status and output."""
    curl = ["curl", "-sSf", "-m", str(seconds), f"{web.url}/text"]
    done = lab.inside[0].run(curl, check=False)
    return done.returncode, done.stdout


def segment_sizes(packets: list[Packet]) -> set[int]:
    """Return the values of the MSS options of TCP packets, in bytes."""
    options = (dpkt.tcp.parse_opts(dpkt.ip.IP(packet.data).data.opts) for packet in packets)
    return {int.from_bytes(value, "big") for some in options for kind, value in some if kind == 2}


def test_without_clamping_a_transfer_hangs(lab: Lab, web: WebServer, iptables: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    status, text = download(lab, web, seconds=3)
    assert (status, text) == (TIMED_OUT, "")


def test_with_clamping_both_ends_send_what_fits(lab: Lab, web: WebServer, iptables: str) -> None:
    lab.rules("up", "--clamp-mss", IPTABLES=iptables)
    opening = f"tcp port {WEB_PORT} and tcp[13] & 2 != 0"
    with (
        without_offload(lab.gateway, "wan"),
        without_offload(lab.gateway, "lan1"),
        lab.capture(lab.outside[0], "eth0", f"{opening} and tcp[13] & 16 == 0") as syn,
        lab.capture(lab.inside[0], "eth0", f"{opening} and tcp[13] & 16 != 0") as syn_ack,
    ):
        assert download(lab, web) == (0, TEXT.decode())
    assert segment_sizes(syn) == segment_sizes(syn_ack) == {UPLINK_MTU - 40}
    assert all(checksums_are_right(packet.data) for packet in (*syn, *syn_ack))


def test_where_errors_get_through_clamping_is_not_needed(
    lab: Lab, web: WebServer, iptables: str
) -> None:
    lab.rules("up", IPTABLES=iptables)
    lab.router.run(["iptables", "-D", *SILENT])
    try:
        assert download(lab, web) == (0, TEXT.decode())
    finally:
        lab.router.run(["iptables", "-A", *SILENT])
        lab.outside[0].ip("route flush cache")
