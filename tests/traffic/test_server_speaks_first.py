"""A server on a forwarded port that speaks first: a PBX with a trunk, both ends on fixed ports.

The peer answers to the forwarded port alone. The kernel's masquerade has it so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import AF_INET, SO_LINGER, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.clients import BRIEFLY, PATIENCE, RESET_AT_THE_END
from tests.traffic.observed import entries
from tests.traffic.servers import Visitor

GATEWAY, INSIDE = "198.51.100.2", "10.77.0.11"
SIP = 5060
FORWARD = f"{SIP}={INSIDE}:{SIP}"
TRUNK = (GATEWAY, SIP)

KERNEL = f"""\
*nat
-A POSTROUTING -o wan -j MASQUERADE
-A PREROUTING -i wan -p udp --dport {SIP} -j DNAT --to-destination {INSIDE}
COMMIT
"""

Masquerade = Callable[..., Daemon]


def bound(stack: ExitStack, host: Host, port: int = SIP) -> socket:
    """Open a UDP socket on a port of a host."""
    opened = stack.enter_context(host.socket(AF_INET, SOCK_DGRAM))
    opened.bind(("", port))
    opened.settimeout(PATIENCE)
    return opened


def heard(listener: socket) -> tuple[bytes, Visitor] | None:
    """Return the next datagram and its sender; None where none comes."""
    try:
        said, sender = listener.recvfrom(100)
    except TimeoutError:
        return None
    return said, sender


@contextmanager
def kernel_masquerade(lab: Lab) -> Iterator[None]:
    """Have the kernel masquerade and forward, within the block."""
    lab.gateway.run(["iptables-restore", "--noflush"], input=KERNEL)
    try:
        yield
    finally:
        lab.gateway.run(["iptables", "-t", "nat", "-F"])
        lab.gateway.run(["conntrack", "-F"])


@pytest.mark.parametrize("by", ["nfmasq", "kernel"])
def test_the_peer_sees_the_forwarded_port_and_its_answer_arrives(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, by: str
) -> None:
    if by == "kernel":
        stack.enter_context(kernel_masquerade(lab))
    else:
        masquerade("--forward", f"udp:{FORWARD}", rules=["--forward", f"udp:{SIP}"])
    pbx, peer = bound(stack, lab.inside[0]), bound(stack, lab.outside[0])
    there = (lab.outside[0].address, SIP)
    for _ in range(3):
        pbx.sendto(b"OPTIONS", there)
        assert heard(peer) == (b"OPTIONS", TRUNK)
        peer.sendto(b"INVITE", TRUNK)
        assert heard(pbx) == (b"INVITE", there)


def test_over_tcp_a_server_leaves_by_its_forwarded_port(
    lab: Lab, masquerade: Masquerade, stack: ExitStack
) -> None:
    masquerade("--forward", f"tcp:{FORWARD}", rules=["--forward", f"tcp:{SIP}"])
    peer = stack.enter_context(lab.outside[0].socket(AF_INET, SOCK_STREAM))
    pbx = stack.enter_context(lab.inside[0].socket(AF_INET, SOCK_STREAM))
    for opened in (peer, pbx):
        opened.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        opened.bind(("", SIP))
        opened.settimeout(PATIENCE)
    peer.listen()
    pbx.setsockopt(SOL_SOCKET, SO_LINGER, RESET_AT_THE_END)
    pbx.connect((lab.outside[0].address, SIP))
    accepted, visitor = peer.accept()
    stack.enter_context(accepted)
    assert visitor == TRUNK
    accepted.sendall(b"INVITE")
    assert pbx.recv(100) == b"INVITE"


def test_after_each_restart_the_trunk_works_whoever_speaks_first(
    lab: Lab, stack: ExitStack
) -> None:
    pbx, peer = bound(stack, lab.inside[0]), bound(stack, lab.outside[0])
    there = (lab.outside[0].address, SIP)
    for server_first in (True, False, True):
        with lab.masquerading("--forward", f"udp:{FORWARD}", rules=["--forward", f"udp:{SIP}"]):
            if server_first:
                pbx.sendto(b"OPTIONS", there)
                assert heard(peer) == (b"OPTIONS", TRUNK)
            for _ in range(2):
                peer.sendto(b"INVITE", TRUNK)
                assert heard(pbx) == (b"INVITE", there)
                pbx.sendto(b"OK", there)
                assert heard(peer) == (b"OK", TRUNK)


@pytest.mark.parametrize("answered", [False, True], ids=["unanswered", "answered"])
def test_a_forward_that_is_added_leads_to_a_server_that_speaks_already(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, tmp_path: Path, answered: bool
) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text("")
    daemon = masquerade("--config", str(file), rules=["--forward", f"udp:{SIP}"])
    pbx, peer = bound(stack, lab.inside[0]), bound(stack, lab.outside[0])
    there = (lab.outside[0].address, SIP)
    pbx.sendto(b"OPTIONS", there)
    said = heard(peer)
    assert said is not None
    before = said[1]
    assert before != TRUNK
    if answered:
        peer.sendto(b"OK", before)
        assert heard(pbx) == (b"OK", there)
    file.write_text(f'forward = "udp:{FORWARD}"\n')
    daemon.ask("reload")
    pbx.sendto(b"OPTIONS", there)
    assert heard(peer) == (b"OPTIONS", before if answered else TRUNK)
    peer.sendto(b"INVITE", TRUNK)
    assert heard(pbx) == (b"INVITE", there)
    pbx.sendto(b"OPTIONS", there)
    assert heard(peer) == (b"OPTIONS", TRUNK)
    (entry,) = entries(daemon, protocol="udp")
    assert (entry["mport"], entry["saddr"]) == (SIP, INSIDE)


def test_a_forward_that_is_removed_leaves_the_server_a_port_of_the_range(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, tmp_path: Path
) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text(f'forward = "udp:{FORWARD}"\n')
    daemon = masquerade("--config", str(file), rules=["--forward", f"udp:{SIP}"])
    pbx, peer = bound(stack, lab.inside[0]), bound(stack, lab.outside[0])
    there = (lab.outside[0].address, SIP)
    pbx.sendto(b"OPTIONS", there)
    assert heard(peer) == (b"OPTIONS", TRUNK)
    peer.sendto(b"OK", TRUNK)
    assert heard(pbx) == (b"OK", there)
    file.write_text("")
    daemon.ask("reload")
    lab.rules("up", "--ports", "61000-65095")
    pbx.sendto(b"OPTIONS", there)
    said = heard(peer)
    assert said is not None
    assert 61000 <= said[1][1] <= 65095
    peer.sendto(b"OK", said[1])
    assert heard(pbx) == (b"OK", there)
    pbx.settimeout(BRIEFLY)
    peer.sendto(b"INVITE", TRUNK)
    assert heard(pbx) is None


def test_a_player_leaves_by_the_port_that_it_has_triggered(
    lab: Lab, masquerade: Masquerade, stack: ExitStack, tmp_path: Path
) -> None:
    """The game sends from the port that it opens, as games between equals do."""
    file = tmp_path / "nfmasq.toml"
    file.write_text('[[trigger]]\noutbound = "udp:27000"\nopens = "udp:27000-27001"\n')
    masquerade("--config", str(file), rules=["--forward", "udp:27000-27001"])
    player = bound(stack, lab.inside[0], 27000)
    for host in lab.outside:
        other, there = bound(stack, host, 27000), (host.address, 27000)
        player.sendto(b"hello", there)
        assert heard(other) == (b"hello", (GATEWAY, 27000))
        other.sendto(b"hello", (GATEWAY, 27000))
        assert heard(player) == (b"hello", there)
