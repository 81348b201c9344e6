"""SIP (RFC 3261) over UDP: calls of, and to, phones inside, with their media.

Theory of operation. A phone writes its address and port into its messages: where answers shall go
(Via), where it can be called (Contact), who it is (From, To), and where it wants its media, in the
message's body (`sdp.py`). On the way out the phone's own address is replaced by the masquerade
address, and its port by the masquerade port of the session in which it speaks SIP: this port leads
back to the phone. Media is expected from the address of the session's other end. On the way in the
replacement is undone, so that the phone recognizes itself:

    out    From, To, Contact; in a request Via; the body
    in     From, To, Contact; in a request its URI; in an answer Via, with the received and rport
           that the other side has added (RFC 3581)

The Via of a request that comes in, and of the answer to it, names others. The URI of a request that
goes out names others, too. The Call-ID names no address, though a phone may have taken its address
for it. These are not touched. A phone that knows of the masquerade (by STUN) and says so in Via or
Contact gets to see its masquerade address, as it expects.

The session lives for as long as an answer says that a registration, a subscription or a call lasts
(`sip_lifetime.py`), so that what comes in meanwhile, a call above all, finds the phone.

Nothing else is remembered of a message but the ports that are expected: a message that is sent
again is rewritten to the same text. A Contact at another inside address than the phone's own goes
on with port 0. What is not SIP passes.

A message may ask for little work, for all packets wait for it. A message of more than `LONGEST`
bytes or more than `MOST_PARTS` parts is refused whole, in both directions: an inside address may
stand anywhere in it. (A phone's longest messages, with video and all candidates of ICE, have some
5,000 bytes and 150 lines; servers refuse messages of more than 20 kilobytes.) The patterns take
time in proportion to the text, whatever it is.
"""

from __future__ import annotations

import re

from nfmasq.apps import sdp
from nfmasq.apps.sip_lifetime import Lines, lasts
from nfmasq.engine.helper.app import Packet, Session
from nfmasq.engine.wire.address import dotted, from_dotted
from nfmasq.engine.wire.header import Refused
from nfmasq.engine.wire.protocols import UDP

LONGEST = 20_480
"""Bytes of the longest message that is read."""

MOST_PARTS = 512
"""The most parts of a message: its lines, the values in them, its URIs, and the users in these."""

_START = re.compile(rb"\s*(?:SIP/2\.0 (\d{3})[^\n]*|[A-Za-z]+ [^ \n]+ SIP/2\.0\r?)\n")
_HEADERS_END = re.compile(rb"\n\r?\n")
_NAME = re.compile(rb"([A-Za-z-]+)[ \t]*:")
_LENGTH = re.compile(rb"(:\s*)(\d{1,5})(?!\d)")

_LONG_NAMES = {
    b"v": b"via",
    b"f": b"from",
    b"t": b"to",
    b"m": b"contact",
    b"l": b"content-length",
    b"i": b"call-id",
    b"x": b"session-expires",
}
_PARTIES = (b"from", b"to")

_ADDRESS = rb"(\d{1,3}(?:\.\d{1,3}){3})(?![\w-]|\.\w)(?::(\d+))?"
_URI = re.compile(rb"(sips?:|@)" + _ADDRESS, re.IGNORECASE)
_VIA = re.compile(rb"(SIP\s*/\s*2\.0\s*/\s*UDP\s+)" + _ADDRESS, re.IGNORECASE)
_RECEIVED = re.compile(rb"(;\s*received\s*=\s*)([\d.]+)", re.IGNORECASE)
_RPORT = re.compile(rb"(;\s*rport\s*=\s*)(\d+)", re.IGNORECASE)

_USUAL_PORT = 5060


class Sip:
    """The helper for SIP."""

    name = "sip"
    protocol = UDP
    ports: tuple[int, ...] = (_USUAL_PORT,)

    def bind(self, session: Session) -> None:
        session.data = _Phone(session)

    def unbind(self, session: Session) -> None:
        session.data = None

    def packet_out(self, session: Session, packet: Packet) -> None:
        packet.payload = session.data.says(packet.payload)

    def packet_in(self, session: Session, packet: Packet) -> None:
        packet.payload = session.data.hears(packet.payload)


class _Phone:
    """Rewrites the messages of one inside host, from its endpoint to its mport and back."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._knows_maddr = False

    # -- out ------------------------------------------------------------------------------

    def says(self, message: bytes) -> bytes:
        """Return a message of the phone's, as it is to go out."""
        start = _START.match(message)
        if start is None:
            return message
        _refuse_excessive(message)
        is_answer = start[1] is not None
        lines, body = _headers_and_body(message, start.end())
        self._keep_session(start[1], lines)
        announced = sdp.announced(body, self._session) if body.startswith(b"v=") else body
        grown = len(announced) - len(body)
        for at, (name, line) in enumerate(lines):
            if name in _PARTIES:
                lines[at] = name, _URI.sub(self._hidden_party, line)
            elif name == b"contact":
                lines[at] = name, _URI.sub(self._hidden_contact, line)
            elif name == b"via" and not is_answer:
                lines[at] = name, _VIA.sub(self._hidden_contact, line)
            elif name == b"content-length" and grown:
                lines[at] = name, _LENGTH.sub(lambda m: _grown(m, grown), line, count=1)
        return b"".join(line for _, line in lines) + announced

    def _hidden_party(self, match: re.Match[bytes]) -> bytes:
        """Return who the phone is, by its masquerade address; with a port where it says a port."""
        begin, address, port = match.groups()
        if from_dotted(address.decode()) != self._session.saddr:
            return match[0]
        hidden = begin + dotted(self._session.maddr).encode()
        return hidden + b":%d" % self._session.mport if port else hidden

    def _hidden_contact(self, match: re.Match[bytes]) -> bytes:
        """Return where the phone can be reached, by its masquerade endpoint."""
        begin, written, _ = match.groups()
        address = from_dotted(written.decode())
        if address == self._session.maddr:
            self._knows_maddr = True
        if address is None or not self._session.is_secret(address):
            return match[0]
        mport = self._session.mport if address == self._session.saddr else 0
        return begin + dotted(self._session.maddr).encode() + b":%d" % mport

    # -- in -------------------------------------------------------------------------------

    def hears(self, message: bytes) -> bytes:
        """Return a message to the phone, as it is to come in."""
        start = _START.match(message)
        if start is None:
            return message
        _refuse_excessive(message)
        is_answer = start[1] is not None
        lines, body = _headers_and_body(message, start.end())
        self._keep_session(start[1], lines)
        if self._knows_maddr:
            return message
        for at, (name, line) in enumerate(lines):
            if name in (*_PARTIES, b"contact") or (at == 0 and not is_answer):
                lines[at] = name, _URI.sub(self._restored, line)
            elif name == b"via" and is_answer:
                lines[at] = name, b",".join(map(self._restored_via, line.split(b",")))
        return b"".join(line for _, line in lines) + body

    def _restored(self, match: re.Match[bytes]) -> bytes:
        begin, address, port = match.groups()
        if not self._is_masquerade(address, port):
            return match[0]
        restored = begin + dotted(self._session.saddr).encode()
        return restored + b":%d" % self._session.sport if port else restored

    def _restored_via(self, via: bytes) -> bytes:
        match = _VIA.search(via)
        if match is None or not self._is_masquerade(match[2], match[3]):
            return via
        own, port = dotted(self._session.saddr).encode(), b"%d" % self._session.sport
        via = _VIA.sub(self._restored, via)
        return _RPORT.sub(rb"\g<1>" + port, _RECEIVED.sub(rb"\g<1>" + own, via))

    def _is_masquerade(self, address: bytes, port: bytes | None) -> bool:
        right_port = port is None or port == b"%d" % self._session.mport
        return right_port and from_dotted(address.decode()) == self._session.maddr

    # -- both ways ------------------------------------------------------------------------

    def _keep_session(self, status: bytes | None, lines: Lines) -> None:
        """Keep the session for as long as an answer says, if the request is granted."""
        lasting = lasts(lines, self._is_own) if status and status.startswith(b"2") else None
        if lasting is not None:
            call_id, seconds = lasting
            self._session.keep(seconds, call_id)

    def _is_own(self, contact: bytes) -> bool:
        match = _URI.search(contact)
        return match is not None and self._is_masquerade(match[2], match[3])


def _refuse_excessive(message: bytes) -> None:
    """Refuse a message that is longer, or has more parts, than any real message.

    Raises Refused: malformed.
    """
    if len(message) > LONGEST:
        raise Refused("malformed")
    lines = max(message.count(b"\n"), message.count(b"\r"))
    uris = message.lower().count(b"sip")
    if lines + message.count(b",") + message.count(b"@") + uris > MOST_PARTS:
        raise Refused("malformed")


def _headers_and_body(message: bytes, start: int) -> tuple[Lines, bytes]:
    """Return the lines up to the body, each with its header's full name, and the body.

    The name is in lower case; the start line has none. `start` is the start line's length. A line
    that begins with a space goes on with the header of the line before.
    """
    end = _HEADERS_END.search(message, start - 1)
    body_at = end.end() if end else len(message)
    lines, name = [(b"", message[:start])], b""
    for line in message[start:body_at].splitlines(keepends=True):
        match = _NAME.match(line)
        if match:
            name = match[1].lower()
        elif line[:1] not in (b" ", b"\t"):
            name = b""
        lines.append((_LONG_NAMES.get(name, name), line))
    return lines, message[body_at:]


def _grown(match: re.Match[bytes], by: int) -> bytes:
    """Return a Content-Length that is greater by `by`."""
    return match[1] + b"%d" % max(int(match[2]) + by, 0)
