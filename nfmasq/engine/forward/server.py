"""A server inside that outside clients reach through a forwarded port.

Its sessions are counted by the states of their entries, whenever a state changes. A session is
`active` while it is established (over UDP always), and `inactive` otherwise.
"""

from __future__ import annotations

from nfmasq.engine.table.states import ESTABLISHED, STATE_DNS, STATE_UDP
from nfmasq.engine.wire.address import dotted

_ACTIVE = frozenset({ESTABLISHED, STATE_UDP, STATE_DNS})


class Server:
    """A server behind a forward: its address in host order, its port for the forward's first port.

    `alive` is what the health checks found. `weight` is 0 while the server is drained, and may
    differ from the weight that was `configured`. `active` and `inactive` are how many sessions
    there are with the server, `total` is how many there have been.
    """

    __slots__ = (
        "active",
        "address",
        "alive",
        "configured",
        "inactive",
        "port",
        "total",
        "weight",
    )

    def __init__(self, address: int, port: int, weight: int = 1) -> None:
        self.address = address
        self.port = port
        self.weight = weight
        self.configured = weight
        self.alive = True
        self.active = 0
        self.inactive = 0
        self.total = 0

    def __str__(self) -> str:
        return f"{dotted(self.address)}:{self.port}"

    def configure(self, weight: int) -> None:
        """Take over the weight of a new configuration.

        Where the configuration has not changed it, a weight that was set since is kept.
        """
        if weight != self.configured:
            self.weight = self.configured = weight

    def come_back(self, weight: int) -> None:
        """Serve again, after having been in no forward: alive, with the weight of a configuration.

        The sessions that are left of the time before are counted on.
        """
        self.weight = self.configured = weight
        self.alive = True

    @property
    def has_sessions(self) -> bool:
        """Whether there are sessions with the server."""
        return self.active + self.inactive > 0

    @property
    def takes_new(self) -> bool:
        """Whether the server may be given another session."""
        return self.alive and self.weight > 0

    def entered(self, state: int) -> None:
        """Count a session that is in a state from now on."""
        if state in _ACTIVE:
            self.active += 1
        else:
            self.inactive += 1

    def left(self, state: int) -> None:
        """Take a session that was in a state out of the count."""
        if state in _ACTIVE:
            self.active -= 1
        else:
            self.inactive -= 1
