"""Malformed packets: what a broken or hostile neighbour may send, made from well-formed ones.

A fault is a function that takes a well-formed IPv4 packet and the source of randomness, and
returns malformed packets, mostly one. Afterwards nearly all packets get the right IP header
checksum, since the kernel drops packets with a wrong one before nfmasq sees them. The same seed
gives the same packets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from random import Random

from tests.packets import header_length, internet_checksum

MTU = 1500

ODD_ADDRESSES = [
    IPv4Address(address).packed
    for address in (
        *("0.0.0.0", "10.77.0.1", "10.77.0.11", "10.77.0.255", "127.0.0.1", "192.0.2.1"),
        *("198.51.100.1", "198.51.100.2", "203.0.113.12", "224.0.0.1", "255.255.255.255"),
    )
]
IP_OPTIONS = [
    bytes([1, 1, 1, 0]),  # no operation, end
    bytes([7, 11, 4, *bytes(8), 0]),  # record route
    bytes([68, 12, 5, 1, *bytes(8)]),  # timestamp
    bytes([131, 7, 4, 198, 51, 100, 1, 0]),  # loose source route
    bytes([7, 3, 4, 0]),  # record route without room
    bytes([7, 255, 4, 0]),  # longer than the header
    bytes([68, 0, 0, 0]),  # timestamp of length 0
    bytes([148, 4, 0, 0]),  # router alert
]


def malformed(samples: Sequence[bytes], number: int, seed: int) -> Iterator[bytes]:
    """Yield at least `number` malformed packets, each 1 to `MTU` bytes long."""
    random = Random(seed)
    made = 0
    while made < number:
        fault = random.choice(FAULTS)
        for packet in fault(bytearray(random.choice(samples)), random):
            if random.random() < 0.95:
                _mend_header_checksum(packet)
            yield bytes(packet[:MTU])
            made += 1


def _mend_header_checksum(packet: bytearray) -> None:
    header = bytes(packet[: header_length(bytes(packet[:1]))])
    if len(header) >= 20:
        blank = header[:10] + bytes(2) + header[12:]
        packet[10:12] = internet_checksum(blank).to_bytes(2, "big")


# ---- faults -------------------------------------------------------------------------------------


def flipped_bits(packet: bytearray, random: Random) -> list[bytearray]:
    for _ in range(random.randint(1, 8)):
        packet[random.randrange(len(packet))] ^= 1 << random.randrange(8)
    return [packet]


def cut(packet: bytearray, random: Random) -> list[bytearray]:
    del packet[random.randint(1, len(packet)) :]
    return [packet]


def cut_and_declared(packet: bytearray, random: Random) -> list[bytearray]:
    """Cut a packet behind its IP header, and have the total length say so."""
    del packet[random.randint(20, len(packet)) :]
    return [_with_total_length(packet)]


def total_length(packet: bytearray, random: Random) -> list[bytearray]:
    """Set any total length, also shorter than the header; bytes beyond it are padding."""
    packet[2:4] = random.randrange(len(packet) + 2).to_bytes(2, "big")
    return [packet]


def length_of_header(packet: bytearray, random: Random) -> list[bytearray]:
    packet[0] = packet[0] & 0xF0 | random.randrange(16)
    return [packet]


def version(packet: bytearray, random: Random) -> list[bytearray]:
    packet[0] = packet[0] & 0x0F | random.randrange(16) << 4
    return [packet]


def fragment_field(packet: bytearray, random: Random) -> list[bytearray]:
    packet[4:8] = random.randbytes(4)
    return [packet]


def tiny_fragments(packet: bytearray, random: Random) -> list[bytearray]:
    """Spread the transport header over fragments of 8 bytes, which come in any order."""
    return _fragments(packet, random, [(at, 8) for at in range(0, len(packet) - 20, 8)])


def overlapping_fragments(packet: bytearray, random: Random) -> list[bytearray]:
    end = len(packet) - 20
    starts = [at // 8 * 8 for at in random.choices(range(end + 1), k=3)]
    return _fragments(packet, random, [(at, random.randint(1, end + 8)) for at in (0, *starts)])


def _fragments(packet: bytearray, random: Random, pieces: list[tuple[int, int]]) -> list[bytearray]:
    identification = random.randbytes(2)
    fragments = []
    for start, size in random.sample(pieces, len(pieces)):
        fragment = packet[:20] + packet[20 + start : 20 + start + size]
        more = 0x2000 if 20 + start + size < len(packet) else 0
        fragment[4:8] = identification + (more | start // 8).to_bytes(2, "big")
        fragments.append(_with_total_length(fragment))
    return fragments


def ip_options(packet: bytearray, random: Random) -> list[bytearray]:
    options = random.choice([*IP_OPTIONS, random.randbytes(4 * random.randint(1, 10))])
    packet[0] = 0x45 + len(options) // 4
    packet[20:20] = options
    return [_with_total_length(packet)]


def source(packet: bytearray, random: Random) -> list[bytearray]:
    packet[12:16] = random.choice(ODD_ADDRESSES)
    return [packet]


def destination(packet: bytearray, random: Random) -> list[bytearray]:
    packet[16:20] = random.choice(ODD_ADDRESSES)
    return [packet]


def hop_limit(packet: bytearray, random: Random) -> list[bytearray]:
    packet[8] = random.randrange(3)
    return [packet]


def protocol(packet: bytearray, random: Random) -> list[bytearray]:
    """Set another protocol: for most protocols the rest of the packet is garbage."""
    packet[9] = random.choice([0, 1, 2, 4, 6, 17, 33, 41, 47, 50, 51, 108, 132, 136, 255])
    return [packet]


def garbage(packet: bytearray, random: Random) -> list[bytearray]:
    """Replace everything behind the IP header by random bytes."""
    packet[20:] = random.randbytes(random.randint(0, 200))
    return [_with_total_length(packet)]


def transport_fields(packet: bytearray, random: Random) -> list[bytearray]:
    """Write odd values into the transport header.

    They make ports of 0, TCP flags that never go together, offsets, lengths, types and codes.
    """
    for _ in range(random.randint(1, 3)):
        at = 20 + random.randrange(min(20, len(packet) - 20))
        packet[at] = random.choice([0, 1, 0x0F, 0x3F, 0xF0, 0xFF, random.randrange(256)])
    return [packet]


def icmp_error(packet: bytearray, random: Random) -> list[bytearray]:
    """Make an ICMP error about a packet that is cut, broken or garbage.

    The checksum of the error itself is right most times.
    """
    (quote,) = random.choice([cut, flipped_bits, length_of_header, garbage, protocol])(
        _turned_round(packet), random
    )
    kind = random.choice([3, 4, 5, 11, 12])
    message = bytearray([kind, random.randrange(16), 0, 0]) + random.randbytes(4) + quote[:576]
    if random.random() < 0.9:
        message[2:4] = internet_checksum(bytes(message)).to_bytes(2, "big")
    packet[9] = 1
    packet[20:] = message
    return [_with_total_length(packet)]


def _turned_round(packet: bytearray) -> bytearray:
    """Return a packet in the other direction, between the same endpoints."""
    ports = packet[22:24] + packet[20:22]
    return packet[:12] + packet[16:20] + packet[12:16] + ports + packet[24:]


def _with_total_length(packet: bytearray) -> bytearray:
    packet[2:4] = len(packet).to_bytes(2, "big")
    return packet


FAULTS: list[Callable[[bytearray, Random], list[bytearray]]] = [
    flipped_bits,
    cut,
    cut_and_declared,
    total_length,
    length_of_header,
    version,
    fragment_field,
    tiny_fragments,
    overlapping_fragments,
    ip_options,
    source,
    destination,
    hop_limit,
    protocol,
    garbage,
    transport_fields,
    icmp_error,
]
