"""The TCP state table, cell by cell, and the timeouts of both profiles."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nfmasq.engine.table.states import NONE, STATE_UDP, STATES, state_after_in, state_after_out
from nfmasq.engine.table.timeouts import PROFILES

# The table as it stands in the design document.
DESIGN = """
| | NO | ES | SS | SR | FW | TW | CL | CW | LA | LI |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| in syn | SR | ES | ES | SR | SR | SR | SR | SR | SR | SR |
| in fin | CL | CW | SS | TW | TW | TW | CL | CW | LA | LI |
| in ack | CL | ES | SS | SR | FW | TW | CL | CW | CL | LI |
| in rst | CL | CL | CL | SR | CL | CL | CL | CL | LA | LI |
| out syn | SS | ES | SS | ES | SS | SS | SS | SS | SS | LI |
| out fin | TW | FW | SS | TW | FW | TW | CL | TW | LA | LI |
| out ack | ES | ES | SS | SR | FW | TW | CL | CW | LA | ES |
| out rst | CL | CL | SS | CL | CL | TW | CL | CL | CL | CL |
"""

# Where the engine departs from the design: what the inside acknowledges is established, after a
# reset and after a SYN from the outside; and nothing is that the inside has not acknowledged.
DEPARTURES = {
    ("in", "syn", "SYN_SENT"): "SYN_RECV",
    ("out", "ack", "CLOSE"): "ESTABLISHED",
    ("out", "ack", "SYN_RECV"): "ESTABLISHED",
}

ABBREVIATED = {
    "NO": "NONE",
    "ES": "ESTABLISHED",
    "SS": "SYN_SENT",
    "SR": "SYN_RECV",
    "FW": "FIN_WAIT",
    "TW": "TIME_WAIT",
    "CL": "CLOSE",
    "CW": "CLOSE_WAIT",
    "LA": "LAST_ACK",
    "LI": "LISTEN",
}

# The event of a segment is the first of these flags that is set.
FLAGS = {"rst": 0x04, "syn": 0x02, "fin": 0x01, "ack": 0x10}
EVERY_FLAGS_BYTE = range(256)

TIMEOUTS = {
    "linux-2.2": {
        "NONE": 1800,
        "ESTABLISHED": 900,
        "SYN_SENT": 120,
        "SYN_RECV": 60,
        "FIN_WAIT": 120,
        "TIME_WAIT": 120,
        "CLOSE": 10,
        "CLOSE_WAIT": 60,
        "LAST_ACK": 30,
        "LISTEN": 120,
        "UDP": 300,
        "ICMP": 60,
        "OTHER": 600,
        "DNS": 300,
    },
    "rfc": {
        "NONE": 1800,
        "ESTABLISHED": 7440,
        "SYN_SENT": 240,
        "SYN_RECV": 240,
        "FIN_WAIT": 7440,
        "TIME_WAIT": 240,
        "CLOSE": 240,
        "CLOSE_WAIT": 7440,
        "LAST_ACK": 240,
        "LISTEN": 240,
        "UDP": 300,
        "ICMP": 60,
        "OTHER": 600,
        "DNS": 30,
    },
}


def cells() -> list[tuple[str, str, str, str]]:
    """List every cell of the table: direction, event, state before, state after."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DESIGN.strip().splitlines()
    ]
    return [
        (*row[0].split(), ABBREVIATED[before], ABBREVIATED[after])  # type: ignore[misc]
        for row in rows
        for before, after in zip(head[1:], row[1:], strict=True)
    ]


def event(flags: int) -> str | None:
    return next((name for name, bit in FLAGS.items() if flags & bit), None)


def state_after(direction: str, before: str, flags: int) -> str:
    step = {"in": state_after_in, "out": state_after_out}[direction]
    return STATES[step(STATES.index(before), flags)]


def test_the_table_has_a_cell_for_each_direction_event_and_state() -> None:
    assert len({cell[:3] for cell in cells()}) == 2 * 4 * 10


@pytest.mark.parametrize(("direction", "name", "before", "after"), cells())
def test_each_cell_is_as_designed_whatever_lesser_flags_come_along(
    direction: str, name: str, before: str, after: str
) -> None:
    after = DEPARTURES.get((direction, name, before), after)
    for flags in EVERY_FLAGS_BYTE:
        if event(flags) == name:
            assert state_after(direction, before, flags) == after


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("before", ABBREVIATED.values())
def test_a_segment_without_any_of_these_flags_closes(direction: str, before: str) -> None:
    for flags in EVERY_FLAGS_BYTE:
        if event(flags) is None:
            assert state_after(direction, before, flags) == "CLOSE"


# -- a connection that opens is established -------------------------------------------

SYN, SYN_ACK, DATA = 0x02, 0x12, 0x18

Segment = tuple[str, int]

OPENED_BY_INSIDE: tuple[Segment, ...] = ("out", SYN), ("in", SYN_ACK), ("out", 0x10)
OPENED_BY_OUTSIDE: tuple[Segment, ...] = ("in", SYN), ("out", SYN_ACK), ("in", 0x10)
HANDSHAKES = (
    OPENED_BY_INSIDE,
    OPENED_BY_OUTSIDE,
    # Both sides open at once, or the first SYN from the inside met a closed door.
    (("out", SYN), *OPENED_BY_OUTSIDE),
    (("in", SYN), *OPENED_BY_INSIDE),
    (("out", SYN), ("in", SYN), ("out", SYN_ACK), ("in", SYN_ACK)),
    (("out", SYN), ("in", SYN), ("in", SYN_ACK), ("out", SYN_ACK)),
    (("in", SYN), ("out", SYN), ("in", SYN_ACK), ("out", SYN_ACK)),
)


def states_that_traffic_reaches() -> list[str]:
    """List the states of TCP that segments lead to, from those in which an entry begins."""
    reached = ["NONE", "LISTEN"]
    for before in reached:
        for direction in ("in", "out"):
            for flags in EVERY_FLAGS_BYTE:
                after = state_after(direction, before, flags)
                reached += [after] * (after not in reached)
    return reached


def with_one_sent_again(handshake: Sequence[Segment]) -> list[list[Segment]]:
    """List the ways in which no segment, or one, is sent again at any time before the data."""
    return [list(handshake)] + [
        [*handshake[:later], handshake[at], *handshake[later:]]
        for at in range(len(handshake))
        for later in range(at + 1, len(handshake) + 1)
    ]


@pytest.mark.parametrize("handshake", HANDSHAKES)
@pytest.mark.parametrize("before", states_that_traffic_reaches())
def test_whatever_went_before_a_handshake_and_data_both_ways_establish(
    before: str, handshake: Sequence[Segment]
) -> None:
    """RFC 5382 REQ-5 gives every established connection 2 hours and 4 minutes."""
    for segments in with_one_sent_again(handshake):
        for data in ("out", "in"), ("in", "out"):
            state = before
            for direction, flags in [*segments, *((way, DATA) for way in data)]:
                state = state_after(direction, state, flags)
            assert state == "ESTABLISHED", (segments, data)


def test_a_syn_from_the_outside_does_not_cut_a_half_closed_connection_short() -> None:
    """It may be late, or forged (RFC 5961): the inside acknowledges what it has, and goes on."""
    for flags in (SYN, SYN_ACK):
        state = state_after("in", "FIN_WAIT", flags)
        for _ in range(2):
            state = state_after("in", state_after("out", state, 0x10), DATA)
        assert state == "ESTABLISHED"


@pytest.mark.parametrize("profile", TIMEOUTS)
def test_the_profile_has_the_designed_timeout_for_each_state(profile: str) -> None:
    assert dict(zip(STATES, PROFILES[profile].table(), strict=True)) == TIMEOUTS[profile]


def test_the_default_profile_is_no_shorter_than_the_rfcs_ask() -> None:
    shortest = PROFILES["rfc"]
    minutes = 60
    assert shortest.udp >= 5 * minutes  # RFC 4787 REQ-5c
    assert shortest.icmp >= 1 * minutes  # RFC 5508 REQ-2
    assert shortest.tcp_established >= 124 * minutes  # RFC 5382 REQ-5, also half closed:
    assert min(shortest.tcp_fin_wait, shortest.tcp_close_wait) >= 124 * minutes
    assert min(shortest.table()[NONE:STATE_UDP]) >= 4 * minutes  # RFC 5382 REQ-5, 7857 section 2


def test_there_are_no_other_profiles() -> None:
    assert PROFILES.keys() == TIMEOUTS.keys()
