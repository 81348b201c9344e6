"""FTP (RFC 959): the data connections of active clients inside and of passive servers inside.

Theory of operation. Side by side with its control connection FTP opens a data connection for each
transfer, to an endpoint that one side announces on the control connection as text:

    active    PORT h1,h2,h3,h4,p1,p2            the client listens, the server connects
              EPRT |1|address|port|             (RFC 2428)
    passive   227 ... (h1,h2,h3,h4,p1,p2)       the server listens, the client connects
              229 ... (|||port|)                (RFC 2428)

Where the side that listens is inside, what it announces is replaced by the masquerade address and a
masquerade port, which leads to it. So commands are rewritten where the client is inside, replies
where the server is inside. The other two cases need nothing: the data connection goes out.

Only what the inside host announces of itself is believed, with a port from 1024 on, and only the
other end of the control connection is let in. A reply counts only if it answers a PASV or EPSV, and
is no line of a longer reply, which may be a file's name or text.

What is promised. No announcement tells the outside an inside address: neither the inside host's
own address nor another private address. Announcements are the commands PORT, EPRT and LPRT, and the
replies 227, 228 and 229 (LPRT and 228: RFC 1639). An announcement is read strictly. If it can be
read and cannot be served, it goes on with port 0, which the other side rejects with an error that
the inside hears of. If it cannot be read, whatever is wrong with it, an announcement of nobody goes
on in its place: zeros for the address and the port. An announcement that names somebody else
outside (a transfer between two servers) goes on, written in the usual way.

A line is an announcement if any reader may take it for one, however the line comes in pieces:

* Readers may pass over spaces, control bytes, quotation marks, bytes from 127 on, and commands of
  Telnet (RFC 854) before and within the name, and may want no space after it. A line whose name is
  not known after `_HEAD` bytes is an announcement, too.
* Readers may end a line at a carriage return alone. A space takes its place.
* Readers may take a newline for a part of a Telnet command, and so put two lines together. Where a
  line ends in this way, it gets a carriage return before its newline.
* Readers may look for the address in all lines of a longer reply. So all lines of a longer reply
  227, 228 or 229 are hidden.

Not promised is what is no announcement: a greeting, a file's name or a text may have an address in
it. Nor is anything promised for readers that cut a line for its length and take its end for another
command.

A client whose first line is no FTP command speaks something else (a browser can be made to send
text to any port): its connection is left alone. Empty lines before the first line say nothing. A
server inside that greets with a reply's three digits speaks FTP, whatever the client says. A
connection that turns to TLS is left alone, too: after AUTH, from the reply 234 on, nothing can be
read (RFC 4217).
"""

from __future__ import annotations

import re
from struct import Struct

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.apps.lines import Lines, without_returns
from nfmasq.engine.helper.app import Session
from nfmasq.engine.wire.address import dotted, from_dotted, within_ipv6
from nfmasq.engine.wire.protocols import TCP

_COMMANDS = frozenset(
    b"""USER PASS ACCT CWD CDUP SMNT QUIT REIN PORT PASV TYPE STRU MODE RETR STOR STOU APPE ALLO
    REST RNFR RNTO ABOR DELE RMD MKD PWD LIST NLST SITE SYST STAT HELP NOOP AUTH ADAT PROT PBSZ CCC
    MIC CONF ENC FEAT OPTS LANG EPRT EPSV LPRT LPSV MDTM SIZE MLST MLSD HOST CLNT CSID XCUP XCWD
    XMKD XPWD XRMD""".split()
)
"""RFC 959, 1123, 1639, 2228, 2389, 2428, 2640, 3659, 7151, and CLNT and CSID of no RFC."""

_LONGEST_COMMAND = 4
_CODE = 4  # bytes: three digits, and a space, or a hyphen where more lines follow

_PASSIVE = {b"PASV": b"227 ", b"EPSV": b"229 "}
_PROTECTED = b"234 "

_OF_NOBODY = {
    b"PORT": b"PORT 0,0,0,0,0,0",
    b"EPRT": b"EPRT |1|0.0.0.0|0|",
    b"LPRT": b"LPRT 4,4,0,0,0,0,2,0,0",
    b"227": b"227 (0,0,0,0,0,0)",
    b"228": b"228 (4,4,0,0,0,0,2,0,0)",
    b"229": b"229 (|||0|)",
}
"""The announcements, by command or code, with zeros for the address and the port."""

_COMMANDS_THAT_ANNOUNCE = b"PORT", b"EPRT", b"LPRT"
_REPLIES_THAT_ANNOUNCE = b"227", b"228", b"229"

_endpoint = Struct("!IH")
_HOST_PORT = rb"(\d{1,3}(?:,\d{1,3}){5})"
_END = rb"([ \t]*\r?\n)"
_PORT = re.compile(rb"(PORT +)" + _HOST_PORT + _END, re.IGNORECASE)
_MARK = rb"([!-,\-/;-@\[-`{-~])"  # RFC 2428 has more, with which an address could be misread
_EPRT = re.compile(
    rb"(EPRT +)" + _MARK + rb"([12])\2([\dA-F.:]+)\2(\d{1,5})\2" + _END, re.IGNORECASE
)
_REPLY_END = rb"(\D*?)(?:\d[^\n]*?)?(\r?\n)"  # what follows another number is left out
_REPLY_227 = re.compile(rb"(227 \D*)" + _HOST_PORT + rb"(?!\d)" + _REPLY_END)
_REPLY_229 = re.compile(rb"(229 [^(\d]*\()" + _MARK + rb"\2\2(\d{1,5})\2(?=\))" + _REPLY_END)

_IAC, _SUBNEGOTIATION = b"\xff", b"\xff\xfa"
_TELNET = re.compile(rb"\xff(?:[\xfb-\xfe].?|.?)", re.DOTALL)
_ENDS_IN_TELNET = re.compile(rb"\xff[\xfb-\xfe]?\n\Z")

_HEAD = 64  # bytes in which a line's name is looked for
_CAPITALS = bytes(range(256)).upper()
_PASSED_OVER = bytes([*range(0x21), *range(0x7F, 0x100), *b'"\\'])

_FIRST = re.compile(rb"(?:[\t-\r ]|\xff[\xf0-\xf9])*([A-Z]*)", re.IGNORECASE)

_ODD = rb"\x00-\x09\x0b\x0c\x0e-\x20\x22\x5c\x7f-\xff"
_NOT_BLANK = re.compile(rb"\n[^\r\n]|\r(?!\n)")
_ODD_OR_ASKING = re.compile(
    rb"\n(?:[%b]|[Pp][OoAa%b]|[EeLl][Pp%b]|[Aa][Uu%b])|\r(?!\n)|\xff" % ((_ODD,) * 4)
)
_ODD_OR_ANSWERING = re.compile(rb"\n[" + _ODD + rb"\d]|\r(?!\n)|\xff")
_ANSWERING = re.compile(rb"\n\d")


class Ftp(TcpApp):
    """The helper for FTP."""

    name = "ftp"
    ports: tuple[int, ...] = (21,)

    def bind(self, session: Session) -> None:
        session.data = _ControlConnection(session)


class _ControlConnection(Dialogue):
    """Rewrites the commands and replies of one control connection."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._inside_serves = session.inside_serves
        self._began = False  # the client has sent its first command
        self._greeted = False  # the server has sent a reply
        self._asked: set[bytes] = set()  # the replies that the client's commands ask for
        self._longer_reply: bytes | None = None  # the code that will end a reply of several lines
        self._hides = False  # the line from the inside that is under way
        rests = (None, self._rest) if self._inside_serves else (self._rest, None)
        commands = Lines(
            self._command,
            self._may_be_command,
            rest=rests[0],
            concerning=self._commands_of_concern,
        )
        replies = Lines(
            self._reply, self._may_be_reply, rest=rests[1], concerning=self._replies_of_concern
        )
        out_and_in = (replies, commands) if self._inside_serves else (commands, replies)
        super().__init__(session, *out_and_in)

    # -- commands -----------------------------------------------------------------------

    def _commands_of_concern(self) -> re.Pattern[bytes]:
        return _ODD_OR_ASKING if self._began else _NOT_BLANK

    def _may_be_command(self, start: bytes) -> bool:
        return self._began or _may_be_first(start)

    def _command(self, line: bytes) -> bytes:
        if not self._began and not self._begins(line):
            return line
        if self._inside_serves:
            self._asks(line)
            return line
        served = self._served_command(line)
        if served:
            return served
        self._hides = False
        name = _taken_for(line, _COMMANDS_THAT_ANNOUNCE)
        if name:
            return self._hidden(line, _OF_NOBODY[name])
        self._asks(line)
        return _one_line(line)

    def _begins(self, line: bytes) -> bool:
        """Say whether a line begins the client's FTP; leave alone what begins something else."""
        match = _FIRST.match(line)
        name = match[1].upper() if match else b""
        if _is_blank(line, name) and line.endswith(b"\n"):
            return False
        speaks_ftp = name in _COMMANDS or _is_blank(line, name)
        if not speaks_ftp and not (self._inside_serves and self._greeted):
            self.leave_alone()
            return False
        self._began = True
        return True

    def _asks(self, line: bytes) -> None:
        """Take note of a command that asks for a reply that matters."""
        name = line[: _LONGEST_COMMAND + 1].partition(b" ")[0].strip().upper()
        if name in _PASSIVE:
            self._asked.add(_PASSIVE[name])
        if _taken_for(line, (b"AUTH",)):
            self._asked.add(_PROTECTED)

    def _served_command(self, line: bytes) -> bytes | None:
        by_numbers = _PORT.fullmatch(line)
        if by_numbers:
            return self._announced_by_numbers(*by_numbers.groups())
        return self._announced_by_eprt(line)

    def _announced_by_eprt(self, line: bytes) -> bytes | None:
        match = _EPRT.fullmatch(line)
        if match is None:
            return None
        begin, mark, kind, written, port, end = match.groups()
        if kind == b"2":
            within = within_ipv6(written.decode())
            is_foreign = within is not None and not self._session.is_secret(within)
            return line if is_foreign else None
        address = from_dotted(written.decode())
        if address is None:
            return None
        address, mport = self._announced(address, int(port))
        return begin + mark.join([b"", b"1", dotted(address).encode(), b"%d" % mport, end])

    # -- replies ------------------------------------------------------------------------

    def _may_be_reply(self, start: bytes) -> bool:
        if len(start) < _CODE and (start.isdigit() or not start):
            return True
        if not self._inside_serves or not self._speaks_ftp:
            return False
        return self._hides_longer_reply or bool(
            _taken_for(start, _REPLIES_THAT_ANNOUNCE, goes_on=True)
        )

    def _replies_of_concern(self) -> re.Pattern[bytes] | None:
        if not self._inside_serves:
            return _ANSWERING
        return None if self._hides_longer_reply else _ODD_OR_ANSWERING

    def _reply(self, line: bytes) -> bytes:
        code, longer = line[:_CODE], self._longer_reply
        self._greeted = self._greeted or code[:3].isdigit()
        if longer is None and code[:3].isdigit() and code[3:] == b"-":
            self._longer_reply = code[:3] + b" "
        elif code == longer:
            self._longer_reply = None
        answers = self._longer_reply is None and code in self._asked
        if answers:
            self._asked.discard(code)
        if answers and code == _PROTECTED:
            self.leave_alone()
            return line
        if not self._inside_serves:
            return line
        served = self._served_reply(line) if answers and longer is None else None
        return served or self._reply_out(line, longer)

    def _reply_out(self, line: bytes, longer: bytes | None) -> bytes:
        """Return a reply of a server inside that is not served."""
        self._hides = False
        if not self._speaks_ftp:
            return line
        if self._hides_longer_reply and self._longer_reply:
            return self._hidden(line, self._longer_reply[:3] + b"-")
        is_text = longer is not None and line.startswith(b" ")
        code = None if is_text else _taken_for(line, _REPLIES_THAT_ANNOUNCE)
        return self._hidden(line, _OF_NOBODY[code]) if code else _one_line(line)

    @property
    def _speaks_ftp(self) -> bool:
        return self._began or self._greeted

    @property
    def _hides_longer_reply(self) -> bool:
        return self._longer_reply is not None and self._longer_reply[:3] in _REPLIES_THAT_ANNOUNCE

    def _served_reply(self, line: bytes) -> bytes | None:
        by_numbers = _REPLY_227.fullmatch(line)
        if by_numbers:
            begin, host_port, *end = by_numbers.groups()
            return self._announced_by_numbers(begin, host_port, b"".join(end))
        match = _REPLY_229.fullmatch(line)
        if match is None:
            return None
        begin, mark, port, *end = match.groups()
        _, mport = self._announced(self._session.saddr, int(port))
        return begin + mark * 3 + b"%d" % mport + mark + b"".join(end)

    # -- what is announced ----------------------------------------------------------------

    def _announced_by_numbers(self, begin: bytes, host_port: bytes, end: bytes) -> bytes | None:
        """Return a line with h1,h2,h3,h4,p1,p2 as the other side is to have it, or None."""
        numbers = [int(number) for number in host_port.split(b",")]
        if max(numbers) > 255:
            return None
        endpoint = bytes(numbers)
        if self._session.saddr.to_bytes(4, "big") in endpoint[1:]:
            return None  # it may be meant as 228 or LPRT has it: behind other numbers
        replaced = _endpoint.pack(*self._announced(*_endpoint.unpack(endpoint)))
        return begin + b",".join(b"%d" % number for number in replaced) + end

    def _announced(self, address: int, port: int) -> tuple[int, int]:
        """Return what to announce in the place of an endpoint; expect its session from now on."""
        if not self._session.is_secret(address):
            return address, port
        is_own = address == self._session.saddr
        mport = self._session.expect(TCP, port) if is_own else None
        return self._session.maddr, mport or 0

    def _hidden(self, line: bytes, instead: bytes) -> bytes:
        """Return what goes in the place of a line; the rest of the line, if any, is hidden, too."""
        self._hides = not line.endswith(b"\n")
        return instead if self._hides else instead + b"\r\n"

    def _rest(self, piece: bytes) -> bytes:
        """Return what goes in the place of a later piece of a line from the inside."""
        if self._hides:
            ends = piece.endswith(b"\n")
            return b" " * (len(piece) - ends) + b"\r\n" * ends
        return without_returns(piece) if self._speaks_ftp else piece


def _may_be_first(start: bytes) -> bool:
    """Say whether the start of a client's first line may become an FTP command."""
    match = _FIRST.fullmatch(start)
    if match is None:
        return False
    name = match[1].upper()
    return any(command.startswith(name) for command in _COMMANDS)


def _is_blank(line: bytes, name: bytes) -> bool:
    return not name and _FIRST.fullmatch(line) is not None


def _taken_for(line: bytes, names: tuple[bytes, ...], *, goes_on: bool = False) -> bytes | None:
    """Return which of some names a reader may find at the start of a line, or None.

    `goes_on`: the line is not whole, and a name may yet be found.
    """
    head = line[:_HEAD]
    goes_on = goes_on or len(line) > _HEAD or _SUBNEGOTIATION in head
    for reading in _readings(head):
        text = reading.translate(_CAPITALS, _PASSED_OVER)
        if text.startswith(names):
            return next(name for name in names if text.startswith(name))
        undecided = [name for name in names if name.startswith(text)] if goes_on else []
        if undecided:
            return undecided[0]
    return None


def _readings(head: bytes) -> tuple[bytes, ...]:
    """Return the start of a line with Telnet's commands, and without them."""
    if _IAC not in head:
        return (head,)
    before = head.partition(_SUBNEGOTIATION)[0]
    return head, before, _TELNET.sub(b"", head), _TELNET.sub(b"", before)


def _one_line(line: bytes) -> bytes:
    """Return a line that no reader takes for two lines, or for a part of another line."""
    if _ENDS_IN_TELNET.search(line):
        line = line[:-1] + b"\r\n"
    return without_returns(line)
