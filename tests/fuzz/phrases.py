"""What hosts say to each other where a helper listens, by server port."""

from __future__ import annotations

import struct

from tests.apps.pptp import (
    CLEAR_REQUEST,
    DISCONNECT_NOTIFY,
    INCOMING_CONNECTED,
    INCOMING_REPLY,
    INCOMING_REQUEST,
    LENGTHS,
    OUTGOING_REPLY,
    OUTGOING_REQUEST,
    SET_LINK_INFO,
    message,
)

FTP, TFTP, PPTP, SIP, IRC = 21, 69, 1723, 5060, 6667

_HOST = int.from_bytes(bytes((10, 0, 0, 2)), "big")
_SDP = (
    b"v=0\r\no=me 1 1 IN IP4 10.0.0.2\r\ns=-\r\nc=IN IP4 10.0.0.2\r\nt=0 0\r\n"
    b"m=audio 5000 RTP/AVP 0\r\na=rtcp:5001\r\nm=video 5002 RTP/AVP 31\r\n"
)


def _sip(start: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([start, *headers, length, b"", body])


def _dcc(offer: bytes) -> bytes:
    return b"PRIVMSG you :\1DCC " + offer + b"\1\r\n"


PHRASES: dict[int, tuple[bytes, ...]] = {
    FTP: (
        b"PORT 10,0,0,2,19,136\r\n", b"PORT 10,0,0,3,19,137\r\n", b"PORT 10,10,0,0,2,1\r\n",
        b"EPRT |1|10.0.0.2|5001|\r\n", b"EPRT |2|::1|5001|\r\n",
        b"EPRT |2|::ffff:10.0.0.2|5001|\r\n", b"PASV\r\n", b"EPSV\r\n", b"EPSV ALL\r\n",
        b"227 ok (10,0,0,2,19,137)\r\n", b"227 ok (198,51,100,7,19,137)\r\n",
        b"229 ok (|||5000|)\r\n", b"230-more\r\n", b"AUTH TLS\r\n", b"234 go on\r\n",
        b"\xff\xf4\r\n", b"NOOP\r\n", b"QU",
    ),
    IRC: (
        b"NICK me\r\n", b":me!u@h " + _dcc(b"SEND f 1 5000 9"), _dcc(b"SEND f %d 5000 99" % _HOST),
        _dcc(b'SEND "a b" %d 5001 1 2' % _HOST), _dcc(b"CHAT chat %d 5000" % _HOST),
        _dcc(b"RESUME f 61001 5"), _dcc(b"ACCEPT f 5000 5"), b"@tag=1 ", b"PRIVMSG you :\1DCC",
        b"\1\r\n", b"STARTTLS\r\n", b":srv 670 me :go on\r\n",
        _dcc(b"CHAT chat ::ffff:10.0.0.2 5000"),
        _dcc(b"SEND f 2001:db8::1 5000 9"), b"NOTICE you :\1DCC REJECT\1\r\n",
    ),
    SIP: (
        _sip(b"INVITE sip:you@example.net SIP/2.0", b"Via: SIP/2.0/UDP 10.0.0.2:7;branch=z",
             b"Contact: <sip:me@10.0.0.2:7>", b"CSeq: 1 INVITE", b"Call-ID: 1", body=_SDP),
        _sip(b"SIP/2.0 200 OK", b"Via: SIP/2.0/UDP 203.0.113.1:61000;received=203.0.113.1",
             b"CSeq: 1 INVITE", b"Session-Expires: 30;refresher=uas", b"Call-ID: 1", body=_SDP),
        _sip(b"SIP/2.0 200 OK", b"CSeq: 2 REGISTER", b"Call-ID: 1", b"Expires: 60",
             b"Contact: <sip:me@203.0.113.1:61000>;expires=40"),
        _sip(b"REGISTER sip:example.net SIP/2.0", b"Contact: <sip:me@10.0.0.2:7>;expires=60",
             b"CSeq: 2 REGISTER"),
        _sip(b"BYE sip:me@203.0.113.1:61000 SIP/2.0", b"CSeq: 3 BYE", b"Call-ID: 1"),
        _sip(b"SUBSCRIBE sip:you@example.net SIP/2.0", b"From: <sip:me@10.0.0.2:7>;tag=1",
             b"To: <sip:me@10.0.0.2>", b"CSeq: 4 SUBSCRIBE", b"Expires: 30"),
        _sip(b"SIP/2.0 487 Terminated", b"CSeq: 1 INVITE"), b"\r\n\r\n", _SDP,
        b"m: <sip:me@10.0.0.2>\r\n ;expires=5\r\n", b"Route: <sip:10.0.0.2;lr>\r\n",
    ),
    TFTP: (
        b"\0\1file\0octet\0", b"\0\2file\0netascii\0blksize\x00512\0", b"\0\3\0\1data", b"\0\5\0",
    ),
    PPTP: (
        message(1), message(OUTGOING_REQUEST, 7), message(OUTGOING_REPLY, 9, 7, result=1),
        message(OUTGOING_REPLY, 9, 61000, result=1), message(INCOMING_REQUEST, 8),
        message(INCOMING_REPLY, 8, 7, result=1), message(INCOMING_CONNECTED, 7),
        message(CLEAR_REQUEST, 7), message(OUTGOING_REPLY, 9, 7, result=4),
        message(DISCONNECT_NOTIFY, 9), message(SET_LINK_INFO, 7),
        struct.pack("!HHIHH", LENGTHS[7], 1, 0x1A2B3C4D, 7, 0),
    ),
}  # fmt: skip
"""Words, lines and messages: whole, in parts, and some that no standard knows."""
