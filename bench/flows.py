"""How many datagrams a second pass when they are spread over many flows: 1 to 1,000,000.

`python -m bench.flows FLOWS...` writes the results of one round in JSON.

A million flows that last would take minutes to open, with all their packets. So no nfmasq runs
here. The kernel's map is filled with both directions of each flow by what does it for a running
nfmasq (`flowcache/flows.py`), and the programs are attached as ever. What is measured is the
programs and their map; that a flow gets there by itself shows in "UDP 64 B" of the data paths. The
rules are loaded, and nobody reads the queue: a packet whose flow was not found is lost. So what
arrives was rewritten in the kernel.

The kernel's MASQUERADE gets to know each flow by a datagram that it has forwarded before. Where the
kernel tracks fewer connections than that (nf_conntrack_max, which belongs to the whole machine and
is left alone), there is no figure.

All datagrams go out, from one inside host to the addresses of 198.18.0.0/15, which the outside host
takes for its own.
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack

from bench import traffic
from bench.network import PORT, WARM_UP, Results, answer, running, start
from bench.paths import CACHED, PORTS, kernel_masquerade
from nfmasq.engine import UDP, Timeouts
from nfmasq.engine.table.entry import IpMasq
from nfmasq.engine.table.states import STATE_UDP
from nfmasq.engine.wire.address import from_dotted
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.attachment import Attachment, Sides
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.programs import Programs
from nfmasq.lab import Host, Lab

SIZES = (1, 10, 10_000, 1_000_000)
PATHS = ("masquerade", *CACHED)
"""The data paths that `Spread.measure` measures, by their keys."""

SIZE = 64
"""Bytes of a datagram's payload."""

_MOST_FLOWS = 1 << 20  # as nfmasq's map has by default
_FIRST_MPORT = 40000
_TIMEOUTS = Timeouts().table()
_SECONDS_TRACKED = 600


class Spread:
    """Two labs, for the kernel's MASQUERADE and for the flow cache, within its `with` block.

    Raises OSError where the programs cannot be had.
    """

    def __init__(self) -> None:
        self._known = 0

    def __enter__(self) -> Spread:
        with ExitStack() as stack:
            self._tracking = stack.enter_context(Lab(1, 1))
            self._caching = stack.enter_context(Lab(1, 1))
            _prepare_tracking(self._tracking)
            _prepare_caching(self._caching)
            self._programs = Programs(_MOST_FLOWS)
            stack.callback(self._programs.close)
            self._programs.add_maddr(_number(self._caching.gateway))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def know(self, flows: int) -> None:
        """Have the first `flows` flows known, and so far no others. Raises NfmasqError."""
        if self._tracks(flows):
            spread = start(self._tracking.inside[0], traffic.spread, PORT, SIZE, flows, 0)
            with running(spread):
                answer(spread, timeout=120)
        gateway = self._caching.gateway
        maddr, saddr = _number(gateway), _number(self._caching.inside[0])
        wan = gateway.call(socket.if_nametoindex, "wan")
        cache = Flows(self._programs, {wan})
        for number in range(self._known, flows):
            ms = _entry(number, saddr, maddr)
            if not (cache.put(ms, True, wan) and cache.put(ms, False, 0)):
                raise NfmasqError(f"the kernel's map takes no more than {number:,} flows")
        self._known = flows

    def measure(self, seconds: float) -> Results:
        """Measure the thousand datagrams a second that arrive, of all known flows, by path."""
        results = {}
        if self._tracks(self._known):
            results["masquerade"] = self._arriving(self._tracking, seconds)
        for mode in CACHED:
            results[mode] = self._arriving_by_cache(mode, seconds)
        return results

    def _tracks(self, flows: int) -> bool:
        most = int(self._tracking.gateway.sysctl("net.netfilter.nf_conntrack_max"))
        return not most or flows < most

    def _arriving_by_cache(self, mode: str, seconds: float) -> float:
        gateway = self._caching.gateway
        attachment = gateway.call(Attachment, self._programs, mode, 0)
        try:
            gateway.call(attachment.serve, Sides(("lan",), ("wan",)))
            return self._arriving(self._caching, seconds)
        finally:
            gateway.call(attachment.close)

    def _arriving(self, lab: Lab, seconds: float) -> float:
        inside, outside = lab.inside[0], lab.outside[0]
        counting = start(outside, traffic.count, PORT, SIZE, WARM_UP, seconds)
        with running(counting):
            outside.wait_until_bound(PORT, "udp")
            spread = (PORT, SIZE, self._known, 2 * WARM_UP + seconds)
            with running(start(inside, traffic.spread, *spread)):
                return float(answer(counting)) / 1e3


def _prepare_tracking(lab: Lab) -> None:
    """Have the kernel masquerade, and remember for long the flows that nobody answers."""
    _lead_everything_outside(lab)
    kernel_masquerade(lab)
    lab.gateway.sysctl("net.netfilter.nf_conntrack_udp_timeout", _SECONDS_TRACKED)


def _prepare_caching(lab: Lab) -> None:
    _lead_everything_outside(lab)
    lab.rules("up", "--ports", PORTS)


def _lead_everything_outside(lab: Lab) -> None:
    """Have the outside host receive what is sent to 198.18.0.0/15."""
    outside = lab.outside[0]
    lab.router.ip(f"route add 198.18.0.0/15 via {outside.address}")
    outside.ip("route add local 198.18.0.0/15 dev eth0")


def _number(host: Host) -> int:
    """Return a host's address as a number, in host order."""
    address = from_dotted(host.address)
    assert address is not None
    return address


def _entry(number: int, saddr: int, maddr: int) -> IpMasq:
    """Return an entry for a flow of `traffic.spread`, by the flow's number."""
    port, address = divmod(number, traffic.ADDRESSES)
    mport, sport = _FIRST_MPORT + port, traffic.FIRST_PORT + port
    daddr = traffic.SCATTERED + address
    return IpMasq(UDP, maddr, mport, saddr, sport, daddr, PORT, 0, _TIMEOUTS, STATE_UDP)


def main(sizes: list[int]) -> None:
    """Measure one round with these numbers of flows, in rising order, and write the results."""
    results = {}
    with Spread() as spread:
        for flows in sizes:
            spread.know(flows)
            results[flows] = spread.measure(seconds=1)
    print(json.dumps(results))


if __name__ == "__main__":
    main([int(flows) for flows in sys.argv[1:]] or list(SIZES))
