"""The data paths that are compared, and how each is put into a lab.

A path is a function of a new lab: it makes the lab's inside reach the outside, and returns the
process that handles the packets, or None where the kernel does it all.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nfmasq.config.configuration import DIRECT, ROUTED
from nfmasq.daemon.queue_table import queue_row
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.programs import Programs
from nfmasq.lab import Daemon, Host, Lab

ROOT = Path(__file__).parents[1]

PORTS = "1024-65095"
"""The masquerade ports, nearly all there are.

Each connection of the measurement comes from a source port of its own (32768 to 60999 by default),
takes a masquerade port, and keeps it for minutes after its end; with the 4,096 ports of the
default nfmasq would rightly refuse the rest, after less than a second. The paths that keep
the source port need the ports in the rules, too: the outside answers to the source port.
"""

INSIDE = "10.77.0.0/24"


class DataPath(NamedTuple):
    """A data path: `key` in results and on the command line, `title` for people."""

    key: str
    title: str
    put_up: Callable[[Lab], subprocess.Popen[str] | None]


def run_module(
    host: Host, module: str, *arguments: str, **options: object
) -> subprocess.Popen[str]:
    """Start `python -m MODULE ARGUMENT...` of this checkout on a host."""
    return host.popen([sys.executable, "-m", module, *arguments], cwd=ROOT, **options)


def forwarding(lab: Lab) -> None:
    """Have the kernel forward, and translate nothing."""
    _route_back(lab)


def kernel_masquerade(lab: Lab) -> None:
    """Have the kernel masquerade by itself."""
    nat = ["iptables", "-t", "nat", "-A", "POSTROUTING"]
    lab.gateway.run([*nat, "-o", "wan", "-j", "MASQUERADE"])


def untranslated(module: str, lab: Lab) -> subprocess.Popen[str]:
    """Start a baseline that leaves addresses alone."""
    _route_back(lab)
    return _baseline(lab, module)


def translated(module: str, lab: Lab) -> subprocess.Popen[str]:
    """Start a baseline that masquerades."""
    return _baseline(lab, module, lab.gateway.address)


def nfmasq(*options: str) -> Callable[[Lab], subprocess.Popen[str]]:
    """Return a function that starts nfmasq as people run it, with `options` beside its ports."""

    def put_up(lab: Lab) -> subprocess.Popen[str]:
        lab.rules("up", "--ports", PORTS)
        return lab.nfmasq("--ports", PORTS, *options)

    return put_up


def cached(mode: str) -> Callable[[Lab], Daemon]:
    """Return a function that starts nfmasq with its flow cache, and fails where that is off."""

    def put_up(lab: Lab) -> Daemon:
        lab.rules("up", "--ports", PORTS)
        daemon = lab.nfmasq("--ports", PORTS, "--flow-cache", mode)
        told = daemon.log.read_text()
        if f"flow cache {mode}" not in told:
            raise NfmasqError(f"nfmasq does without its flow cache: {told}")
        return daemon

    return put_up


def has_flow_cache() -> bool:
    """Say whether this machine takes the flow cache's programs."""
    with suppress(OSError):
        Programs(1).close()
        return True
    return False


def _route_back(lab: Lab) -> None:
    """Give the outside a route to the inside addresses, which it sees on this path."""
    lab.router.ip(f"route add {INSIDE} via {lab.gateway.address}")
    for host in lab.outside:
        host.ip(f"route add {INSIDE} via {lab.router.interfaces['net']}")


def _baseline(lab: Lab, module: str, *arguments: str) -> subprocess.Popen[str]:
    process = run_module(lab.gateway, module, *arguments)
    deadline = time.monotonic() + 10
    while not lab.gateway.call(queue_row, 0):
        if process.poll() is not None or time.monotonic() > deadline:
            raise NfmasqError(f"python -m {module} does not bind its queue")
        time.sleep(0.02)
    lab.rules("up", "--ports", PORTS)
    return process


PATHS = (
    DataPath("forwarding", "kernel forwarding, no NAT", forwarding),
    DataPath("masquerade", "kernel MASQUERADE", kernel_masquerade),
    DataPath(DIRECT, "nfmasq, flow cache direct", cached(DIRECT)),
    DataPath(ROUTED, "nfmasq, flow cache routed", cached(ROUTED)),
    DataPath("nfmasq", "nfmasq, all by NFQUEUE", nfmasq("--flow-cache", "off")),
    DataPath("nfmasq-no-gso", "nfmasq --no-gso", nfmasq("--no-gso", "--flow-cache", "off")),
    DataPath(
        "floor", "NFQUEUE, hand back its bytes: the floor", partial(untranslated, "bench.floor")
    ),
    DataPath("accept", "NFQUEUE, accept every packet", partial(untranslated, "bench.accept")),
    DataPath("dpkt", "plain masquerade with dpkt", partial(translated, "bench.dpkt_masquerade")),
    DataPath("scapy", "plain masquerade with scapy", partial(translated, "bench.scapy_masquerade")),
)
"""All paths, in the order of the tables. Those that are held against each other are neighbours:
what is measured of them is measured within a few seconds."""

CACHED = (DIRECT, ROUTED)
"""The keys of the paths that take a machine with the flow cache."""
