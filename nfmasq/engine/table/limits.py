"""What one inside host may have, so that no host can take what the others need.

Counted for each inside host: its entries, and the masquerade ports that it holds. Limited, where a
limit is set: both, and the new entries a second, by a token bucket that holds one second's
worth. Where nothing is limited the counts still tell who has most when the ports run out.
"""

from __future__ import annotations

from nfmasq.engine.table.entry import NO_REPLY, OUTSIDE, IpMasq


class TokenBucket:
    """At most `rate` events a second in the long run, and `burst` at once."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = float("-inf")

    def has_one(self, now: float) -> bool:
        """Whether one more event is allowed at `now` (seconds)."""
        if now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now
        return self._tokens >= 1

    def take(self, now: float) -> bool:
        """Whether one more event is allowed at `now`; if so, it is counted."""
        allowed = self.has_one(now)
        self._tokens -= allowed
        return allowed


class InsideHost:
    """What an inside host has: entries, masquerade ports, and a bucket for new entries.

    Of its entries, the outside made those `given`.
    """

    __slots__ = ("entries", "given", "new", "ports")

    def __init__(self, max_new: int) -> None:
        self.entries = 0
        self.given = 0
        self.ports = 0
        self.new: TokenBucket | None = None
        self.limit(max_new)

    def limit(self, max_new: int) -> None:
        """Begin with a full bucket of that limit."""
        self.new = TokenBucket(max_new, max_new) if max_new else None


class InsideHosts:
    """All inside hosts that have entries or ports, by address. A limit of 0 is none.

    `are_limited` tells whether there is any limit.
    """

    def __init__(self) -> None:
        self._max_entries = 0
        self._max_ports = 0
        self._max_new = 0
        self.are_limited = False
        self._hosts: dict[int, InsideHost] = {}
        self._port_holder: dict[int, int] = {}

    def limit(self, max_entries: int, max_ports: int, max_new: int) -> None:
        """Set the limits. Who has more than that loses nothing, and gets no more."""
        self._max_entries = max_entries
        self._max_ports = max_ports
        self.are_limited = bool(max_entries or max_ports or max_new)
        if max_new != self._max_new:
            self._max_new = max_new
            for host in self._hosts.values():
                host.limit(max_new)

    def may_have_entry(self, saddr: int) -> bool:
        """Whether one more entry is within the limit."""
        return not self._max_entries or self.entries_of(saddr) < self._max_entries

    def may_be_given_entry(self, saddr: int) -> bool:
        """The same for an entry that the outside makes: half of them are the host's own to make."""
        host = self._hosts.get(saddr)
        return host is None or not self._max_entries or host.given * 2 < self._max_entries

    def may_take_port(self, saddr: int) -> bool:
        """Whether one more masquerade port is within the limit."""
        return not self._max_ports or self.ports_of(saddr) < self._max_ports

    def may_open(self, saddr: int, now: float) -> bool:
        """Whether all limits let a host itself make one more entry, with a port of its own."""
        return (
            self.may_have_entry(saddr)
            and self.may_take_port(saddr)
            and self.may_make_entry(saddr, now)
        )

    def may_make_entry(self, saddr: int, now: float) -> bool:
        """Whether one more entry that the host itself makes is within the rate."""
        host = self._hosts.get(saddr)
        return host is None or host.new is None or host.new.has_one(now)

    def ports_of(self, saddr: int) -> int:
        """How many masquerade ports a host holds."""
        host = self._hosts.get(saddr)
        return host.ports if host else 0

    def entries_of(self, saddr: int) -> int:
        """How many entries a host has."""
        host = self._hosts.get(saddr)
        return host.entries if host else 0

    def entered(self, ms: IpMasq, now: float) -> None:
        """Count a new entry; one that the outside made costs the host nothing of its rate."""
        host = self._hosts.get(ms.saddr) or self._begin(ms.saddr)
        host.entries += 1
        if ms.flags & OUTSIDE:
            host.given += 1
        elif host.new and ms.flags & NO_REPLY:
            host.new.take(now)

    def left(self, ms: IpMasq) -> None:
        """Count an entry no more; a host that has nothing left is forgotten."""
        host = self._hosts[ms.saddr]
        host.entries -= 1
        if ms.flags & OUTSIDE:
            host.given -= 1
        self._forget_if_bare(ms.saddr, host)

    def took_port(self, key: int, saddr: int) -> None:
        """Count a masquerade port, known by its key in the m-table, with the host that took it."""
        self._port_holder[key] = saddr
        host = self._hosts.get(saddr) or self._begin(saddr)
        host.ports += 1

    def gave_port_back(self, key: int) -> None:
        """Count a port no more, with whoever took it: the last one to have it may be another host.

        The one that took it may even have no entry any more.
        """
        saddr = self._port_holder.pop(key)
        holder = self._hosts[saddr]
        holder.ports -= 1
        self._forget_if_bare(saddr, holder)

    def _forget_if_bare(self, saddr: int, host: InsideHost) -> None:
        if not host.entries and not host.ports:
            del self._hosts[saddr]

    def _begin(self, saddr: int) -> InsideHost:
        """Make the record of a host that has nothing yet."""
        host = self._hosts[saddr] = InsideHost(self._max_new)
        return host
