"""Identifications: unique where fragments could be mixed up, and left alone elsewhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import Masquerade
from nfmasq.engine.wire.identification import Identification
from tests.packets import (
    ACK,
    checksums_are_right,
    fragmentable,
    identification,
    number,
    query,
    source,
    tcp,
    udp,
)

HOSTS = ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
SERVERS = ["198.51.100.7", "198.51.100.8"]
GATEWAY = "203.0.113.1"

PACKETS = {
    "tcp": lambda host, server: tcp((host, 40000), (server, 80), ACK, b"data"),
    "udp": lambda host, server: udp((host, 40000), (server, 53), b"question"),
    "icmp": lambda host, server: query((host, 7), server),
}
sent = st.tuples(st.sampled_from(HOSTS), st.sampled_from(SERVERS), st.sampled_from(sorted(PACKETS)))


@given(st.lists(sent, max_size=60))
def test_no_two_packets_of_one_source_destination_and_protocol_have_the_same_identification(
    packets: list[tuple[str, str, str]],
) -> None:
    masquerade = Masquerade()
    seen = []
    for host, server, protocol in packets:
        packet = fragmentable(PACKETS[protocol](host, server))
        left = masquerade.ip_fw_masquerade(packet, number(GATEWAY), 0.0)
        assert left is not None
        assert checksums_are_right(left)
        seen.append((server, protocol, identification(left)))
    assert len(set(seen)) == len(seen)


def test_what_must_not_be_fragmented_keeps_its_own_identification() -> None:
    packet = udp(("10.0.0.2", 40000), ("198.51.100.7", 53))
    left = Masquerade().ip_fw_masquerade(packet, number(GATEWAY), 0.0)
    assert left is not None
    assert identification(left) == identification(packet)


def test_what_comes_in_keeps_its_own_identification() -> None:
    masquerade = Masquerade()
    question = udp(("10.0.0.2", 40000), ("198.51.100.7", 53))
    left = masquerade.ip_fw_masquerade(question, number(GATEWAY), 0.0)
    assert left is not None
    answer = fragmentable(udp(("198.51.100.7", 53), source(left)))
    came = masquerade.ip_fw_demasquerade(answer, 0.0)
    assert came is not None
    assert identification(came) == identification(answer)


def test_an_identification_comes_again_only_after_all_the_others() -> None:
    identifications = Identification()
    packet = fragmentable(udp((GATEWAY, 61000), ("198.51.100.7", 53)))
    given = {identification(identifications.renewed(packet)) for _ in range(65536)}
    assert len(given) == 65536


@given(st.integers(750, 1460), st.integers(2, 40))
def test_a_superpacket_has_an_identification_for_each_segment(size: int, segments: int) -> None:
    identifications = Identification()
    superpacket = fragmentable(udp((GATEWAY, 61000), ("198.51.100.7", 53), bytes(size * segments)))
    first = identification(identifications.renewed(superpacket))
    after = identification(identifications.renewed(superpacket))
    assert (after - first) % 65536 >= segments
