"""What this machine's packet filter does to a connection from the inside, found out by rehearsal.

Where a packet is stopped, doctor tries in the rehearsal what would let it through, and only advises
what did.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import dpkt

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.cli.doctor.network import Network
from nfmasq.cli.doctor.rehearsal import Command, Failure, Probe, Rehearsal, Stop
from nfmasq.cli.doctor.routes import SOMEBODY, Way
from nfmasq.cli.doctor.tables import NftTable, Tables
from nfmasq.errors import NfmasqError

_MOST_CHANGES = 8

_PORTS = count(40000)

_OPENING, _ANSWER = 0, 1
"""The numbers of the two packets of a rehearsal (`_connection`)."""

_SINGLE_OUT = {
    *("-s", "-d", "-i", "-o", "--sport", "--sports", "--dport", "--dports", "--match-set"),
    *("--mark", "--src-range", "--dst-range", "--mac-source"),
}
"""Matches by which a rule is about packets of somebody, and not about all that are left."""


class Change(NamedTuple):
    """What lets a packet through: a command, and what it is that stops the packet without it."""

    number: int
    """The number of the packet that is let through: _OPENING or _ANSWER."""
    stopped_by: str
    command: Command
    owned: bool = False
    """Whether only the program that made the table may change it."""


def passage(tables: Tables, network: Network, way: Way) -> Iterator[Finding]:
    """Yield whether a connection from the inside passes the filter and, if not, what stops it."""
    yield from _sets_unseen(tables)
    level = "problem" if tables.sets is not None else "warning"
    whose = f"a connection from {way.host} ({way.inside.name}) to the outside ({way.outside.name})"
    hosts = [(way.inside, way.host), (way.outside, SOMEBODY)]
    rehearsal = Rehearsal(tables, network, hosts)
    try:
        changes, failure = _what_lets_pass(rehearsal, tables, way)
        if failure is not None:
            yield _unmended(failure, whose, level)
        elif not changes and _passes_by(rehearsal, tables, way):
            what = f"{whose} gets past nfmasq: inside addresses go out"
            yield Finding("problem", what, "look what stands before our rules: iptables-save")
        elif not changes:
            yield Finding("ok", f"{whose} passes the rules")
        for change in changes:
            yield _stopped(change, whose, level)
    except NfmasqError as error:
        yield Finding("note", f"whether the rules let {whose} pass cannot be tried: {error}")
        yield from _policies(tables)


def _connection(way: Way) -> list[Probe]:
    """Return the first segment of a TCP connection to a web server, and its answer."""
    here, there = (way.host, next(_PORTS)), (SOMEBODY, 443)
    opening = _segment(here, there, dpkt.tcp.TH_SYN, seq=1, ack=0)
    answer = _segment(there, here, dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK, seq=1, ack=2)
    inside, outside = way.inside.name, way.outside.name
    return [Probe(inside, outside, opening), Probe(outside, inside, answer)]


def _segment(
    source: tuple[str, int], destination: tuple[str, int], flags: int, *, seq: int, ack: int
) -> bytes:
    tcp = dpkt.tcp.TCP(sport=source[1], dport=destination[1], flags=flags, seq=seq, ack=ack)
    addresses = {"src": socket.inet_aton(source[0]), "dst": socket.inet_aton(destination[0])}
    return bytes(dpkt.ip.IP(p=dpkt.ip.IP_PROTO_TCP, data=tcp, **addresses))


def _what_lets_pass(
    rehearsal: Rehearsal, tables: Tables, way: Way
) -> tuple[list[Change], Failure | None]:
    """Return the fewest changes that let a connection pass, or else what stops it in the end."""
    changes: list[Change] = []
    while failure := rehearsal.first_failure(_connection(way), _commands(changes)):
        change = next(_remedies(failure, tables, way, changes), None)
        if change is None or len(changes) == _MOST_CHANGES:
            return [], failure
        changes.append(change)
    return _needed(rehearsal, changes, way), None


def _needed(rehearsal: Rehearsal, changes: list[Change], way: Way) -> list[Change]:
    """Return the changes without those of nft that change nothing for a connection."""
    needed = changes
    for change in changes:
        if change.command[0] == "nft":
            fewer = [each for each in needed if each is not change]
            if not rehearsal.first_failure(_connection(way), _commands(fewer)):
                needed = fewer
    return needed


def _commands(changes: list[Change]) -> list[Command]:
    return [change.command for change in changes]


def _remedies(failure: Failure, tables: Tables, way: Way, tried: list[Change]) -> Iterator[Change]:
    """Yield what may let a packet through that was stopped, and has not been tried."""
    if failure.stop is not None:
        yield from _iptables_remedy(failure.number, failure.stop, tables, way, tried)
        return
    # Which table of nft stops a packet, nobody tells: each that may is opened, one by one.
    commands = _commands(tried)
    for table in tables.nft:
        for chain in table.forward_chains():
            change = _nft_change(failure.number, table, chain, way)
            if change.command not in commands:
                yield change


def _iptables_remedy(
    number: int, stop: Stop, tables: Tables, way: Way, tried: list[Change]
) -> Iterator[Change]:
    if stop.table != "filter":
        return  # what is accepted in raw or security passes nfmasq by
    if number == _OPENING and _singles_out(stop.line):
        command: Command = (stop.program, "-D", *shlex.split(stop.line)[1:])
    else:
        chain = "DOCKER-USER" if _enters_docker_user_first(tables, stop.program) else "FORWARD"
        command = (stop.program, "-I", chain, *_matches(number, way), "-j", "ACCEPT")
    if command not in _commands(tried):
        yield Change(number, _told(stop), command)


def _singles_out(line: str) -> bool:
    """Say whether a rule is against some packets; else it is what stops whatever gets that far."""
    words = shlex.split(line)
    return "!" not in words and not _SINGLE_OUT.isdisjoint(words)


def _told(stop: Stop) -> str:
    policy = re.match(r":(\w+) DROP", stop.line)
    what = f"the policy of {policy[1]}" if policy else stop.line
    return f"{stop.program} -t {stop.table}: {what}"


def _enters_docker_user_first(tables: Tables, program: str) -> bool:
    """Say whether FORWARD begins with the chain that Docker leaves to the administrator."""
    rules = (rule for saved in tables.saved if saved.program == program for rule in saved.rules)
    forward = (rule for rule in rules if (rule.table, rule.chain) == ("filter", "FORWARD"))
    first = next(forward, None)
    return first is not None and first.words[2:] == ["-j", "DOCKER-USER"]


def _matches(number: int, way: Way) -> Command:
    inside, outside = way.inside.name, way.outside.name
    if number == _OPENING:
        return ("-i", inside, "-o", outside)
    answers = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED")
    return ("-i", outside, "-o", inside, *answers)


def _nft_change(number: int, table: NftTable, chain: str, way: Way) -> Change:
    inside, outside = way.inside.name, way.outside.name
    match = f'iifname "{inside}" oifname "{outside}"'
    if number == _ANSWER:
        match = f'iifname "{outside}" oifname "{inside}" ct state established,related'
    rule = f"insert rule {table} {chain} {match} accept"
    told = f"nft: chain {chain} of table {table}"
    return Change(number, told, ("nft", rule), owned=table.is_owned)


def _stopped(change: Change, whose: str, level: str) -> Finding:
    what = f"{_packet(change.number, whose)} is dropped by {change.stopped_by}"
    if change.owned:
        return Finding(level, what, "have the program that owns the table let it pass")
    advice = "let it pass, and keep that where your firewall keeps its rules"
    return Finding(level, what, advice, (as_root(*change.command),))


def _unmended(failure: Failure, whose: str, level: str) -> Finding:
    by = "a rule" if failure.stop is None else _told(failure.stop)
    what = f"{_packet(failure.number, whose)} is dropped by {by}"
    return Finding(level, what, "see iptables-save and nft list ruleset")


def _packet(number: int, whose: str) -> str:
    return whose if number == _OPENING else f"the answer to {whose}"


def _passes_by(rehearsal: Rehearsal, tables: Tables, way: Way) -> bool:
    """Say whether our rules are there, and a packet from the inside meets none of them."""
    if not any(rule.our_chain for rule in tables.rules):
        return False
    probe, _ = _connection(way)
    ours = "-A NFMASQ-FORWARD "
    return not rehearsal.counted(probe, lambda p: p.table == "security" and ours in p.line)


def _policies(tables: Tables) -> Iterator[Finding]:
    for saved in tables.saved:
        if "\n:FORWARD DROP " in saved.text:
            what = f"{saved.program}: FORWARD's policy is DROP, which may stop what is forwarded"
            yield Finding("warning", what, "see that a rule accepts it")


def _sets_unseen(tables: Tables) -> Iterator[Finding]:
    if tables.sets is None:
        what = "rules look addresses up in sets that cannot be read here: they are left out"
        install = as_root("apt", "install", "ipset")
        yield Finding("note", what, "install ipset and ask again", (install,))
