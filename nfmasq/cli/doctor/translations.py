"""NAT of others on this machine that takes what is nfmasq's, or whose packets nfmasq takes.

A source translation of what leaves by an outside interface translates again what nfmasq has
rewritten, save where it is of inside addresses alone: nfmasq has replaced these before. A
destination translation of a forwarded port never sees a packet, as nfmasq has it first; one of a
masquerade port sees none while a session has the port. Rules of iptables are read as it prints
them, those of nft in its JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NamedTuple

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.cli.doctor.network import Network, Sides
from nfmasq.cli.doctor.tables import PLACES, Tables
from nfmasq.rules import Rule, overlap, ports_of

_SOURCE = {"MASQUERADE", "SNAT"}
_DESTINATION = {"DNAT", "REDIRECT"}


class Translation(NamedTuple):
    """A rule of somebody else that translates. What it does not restrict is None."""

    told: str
    """The rule, as people write it."""
    removal: str
    """The command that removes it."""
    of_source: bool
    leaves: str | None
    enters: str | None
    source: IPv4Network | None
    destination: IPv4Network | None
    protocol: str | None
    ports: frozenset[int] | None


def foreign_translations(
    tables: Tables, network: Network, sides: Sides, wanted: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield which translations of others overlap with what nfmasq does."""
    ours = _Claims(wanted)
    for each in (*_of_iptables(tables), *_of_nft(tables)):
        if each.of_source:
            yield from _source_again(each, network, sides, wanted["masquerade-address"])
        elif each.enters is None or not sides.outside or _among(each.enters, sides.outside):
            yield from ours.taken_from(each)


def _source_again(
    each: Translation, network: Network, sides: Sides, addresses: Sequence[str]
) -> Iterator[Finding]:
    """Yield whether a source translation is of what nfmasq has rewritten."""
    if each.leaves is not None and sides.outside and not _among(each.leaves, sides.outside):
        return
    outside = [address for link in network.matching(sides.outside) for address in link.own]
    ours = [IPv4Address(address) for address in addresses] or outside
    inside = [net for link in network.matching(sides.inside) for net in link.networks]
    if each.source is None or not ours or any(address in each.source for address in ours):
        what = f"another rule translates, too: {each.told}"
        yield Finding("problem", what, "remove it", (each.removal,))
    elif any(each.source.overlaps(net) for net in inside):
        what = (
            f"a rule translates the inside, but meets only what nfmasq has rewritten: {each.told}"
        )
        yield Finding("note", what, "remove it", (each.removal,))


class _Claims:
    """The ports that nfmasq takes from everybody else, by protocol."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self._masquerade = ports_of(wanted["ports"])
        self._led_inside: dict[str, set[int]] = {"tcp": set(), "udp": set()}
        listens = [forward["listen"] for forward in wanted["forward"]]
        listens += [trigger["opens"] for trigger in wanted["trigger"]]
        for listen in listens:
            protocol, *_, ports = listen.split(":")
            self._led_inside[protocol] |= ports_of(ports)

    def taken_from(self, each: Translation) -> Iterator[Finding]:
        """Yield whether nfmasq takes packets that a destination translation is to have."""
        if each.ports is None or (each.destination and each.destination.is_loopback):
            return  # for an address of its own, for what only passes, or for this machine alone
        led_inside = self._led_inside.get(each.protocol or "tcp", set())
        if both := each.ports & led_inside:
            yield Finding(
                "problem",
                f"nfmasq forwards port {_listed(both)}, which another rule leads elsewhere: "
                f"{each.told}",
                "nfmasq has it first: forward another port, or remove the rule",
                (each.removal,),
            )
        elif both := each.ports & self._masquerade:
            yield Finding(
                "warning",
                f"another rule leads masquerade port {_listed(both)} elsewhere, which fails while "
                f"a session has it: {each.told}",
                "choose another port there, or other --ports",
            )


def _of_iptables(tables: Tables) -> Iterator[Translation]:
    for saved in tables.saved:
        for rule in saved.rules:
            target = next(iter(rule.values("-j")), "")
            if rule.table == "nat" and target in _SOURCE | _DESTINATION:
                yield _read(rule, target, saved.program)


def _read(rule: Rule, target: str, program: str) -> Translation:
    def of(option: str) -> str | None:
        negated = option in rule.values("!")
        return None if negated else next(iter(rule.values(option)), None)

    ports = of("--dport") or of("--dports")
    return Translation(
        told=str(rule),
        removal=as_root(program, "-t", "nat", "-D", *rule.words[1:]),
        of_source=target in _SOURCE,
        leaves=of("-o"),
        enters=of("-i"),
        source=_network(of("-s")),
        destination=_network(of("-d")),
        protocol=of("-p"),
        ports=ports_of(ports) if ports else None,
    )


def _of_nft(tables: Tables) -> Iterator[Translation]:
    program = shutil.which("nft", path=PLACES)
    for table in tables.nft:
        command = [program or "nft", "--json", "list", "table", table.family, table.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            for item in json.loads(done.stdout)["nftables"]:
                if "rule" in item:
                    yield from _read_nft(item["rule"])


def _read_nft(rule: Mapping[str, Any]) -> Iterator[Translation]:
    verdicts = {key for statement in rule["expr"] for key in statement}
    of_source = not verdicts.isdisjoint({"masquerade", "snat"})
    if not of_source and verdicts.isdisjoint({"dnat", "redirect"}):
        return
    place = (rule["family"], rule["table"], rule["chain"])
    matches = dict(_matches(rule["expr"]))
    ports = matches.get("dport")
    handle = str(rule["handle"])
    yield Translation(
        told=f"nft rule {' '.join(place)} handle {handle}",
        removal=as_root("nft", "delete", "rule", *place, "handle", handle),
        of_source=of_source,
        leaves=_text(matches.get("oifname") or matches.get("oif")),
        enters=_text(matches.get("iifname") or matches.get("iif")),
        source=_network(matches.get("saddr")),
        destination=_network(matches.get("daddr")),
        protocol=_text(matches.get("protocol")),
        ports=frozenset(_numbers(ports)) if ports is not None else None,
    )


def _matches(expressions: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what the matches of a rule of nft ask for, by the name of the field."""
    for statement in expressions:
        match = statement.get("match")
        if match is None or match["op"] not in ("==", "in"):
            continue
        left = match["left"]
        if "meta" in left:
            yield left["meta"]["key"], match["right"]
        elif "payload" in left and "field" in left["payload"]:
            yield left["payload"]["field"], match["right"]
            if left["payload"]["field"] == "dport":
                yield "protocol", left["payload"]["protocol"]


def _text(value: Any) -> str | None:
    # A set, or an expression, restricts nothing that could be told from here.
    return value.replace("*", "+") if isinstance(value, str) else None


def _network(value: Any) -> IPv4Network | None:
    if isinstance(value, dict) and "prefix" in value:
        return IPv4Network(f"{value['prefix']['addr']}/{value['prefix']['len']}")
    try:
        return IPv4Network(value)
    except (TypeError, ValueError):
        return None


def _numbers(value: Any) -> Iterator[int]:
    """Yield the ports of a number, a range, or a set of these."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict) and "range" in value:
        low, high = value["range"]
        yield from range(low, high + 1)
    elif isinstance(value, dict) and "set" in value:
        for each in value["set"]:
            yield from _numbers(each)


def _among(interface: str, named: Iterable[str]) -> bool:
    return any(overlap(interface, name) for name in named)


def _listed(ports: Iterable[int]) -> str:
    first, *rest = sorted(ports)
    return f"{first} and {len(rest)} more" if rest else str(first)
