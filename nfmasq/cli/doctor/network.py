"""The interfaces of this machine: which are inside and outside, and whether they carry packets.

They are read from the kernel once, so that all that is said of them agrees.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import chain
from typing import Any, NamedTuple

from pyroute2 import IPRoute

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.rules import Rule, interfaces_of, overlap

_IFF_UP = 1
_NUD_FAILED = 0x20
_RT_SCOPE_LINK = 253


@dataclass(frozen=True)
class Link:
    """An interface: our `own` addresses of global scope on it, and the networks that they are in.

    `neighbours` are the hosts beyond it that the kernel has talked to of late. `kind` says which
    headers its packets have: an ARPHRD_ number of linux/if_arp.h.
    """

    index: int
    name: str
    is_up: bool
    has_carrier: bool
    own: list[IPv4Address]
    networks: list[IPv4Network]
    neighbours: list[IPv4Address]
    kind: int = 1


class Network:
    """The interfaces of this machine by name, as they were at one moment."""

    def __init__(self, links: Iterable[Link]) -> None:
        self.links = {link.name: link for link in links}

    def matching(self, names: Iterable[str]) -> list[Link]:
        """Return the interfaces that are meant by these names, of which each may be a pattern."""
        named = [*names]
        return [link for link in self.links.values() if any(overlap(link.name, n) for n in named)]

    def host_beyond(self, link: Link) -> IPv4Address | None:
        """Return the address of a host beyond an interface: one that is known, or may be there."""
        ours = {address for each in self.links.values() for address in each.own}
        for network in link.networks:
            known = (host for host in link.neighbours if host in network)
            for host in chain(known, network.hosts()):
                if host not in ours:
                    return host
        return None

    def holds(self, address: str) -> Link | None:
        """Return the interface that has an address of ours."""
        held = (link for link in self.links.values() if IPv4Address(address) in link.own)
        return next(held, None)


class Sides(NamedTuple):
    """The names of the interfaces inside and outside, of which each may be a pattern (`ppp+`)."""

    inside: list[str]
    outside: list[str]

    def or_unknown(self) -> Sides:
        """Return the sides; one that has no interface is called INSIDE, or OUTSIDE."""
        return Sides(self.inside or ["INSIDE"], self.outside or ["OUTSIDE"])


Loading = Callable[[Sides], str]
"""Makes the command that loads the rules for these interfaces."""


def sides_of(wanted: Mapping[str, Any], ours: Iterable[Rule]) -> Sides:
    """Return the sides that are configured or else, by the rules that are loaded, in force."""
    if wanted["inside"] and wanted["outside"]:
        return Sides(wanted["inside"], wanted["outside"])
    return Sides(*interfaces_of(ours))


def bystanders(network: Network, sides: Sides) -> list[Link]:
    """Return the interfaces on neither side that have an address, and that packets come in by."""
    named = network.matching([*sides.inside, *sides.outside])
    links = (link for link in network.links.values() if link not in named)
    return [link for link in links if link.own and link.is_up and link.has_carrier]


def carriers(
    network: Network, sides: Sides, addresses: Sequence[str], load: Loading
) -> Iterator[Finding]:
    """Yield which interfaces of either side carry no packets, and why.

    `addresses` are the masquerade addresses, where they are given.
    """
    for side, names in sides._asdict().items():
        for name in names:
            links = network.matching([name])
            if not links:
                yield Finding("warning", f"{name} ({side}) is not there: nothing passes by it yet")
            for link in links:
                yield from _link_state(link, side)
    yield from _no_inside_address(network, sides, load)
    yield from _no_masquerade_address(network, sides, addresses)


def _link_state(link: Link, side: str) -> Iterator[Finding]:
    if not link.is_up:
        up = as_root("ip", "link", "set", link.name, "up")
        yield Finding("problem", f"{link.name} ({side}) is down", "switch it on", (up,))
    elif not link.has_carrier:
        advice = "plug the cable in, or switch the other end on"
        yield Finding("problem", f"{link.name} ({side}) has no carrier", advice)


def _no_inside_address(network: Network, sides: Sides, load: Loading) -> Iterator[Finding]:
    others = [link.name for link in bystanders(network, sides)]
    for link in network.matching(sides.inside):
        if link.own:
            continue
        what = f"{link.name} (inside) has no IPv4 address: it is no host's gateway"
        if others:
            advice = f"if {' and '.join(others)} is inside in its place, load the rules for it"
            command = load(Sides(others, sides.outside))
        else:
            advice = "give it an address of the inside network"
            command = as_root("ip", "address", "add", "ADDRESS/PREFIX", "dev", link.name)
        yield Finding("problem", what, advice, (command,))


def _no_masquerade_address(
    network: Network, sides: Sides, addresses: Sequence[str]
) -> Iterator[Finding]:
    if addresses:
        return
    for link in network.matching(sides.outside):
        if not link.own:
            add = as_root("ip", "address", "add", "ADDRESS/PREFIX", "dev", link.name)
            yield Finding(
                "problem",
                f"{link.name} (outside) has no IPv4 address: there is none to masquerade with",
                "wait for the lease, or give it the address that your provider has told you",
                (add,),
            )


def overlapping_networks(network: Network, sides: Sides) -> Iterator[Finding]:
    """Yield where an inside network and an outside network overlap (RFC 4787 REQ-7)."""
    for inside in network.matching(sides.inside):
        for outside in network.matching(sides.outside):
            for here in inside.networks:
                for there in outside.networks:
                    if here.overlaps(there):
                        yield Finding(
                            "warning",
                            f"{here} on {inside.name} (inside) and {there} on {outside.name} "
                            "(outside) overlap",
                            "number the inside differently: hosts of one side hide those of the "
                            "other",
                        )


def read_network() -> Network:
    """Read the interfaces of this machine, all but lo."""
    with IPRoute() as kernel:
        addresses = [*kernel.get_addr(family=socket.AF_INET)]
        neighbours = [*kernel.get_neighbours(family=socket.AF_INET)]
        links = [_link(link, addresses, neighbours) for link in kernel.get_links()]
    return Network(link for link in links if link.name != "lo")


def _link(link: Any, addresses: Iterable[Any], neighbours: Iterable[Any]) -> Link:
    index = link["index"]
    held = [each for each in addresses if each["index"] == index]
    held = [each for each in held if each["scope"] < _RT_SCOPE_LINK]
    return Link(
        index,
        link.get("ifname"),
        bool(link["flags"] & _IFF_UP),
        # Of an interface that is down the kernel says nothing, or what was before.
        link.get("carrier") != 0,
        [IPv4Address(each.get("local")) for each in held],
        # Of a line between two hosts this is the other end.
        [IPv4Interface(f"{each.get('address')}/{each['prefixlen']}").network for each in held],
        [
            IPv4Address(each.get("dst"))
            for each in neighbours
            if each["ifindex"] == index and not each["state"] & _NUD_FAILED
        ],
        link["ifi_type"],
    )
