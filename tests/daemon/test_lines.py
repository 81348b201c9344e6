"""The lines in which packets wait: nobody waits behind another host's packets."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.daemon.lines import LONG, PATIENCE, TURN, Lines


@given(
    st.lists(
        st.tuples(st.just("join"), st.integers(0, 4), st.integers(0, 70_000))
        | st.tuples(st.just("take"), st.integers(0, 9), st.just(0)),
        max_size=200,
    )
)
def test_each_host_s_packets_keep_their_order_and_none_is_lost(
    steps: list[tuple[str, int, int]],
) -> None:
    lines = Lines(64)
    model: defaultdict[int, deque[bytes]] = defaultdict(deque)
    for number, (step, of, size) in enumerate(steps):
        if step == "join":
            message = bytes([of]) + number.to_bytes(4, "big") + bytes(size)
            if lines.join(of, message):
                model[of].append(message)
        else:
            taken = lines.take(of)
            assert len(taken) == min(of, sum(map(len, model.values())))
            for message in taken:
                assert model[message[0]].popleft() == message
        assert lines.waiting == sum(map(len, model.values()))
    rest = lines.take(1000)
    assert len(rest) == sum(map(len, model.values()))
    assert not lines.take(1)


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 40), min_size=1), st.integers(1, 50))
def test_hosts_get_equal_shares(waiting: dict[int, int], count: int) -> None:
    lines = Lines(10_000)
    for host, packets in waiting.items():
        for _ in range(packets):
            assert lines.join(host, bytes([host]))
    got = Counter(message[0] for message in lines.take(count))
    for host, packets in waiting.items():
        assert got[host] == packets or got[host] >= max(got.values()) - TURN


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_whoever_has_nothing_waiting_comes_first(flood: int, before: int) -> None:
    lines = Lines(10_000)
    for _ in range(flood):
        lines.join(1, b"flood")
    lines.take(min(before, flood - 1))
    assert lines.join(2, b"quiet")
    assert b"quiet" in lines.take(TURN + 1)


@given(st.integers(1, 20), st.integers(100, 1000))
def test_there_is_room_for_another_host_however_many_flood(hosts: int, room: int) -> None:
    lines = Lines(room)
    for _ in range(room):
        for host in range(hosts):
            lines.join(host, b"flood")
    assert lines.waiting < room
    share = room // (hosts + 1)
    assert sum(lines.join(hosts, b"quiet") for _ in range(share)) >= share // 2
    assert lines.waiting <= room


def test_a_superpacket_takes_more_room_than_a_packet() -> None:
    small, large = Lines(100), Lines(100)
    packets = sum(small.join(1, bytes(100)) for _ in range(100))
    superpackets = sum(large.join(1, bytes(65_000)) for _ in range(100))
    assert superpackets * 5 < packets


def test_a_host_crowds_the_others_when_its_line_never_ends() -> None:
    lines = Lines(1000)

    def pass_time(seconds: float, comes: int, goes: int) -> None:
        for _ in range(20):
            lines.now += seconds / 20
            for _ in range(comes):
                lines.join(1, b"")
            lines.take(goes)

    for _ in range(20):
        pass_time(PATIENCE * 2, 2 * LONG, 2 * LONG)
    assert not lines.crowding, "spurts"
    pass_time(PATIENCE * 2, LONG // 2, LONG // 4)
    assert lines.crowding == {1}
