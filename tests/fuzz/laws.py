"""What is true of each packet that leaves, and of a masquerade whose entries have all ended."""

from __future__ import annotations

from nfmasq.engine.wire.protocols import PROTOCOLS
from tests.engine.two_ways import Step, Way
from tests.packets import checksums_are_right, header_length, quoted

LEAPS, LEAP = 6, 3 * 24 * 3600
"""Leaps of time, in seconds, after which nothing can be left: no entry waits for longer."""

_INSIDE = 10
_CHECKED = 1, 6, 17, 33, 136


def of_a_packet(step: Step, sent: object) -> None:
    """Assert what is true of the packet that comes of a step."""
    if step.what not in ("out", "into", "own", "hairpin", "hairpin_source", "hairpin_own_error"):
        return
    packet, *rest = step.args
    if isinstance(sent, list):
        sent = sent[-1]
    if not isinstance(sent, bytes):
        return
    assert step.what != "out" or sent is not packet, "a packet from the inside passes as it is"
    if sent is packet:
        return
    if step.what == "out":
        has_no_inside_address(sent)
    assert int.from_bytes(sent[2:4], "big") == len(sent)
    unsummed = bool(rest and rest[-1])
    if not unsummed and _is_right(packet):
        assert _is_right(sent), "a checksum was right, and is wrong now"


def has_no_inside_address(packet: bytes) -> None:
    """Assert that a packet that leaves by the outside tells no inside address in its headers."""
    assert packet[12] != _INSIDE, "an inside source leaves"
    is_error = packet[9] == 1 and packet[header_length(packet)] in (3, 4, 5, 11, 12)
    if is_error and len(quoted(packet)) >= 20:
        assert quoted(packet)[16] != _INSIDE, "an error tells an inside address"


def _is_right(packet: bytes) -> bool:
    is_whole = len(packet) >= 28 and packet[0] >> 4 == 4 and header_length(packet) >= 20
    if not is_whole or int.from_bytes(packet[2:4], "big") != len(packet):
        return False
    least = header_length(packet) + (20 if packet[9] == 6 else 8)
    return len(packet) >= least and not packet[6] & 0x3F and checksums_are_right(packet)


def at_the_end(way: Way) -> None:
    """Let all entries expire; asserts that they do, and that all they had is given back."""
    for _ in range(LEAPS):
        while way.take(Step(LEAP, "sweep", (10_000,))) not in (False, None):
            pass
        if not way.entries():
            break
    sessions = way.masq.sessions
    assert sessions.entries() == []
    assert not any(sessions.entry_counts().values())
    for protocol in PROTOCOLS:
        free = {sessions.choice.ports.free(protocol), len(sessions.choice.ports.ports)}
        assert len(free) == 1, "a port is not given back"
    assert sessions.cached.flows == 0
    assert not way.masq.hairpins.sessions()
    servers = [server for forward in sessions.forwards.all for server in forward.servers]
    assert not any(server.active or server.inactive for server in servers)
    left = [each for each in sessions._dictionaries() if each]
    assert not left, left
