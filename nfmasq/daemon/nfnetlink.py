"""Messages to and from the kernel's NFQUEUE, over nfnetlink: what NetfilterQueue leaves out.

NetfilterQueue configures a queue when it binds the queue, but caps the copy range at 4,016 bytes
and knows no flags. What it leaves out is sent here, on the queue's own socket: the kernel takes
configuration and verdicts only from the socket that bound the queue. A message is::

    nlmsghdr   length, type (subsystem << 8 | message), flags, sequence, port id    native order
    nfgenmsg   family, version, queue number (network order)
    attributes length, type, value (network order), padded to 4 bytes

To a request the kernel answers with an NLMSG_ERROR that repeats the sequence number; error 0 is the
acknowledgement. A packet comes in a message whose last attribute is the packet itself. The
attribute NFQA_SKB_INFO comes before it, where the kernel has something to say of the packet.
Source: linux/netfilter/nfnetlink_queue.h, linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

MOST_COPIED = 65531
"""The most bytes of a packet that the kernel hands over or takes back: what an attribute holds."""

CHECKSUM_MISSING, SUPERPACKET = 1, 2
"""What the kernel says of a packet (NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO): the sum of the pseudo
header stands in place of its checksum; the packet is to be cut into single packets later on."""

DROP, ACCEPT, QUEUE = 0, 1, 3
"""Verdicts (linux/netfilter.h); QUEUE has the queue's number in its upper 16 bits."""

_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NFNL_SUBSYS_QUEUE = 3
_NFQNL_MSG_VERDICT = 1
_NFQNL_MSG_CONFIG = 2
_NFQA_CFG_PARAMS = 2
_NFQA_CFG_MASK = 4
_NFQA_CFG_FLAGS = 5
_NFQNL_COPY_PACKET = 2
_NFQA_CFG_F_GSO = 1 << 2
_NFQA_VERDICT_HDR = 2
NFQA_PAYLOAD = 10
_NFQA_SKB_INFO = 14

_NLMSGHDR = struct.Struct("=IHHII")
_NFGENMSG = struct.Struct("!BBH")
_NLATTR = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
SEQUENCE = 0x6E666D71

_FIRST_ATTRIBUTE = _NLMSGHDR.size + _NFGENMSG.size
_NUMBER = struct.Struct("!I")
_HOOK = _FIRST_ATTRIBUTE + _NLATTR.size + 6  # after the number, and the protocol of the link
LEAST = _HOOK + 1
"""The fewest bytes of a message that tells a packet's hook and number."""

_SKB_INFO_HEADER = _NLATTR.pack(_NLATTR.size + 4, _NFQA_SKB_INFO)
_INFO_BY_ATTRIBUTE = {
    _SKB_INFO_HEADER + struct.pack("!I", info): info & (CHECKSUM_MISSING | SUPERPACKET)
    for info in range(8)
}


def copy_whole_packets(sock: socket.socket, queue: int) -> None:
    """Have the queue bound on `sock` copy whole packets.

    To be called while the queue copies nothing yet (COPY_NONE): the acknowledgement must be the
    only thing to read. Raises OSError: with the kernel's errno where the kernel answers with an
    error, with ETIMEDOUT where it does not answer.
    """
    params = struct.pack("!IB", MOST_COPIED, _NFQNL_COPY_PACKET)
    _request(
        sock, _message(_NFQNL_MSG_CONFIG, queue, _attribute(_NFQA_CFG_PARAMS, params), ask=True)
    )


def ask_for_superpackets(sock: socket.socket, queue: int) -> None:
    """Have the queue hand packets over as they are, before they are cut into what a link takes.

    To be called before `copy_whole_packets`. Raises OSError as `copy_whole_packets` does.
    """
    _request(sock, superpackets(queue, True, ask=True))


def superpackets(queue: int, wanted: bool, *, ask: bool = False) -> bytes:
    """Make the message that turns superpackets on or off; with `ask` the kernel acknowledges it."""
    flag = struct.pack("!I", _NFQA_CFG_F_GSO)
    attributes = _attribute(_NFQA_CFG_FLAGS, flag if wanted else bytes(4))
    return _message(
        _NFQNL_MSG_CONFIG, queue, attributes + _attribute(_NFQA_CFG_MASK, flag), ask=ask
    )


def verdict_message(queue: int, verdict: int) -> bytes:
    """Make the message that gives a packet a verdict.

    Its last four bytes are the packet's number (network order), which is 0 here.
    """
    header = struct.pack("!II", verdict, 0)
    return _message(_NFQNL_MSG_VERDICT, queue, _attribute(_NFQA_VERDICT_HDR, header))


def _attribute(kind: int, value: bytes) -> bytes:
    padding = b"\0" * (-len(value) % 4)
    return _NLATTR.pack(_NLATTR.size + len(value), kind) + value + padding


def _message(kind: int, queue: int, attributes: bytes, *, ask: bool = False) -> bytes:
    body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, queue) + attributes
    kind |= _NFNL_SUBSYS_QUEUE << 8
    flags = _NLM_F_REQUEST | _NLM_F_ACK * ask
    return _NLMSGHDR.pack(_NLMSGHDR.size + len(body), kind, flags, SEQUENCE, 0) + body


def _request(sock: socket.socket, message: bytes) -> None:
    sock.send(message)
    while True:
        try:
            answer = sock.recv(65536)
        except BlockingIOError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        _, kind, _, sequence, _ = _NLMSGHDR.unpack_from(answer)
        if kind == _NLMSG_ERROR and sequence == SEQUENCE:
            break
    (error,) = _ERROR.unpack_from(answer, _NLMSGHDR.size)
    if error:
        raise OSError(-error, os.strerror(-error))


def hook_of(message: bytes) -> int:
    """Return the netfilter hook at which a message's packet was queued: its first attribute."""
    return message[_HOOK]


def number_of(message: bytes) -> int:
    """Return the number that the kernel gave a message's packet."""
    number: int = _NUMBER.unpack_from(message, _FIRST_ATTRIBUTE + _NLATTR.size)[0]
    return number


def packet_start(message: bytes, usual: int = 0) -> int:
    """Return where the packet begins in its message; the message's length where there is none.

    `usual` is where the packet began in a message before, which saves the search.
    """
    if message[usual - 4 : usual] == _NLATTR.pack(
        (len(message) - usual + 4) & 0xFFFF, NFQA_PAYLOAD
    ):
        return usual
    at = _FIRST_ATTRIBUTE
    while at + _NLATTR.size <= len(message):
        length, kind = _NLATTR.unpack_from(message, at)
        if kind == NFQA_PAYLOAD:
            return at + _NLATTR.size
        at += max(_NLATTR.size, length + 3 & ~3)
    return len(message)


def skb_info(message: bytes, payload_length: int) -> int:
    """Read what a message says of its packet: CHECKSUM_MISSING, SUPERPACKET, both or none (0).

    `payload_length` is the length of the packet in bytes.
    """
    payload = len(message) - payload_length
    # The attribute is eight bytes; after it, four bytes begin the attribute of the payload.
    info = _INFO_BY_ATTRIBUTE.get(message[payload - 12 : payload - 4])
    return _skb_info_elsewhere(message, payload) if info is None else info


def _skb_info_elsewhere(message: bytes, end: int) -> int:
    """Find NFQA_SKB_INFO outside of its usual place; 0 where there is none, which is usual."""
    if message.find(_SKB_INFO_HEADER, _FIRST_ATTRIBUTE, end) < 0:
        return 0
    at = _FIRST_ATTRIBUTE
    while at + _NLATTR.size <= end:
        length, kind = _NLATTR.unpack_from(message, at)
        if kind == _NFQA_SKB_INFO:
            return message[at + 7] & (CHECKSUM_MISSING | SUPERPACKET)
        at += max(_NLATTR.size, length + 3 & ~3)
    return 0
