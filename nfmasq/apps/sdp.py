"""SDP (RFC 4566): the addresses and ports at which an inside host wants to get media.

    c=IN IP4 address                where: for the whole description, or for one medium
    m=audio port RTP/AVP 0          a medium; RTP comes to the port, RTCP to the next port
    a=rtcp:port IN IP4 address      RTCP comes to another port (RFC 3605)

Of a medium at the host's own address, each port is expected and replaced by a masquerade port. RTP
and RTCP get an even port and the next port, where two in this order can be had. Port 0 rejects a
medium. It stands for a medium at another inside address, with a port below 1024, over TCP, with
several ports in one line, or beyond MOST_MEDIA. The host's own address is told nowhere: where a
line has it beside a port (the candidates of ICE), the port is replaced too, where it is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeAlias

from nfmasq.engine.helper.app import LEAST_PORT, MOST_EXPECTED, Session
from nfmasq.engine.wire.address import dotted, from_dotted
from nfmasq.engine.wire.protocols import UDP

MOST_MEDIA = MOST_EXPECTED // 2
"""The most media of one description that are served: RTP and RTCP of each can be expected at a
time."""

_DISCARD = 9  # the port on which nobody listens, as ICE uses it

_Mports: TypeAlias = "Mapping[int, int | None]"
_NO_MPORTS: _Mports = {}

_CONNECTION = re.compile(rb"(c=IN +IP4 +)(\d{1,3}(?:\.\d{1,3}){3})(?!\d)(.*)", re.DOTALL)
_MEDIUM = re.compile(rb"(m=[^ ]+ +)(\d{1,5})(/\d+)?( +([^ ]+).*)", re.DOTALL)
_RTCP = re.compile(rb"(a=rtcp:)(\d{1,5})(?!\d)(.*)", re.DOTALL)


def announced(description: bytes, session: Session) -> bytes:
    """Return a description of the inside host's, as it is to go out; expect its media."""
    lines = description.split(b"\n")
    starts = [at for at, line in enumerate(lines) if line.startswith(b"m=")]
    parts = [lines[a:b] for a, b in pairwise([0, *starts, len(lines)])]
    offer = _Offer(session)
    default = _address(parts[0])
    rewritten = [offer.hidden(line) for line in parts[0]]
    for medium in parts[1:]:
        rewritten += offer.medium(medium, _address(medium) or default)
    return b"\n".join(rewritten)


class _Offer:
    """Rewrites what one description announces."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._maddr = dotted(session.maddr).encode()
        self._own = own_address(session, rb"(?:( +)(\d{1,5})(?!\d))?")
        self._served = 0

    def medium(self, lines: list[bytes], address: int | None) -> list[bytes]:
        """Return a medium's lines as they are to go out; the first line is `m=`."""
        if address is None or not self._session.is_secret(address):
            return [self.hidden(line) for line in lines]
        rtcp = next(filter(None, map(_RTCP.fullmatch, lines)), None)
        mports = self._expected(lines[0], address, int(rtcp[2]) if rtcp else None)
        return [self.hidden(_with_mport(line, mports), mports) for line in lines]

    def hidden(self, line: bytes, mports: _Mports = _NO_MPORTS) -> bytes:
        """Return a line without any address that must not be told."""
        connection = _CONNECTION.fullmatch(line)
        if connection and self._session.is_secret(from_dotted(connection[2].decode()) or 0):
            return connection[1] + self._maddr + connection[3]

        def endpoint(own: re.Match[bytes]) -> bytes:
            if own[2] is None:
                return self._maddr
            return self._maddr + own[1] + b"%d" % (mports.get(int(own[2])) or _DISCARD)

        return self._own.sub(endpoint, line)

    def _expected(self, line: bytes, address: int, rtcp: int | None) -> _Mports:
        """Expect a medium's ports; return the masquerade ports (or None) by port."""
        match = _MEDIUM.fullmatch(line)
        is_own = address == self._session.saddr
        if match is None or match[3] or not is_own or self._served == MOST_MEDIA:
            return {}
        port, transport = int(match[2]), match[5].upper()
        if transport.startswith(b"TCP") or port < LEAST_PORT:
            return {}
        self._served += 1
        if b"RTP" not in transport:
            return {port: self._session.expect(UDP, port)}
        if rtcp in (None, port + 1):
            return dict(zip((port, port + 1), self._session.expect_pair(UDP, port), strict=True))
        return {each: self._session.expect(UDP, each) for each in (port, rtcp) if each}


def own_address(session: Session, rest: bytes) -> re.Pattern[bytes]:
    """Return a pattern of the inside host's address as text, and of what may follow it."""
    own = re.escape(dotted(session.saddr).encode())
    return re.compile(rb"(?<![\d.])" + own + rb"(?![\w-]|\.\w)" + rest)


def _with_mport(line: bytes, mports: _Mports) -> bytes:
    """Return a line, which may name a port, with the masquerade port of the port.

    Where the port has no masquerade port, the line of a medium gets port 0, the line of RTCP port
    9.
    """
    medium = _MEDIUM.fullmatch(line)
    if medium:
        return medium[1] + b"%d" % (mports.get(int(medium[2])) or 0) + medium[4]
    rtcp = _RTCP.fullmatch(line)
    if rtcp:
        return rtcp[1] + b"%d" % (mports.get(int(rtcp[2])) or _DISCARD) + rtcp[3]
    return line


def _address(lines: list[bytes]) -> int | None:
    """Return the address in the first line that has a connection's address, or None."""
    match = next(filter(None, map(_CONNECTION.fullmatch, lines)), None)
    return from_dotted(match[2].decode()) if match else None
