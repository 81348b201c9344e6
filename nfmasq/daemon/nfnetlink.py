"""Configuration messages to the kernel's NFQUEUE, over nfnetlink.

NetfilterQueue configures a queue when it binds it, but caps the copy range at 4,016 bytes and knows
no flags. What it leaves out is sent here, on the queue's own socket: the kernel takes configuration
only from the socket that bound the queue. A message is::

    nlmsghdr   length, type (subsystem << 8 | message), flags, sequence, port id    native order
    nfgenmsg   family, version, queue number (network order)
    attributes length, type, value (network order), padded to 4 bytes

The kernel answers with an NLMSG_ERROR that repeats the sequence number; error 0 is the
acknowledgement. Source: linux/netfilter/nfnetlink_queue.h, linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

MAX_COPY_RANGE = 0xFFFF
"""Bytes of a packet to copy: all. The kernel makes it 65,531, the most that an attribute holds."""

_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NFNL_SUBSYS_QUEUE = 3
_NFQNL_MSG_CONFIG = 2
_NFQA_CFG_PARAMS = 2
_NFQA_CFG_MASK = 4
_NFQA_CFG_FLAGS = 5
_NFQNL_COPY_PACKET = 2
_NFQA_CFG_F_GSO = 1 << 2

_NLMSGHDR = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")
SEQUENCE = 0x6E666D71


def configure(sock: socket.socket, queue: int, *, gso: bool) -> None:
    """Have the queue bound on `sock` copy whole packets, and unsegmented ones with `gso`.

    To be called while the queue copies nothing yet (COPY_NONE): the acknowledgement must be the
    only thing to read. Raises OSError with the kernel's errno where it refuses, ETIMEDOUT where it
    does not answer.
    """
    params = struct.pack("!IB", MAX_COPY_RANGE, _NFQNL_COPY_PACKET)
    flag = struct.pack("!I", _NFQA_CFG_F_GSO)
    flags = flag if gso else struct.pack("!I", 0)
    attributes = (
        _attribute(_NFQA_CFG_FLAGS, flags)
        + _attribute(_NFQA_CFG_MASK, flag)
        + _attribute(_NFQA_CFG_PARAMS, params)
    )
    _request(sock, struct.pack("!BBH", socket.AF_UNSPEC, 0, queue) + attributes)


def _attribute(kind: int, value: bytes) -> bytes:
    padding = b"\0" * (-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def _request(sock: socket.socket, body: bytes) -> None:
    kind = _NFNL_SUBSYS_QUEUE << 8 | _NFQNL_MSG_CONFIG
    length = _NLMSGHDR.size + len(body)
    header = _NLMSGHDR.pack(length, kind, _NLM_F_REQUEST | _NLM_F_ACK, SEQUENCE, 0)
    sock.send(header + body)
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
