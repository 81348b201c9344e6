"""All forwarded and triggered ports, found by the destination of a packet from the outside."""

from __future__ import annotations

from collections.abc import Sequence

from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.trigger import Trigger
from nfmasq.engine.table.entry import IpMasq


class Forwards:
    """All forwards and triggers, found by the destination of a packet.

    `firing` has the (protocol, outside port) of new sessions that open triggered ports.
    """

    def __init__(self, forwards: Sequence[Forward] = (), triggers: Sequence[Trigger] = ()) -> None:
        self.all = tuple(forwards)
        self.triggers = tuple(triggers)
        self.firing = {
            (trigger.fired_by[0], port)
            for trigger in triggers
            for ports in trigger.fired_by[1]
            for port in ports
        }
        self._by_port: dict[tuple[int, int], list[Forward]] = {}
        for forward in (*forwards, *triggers):
            for port in forward.ports:
                self._by_port.setdefault((forward.protocol, port), []).append(forward)

    def __bool__(self) -> bool:
        return bool(self._by_port)

    def go_on_from(self, before: Forwards) -> None:
        """Take the place of `before`; what listens at the same place goes on as it was there."""
        forwards = {forward.place: forward for forward in before.all}
        for forward in self.all:
            if forward.place in forwards:
                forward.go_on_from(forwards[forward.place])
        triggers = {trigger.place: trigger for trigger in before.triggers}
        for trigger in self.triggers:
            if trigger.place in triggers:
                trigger.stay_open_as(triggers[trigger.place])

    def fire(self, ms: IpMasq, now: float) -> None:
        """Have a new session from the inside open the ports that it triggers, at `now` seconds."""
        for trigger in self.triggers:
            if trigger.is_fired_by(ms):
                trigger.fire(ms, now)

    def find(self, protocol: int, address: int, port: int) -> Forward | None:
        """Return the forward or trigger that listens on an address and a port; None: there is none.

        A forward on this address goes before a forward on any address.
        """
        found = None
        for forward in self._by_port.get((protocol, port), ()):
            if forward.listen == address:
                return forward
            if forward.listen is None:
                found = forward
        return found
