"""For how long a SIP answer says that something lasts: what has to come in for as long.

A registration (RFC 3261) and a subscription (RFC 6665) last for some seconds unless they are
renewed, a call for some seconds unless a message of it is exchanged (RFC 4028, where both sides
have timers). The answer has the last word, not the request: a registrar may shorten what a phone
asks for. A registrar lists all phones that are registered under the name, each with its own time.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_METHOD = re.compile(rb"\s*\d+\s+([A-Z]+)")
_SECONDS = re.compile(rb"\s*(\d{1,10})")
_EXPIRES = re.compile(rb";\s*expires\s*=\s*(\d{1,10})", re.IGNORECASE)

_HEADERS = {
    b"REGISTER": b"expires",
    b"SUBSCRIBE": b"expires",
    b"INVITE": b"session-expires",
    b"UPDATE": b"session-expires",
    b"BYE": b"",  # the call is over
}
"""The header that says how long something lasts, by the method that is answered."""

Lines = list[tuple[bytes, bytes]]
"""The lines of a message up to its body, each with its header's full name in lower case."""


def lasts(lines: Lines, is_own: Callable[[bytes], bool]) -> tuple[bytes, int] | None:
    """Return the Call-ID of an answer that grants a request, and for how many seconds that lasts.

    It is 0 seconds where something is over. None where the answer is about nothing that lasts.
    `is_own` tells whether a value of Contact names the phone.
    """
    method = _METHOD.match(_value(lines, b"cseq") or b"")
    if method is None or method[1] not in _HEADERS:
        return None
    said = _SECONDS.match(_value(lines, _HEADERS[method[1]]) or b"")
    seconds = int(said[1]) if said else 0
    contacts = _value(lines, b"contact") if method[1] == b"REGISTER" else None
    if contacts is not None:
        own = filter(is_own, contacts.split(b","))
        seconds = max((_expires(contact, seconds) for contact in own), default=0)
    return (_value(lines, b"call-id") or b"").strip(), seconds


def _expires(contact: bytes, otherwise: int) -> int:
    """Return the seconds that a value of Contact says, behind its URI, of itself."""
    said = _EXPIRES.search(contact.rpartition(b">")[2])
    return int(said[1]) if said else otherwise


def _value(lines: Lines, header: bytes) -> bytes | None:
    """Return the values of a header with commas between; None where there is none.

    A line that begins with a space goes on with the line before.
    """
    parts = [
        line if line[:1] in (b" ", b"\t") else b"," + line.partition(b":")[2]
        for name, line in lines
        if name == header
    ]
    return b"".join(parts)[1:] if parts else None
