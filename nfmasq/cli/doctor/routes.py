"""The way of a packet from the inside, and of its answer, as the kernel routes them.

The kernel is asked what it would do with a packet that comes in by an interface; none is sent. So
its answer knows of all routes and rules, of the settings of each interface, and of rp_filter.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.cli.doctor.machine import sysctl
from nfmasq.cli.doctor.network import Link, Loading, Network, Sides, bystanders

SOMEBODY = "1.1.1.1"
"""An address that stands for the world. It is asked about, and nothing is sent to it."""


class Way(NamedTuple):
    """The way of packets from a host inside to SOMEBODY: in by one interface, out by another."""

    inside: Link
    host: str
    outside: Link


class _Refusal(NamedTuple):
    number: int
    reason: str


def guessed_sides(network: Network) -> Sides:
    """Guess the sides: the default route leads outside, and whatever else is up is inside."""
    index = _asked(SOMEBODY)
    outside = [link.name for link in network.links.values() if link.index == index]
    inside = [link.name for link in bystanders(network, Sides([], outside))]
    return Sides(inside, outside)


def ways_out(network: Network, sides: Sides) -> tuple[list[Way], list[Finding]]:
    """Return the ways from each inside interface that is there, and where there is none."""
    ways: list[Way] = []
    findings: list[Finding] = []
    for inside in network.matching(sides.inside):
        host = network.host_beyond(inside)
        if not (inside.is_up and inside.has_carrier and host):
            continue  # the interface itself is what is wrong
        index = _asked(SOMEBODY, source=str(host), enters=inside)
        if isinstance(index, _Refusal):
            findings += _refused(index, Way(inside, str(host), inside), network, sides)
        elif outside := next((x for x in network.links.values() if x.index == index), None):
            ways.append(Way(inside, str(host), outside))
    return ways, findings


def strays(ways: Sequence[Way], sides: Sides, network: Network, load: Loading) -> Iterator[Finding]:
    """Yield which ways lead to an interface that is not outside."""
    inside, outside = (network.matching(names) for names in sides)
    for way in ways:
        if way.outside in outside:
            continue
        kind = "inside" if way.outside in inside else "not outside"
        yield Finding(
            "problem",
            f"what comes in by {way.inside.name} leaves by {way.outside.name}, which is {kind} for "
            "the rules: nfmasq never sees it",
            "load the rules for the right interfaces",
            tuple(_reloading(way, sides, network, load)),
        )


def _reloading(way: Way, sides: Sides, network: Network, load: Loading) -> Iterator[str]:
    """Yield the command that names the interface that packets leave by as the outside one."""
    outward = way.outside.name
    inside = [name for name in sides.inside if name != outward]
    if not inside:
        inside = [link.name for link in bystanders(network, Sides([outward], []))]
    if inside:
        yield load(Sides(inside, [outward]))


def ways_back(
    ways: Sequence[Way], network: Network, sides: Sides, addresses: Sequence[str]
) -> Iterator[Finding]:
    """Yield by which outside interfaces no answer gets back to the inside, and why.

    `addresses` are the masquerade addresses, where they are given.
    """
    answered = {link.name for address in addresses if (link := network.holds(address))}
    for way in ways[:1]:
        for outside in network.matching(sides.outside):
            if not (outside.is_up and outside.has_carrier):
                continue
            answer = _asked(way.host, source=SOMEBODY, enters=outside)
            if isinstance(answer, _Refusal):
                expected = outside.name in (answered or {way.outside.name})
                yield _answer_refused(answer, outside, way, "problem" if expected else "warning")


def _answer_refused(refusal: _Refusal, outside: Link, way: Way, level: str) -> Finding:
    if _source_is_refused(refusal) and _rp_filter(outside):
        return Finding(
            level,
            f"rp_filter drops answers that come in by {outside.name}: the way to who sends them "
            f"is by {way.outside.name}",
            "make it loose, where answers do come in there",
            (_loosening(outside),),
        )
    if refusal.number == errno.EHOSTUNREACH:
        return _not_forwarding(outside)
    what = f"the kernel does not forward answers from {outside.name} to {way.host}"
    return Finding(level, f"{what}: {refusal.reason}", "see ip route and ip rule")


def _asked(
    destination: str, *, source: str | None = None, enters: Link | None = None
) -> int | _Refusal:
    """Ask the kernel by which interface (its index) a packet would leave.

    Without `source` and `enters` it is a packet of this machine itself.
    """
    asked: dict[str, object] = {"dst": destination}
    if source is not None and enters is not None:
        asked |= {"src": source, "iif": enters.index}
    with IPRoute() as kernel:
        try:
            (route,) = kernel.route("get", **asked)
        except NetlinkError as error:
            return _Refusal(error.code, str(error.args[1]))
    return int(route.get("oif"))


def _refused(refusal: _Refusal, way: Way, network: Network, sides: Sides) -> Iterator[Finding]:
    """Yield why the kernel would not forward a packet from the inside."""
    whose = f"a packet from {way.host} ({way.inside.name}) to the outside"
    if refusal.number == errno.EHOSTUNREACH and sysctl("ipv4/ip_forward") != "1":
        return  # told by itself
    if refusal.number == errno.EHOSTUNREACH and not _forwards(way.inside):
        yield _not_forwarding(way.inside)
    elif refusal.number == errno.ENETUNREACH:
        yield _no_route(whose, network, sides)
    elif refusal.number == errno.EACCES:
        what = f"{whose} is prohibited by a route or a rule of routing"
        yield Finding("problem", what, "see ip rule and ip route show table all type prohibit")
    elif _source_is_refused(refusal) and _goes_elsewhere(way) and _rp_filter(way.inside):
        yield Finding(
            "problem",
            f"rp_filter drops {whose}: the way to its sender is not by {way.inside.name}",
            "make it loose, or mend the route to that network",
            (_loosening(way.inside),),
        )
    else:
        what = f"{whose} is not forwarded by the kernel: {refusal.reason}"
        yield Finding("problem", what, "see ip route show table all, and ip rule")


def _no_route(whose: str, network: Network, sides: Sides) -> Finding:
    outside = network.matching(sides.outside)
    link = next((link for link in outside if link.own), None)
    router = "ROUTER"
    if link is not None:
        near = {host for host in link.neighbours if any(host in net for net in link.networks)}
        if len(near) == 1:
            router = str(near.pop())
    device = link.name if link else sides.outside[0] if sides.outside else "OUTSIDE"
    add = as_root("ip", "route", "add", "default", "via", router, "dev", device)
    seen = "the only host that was seen there" if router != "ROUTER" else "your provider's router"
    advice = f"add the default route, by {seen}, or have DHCP or PPP set it"
    return Finding("problem", f"there is no route for {whose}", advice, (add,))


def _not_forwarding(link: Link) -> Finding:
    return Finding(
        "problem",
        f"the kernel does not forward what comes in by {link.name}",
        "switch it on for this interface",
        (as_root("sysctl", "-w", f"{_setting(link)}/forwarding=1"),),
    )


def _source_is_refused(refusal: _Refusal) -> bool:
    """Say whether a packet is refused because of where it comes from; kernels differ in how."""
    return refusal.number in (errno.EXDEV, errno.EINVAL)


def _goes_elsewhere(way: Way) -> bool:
    """Say whether what is sent to the host leaves by another interface than it comes in by."""
    return _asked(way.host) != way.inside.index


def _rp_filter(link: Link) -> bool:
    values = (sysctl(f"ipv4/conf/{name}/rp_filter") for name in ("all", link.name))
    return any(value not in (None, "0") for value in values)


def _forwards(link: Link) -> bool:
    return sysctl(f"ipv4/conf/{link.name}/forwarding") == "1"


def _loosening(link: Link) -> str:
    return as_root("sysctl", "-w", f"{_setting(link)}/rp_filter=2")


def _setting(link: Link) -> str:
    # With slashes, as the name of an interface may have a dot.
    return f"net/ipv4/conf/{link.name}"
