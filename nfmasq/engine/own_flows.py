"""The gateway's own flows: what the gateway itself sends from a port that the masquerade uses.

A resolver on the gateway draws its ports from all there are, and a ping its identifier. So a flow
of the gateway may have the number of a masquerade port, and an inside endpoint may have a session
with the same outside endpoint from this port. The answers to both would look alike. And a time
server on the gateway may send from a port that is forwarded to the inside.

So the gateway is treated like an inside endpoint. A flow of its own from a masquerade port or a
forwarded port gets an entry, whose inside address is the masquerade address itself. As a rule the
flow keeps its port: its entry only keeps others from being given the session that is in use. Where
an inside endpoint was first, the flow gets another port, like any flow.

The rules send the packets here (security OUTPUT). Nobody's session can be mistaken for the
gateway's flows from other ports.
"""

from __future__ import annotations

from nfmasq.engine.inbound import Inbound, is_untouched_own
from nfmasq.engine.sessions import Sessions
from nfmasq.engine.table.entry import NO_REPLY, OWN, IpMasq
from nfmasq.engine.wire.header import ICMP_QUERIES, Header
from nfmasq.engine.wire.protocols import ICMP, TCP
from nfmasq.engine.wire.rewrite import rewrite_source
from nfmasq.engine.wire.segment import read_segment


class OwnFlows:
    """Sends packets of the gateway's own flows."""

    def __init__(self, sessions: Sessions, inbound: Inbound) -> None:
        self._sessions = sessions
        self._inbound = inbound

    def masquerade(self, packet: bytes, header: Header) -> bytes | None:
        """Rewrite a packet that the gateway itself sends; the same object where nothing changes.

        None where an inside endpoint has the packet's session and no other port is free. The caller
        holds the lock.
        """
        sessions = self._sessions
        saddr, sport = header.saddr, header.sport
        if saddr not in self._inbound.maddrs or not self._may_be_mistaken(header):
            return packet
        dport = 0 if header.protocol == ICMP else header.dport
        ms = sessions.tables.ip_masq_out_get_unlocked(
            header.protocol, saddr, sport, header.daddr, dport
        )
        if ms is None and (header.is_reset or header.is_second_segment):
            return packet  # anybody outside can have the gateway answer: this makes no entry
        if ms is None:
            ends = saddr, sport, header.daddr, dport
            keeps_port = sessions.choice.may_use(header.protocol, saddr, sport, ends, OWN)
            mport = sport if keeps_port else 0
            ms = sessions.ip_masq_new(header.protocol, saddr, mport, *ends, NO_REPLY | OWN)
            if ms is None:
                return packet if keeps_port else None
        refreshed = True
        try:
            sent, refreshed = self._send(ms, packet, header)
            return sent
        finally:
            sessions.give_back(ms, refreshed)

    def _may_be_mistaken(self, header: Header) -> bool:
        """Say whether the answer to a packet could be taken for a packet of another session."""
        if header.protocol == ICMP and header.kind not in ICMP_QUERIES:
            return False
        sessions = self._sessions
        forward = sessions.forwards.find(header.protocol, header.saddr, header.sport)
        return header.sport in sessions.choice.ports or forward is not None

    def _send(self, ms: IpMasq, packet: bytes, header: Header) -> tuple[bytes, bool]:
        """Return a packet as it leaves, and whether it restarts its entry's timer."""
        state, believed = ms.state, True
        if header.protocol == TCP:
            segment = read_segment(packet, header.transport)
            believed = self._sessions.follow(ms, segment, outbound=True)
        ms.packets_out += 1
        ms.bytes_out += len(packet)
        refreshed = believed and (ms.state != state or not header.is_reset)
        if is_untouched_own(ms):
            return packet, refreshed
        return bytes(rewrite_source(packet, header, ms.maddr, ms.mport)), refreshed
