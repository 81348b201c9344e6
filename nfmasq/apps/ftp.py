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
is no line of a longer reply, which may be a file's name or text. An announcement that cannot be
served tells no inside address. If it can be read, it goes on with port 0, which the other side
rejects with an error that the inside hears of. If it cannot be read, it goes on with zeros in place
of the address. An announcement that names somebody else outside (a transfer between two servers)
goes on unchanged.

A client whose first line is no FTP command speaks something else (a browser can be made to send
text to any port): its connection is left alone. A connection that turns to TLS is left alone, too:
after AUTH, from the reply 234 on, nothing can be read (RFC 4217).
"""

from __future__ import annotations

import re
from struct import Struct

from nfmasq.apps.dialogue import Dialogue, TcpApp
from nfmasq.apps.lines import Lines
from nfmasq.engine.helper.app import Session
from nfmasq.engine.wire.address import dotted, from_dotted
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

_endpoint = Struct("!IH")
_HOST_PORT = rb"(\d{1,3}(?:,\d{1,3}){5})"
_PORT = re.compile(rb"(PORT +)" + _HOST_PORT + rb"([ \t]*\r?\n?)", re.IGNORECASE)
_EPRT = re.compile(rb"(EPRT +)([!-~])1\2([\d.]+)\2(\d{1,5})\2([ \t]*\r?\n?)", re.IGNORECASE)
_REPLY_227 = re.compile(rb"(227 \D*)" + _HOST_PORT + rb"(\D.*)", re.DOTALL)
_REPLY_229 = re.compile(rb"(229 [^(]*\()([!-~])\2\2(\d{1,5})\2(\).*)", re.DOTALL)


class Ftp(TcpApp):
    """The helper for FTP."""

    name = "ftp"
    ports: tuple[int, ...] = (21,)

    def bind(self, session: Session) -> None:
        session.data = _ControlConnection(session)


class _ControlConnection(Dialogue):
    """Rewrites the commands and replies of one control connection."""

    def __init__(self, session: Session) -> None:
        commands = Lines(self._command, _may_be_announcing_command)
        replies = Lines(self._reply, _may_be_announcing_reply)
        out_and_in = (replies, commands) if session.inside_serves else (commands, replies)
        super().__init__(session, *out_and_in)
        self._session = session
        self._began = False
        self._asked: set[bytes] = set()  # the replies that the client's commands ask for
        self._longer_reply: bytes | None = None  # the code that will end a reply of several lines

    # -- commands -----------------------------------------------------------------------

    def _command(self, line: bytes) -> bytes:
        name = line[: _LONGEST_COMMAND + 1].partition(b" ")[0].strip().upper()
        if not self._began:
            self._began = True
            if name not in _COMMANDS:
                self.leave_alone()
        if name == b"AUTH":
            self._asked.add(_PROTECTED)
        if name in _PASSIVE:
            self._asked.add(_PASSIVE[name])
        if self._session.inside_serves or name not in (b"PORT", b"EPRT"):
            return line
        by_numbers = self._announced_by_numbers(_PORT.fullmatch(line))
        return by_numbers or self._announced_by_eprt(line) or self._hidden(line)

    def _announced_by_eprt(self, line: bytes) -> bytes | None:
        match = _EPRT.fullmatch(line)
        if match is None:
            return None
        begin, mark, written, port, end = match.groups()
        address = from_dotted(written.decode())
        if address is None:
            return None
        address, mport = self._announced(address, int(port))
        return begin + mark.join([b"", b"1", dotted(address).encode(), b"%d" % mport, end])

    # -- replies ------------------------------------------------------------------------

    def _reply(self, line: bytes) -> bytes:
        code, longer = line[:_CODE], self._longer_reply
        if longer is None and code[:3].isdigit() and code[3:] == b"-":
            self._longer_reply = code[:3] + b" "
        elif code == longer:
            self._longer_reply = None
        answers = self._longer_reply is None and code in self._asked
        if answers:
            self._asked.discard(code)
        if answers and code == _PROTECTED:
            self.leave_alone()
        if not self._session.inside_serves or code[:3] + b" " not in _PASSIVE.values():
            return line
        if longer or not answers:
            return self._hidden(line)
        by_numbers = self._announced_by_numbers(_REPLY_227.fullmatch(line))
        return by_numbers or self._announced_by_229(line) or self._hidden(line)

    def _announced_by_229(self, line: bytes) -> bytes | None:
        match = _REPLY_229.fullmatch(line)
        if match is None:
            return None
        begin, mark, port, end = match.groups()
        _, mport = self._announced(self._session.saddr, int(port))
        return begin + mark * 3 + b"%d" % mport + mark + end

    # -- what is announced ----------------------------------------------------------------

    def _announced_by_numbers(self, match: re.Match[bytes] | None) -> bytes | None:
        """Return a line with h1,h2,h3,h4,p1,p2 as the other side is to have it, or None."""
        if match is None:
            return None
        begin, host_port, end = match.groups()
        numbers = [int(number) for number in host_port.split(b",")]
        if max(numbers) > 255:
            return None
        replaced = _endpoint.pack(*self._announced(*_endpoint.unpack(bytes(numbers))))
        return begin + b",".join(b"%d" % number for number in replaced) + end

    def _announced(self, address: int, port: int) -> tuple[int, int]:
        """Return what to announce in the place of an endpoint; expect its session from now on."""
        if not self._session.is_secret(address):
            return address, port
        is_own = address == self._session.saddr
        mport = self._session.expect(TCP, port) if is_own else None
        return self._session.maddr, mport or 0

    def _hidden(self, line: bytes) -> bytes:
        """Return a line without the inside host's address."""
        own, nobody = dotted(self._session.saddr).encode(), b"0.0.0.0"
        for separator in (b".", b","):
            line = line.replace(own.replace(b".", separator), nobody.replace(b".", separator))
        return line


def _may_be_announcing_command(start: bytes) -> bool:
    return len(start) < _CODE or start[:_CODE].upper() in (b"PORT", b"EPRT")


def _may_be_announcing_reply(start: bytes) -> bool:
    return len(start) < _CODE or start[:_CODE] in _PASSIVE.values()
