"""How servers and clients read what leaves the gateway: more tolerantly than any single program.

Each function returns the addresses that somebody may find announced in a text, as ints in host
order. Programs differ in what they throw away, in where they end a line, and in how they read
numbers; all ways are tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv6Address
from itertools import product
from socket import inet_aton

Reading = Callable[[bytes], bytes]


def as_it_is(text: bytes) -> bytes:
    return text


def without_telnet(text: bytes) -> bytes:
    """Take out Telnet's commands as the FTP daemon of BSD does."""
    return re.sub(rb"\xff(?:[\xfb-\xfe].|.)", b"", text, flags=re.DOTALL)


def without_subnegotiations(text: bytes) -> bytes:
    """Take out Telnet's commands as RFC 854 has them."""
    return without_telnet(re.sub(rb"\xff\xfa.*?\xff\xf0", b"", text, flags=re.DOTALL))


def without_zeros(text: bytes) -> bytes:
    return text.replace(b"\0", b"")


def printable(text: bytes) -> bytes:
    return bytes(byte for byte in text if 32 <= byte < 127 or byte in b"\r\n\t\1")


READINGS: tuple[Reading, ...] = (
    as_it_is,
    without_telnet,
    without_subnegotiations,
    without_zeros,
    printable,
    lambda text: printable(without_telnet(text)),
)
_NUMBERS = {b"PORT": 6, b"LPRT": 9}
ENDS = rb"\n", rb"\r\n", rb"\r\n|\r|\n"


def ways(text: bytes) -> Iterator[list[bytes]]:
    """Yield the lines of a text in all ways."""
    for reading, end in product(READINGS, ENDS):
        yield re.split(end, reading(text))


def numbers(text: bytes, base: int) -> list[int]:
    """Read all numbers; `base` 0 takes 0x for hexadecimal and 0 for octal, as C does."""
    found = []
    for number in re.findall(rb"0x[0-9a-fA-F]+|\d+", text):
        octal = base == 0 and number.startswith(b"0") and number.isdigit()
        with suppress(ValueError):
            found.append(int(number, 8 if octal else base))
    return found


def of_four(text: bytes, most: int | None = None) -> Iterator[int]:
    """Yield the addresses that four of the first `most` numbers may be, cut to a byte each."""
    for base in (10, 0):
        cut = [number & 255 for number in numbers(text, base)[:most]]
        for n in range(len(cut) - 3):
            yield int.from_bytes(bytes(cut[n : n + 4]), "big")


def of_words(text: bytes) -> Iterator[int]:
    """Yield the addresses of IPv4 and IPv6 that stand between marks."""
    for word in re.split(rb"[^0-9a-fA-Fx.:]+", text):
        with suppress(OSError, UnicodeDecodeError):
            yield int.from_bytes(inet_aton(word.decode()), "big")
        with suppress(ValueError):
            yield int(IPv6Address(word.decode())) & 0xFFFFFFFF
        with suppress(ValueError):
            yield int(word) & 0xFFFFFFFF


def announced_by_commands(text: bytes) -> set[int]:
    """Return what a server may take for the address of PORT, EPRT or LPRT."""
    found: set[int] = set()
    for lines in ways(text):
        for line in lines:
            command = re.match(rb'[\s"\\]*(PORT|EPRT|LPRT)(.*)', line, re.I | re.S)
            if command:
                most = _NUMBERS.get(command[1].upper(), 0)
                found.update(of_four(command[2], most))
                found.update(of_words(command[2].partition(b"\n")[0]))
    return found


def announced_by_replies(text: bytes) -> set[int]:
    """Return what a client may take for the address of a reply 227, 228 or 229."""
    found: set[int] = set()
    for lines in ways(text):
        for code, reply in replies(lines):
            if code in (b"227", b"228", b"229"):
                found.update(of_four(reply), of_words(reply))
    return found


def replies(lines: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the code of each reply, and what follows the code, in all of its lines."""
    waiting = iter(lines)
    for line in waiting:
        line = line.lstrip()
        code, reply = line[:3], line[3:]
        if line[3:4] == b"-":
            for more in waiting:
                reply += b"\n" + more
                if more[:4] == code + b" ":
                    break
        yield code, reply


def offered(text: bytes) -> set[int]:
    """Return what a client may take for the address of a DCC offer."""
    found: set[int] = set()
    for reading in (as_it_is, without_zeros, printable, without_quotes):
        for line in re.split(rb"[\r\n]", reading(text)):
            for message in line.split(b"\1")[1:]:
                offer = re.match(rb"\s*DCC\s*(.*)", message, re.I | re.S)
                kind = offer[1].split(b" ")[0].upper() if offer else b""
                if offer and kind not in (b"REJECT", b"RESUME", b"ACCEPT"):
                    found.update(of_words(offer[1]))
    return found


def without_quotes(text: bytes) -> bytes:
    """Take out both of CTCP's ways of quoting."""
    return re.sub(rb"\\(.)", rb"\1", re.sub(rb"\x10(.)", rb"\1", text))
