"""IRC: direct connections between clients (DCC), offered by clients inside.

Theory of operation. A client that offers a file or a chat listens, and announces its endpoint in a
message to the other client, through the server:

    PRIVMSG nick :^ADCC SEND file address port size^A       address: one decimal number
    PRIVMSG nick :^ADCC CHAT chat address port^A

The address is replaced by the masquerade address, the port by a masquerade port, which leads to the
client. The server does not tell who will connect, and from which address: whoever comes first is
let in, once. Before a file is sent both sides may agree to go on in the middle of it:

    PRIVMSG nick :^ADCC RESUME file port position^A         to the client that offers
    PRIVMSG nick :^ADCC ACCEPT file port position^A         from the client that offers

Here the port tells which offer is meant. The other client knows the offer by the masquerade port.

Only the client's own address is believed, with a port from 1024 on. An offer of any other inside
address or port goes on with the masquerade address and port 0. (With its own address a client may
offer port 0 itself, and mean that the other side shall listen.) An offer that cannot be read goes
on with 0 for the client's address.

A client whose first line is no IRC command speaks something else, and its connection is left alone.
A connection that turns to TLS is left alone, too: after the client's STARTTLS, from the server's
reply 670 on.
"""

from __future__ import annotations

import re

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.apps.lines import Lines
from nfmasq.engine.helper.app import Session
from nfmasq.engine.wire.address import dotted
from nfmasq.engine.wire.protocols import TCP

_COMMANDS = frozenset(
    b"""PASS NICK USER OPER SERVICE QUIT JOIN PART MODE TOPIC NAMES LIST INVITE KICK PRIVMSG NOTICE
    MOTD LUSERS VERSION STATS LINKS TIME CONNECT TRACE ADMIN INFO SERVLIST SQUERY WHO WHOIS WHOWAS
    KILL PING PONG AWAY USERHOST ISON CAP AUTHENTICATE STARTTLS WEBIRC PROTOCTL MONITOR
    TAGMSG""".split()
)
"""RFC 2812, and the extensions of IRCv3."""

_TLS_BEGINS = b"670"

_MESSAGE = b"PRIVMSG "
_DCC = b"\x01DCC "

_SENDER = rb"(?:@[^ ]* +)?(?::[^ ]* +)?"  # message tags and source: both may be absent
_TO_NICK = _SENDER + rb"PRIVMSG +[^ ]+ +:?\x01DCC +"
_FILE = rb' +(?:"[^"\r\n\x01]*"|[^ "\r\n\x01]+) +'
_REST = rb"((?: [^\r\n\x01]*)?\x01?\r?\n?)"

_COMMAND = re.compile(_SENDER + rb"([A-Z]+|\d{3})(?![^ \r\n])", re.IGNORECASE)
_OFFER = re.compile(
    rb"(" + _TO_NICK + rb"(?:[ST]?SEND|S?CHAT)" + _FILE + rb")(\d{1,10}) +(\d{1,5})" + _REST,
    re.IGNORECASE,
)
_RESUME = re.compile(
    rb"(" + _TO_NICK + rb"(?:RESUME|ACCEPT)" + _FILE + rb")(\d{1,5})" + _REST,
    re.IGNORECASE,
)


class Irc(TcpApp):
    """The helper for IRC."""

    name = "irc"
    ports: tuple[int, ...] = (6667,)

    def bind(self, session: Session) -> None:
        session.data = _Connection(session)


class _Connection(Dialogue):
    """Rewrites what a client and its server say to each other."""

    def __init__(self, session: Session) -> None:
        super().__init__(
            session, Lines(self._line_out, _may_be_dcc), Lines(self._line_in, _may_be_dcc)
        )
        self._session = session
        self._began = False
        self._asked_for_tls = False

    def _line_out(self, line: bytes) -> bytes:
        command = _command(line)
        if not self._began:
            self._began = True
            if command not in _COMMANDS or self._session.inside_serves:
                self.leave_alone()
        if command == b"STARTTLS":
            self._asked_for_tls = True
        if _DCC not in line.upper():
            return line
        offer = _OFFER.fullmatch(line)
        if offer:
            begin, address, port, end = offer.groups()
            return begin + b"%d %d" % self._offered(int(address), int(port)) + end
        accept = _RESUME.fullmatch(line)
        if accept:
            begin, port, end = accept.groups()
            mport = self._session.expected_mport(TCP, int(port))
            return begin + (b"%d" % mport if mport else port) + end
        return self._hidden(line)

    def _line_in(self, line: bytes) -> bytes:
        if self._asked_for_tls and _command(line) == _TLS_BEGINS:
            self.leave_alone()
        resume = _RESUME.fullmatch(line)
        if resume is None:
            return line
        begin, mport, end = resume.groups()
        port = self._session.expected_port(TCP, int(mport))
        return begin + (b"%d" % port if port else mport) + end

    def _offered(self, address: int, port: int) -> tuple[int, int]:
        """Return what to offer in the place of an endpoint; expect its session from now on."""
        if not self._session.is_secret(address):
            return address, port
        is_own = address == self._session.saddr
        mport = self._session.expect(TCP, port, anyone=True) if is_own else None
        return self._session.maddr, mport or 0

    def _hidden(self, line: bytes) -> bytes:
        """Return a line without the inside host's address."""
        own = self._session.saddr
        for written in (b"%d" % own, dotted(own).encode()):
            line = line.replace(written, b"0")
        return line


def _command(line: bytes) -> bytes:
    match = _COMMAND.match(line)
    return match[1].upper() if match else b""


def _may_be_dcc(start: bytes) -> bool:
    while start[:1] in (b"@", b":"):
        _, space, start = start.partition(b" ")
        if not space:
            return True
        start = start.lstrip(b" ")
    if start[: len(_MESSAGE)].upper() != _MESSAGE[: len(start)]:
        return False
    _, _, text = start[len(_MESSAGE) :].lstrip(b" ").partition(b" ")
    text = text.lstrip(b" ").removeprefix(b":")
    return text[: len(_DCC)].upper() == _DCC[: len(text)]
