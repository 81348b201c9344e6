"""The masquerade ports: kept from this machine's own programs, and not nearly all taken."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple

from nfmasq.cli.doctor.finding import Finding, nfmasq
from nfmasq.cli.doctor.machine import sysctl
from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError
from nfmasq.rules import ports_of, range_of

PROC = Path("/proc")

_MOST_HELD = 0.8
"""The share of the ports from which on doctor warns."""

_LISTENS, _BOUND, _GONE = "0A", "07", "06"
"""States of a socket: of TCP, of UDP, and of what is none any more (TIME_WAIT)."""

_NOBODY = "0" * 8
_ANY_IPV6 = "0" * 32
_IPV4_IN_IPV6 = "0000000000000000FFFF0000"


class Socket(NamedTuple):
    """A socket of this machine that packets from other hosts may reach over IPv4."""

    protocol: str
    port: int
    serves: bool
    """Whether it takes packets of anybody: it listens, or is a UDP socket without a peer."""
    inode: str


def local_ports(wanted: Mapping[str, Any], reserving: str) -> Iterator[Finding]:
    """Yield whether this machine's own connections may take masquerade ports.

    `wanted` is the configuration as plain data; `reserving` is the command that keeps the ports.
    """
    ports = wanted["ports"]
    local = range_of(sysctl("ipv4/ip_local_port_range") or "32768 60999")
    free = ports_of(ports) - ports_of(sysctl("ipv4/ip_local_reserved_ports") or "")
    if wanted["reserve"] and free:
        yield Finding(
            "problem",
            f"masquerade ports {ports} are not all in net.ipv4.ip_local_reserved_ports",
            "load the rules anew",
            (reserving,),
        )
    elif not free & {*local}:
        yield Finding("ok", f"masquerade ports {ports} are apart from this machine's own ports")
    else:
        yield Finding(
            "problem",
            f"masquerade ports {ports} meet this machine's own, {local.start}-{local.stop - 1}",
            "load the rules with --reserve (reserve = true in the file), or choose other --ports",
            (reserving,),
        )


def sockets(wanted: Mapping[str, Any], reserving: str) -> Iterator[Finding]:
    """Yield which programs of this machine have sockets on ports that are nfmasq's."""
    masquerade = ports_of(wanted["ports"])
    led_inside = {
        (protocol, port)
        for protocol, *_, ports in (each["listen"].split(":") for each in wanted["forward"])
        for port in ports_of(ports)
    }
    found = [
        each
        for each in _sockets()
        if each.port in masquerade or (each.protocol, each.port) in led_inside
    ]
    owners = _owners({each.inode for each in found})
    connected: Counter[str] = Counter()
    for each in sorted({*found}):
        owner = owners.get(each.inode, "a program")
        port = f"{each.protocol.upper()} port {each.port}"
        if not each.serves:
            connected[owner] += each.port in masquerade
        elif (each.protocol, each.port) in led_inside:
            what = f"{owner} serves {port}, but what comes from the outside there goes inside"
            yield Finding("warning", what, "forward another port, unless that is meant")
        else:
            what = f"{owner} serves {port}, a masquerade port, which a session may take from it"
            yield Finding("warning", what, "have it serve another port, or choose other --ports")
    for owner, count in (+connected).items():
        what = f"{owner} is connected from {count} masquerade port{'s' if count > 1 else ''}"
        advice = "nfmasq keeps such connections apart; reserved ports leave it all of them"
        yield Finding("note", what, advice, (reserving,))


def _sockets() -> Iterator[Socket]:
    for protocol in ("tcp", "udp"):
        for version in ("", "6"):
            table = PROC / "net" / (protocol + version)
            lines = table.read_text().splitlines()[1:] if table.exists() else []
            for fields in map(str.split, lines):
                local, _, port = fields[1].partition(":")
                state, inode = fields[3], fields[9]
                if state != _GONE and _is_reached(local):
                    serves = state in (_LISTENS, _BOUND)
                    yield Socket(protocol, int(port, 16), serves, inode)


def _is_reached(local: str) -> bool:
    """Say whether packets of other hosts may have this destination, written as in /proc/net."""
    if len(local) > len(_NOBODY):
        if local == _ANY_IPV6:
            return True
        if not local.startswith(_IPV4_IN_IPV6):
            return False
    address = IPv4Address(bytes.fromhex(local[-8:])[::-1])
    return not address.is_loopback


def _owners(inodes: set[str]) -> dict[str, str]:
    """Return the programs that have sockets, by the socket's inode; root sees them all."""
    owners: dict[str, str] = {}
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for opened in PROC.glob("[0-9]*/fd/*") if wanted else ():
        try:
            inode = wanted.get(str(opened.readlink()))
            if inode is not None:
                process = opened.parents[1]
                name = (process / "comm").read_text().strip()
                owners[inode] = f"{name} (process {process.name})"
        except OSError:
            continue  # it has ended, or is somebody else's
    return owners


def nearly_taken(control: Path, wanted: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield of which protocol nearly all masquerade ports are held, and who holds most.

    What is over holds no port: it makes room as soon as room is needed.
    """
    dynamic = len(ports_of(wanted["ports"]))
    try:
        over, scarce = _over_and_scarce(control, dynamic)
        entries = [*request(control, "list")] if scarce else []
    except NfmasqError as error:
        yield Finding("note", f"how many ports are held cannot be told: {error}")
        return
    for (protocol, maddr), holders in _holders(entries, ports_of(wanted["ports"])).items():
        held = sum(holders.values()) - over.get(protocol, 0)
        if held > _MOST_HELD * dynamic:
            host, most = holders.most_common(1)[0]
            yield Finding(
                "warning",
                f"{held} of {dynamic} {protocol.upper()} masquerade ports of {maddr} are held, "
                f"{most} of them by {host}",
                "choose more --ports, add a --masquerade-address, or see what that host does",
                (nfmasq("list", "--protocol", protocol, "--saddr", host),),
            )


def _over_and_scarce(control: Path, dynamic: int) -> tuple[dict[str, int], bool]:
    """Return how many entries are over, by protocol, and whether ports may be scarce.

    The free ports of several addresses are added up, so that only the entries tell for sure. There
    may be a million, and to list them takes a while; mostly that need not be.
    """
    figures: dict[str, dict[str, int]] = defaultdict(dict)
    for name, labels, value in request(control, "stats"):
        if name in ("nfmasq_ports_free", "nfmasq_entries_over"):
            figures[name][labels["protocol"]] = int(value)
    over = figures["nfmasq_entries_over"]
    free = figures["nfmasq_ports_free"]
    scarce = any(count + over.get(name, 0) < dynamic / 2 for name, count in free.items())
    return over, scarce


def _holders(
    entries: Iterable[Mapping[str, Any]], masquerade: frozenset[int]
) -> dict[tuple[str, str], Counter[str]]:
    """Return how many ports each inside host holds, by protocol and masquerade address."""
    held = {
        (entry["protocol"], entry["maddr"], entry["mport"], entry["saddr"])
        for entry in entries
        if entry["mport"] in masquerade
    }
    holders: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for protocol, maddr, _, host in held:
        holders[protocol, maddr][host] += 1
    return holders
