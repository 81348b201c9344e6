"""PPTP (RFC 2637): the calls that a control connection sets up, whose packets are PPP in GRE.

Theory of operation. Each end gives a call an ID and tells the other end on the control connection.
The packets to an end have the ID that this end gave, and no port. Several inside hosts may pick the
same ID, and have calls with the same server. So the inside host's own ID is replaced, in all
messages, by an ID that is unique there (`engine/helper/calls.py`); the other end's ID stays:

    request and reply, of an outgoing or incoming call   the sender's ID; in a reply both IDs
    Incoming-Call-Connected, WAN-Error-Notify,           the receiver's ID
    Set-Link-Info
    Call-Clear-Request, Call-Disconnect-Notify           the sender's ID

Which end dials does not matter: packets are let in from the moment that the inside host has told
its ID, and out from the reply that accepts the call. A reply that rejects the call ends it. A
Call-Disconnect-Notify from either end ends it, too.

A message is known by the cookie that each message has in it. A connection in which a message lacks
the cookie, or has an impossible length, speaks something else, and is left alone from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.engine.helper.app import Packet, Session

_CONTROL_MESSAGE = b"\0\1"
_COOKIE = b"\x1a\x2b\x3c\x4d"
_SAME_IN_ALL = _CONTROL_MESSAGE + _COOKIE  # after the length

_LEAST, _MOST = 12, 256  # bytes; the longest, Incoming-Call-Request, has 220

_OUTGOING_REQUEST, _OUTGOING_REPLY, _INCOMING_REQUEST, _INCOMING_REPLY = 7, 8, 9, 10
_INCOMING_CONNECTED, _CLEAR_REQUEST, _DISCONNECT_NOTIFY = 11, 12, 13
_WAN_ERROR_NOTIFY, _SET_LINK_INFO = 14, 15

_REPLIES = frozenset({_OUTGOING_REPLY, _INCOMING_REPLY})
_BEGINNING = _REPLIES | {_OUTGOING_REQUEST, _INCOMING_REQUEST}
_WITH_SENDERS_ID = _BEGINNING | {_CLEAR_REQUEST, _DISCONNECT_NOTIFY}
_WITH_RECEIVERS_ID_ONLY = frozenset({_INCOMING_CONNECTED, _WAN_ERROR_NOTIFY, _SET_LINK_INFO})

_KIND, _FIRST_ID, _SECOND_ID, _RESULT = 8, 12, 14, 16
_CONNECTED = b"\1"
_LEAST_WITH_ID = 16

_u16 = Struct("!H")


class Pptp(TcpApp):
    """The helper for PPTP."""

    name = "pptp"
    ports: tuple[int, ...] = (1723,)

    def bind(self, session: Session) -> None:
        session.data = _ControlConnection(session)

    def packet_out(self, session: Session, packet: Packet) -> None:
        super().packet_out(session, packet)
        session.calls.refresh()

    def packet_in(self, session: Session, packet: Packet) -> None:
        super().packet_in(session, packet)
        session.calls.refresh()


class _ControlConnection(Dialogue):
    """Rewrites what both ends of a control connection say."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, _Messages(self._message_out), _Messages(self._message_in))
        self._calls = session.calls

    def _message_out(self, message: bytes) -> bytes:
        kind = _number(message, _KIND)
        if kind not in _WITH_SENDERS_ID:
            return message
        own = _number(message, _FIRST_ID)
        ours = self._calls.begin(own) if kind in _BEGINNING else self._calls.ours(own)
        if ours is None:
            return message
        if kind in _REPLIES:
            self._answered(message, own, peers=_number(message, _SECOND_ID))
        elif kind == _DISCONNECT_NOTIFY:
            self._calls.end(own)
        return _with(message, _FIRST_ID, ours)

    def _message_in(self, message: bytes) -> bytes:
        kind = _number(message, _KIND)
        if kind == _DISCONNECT_NOTIFY:
            ended = self._calls.own_by_peers(_number(message, _FIRST_ID))
            if ended is not None:
                self._calls.end(ended)
            return message
        if kind not in _REPLIES | _WITH_RECEIVERS_ID_ONLY:
            return message
        at = _SECOND_ID if kind in _REPLIES else _FIRST_ID
        own = self._calls.own(_number(message, at))
        if own is None:
            return message
        if kind in _REPLIES:
            self._answered(message, own, peers=_number(message, _FIRST_ID))
        return _with(message, at, own)

    def _answered(self, message: bytes, own: int, peers: int) -> None:
        if message[_RESULT : _RESULT + 1] == _CONNECTED:
            self._calls.connect(own, peers)
        else:
            self._calls.end(own)


class _Messages:
    """Divides one direction into messages, as units of a stream (`engine/helper/stream.py`)."""

    def __init__(self, rewrite: Callable[[bytes], bytes]) -> None:
        self._rewrite = rewrite
        self._is_something_else = False

    def length(self, text: bytes, at: int) -> int:
        """Return the length of a message; 0 where it is not whole.

        Where the text is no message, return the length of all there is.
        """
        there = len(text) - at
        start = text[at : at + _KIND]
        if self._is_something_else or not _SAME_IN_ALL.startswith(start[2:]):
            return there
        if there < _KIND:
            return 0
        length = _number(start, 0)
        if not _LEAST <= length <= _MOST:
            return there
        return length if there >= length else 0

    def rewrite(self, unit: bytes) -> bytes:
        """Return what is to be sent in the place of a message; other text as it is."""
        is_message = unit[2:_KIND] == _SAME_IN_ALL and len(unit) == _number(unit, 0)
        if self._is_something_else or not is_message:
            self._is_something_else = True
            return unit
        return self._rewrite(unit) if len(unit) >= _LEAST_WITH_ID else unit


def _number(message: bytes, at: int) -> int:
    return int(_u16.unpack_from(message, at)[0])


def _with(message: bytes, at: int, number: int) -> bytes:
    return message[:at] + _u16.pack(number) + message[at + _u16.size :]
