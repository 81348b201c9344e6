"""The programs at the interfaces: attached, kept there, and removed without a trace."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fcntl import ioctl
from ipaddress import IPv4Address
from socket import if_nametoindex

import pytest

from nfmasq.config.configuration import DIRECT, ROUTED
from nfmasq.flowcache.attachment import Attachment, Sides
from nfmasq.flowcache.libbpf import EGRESS, INGRESS
from nfmasq.flowcache.marks import KNOWN_MARK
from nfmasq.flowcache.programs import Programs
from tests.flowcache.trial import DROP, HEADER, PASS, attempt
from tests.packets import udp
from tests.traffic.observed import eventually
from tests.traffic.tunnels import open_tun

QUEUE = 3
LAN_AND_WAN = Sides(("lan",), ("wan",))
ROUTED_PROGRAMS = {
    ("lan", "ingress"): ["inside_ether"],
    ("wan", "ingress"): ["outside_ether"],
    ("wan", "egress"): ["leaving_ether"],
}

TUNSETLINK = 0x400454CD
GRE_TUNNEL = 778
"""A kind of interface with headers that nobody here knows: ARPHRD_IPGRE."""


def run(line: str) -> str:
    done = subprocess.run(line.split(), check=True, capture_output=True, text=True)
    return done.stdout


def attached() -> dict[tuple[str, str], list[str]]:
    """Return the names of the programs at each interface and point where there are any."""
    found = {}
    for interface in re.findall(r"^\d+: ([^:@]+)", run("ip link show"), re.MULTILINE):
        for point in ("ingress", "egress"):
            shown = run(f"tc filter show dev {interface} {point}")
            names = re.findall(r"handle 0x\w+ (\w+)", shown)
            if names:
                found[interface, point] = names
    return found


def has_place(interface: str) -> bool:
    """Say whether an interface has its place for programs."""
    return "clsact" in run(f"tc qdisc show dev {interface}")


def add_veth(name: str) -> None:
    run(f"ip link add {name} type veth peer name to-{name}")


@pytest.fixture
def links(namespace: None) -> Iterator[None]:
    """Make the interfaces lan and wan."""
    add_veth("lan")
    add_veth("wan")
    yield
    for interface in re.findall(r"^\d+: ([^:@]+)", run("ip link show"), re.MULTILINE):
        if interface != "lo":
            with suppress(subprocess.CalledProcessError):
                run(f"ip link delete {interface}")


@pytest.fixture
def attach(programs: Programs, links: None) -> Iterator[Callable[..., Attachment]]:
    """Yield a function that attaches programs, which are detached when the test is over."""
    with ExitStack() as stack:

        def start(mode: str = ROUTED, queue: int = QUEUE) -> Attachment:
            attachment = Attachment(programs, mode, queue)
            stack.callback(attachment.close)
            return attachment

        yield start


@pytest.fixture
def others(programs: Programs) -> Callable[[str, int], None]:
    """Return a function that attaches a program of somebody else."""

    def attach_another(interface: str, point: int) -> None:
        programs.libbpf.attach(
            if_nametoindex(interface), point, programs.program("inside_bare"), handle=1, priority=9
        )

    return attach_another


def test_an_interface_that_changes_its_side_is_known_on_the_other(
    attach: Callable[..., Attachment], programs: Programs
) -> None:
    """The guard drops what comes from the inside, wherever the inside was before."""
    attachment = attach()
    attachment.serve(LAN_AND_WAN)
    attachment.serve(Sides(("wan",), ("lan",)))
    frame = HEADER + udp(("10.0.0.2", 4000), ("198.51.100.7", 443))

    def leaves(came_by: str) -> int:
        return attempt(programs, "leaving_ether", frame, came_by=if_nametoindex(came_by)).verdict

    assert leaves("wan") == DROP
    assert leaves("lan") == PASS


def test_each_side_has_its_programs_and_loses_them(attach: Callable[..., Attachment]) -> None:
    attachment = attach()
    attachment.serve(LAN_AND_WAN)
    assert attached() == ROUTED_PROGRAMS
    assert attachment.served == {if_nametoindex("wan")}
    attachment.serve(Sides(("wan",), ("lan",)))
    assert attached() == {
        ("wan", "ingress"): ["inside_ether"],
        ("lan", "ingress"): ["outside_ether"],
        ("lan", "egress"): ["leaving_ether"],
    }
    assert attachment.served == {if_nametoindex("lan")}
    attachment.serve(Sides())
    assert attached() == {}
    assert attachment.served == set()
    assert not has_place("lan")
    assert not has_place("wan")


@pytest.mark.parametrize("mode", [ROUTED, DIRECT])
def test_where_no_flows_are_carried_a_guard_stands_where_packets_leave(
    attach: Callable[..., Attachment], mode: str
) -> None:
    """Flows are forgotten before, and interfaces keep their places, whose making loses packets."""
    attachment, seen = attach(mode), []
    attachment.forget = lambda: seen.append((attached(), set(attachment.served)))
    attachment.serve(LAN_AND_WAN)
    carrying = attached()
    for _ in range(2):
        attachment.serve(LAN_AND_WAN, carry=False)
        assert attached() == {("wan", "egress"): ["guard_ether"]}
        assert seen.pop() == ({("wan", "egress"): ["leaving_ether"]}, set())
        assert has_place("lan")
        attachment.serve(LAN_AND_WAN)
        assert attached() == carrying
        assert attachment.served == {if_nametoindex("wan")}
    attachment.serve(LAN_AND_WAN, carry=False)
    attachment.serve(Sides())
    assert attached() == {}
    assert not has_place("lan")
    assert not has_place("wan")


def test_a_guard_does_not_look_at_marks(
    attach: Callable[..., Attachment], programs: Programs
) -> None:
    """Somebody else's mark may have the bit of known flows, and goes on."""
    attach().serve(LAN_AND_WAN, carry=False)
    programs.add_maddr(int(IPv4Address("203.0.113.1")))
    for source, came_by, verdict in (
        ("10.0.0.2", "lan", DROP),
        ("10.0.0.2", "wan", PASS),
        ("203.0.113.1", "lan", PASS),
    ):
        frame = HEADER + udp((source, 4000), ("198.51.100.7", 443))
        for mark in (0, KNOWN_MARK):
            came = {"mark": mark, "came_by": if_nametoindex(came_by)}
            seen = attempt(programs, "guard_ether", frame, **came)
            assert seen.verdict == verdict
            assert seen.mark == mark


def test_direct_programs_stand_where_packets_come_in(attach: Callable[..., Attachment]) -> None:
    attach(DIRECT).serve(LAN_AND_WAN)
    assert attached() == {
        ("lan", "ingress"): ["inside_direct"],
        ("wan", "ingress"): ["outside_direct"],
        ("wan", "egress"): ["leaving_ether"],
    }


def test_nothing_is_known_before_packets_leave_as_they_are(
    attach: Callable[..., Attachment], programs: Programs
) -> None:
    """When flows are forgotten none is marked any more, and those that were marked can leave."""
    attachment, seen = attach(), []
    attachment.forget = lambda: seen.append((attached(), set(attachment.served)))
    attachment.serve(LAN_AND_WAN)
    assert seen == []
    attachment.serve(Sides())
    assert seen == [({("wan", "egress"): ["leaving_ether"]}, set())]


def test_where_packets_cannot_be_rewritten_any_more_no_flow_is_known(
    attach: Callable[..., Attachment], programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removes the programs, and they cannot come back."""
    attachment, forgotten = attach(), []
    attachment.serve(LAN_AND_WAN)
    attachment.forget = lambda: forgotten.append(set(attachment.served))

    def refuse(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(programs.libbpf, "attach", refuse)
    run("tc qdisc delete dev wan clsact")
    assert eventually(lambda: forgotten != [])
    assert forgotten[0] == set()


def test_what_a_former_nfmasq_left_is_removed_and_what_others_have_stays(
    programs: Programs, attach: Callable[..., Attachment], others: Callable[[str, int], None]
) -> None:
    libbpf, wan = programs.libbpf, if_nametoindex("wan")
    left = Attachment(programs, ROUTED, QUEUE)
    left.serve(LAN_AND_WAN)
    left._changes.end()  # it follows no interfaces any more, as if it were killed
    left._thread.join()
    attach(queue=QUEUE + 1).serve(Sides((), ("wan",)))
    others("wan", EGRESS)
    assert len(attached()["wan", "egress"]) == 3
    attach()
    assert attached() == {
        ("wan", "ingress"): ["outside_ether"],
        ("wan", "egress"): ["inside_bare", "leaving_ether"],
    }
    assert not has_place("lan")
    assert libbpf.attached(wan, EGRESS, handle=1, priority=9)


def test_the_place_for_programs_stays_where_somebody_else_uses_it(
    attach: Callable[..., Attachment], others: Callable[[str, int], None]
) -> None:
    run("tc qdisc add dev lan clsact")
    attachment = attach()
    attachment.serve(LAN_AND_WAN)
    others("wan", INGRESS)
    attachment.serve(Sides())
    assert has_place("lan")
    assert attached() == {("wan", "ingress"): ["inside_bare"]}


@pytest.mark.parametrize("what", ["the program", "all programs", "the place"])
def test_a_program_that_somebody_removes_comes_back(
    attach: Callable[..., Attachment], what: str
) -> None:
    attach().serve(LAN_AND_WAN)
    if what == "the program":
        run("tc filter delete dev wan egress pref 28262")
    elif what == "all programs":
        run("tc filter delete dev lan ingress")
    else:
        run("tc qdisc delete dev wan clsact")
    assert eventually(lambda: attached() == ROUTED_PROGRAMS)


def test_a_program_that_somebody_replaces_comes_back(
    attach: Callable[..., Attachment], programs: Programs
) -> None:
    attach().serve(LAN_AND_WAN)
    ours = {"handle": 0x6E66_0000 | QUEUE, "priority": 0x6E66}
    wan = if_nametoindex("wan")
    programs.libbpf.attach(wan, EGRESS, programs.program("inside_bare"), **ours)
    assert eventually(lambda: attached() == ROUTED_PROGRAMS)


def test_an_interface_that_comes_later_is_served_and_one_that_goes_is_not(
    attach: Callable[..., Attachment],
) -> None:
    attachment = attach()
    attachment.serve(Sides(("lan",), ("wan", "ppp+")))
    assert attached() == ROUTED_PROGRAMS
    add_veth("ppp7")
    more = {("ppp7", "ingress"): ["outside_ether"], ("ppp7", "egress"): ["leaving_ether"]}
    assert eventually(lambda: attached() == ROUTED_PROGRAMS | more)
    assert eventually(lambda: attachment.served == {*map(if_nametoindex, ("wan", "ppp7"))})
    run("ip link delete ppp7")
    assert eventually(lambda: attachment.served == {if_nametoindex("wan")})
    add_veth("ppp8")
    assert eventually(lambda: ("ppp8", "egress") in attached())
    run("ip link set ppp8 name eth8")
    assert eventually(lambda: attached() == ROUTED_PROGRAMS)
    assert not has_place("eth8")


def test_an_interface_without_ethernet_headers_is_served_where_it_can_be(
    attach: Callable[..., Attachment],
) -> None:
    tun = open_tun("tun0")
    try:
        attachment = attach()
        attachment.serve(Sides(("lan",), ("tun0",)))
        assert attached() == {
            ("lan", "ingress"): ["inside_ether"],
            ("tun0", "ingress"): ["outside_bare"],
            ("tun0", "egress"): ["leaving_bare"],
        }
        attachment.serve(Sides(("tun0",), ("wan",)))
        assert attached()["tun0", "ingress"] == ["inside_bare"]
        assert attachment.left_out == ()
        attachment.serve(Sides())
        directly = attach(DIRECT, QUEUE + 1)
        directly.serve(Sides(("lan",), ("wan", "tun0")))
        assert directly.left_out == ("tun0",)
        assert directly.served == {if_nametoindex("wan")}
    finally:
        os.close(tun)


def test_an_interface_whose_headers_nobody_knows_is_left_out(
    attach: Callable[..., Attachment], caplog: pytest.LogCaptureFixture
) -> None:
    tun = open_tun("gre1")
    try:
        ioctl(tun, TUNSETLINK, GRE_TUNNEL)
        attachment = attach()
        attachment.serve(Sides(("lan",), ("wan", "gre1")))
        assert attached() == ROUTED_PROGRAMS
        assert attachment.left_out == ("gre1",)
        assert "cannot serve" in caplog.text
        assert "gre1" in caplog.text
    finally:
        os.close(tun)


def test_a_bridge_is_served_as_any_interface(attach: Callable[..., Attachment]) -> None:
    run("ip link add br0 type bridge")
    run("ip link set lan master br0")
    attach().serve(Sides(("br0",), ("wan",)))
    assert attached() == {
        ("br0", "ingress"): ["inside_ether"],
        ("wan", "ingress"): ["outside_ether"],
        ("wan", "egress"): ["leaving_ether"],
    }
