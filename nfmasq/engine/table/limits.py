"""What one inside host may have, so that no host can take what the others need.

The entries of each inside host are counted, and the masquerade ports that it holds. Both may be
limited. The entries that it makes in a second may be limited, too, by a token bucket that holds one
second's worth. Without limits the counts still tell which host has most when the ports run out.

Anybody inside can forge the source of a packet, and so pretend to be many hosts. A host that is
genuine has shown that it is there: it has acknowledged the number of a server's SYN, which only
the server and the host saw. Or the kernel had an answer to ARP from it, as the daemon reports. The
server's answer alone shows nothing: servers answer forged questions, too. What is known of a host
is kept for a while, so that its sessions go before those of others when room is short (`room.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from nfmasq.engine.table.entry import NO_REPLY, OUTSIDE, IpMasq
from nfmasq.engine.table.roll import HostRoll
from nfmasq.engine.wire.protocols import PROTOCOLS

_LOOKS = 64
"""How many entries are looked at to find one that may go: nobody waits for a search through all."""


GENUINE_FOR = 3600.0
"""Seconds for which a host is genuine, after it has shown that it is there."""

MOST_GENUINE = 65_536
"""The most hosts that are known to be genuine; where there are more, the newest are known."""


class TokenBucket:
    """Allows at most `rate` events a second in the long run, and `burst` at once."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = float("-inf")

    def has_one(self, now: float) -> bool:
        """Say whether one more event is allowed at `now` (seconds)."""
        if now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now
        return self._tokens >= 1

    def take(self, now: float) -> bool:
        """Say whether one more event is allowed at `now` (seconds); if so, count it."""
        allowed = self.has_one(now)
        self._tokens -= allowed
        return allowed


class InsideHost:
    """Counts what an inside host has: `entries`, and masquerade `ports` by protocol number.

    The outside made `given` of the entries. `new` is the bucket for entries that the host makes;
    None: no limit. `over` has its sessions that are over and make room for others of the host, the
    oldest first; it is kept while there are limits. `roll` has all its entries.
    """

    __slots__ = ("entries", "given", "new", "over", "ports", "roll")

    def __init__(self, max_new: int) -> None:
        self.entries = 0
        self.roll = HostRoll()
        self.given = 0
        self.ports = dict.fromkeys(PROTOCOLS, 0)
        self.over: OrderedDict[IpMasq, None] | None = None
        self.new: TokenBucket | None = None
        self.limit(max_new)

    def limit(self, max_new: int) -> None:
        """Begin with a full bucket of `max_new` entries a second; 0: no limit."""
        self.new = TokenBucket(max_new, max_new) if max_new else None


class InsideHosts:
    """All inside hosts that have entries or masquerade ports, and their limits.

    `are_limited` tells whether there is any limit. Addresses are ints in host order. Which hosts
    are genuine is known for longer than they have anything.
    """

    def __init__(self) -> None:
        self._max_entries = 0
        self._max_ports = 0
        self._max_new = 0
        self.are_limited = False
        self._hosts: dict[int, InsideHost] = {}
        # When a host has shown that it is there, the longest ago first.
        self._genuine: OrderedDict[int, float] = OrderedDict()

    def limit(self, max_entries: int, max_ports: int, max_new: int) -> None:
        """Set the limits; 0 is no limit. A host that has more loses nothing, and gets no more.

        `max_new` is how many entries a host may make in a second.
        """
        self._max_entries = max_entries
        self._max_ports = max_ports
        self.are_limited = bool(max_entries or max_ports or max_new)
        if max_new != self._max_new:
            self._max_new = max_new
            for host in self._hosts.values():
                host.limit(max_new)

    def is_genuine(self, saddr: int) -> bool:
        """Say whether an inside host has shown that it is there, not longer than GENUINE_FOR ago.

        Until `forget` is called a host that is to be forgotten is genuine still.
        """
        return saddr in self._genuine

    def is_there(self, saddr: int, now: float) -> None:
        """Note that an inside host has shown that it is there, at `now` (seconds)."""
        self._genuine[saddr] = now
        self._genuine.move_to_end(saddr)
        if len(self._genuine) > MOST_GENUINE:
            self._genuine.popitem(last=False)

    def forget(self, now: float, limit: int) -> None:
        """Forget hosts that showed that they are there too long ago, `limit` of them at most."""
        genuine = self._genuine
        for _ in range(min(limit, len(genuine))):
            longest_ago = next(iter(genuine))
            if genuine[longest_ago] + GENUINE_FOR > now:
                break
            del genuine[longest_ago]

    def may_have_entry(self, saddr: int) -> bool:
        """Say whether one more entry is within a host's limit."""
        return not self._max_entries or self.entries_of(saddr) < self._max_entries

    def may_be_given_entry(self, saddr: int) -> bool:
        """Say whether one more entry that the outside makes is within a host's limit.

        The outside may make half of the entries; the other half is for the host itself to make.
        """
        host = self._hosts.get(saddr)
        return host is None or not self._max_entries or host.given * 2 < self._max_entries

    def may_take_port(self, saddr: int) -> bool:
        """Say whether one more masquerade port is within a host's limit."""
        return not self._max_ports or self.ports_of(saddr) < self._max_ports

    def may_open(self, saddr: int, now: float) -> bool:
        """Say whether all limits let a host itself make one more entry, with one more port."""
        return (
            self.may_have_entry(saddr)
            and self.may_take_port(saddr)
            and self.may_make_entry(saddr, now)
        )

    def may_make_entry(self, saddr: int, now: float) -> bool:
        """Say whether a host itself may make one more entry by its rate, at `now` (seconds)."""
        host = self._hosts.get(saddr)
        return host is None or host.new is None or host.new.has_one(now)

    def ports_of(self, saddr: int) -> int:
        """Return how many masquerade ports a host holds, of all protocols."""
        host = self._hosts.get(saddr)
        return sum(host.ports.values()) if host else 0

    def ports_of_protocol(self, protocol: int, saddr: int) -> int:
        """Return how many masquerade ports of a protocol number a host holds."""
        host = self._hosts.get(saddr)
        return host.ports[protocol] if host else 0

    def entries_of(self, saddr: int) -> int:
        """Return how many entries a host has."""
        host = self._hosts.get(saddr)
        return host.entries if host else 0

    def roll_of(self, saddr: int) -> HostRoll:
        """Return the roll of a host's entries; that of a host without entries is empty."""
        host = self._hosts.get(saddr)
        return host.roll if host else HostRoll()

    def entered(self, ms: IpMasq, now: float) -> None:
        """Count a new entry; an entry that the outside made costs the host nothing of its rate."""
        host = self._hosts.get(ms.saddr) or self._begin(ms.saddr)
        host.entries += 1
        host.roll.join(ms)
        if ms.flags & OUTSIDE:
            host.given += 1
        elif host.new and ms.flags & NO_REPLY:
            host.new.take(now)

    def left(self, ms: IpMasq) -> None:
        """Take an entry out of the count; forget a host that has nothing left."""
        host = self._hosts[ms.saddr]
        host.entries -= 1
        host.roll.leave(ms)
        if host.over is not None:
            host.over.pop(ms, None)
        if ms.flags & OUTSIDE:
            host.given -= 1
        self._forget_if_bare(ms.saddr, host)

    def took_port(self, protocol: int, saddr: int) -> None:
        """Count a masquerade port for the host that took it."""
        host = self._hosts.get(saddr) or self._begin(saddr)
        host.ports[protocol] += 1

    def gave_port_back(self, protocol: int, saddr: int) -> None:
        """Take a masquerade port out of the count of the host that took it.

        The last host to have the port may be another host, and the host that took it may have no
        entry any more.
        """
        holder = self._hosts[saddr]
        holder.ports[protocol] -= 1
        self._forget_if_bare(saddr, holder)

    def is_over(self, ms: IpMasq) -> None:
        """Note that a session of a host is over."""
        host = self._hosts.get(ms.saddr)
        if host is not None:
            host.over = host.over or OrderedDict()
            host.over[ms] = None

    def is_open_again(self, ms: IpMasq) -> None:
        """Note that a session of a host is over no more."""
        host = self._hosts.get(ms.saddr)
        if host is not None and host.over is not None:
            host.over.pop(ms, None)

    def first_over(self, saddr: int, wanted: Callable[[IpMasq], bool]) -> IpMasq | None:
        """Return the oldest session of a host that is over and `wanted`; None where none is seen.

        At most `_LOOKS` sessions are looked at.
        """
        host = self._hosts.get(saddr)
        if host is None or host.over is None:
            return None
        over = host.over
        for _ in range(min(_LOOKS, len(over))):
            ms = next(iter(over))
            if wanted(ms):
                return ms
            over.move_to_end(ms)
        return None

    def dictionaries(self) -> Iterator[dict[Any, Any]]:
        """Yield what may become sparse when many hosts have gone (`memory.py`)."""
        yield self._hosts

    def begin_anew(self) -> dict[int, InsideHost]:
        """Forget all hosts, at once; returns what had them."""
        former, self._hosts = self._hosts, {}
        return former

    def _forget_if_bare(self, saddr: int, host: InsideHost) -> None:
        if not host.entries and not any(host.ports.values()):
            del self._hosts[saddr]
            host.roll.dissolve()

    def _begin(self, saddr: int) -> InsideHost:
        """Make the record of a host that has nothing yet."""
        host = self._hosts[saddr] = InsideHost(self._max_new)
        return host
