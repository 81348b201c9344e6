"""A server inside that outside clients reach through a forwarded port.

Its sessions are counted by the states of their entries, as these change: `active` while
established (over UDP always), `inactive` else.
"""

from __future__ import annotations

from nfmasq.engine.table.states import ESTABLISHED, OPENING, OVER, STATE_UDP
from nfmasq.engine.wire.address import dotted

_ACTIVE = frozenset({ESTABLISHED, STATE_UDP})


class Server:
    """Its address in host order, and its port for the first port of its forward.

    `alive` is what the health checks found; `weight` is 0 while it is drained, and may be
    another than the one that was `configured`.
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
        """Have another weight in the configuration; the same leaves one set since as it is."""
        if weight != self.configured:
            self.weight = self.configured = weight

    @property
    def takes_new(self) -> bool:
        """Whether it may be given another session."""
        return self.alive and self.weight > 0

    def is_given_up(self, state: int) -> bool:
        """Whether a SYN for a session in that state begins another, with whichever server is next.

        It does where the session is over, for a client may well use a port again; and where it has
        not begun, and the server is dead by now.
        """
        return state in OVER or (state in OPENING and not self.alive)

    def entered(self, state: int) -> None:
        """Count a session in that state."""
        if state in _ACTIVE:
            self.active += 1
        else:
            self.inactive += 1

    def left(self, state: int) -> None:
        """Count a session no more that was in that state."""
        if state in _ACTIVE:
            self.active -= 1
        else:
            self.inactive -= 1
