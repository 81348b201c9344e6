"""The kernel of this machine: what this process may do, its queues, and its settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.daemon.queue_table import queue_row

SYSCTLS = Path("/proc/sys/net")
NETWORK = Path("/sys/class/net")
CAP_NET_ADMIN = 1 << 12
CAP_NET_RAW = 1 << 13
CAP_SYS_ADMIN = 1 << 21
CAP_PERFMON = 1 << 38
CAP_BPF = 1 << 39


def privilege() -> Iterator[Finding]:
    """Yield whether this process has the two capabilities that nfmasq needs; root has both."""
    advice = "run nfmasq with sudo"
    if not is_privileged():
        yield Finding("warning", "no CAP_NET_ADMIN: nfmasq run would fail", advice)
    elif not has(CAP_NET_RAW):
        what = (
            "no CAP_NET_RAW: datagrams of more than 65,503 bytes would be lost, "
            "and nobody told of what is refused or ended"
        )
        yield Finding("warning", what, advice)
    else:
        yield Finding("ok", "CAP_NET_ADMIN and CAP_NET_RAW")


def is_privileged() -> bool:
    """Say whether this process may see and change what belongs to the network."""
    return has(CAP_NET_ADMIN)


def has(capability: int) -> bool:
    """Say whether this process has a capability, which is given as its bit."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) & capability)


def queue(number: int, running: bool) -> Iterator[Finding]:
    """Yield whether the queue can be bound or, where it is bound, whether nfmasq has bound it."""
    holder = _holder(number)
    if running and holder is None:
        yield Finding(
            "problem",
            f"nfmasq runs, but queue {number} is not bound in this network namespace",
            "run doctor where nfmasq runs, or restart nfmasq",
        )
    elif running:
        yield Finding("ok", f"queue {number} is bound")
    elif holder is not None:
        yield Finding(
            "problem",
            f"queue {number} is bound by another program (netlink port {holder})",
            "stop it, or choose another --queue, for nfmasq and in the rules",
        )
    elif not is_privileged():
        yield Finding("note", f"cannot try to bind queue {number} without CAP_NET_ADMIN")
    else:
        yield _try_to_bind(number)


def _holder(number: int) -> int | None:
    """Return the netlink port of the socket that has bound the queue."""
    row = queue_row(number)
    return row.port if row else None


def _try_to_bind(number: int) -> Finding:
    try:
        from netfilterqueue import NetfilterQueue
    except ImportError as error:
        install = as_root(sys.executable, "-m", "pip", "install", "NetfilterQueue")
        return Finding("problem", f"NetfilterQueue: {error}", "install it", (install,))
    trial = NetfilterQueue()
    try:
        trial.bind(number, lambda packet: packet.drop())
    except OSError as error:
        return Finding(
            "problem",
            f"queue {number} cannot be bound: {error}",
            "load the module, or take a kernel with CONFIG_NETFILTER_NETLINK_QUEUE",
            (as_root("modprobe", "nfnetlink_queue"),),
        )
    trial.unbind()
    return Finding("ok", f"queue {number} can be bound")


def forwarding() -> Iterator[Finding]:
    """Yield whether the kernel forwards packets at all."""
    if sysctl("ipv4/ip_forward") == "1":
        yield Finding("ok", "net.ipv4.ip_forward is 1")
    else:
        switch_on = as_root("sysctl", "-w", "net.ipv4.ip_forward=1")
        yield Finding("problem", "net.ipv4.ip_forward is not 1", "switch it on", (switch_on,))


def settings() -> Iterator[Finding]:
    """Yield settings of the kernel that are right on most gateways, and puzzling on the others."""
    if sysctl("bridge/bridge-nf-call-iptables") == "1" and any(NETWORK.glob("*/bridge")):
        yield Finding(
            "warning",
            "net.bridge.bridge-nf-call-iptables is 1: bridged packets meet the rules twice",
            "where a bridge is the inside interface and connections are tracked, the kernel then "
            "refuses to queue them",
            (as_root("sysctl", "-w", "net.bridge.bridge-nf-call-iptables=0"),),
        )
    if sysctl("ipv4/conf/all/send_redirects") == "1":
        yield Finding(
            "note",
            "net.ipv4.conf.all.send_redirects is 1",
            "where inside machines reach each other by the outside address, set it to 0: redirects "
            "are dropped, but hold back errors that the kernel would send",
        )


def socket_buffer(wanted: int) -> Iterator[Finding]:
    """Yield a note where the kernel grants a receive buffer of `wanted` bytes only by force."""
    most = int(sysctl("core/rmem_max") or wanted)
    if most < wanted:
        yield Finding(
            "note",
            f"net.core.rmem_max is {most}, less than the socket buffer of {wanted}",
            "with CAP_NET_ADMIN nfmasq gets it all the same",
        )


def sysctl(name: str) -> str | None:
    """Return a setting below /proc/sys/net; None where there is none of this name."""
    try:
        return (SYSCTLS / name).read_text().strip()
    except OSError:
        return None
