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
offer port 0 itself, and mean that the other side shall listen.)

What is promised. No offer tells the outside the client's own address. An offer is read strictly.
If it cannot be read, whatever is wrong with it, "^ADCC^A" goes in its place, which offers nothing.
The reason may be that the client's address is there as another number, too: clients read an offer
in different ways. Every line in which a mark ^A stands before DCC is an offer, however the line
comes in pieces and whatever its command is, except DCC REJECT. Between the mark and the end of DCC
there may be spaces and bytes that clients pass over: control bytes, CTCP's quoting, bytes from 127
on. A line that is longer than any client's line has spaces for its marks. A carriage return within
a line, which servers take for the line's end, becomes a space. Not promised is what is no offer: a
text may have an address in it.

A client whose first line is no IRC command speaks something else, and its connection is left alone.
So is the connection of a server inside. Empty lines before the first line say nothing. A connection
that turns to TLS is left alone, too: after the client's STARTTLS, from the server's reply 670 on.
"""

from __future__ import annotations

import re

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.apps.lines import Lines, without_returns
from nfmasq.engine.helper.app import Session
from nfmasq.engine.wire.address import within_ipv6
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
_MARK = b"\x01"
_NO_OFFER = b"\x01DCC\x01"
_LAST_ADDRESS = 0xFFFFFFFF
_NUMBER = re.compile(rb"\d+")

_WORD = rb"[^ \r\n\x01]*"
_GAP = rb" {1,9}"  # through a longer gap a pattern would go again and again
# Message tags and source, if any:
_SENDER = rb"(?:@" + _WORD + _GAP + rb")?(?::" + _WORD + _GAP + rb")?"
_TO_NICK = _SENDER + rb"PRIVMSG" + _GAP + rb"[^ \r\n\x01]+" + _GAP + rb":?\x01DCC" + _GAP
_FILE = _GAP + rb'(?:"[^"\0-\x1f\\]*"|[^"\0-\x20\\]+)' + _GAP
_REST = rb"((?:" + _GAP + rb"\w+){0,3} {0,9}\x01?\r?\n)"

_BLANK = rb"[\t-\r ]*"
_COMMAND = re.compile(rb"([A-Z]+|\d{3})(?![^ \r\n])", re.IGNORECASE)
_BEGINNING = re.compile(
    _BLANK + rb"(?:@[^ \r\n]*(?: +|\Z))?(?::[^ \r\n]*(?: +|\Z))?([A-Z]*)", re.IGNORECASE
)
_OFFER = re.compile(
    rb"("
    + _TO_NICK
    + rb"(?:[ST]?SEND|S?CHAT)"
    + _FILE
    + rb")(?:(\d{1,10})|([\dA-F.]*:[\dA-F.:]*))"
    + _GAP
    + rb"(\d{1,5})"
    + _REST,
    re.IGNORECASE,
)
_RESUME = re.compile(
    rb"(" + _TO_NICK + rb"(?:RESUME|ACCEPT)" + _FILE + rb")(\d{1,5})" + _REST,
    re.IGNORECASE,
)

_PASSED_OVER = rb"[\0\x02-\x20\x22\x5c\x7f-\xff]*"
_HIDDEN = re.compile(
    rb"\x01" + _PASSED_OVER + _PASSED_OVER.join([b"D", b"C", b"C"]) + rb"(?!" + _GAP + rb"REJECT )",
    re.IGNORECASE,
)

_NOT_BLANK = re.compile(rb"\n[^\r\n]|\r(?!\n)")
_CONCERNS_OUT = re.compile(rb"\x01|\r(?!\n)|\n[\0-\x09\x0b\x0c\x0e- :@Ss]")
_CONCERNS_IN = re.compile(rb"\x01|670")


class Irc(TcpApp):
    """The helper for IRC."""

    name = "irc"
    ports: tuple[int, ...] = (6667,)

    def bind(self, session: Session) -> None:
        session.data = _Connection(session)


class _Connection(Dialogue):
    """Rewrites what a client and its server say to each other."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._began = False
        self._asked_for_tls = False
        lines_out = Lines(
            self._line_out,
            self._may_be_line_out,
            rest=self._unmarked,
            concerning=self._lines_of_concern,
        )
        lines_in = Lines(self._line_in, _may_be_dcc, concerning=lambda: _CONCERNS_IN)
        super().__init__(session, lines_out, lines_in)

    def _may_be_line_out(self, start: bytes) -> bool:
        return self._began or _may_be_first(start)

    def _lines_of_concern(self) -> re.Pattern[bytes]:
        return _CONCERNS_OUT if self._began else _NOT_BLANK

    def _line_out(self, line: bytes) -> bytes:
        if not self._began and not self._begins(line):
            return line
        if _command(line) == b"STARTTLS":
            self._asked_for_tls = True
        if _MARK not in line:
            return without_returns(line)
        offer = _OFFER.fullmatch(line)
        accept = _RESUME.fullmatch(line)
        if offer:
            return self._offered(*offer.groups()) or _hidden(line)
        if accept:
            begin, port, end = accept.groups()
            mport = self._session.expected_mport(TCP, int(port))
            return begin + (b"%d" % mport if mport else port) + end
        return _hidden(line) if line.endswith(b"\n") else self._unmarked(line)

    def _begins(self, line: bytes) -> bool:
        """Say whether a line begins the client's IRC; leave alone what begins something else."""
        is_blank = not line.strip()
        if is_blank and line.endswith(b"\n"):
            return False
        speaks_irc = is_blank or _command(line) in _COMMANDS
        if not speaks_irc or self._session.inside_serves:
            self.leave_alone()
            return False
        self._began = True
        return True

    def _line_in(self, line: bytes) -> bytes:
        if self._asked_for_tls and _command(line) == _TLS_BEGINS:
            self.leave_alone()
        resume = _RESUME.fullmatch(line)
        if resume is None:
            return line
        begin, mport, end = resume.groups()
        port = self._session.expected_port(TCP, int(mport))
        return begin + (b"%d" % port if port else mport) + end

    def _offered(
        self, begin: bytes, number: bytes | None, ipv6: bytes, port: bytes, end: bytes
    ) -> bytes | None:
        """Return an offer as the other client is to have it; None where it cannot be read."""
        if self._has_own_address(begin + end):
            return None
        if number is None:
            within = within_ipv6(ipv6.decode())
            is_foreign = within is not None and not self._session.is_secret(within)
            return begin + b"%s %s" % (ipv6, port) + end if is_foreign else None
        address = int(number)
        if address > _LAST_ADDRESS:
            return None
        return begin + b"%d %d" % self._announced(address, int(port)) + end

    def _has_own_address(self, text: bytes) -> bool:
        """Say whether a number in a text, read in 32 bits, is the client's address."""
        numbers = (int(number) & _LAST_ADDRESS for number in _NUMBER.findall(text))
        return self._session.saddr in numbers

    def _announced(self, address: int, port: int) -> tuple[int, int]:
        """Return what to offer in the place of an endpoint; expect its session from now on."""
        if not self._session.is_secret(address):
            return address, port
        is_own = address == self._session.saddr
        mport = self._session.expect(TCP, port, anyone=True) if is_own else None
        return self._session.maddr, mport or 0

    def _unmarked(self, piece: bytes) -> bytes:
        """Return a piece of a line that is too long, without marks."""
        return without_returns(piece).replace(_MARK, b" ") if self._began else piece


def _hidden(line: bytes) -> bytes:
    """Return a line without the offer that it may be taken for."""
    found = _HIDDEN.search(line)
    return without_returns(line[: found.start()] + _NO_OFFER + b"\r\n" if found else line)


def _may_be_first(start: bytes) -> bool:
    """Say whether the start of a client's first line may become an IRC command."""
    match = _BEGINNING.fullmatch(start)
    if match is None:
        return False
    name = match[1].upper()
    return any(command.startswith(name) for command in _COMMANDS)


def _command(line: bytes) -> bytes:
    match = _COMMAND.match(_without_sender(line.lstrip()))
    return match[1].upper() if match else b""


def _without_sender(line: bytes) -> bytes:
    for mark in (b"@", b":"):
        if line.startswith(mark):
            line = line.partition(b" ")[2].lstrip(b" ")
    return line


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
