"""A rehearsal: packets sent through a copy of this machine's packet filter.

Theory of operation. Only the kernel knows what becomes of a packet in rules of three programs with
their matches, states and marks. So doctor asks the kernel, without touching the machine: a thread
enters a network namespace of its own, which has no name. There it makes interfaces of the same
names and addresses, loads the same tables, and routes between two interfaces alone. What it writes
into one is, for the kernel, a packet that arrives there; it comes out of the other, or it does not.
The namespace is gone with the thread and its interfaces, in whatever way doctor ends.

The copy differs from the machine in this: nobody serves its queues, so packets pass them by
(`--queue-bypass`); so both directions of a connection are seen in their inside form. And nothing is
translated: nfmasq has taken the place of that.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import select
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.cli.doctor.network import Link, Network
from nfmasq.cli.doctor.tables import PLACES, Tables
from nfmasq.errors import NfmasqError

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000

# Seconds in which a packet comes out that takes microseconds. Where no rule tells that it has
# stopped the packet, there is more patience: a machine may be slow.
_SOON = 0.1
_PATIENCE = 0.5

_LONGEST = 2048  # bytes
_ENDPOINTS = slice(12, 24)  # addresses and ports, of a packet without IP options

Command = tuple[str, ...]
_T = TypeVar("_T")


class Probe(NamedTuple):
    """A packet for a rehearsal: it enters by one interface, and is to leave by another one."""

    enters: str
    leaves: str
    packet: bytes


class Stop(NamedTuple):
    """Where a packet was stopped: by a rule or a policy as its iptables-save prints it."""

    program: str
    table: str
    line: str


class Failure(NamedTuple):
    """The first packet of a rehearsal that did not arrive (by its number).

    `stop` is where; None where no rule of iptables stopped it.
    """

    number: int
    stop: Stop | None


class Rehearsal:
    """Rehearses the passage of packets between two interfaces, each time in a new copy.

    `hosts` are the addresses beyond the interfaces of either side, which packets go to.
    """

    def __init__(self, tables: Tables, network: Network, hosts: Sequence[tuple[Link, str]]) -> None:
        self._tables = tables
        self._network = network
        self._hosts = hosts

    def first_failure(
        self, probes: Sequence[Probe], changes: Iterable[Command] = ()
    ) -> Failure | None:
        """Return which packet is the first not to arrive, after `changes` to the filter.

        None where all arrive. Raises NfmasqError where this cannot be tried out here.
        """
        return self._in_a_copy(lambda copy: copy.first_failure(probes), changes)

    def counted(
        self, probe: Probe, rule: Callable[[Stop], bool], changes: Iterable[Command] = ()
    ) -> bool:
        """Say whether a packet meets such a rule of iptables, after `changes` to the filter."""

        def meets(copy: _Copy) -> bool:
            before = copy.counts()
            copy.send(probe)
            return any(rule(place) for place in copy.grown(before))

        return self._in_a_copy(meets, changes)

    def _in_a_copy(self, ask: Callable[[_Copy], _T], changes: Iterable[Command]) -> _T:
        def enter_and_ask() -> _T:
            with ExitStack() as stack:
                copy = _Copy(stack, self._tables, self._network, self._hosts)
                for command in changes:
                    copy.run(command)
                return ask(copy)

        with ThreadPoolExecutor(max_workers=1) as executor:
            return executor.submit(enter_and_ask).result()


class _Copy:
    """The copy, in the namespace that the calling thread enters for good."""

    def __init__(
        self,
        stack: ExitStack,
        tables: Tables,
        network: Network,
        hosts: Sequence[tuple[Link, str]],
    ) -> None:
        self._programs = [saved.program for saved in tables.saved]
        try:
            _enter_new_namespace()
            self._interfaces = {name: _tun(stack, name) for name in network.links}
            _set_up(network, hosts)
        except (OSError, NetlinkError) as error:
            raise NfmasqError(f"no copy of the filter can be made here: {error}") from None
        if tables.sets:
            self.run(("ipset", "restore"), input=tables.sets)
        for saved in tables.saved:
            text = _without_nat(saved.text)
            if tables.sets is None:
                text = _without_sets(text)
            self.run((f"{saved.program}-restore", "--wait", "10"), input=_with_queues_passed(text))
        for table in tables.nft:
            self.run(("nft", "-f", "-"), input=_harmless(table.text))

    def first_failure(self, probes: Sequence[Probe]) -> Failure | None:
        for number, probe in enumerate(probes):
            before = self.counts()
            self.send(probe)
            if self._comes_out(probe, _SOON):
                continue
            stop = next((place for place in self.grown(before) if _stops(place.line)), None)
            if stop or not self._comes_out(probe, _PATIENCE):
                return Failure(number, stop)
        return None

    def send(self, probe: Probe) -> None:
        os.write(self._interfaces[probe.enters], probe.packet)

    def _comes_out(self, probe: Probe, seconds: float) -> bool:
        """Say whether a packet comes out where it should, whatever else comes out there."""
        target = self._interfaces[probe.leaves]
        deadline = time.monotonic() + seconds
        while select.select([target], [], [], max(0.0, deadline - time.monotonic()))[0]:
            # The rest may be changed on the way: the time to live, the mark for QoS, the MSS.
            if os.read(target, _LONGEST)[_ENDPOINTS] == probe.packet[_ENDPOINTS]:
                return True
        return False

    def counts(self) -> dict[Stop, int]:
        """Return how many packets each rule, and each policy, of iptables has counted."""
        counts: dict[Stop, int] = {}
        for program in self._programs:
            table = ""
            for line in self.run((f"{program}-save", "-c")).splitlines():
                if line.startswith("*"):
                    table = line[1:]
                elif counted := re.match(r"(?=\[|:)(:\w+ \w+ )?\[(\d+):\d+\] ?(.*)", line):
                    policy, count, rule = counted.groups()
                    place = Stop(program, table, (policy or rule).strip())
                    counts[place] = counts.get(place, 0) + int(count)
        return counts

    def grown(self, before: dict[Stop, int]) -> list[Stop]:
        """Return what has counted packets since then."""
        return [place for place, count in self.counts().items() if count > before.get(place, 0)]

    def run(self, command: Command, input: str = "") -> str:
        """Run a command in the copy, and return its output; raises NfmasqError where it fails."""
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": PLACES},
            check=False,
        )
        if done.returncode != 0:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise NfmasqError(f"{' '.join(command)}: {reason}")
        return done.stdout


def _enter_new_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # A namespace has the settings of the machine to begin with.
    settings = Path("/proc/sys/net")
    for name in ("all", "default"):
        (settings / f"ipv4/conf/{name}/rp_filter").write_text("0")
        if (settings / "ipv6").exists():
            (settings / f"ipv6/conf/{name}/disable_ipv6").write_text("1")
    (settings / "ipv4/ip_forward").write_text("1")


def _tun(stack: ExitStack, name: str) -> int:
    """Make an interface whose packets this process writes and reads."""
    interface = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    stack.callback(os.close, interface)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(interface, _TUNSETIFF, request)
    return interface


def _set_up(network: Network, hosts: Iterable[tuple[Link, str]]) -> None:
    with IPRoute() as kernel:
        indices = {link.get("ifname"): link["index"] for link in kernel.get_links()}
        for name, link in network.links.items():
            kernel.link("set", index=indices[name], state="up")
            for address in link.own:
                kernel.addr("add", index=indices[name], address=str(address), prefixlen=32)
        for link, host in hosts:
            kernel.route("add", dst=f"{host}/32", oif=indices[link.name])


def _without_nat(saved: str) -> str:
    return re.sub(r"^\*nat$.*?^COMMIT$", "", saved, flags=re.MULTILINE | re.DOTALL)


def _without_sets(saved: str) -> str:
    return re.sub(r"^-A .* --match-set .*\n", "", saved, flags=re.MULTILINE)


def _with_queues_passed(saved: str) -> str:
    saved = saved.replace(" --queue-bypass", "")
    return re.sub(r"^(-A .* -j NFQUEUE\b.*)$", r"\1 --queue-bypass", saved, flags=re.MULTILINE)


def _harmless(text: str) -> str:
    """Return an nft table that outlives the program nft, translates nothing and queues nothing."""
    text = re.sub(r"^\s*type nat hook .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*flags owner.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\bqueue (flags \S+ )?to\b", "queue flags bypass to", text)
    return re.sub(r"\bqueue num (\S+)( bypass)?", r"queue num \1 bypass", text)


def _stops(line: str) -> bool:
    """Say whether what iptables-save prints in this line is the end of a packet."""
    return bool(re.search(r"-j (DROP|REJECT)\b|^:\w+ DROP", line))
