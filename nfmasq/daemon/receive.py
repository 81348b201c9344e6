"""Reading messages from a socket, many with one system call.

Where packets come faster than they are handled, a system call for each packet is a good part of
what a small packet costs. recvmmsg(2) reads all messages that are there, and waits only where there
are none. Python's socket module does not have it, so it is called in the C library, which takes
longer: for a single message, recv(2) is quicker. After a message that came alone, the next few most
likely come alone, too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from struct import Struct

_WAIT_FOR_ONE = 0x10000  # MSG_WAITFORONE, recvmmsg(2); the socket module has no name for it
_NOTHING = (errno.EAGAIN, errno.EINTR)
_ALONE = 8
"""How many messages are read one by one after a message that came alone."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr, see recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iovec", ctypes.POINTER(_Iovec)),
        ("iovec_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Message(ctypes.Structure):
    """struct mmsghdr, see recvmmsg(2) and sendmmsg(2)."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


def messages_at(address: int, size: int, count: int, step: int = 0) -> ctypes.Array[Message]:
    """Make `count` messages of at most `size` bytes, each `step` bytes after the one before it.

    The bytes of the first message are at `address`.
    """
    messages = (Message * count)()
    for place, message in enumerate(messages):
        message.header.iovec = ctypes.pointer(_Iovec(address + place * step, size))
        message.header.iovec_length = 1
    return messages


class Receiver:
    """Reads up to `most` messages of at most `size` bytes at a time from a blocking socket.

    The socket's SO_RCVTIMEO limits the time that `receive` waits.
    """

    def __init__(self, sock: socket.socket, size: int, most: int) -> None:
        self._recv = sock.recv
        self._size = size
        self._alone = 0
        self._descriptor = sock.fileno()
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._most = most
        # Pages of the buffer that no message needs are never touched, and take no memory.
        buffer = bytearray(size * most)
        self._buffer = memoryview(buffer)
        self._starts = range(0, size * most, size)
        first = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._messages = messages_at(first, size, most, size)
        before, after = Message.length.offset, ctypes.sizeof(Message) - Message.length.offset - 4
        self._lengths = [Struct(f"{before}xI{after}x" * count) for count in range(most + 1)]

    def receive(self) -> list[bytes]:
        """Return the messages that are there, in reverse order; waits where there are none.

        The list is empty after a wait in vain, or where a signal came. Raises OSError.
        """
        if not self._alone:
            return self._receive_many()
        self._alone -= 1
        try:
            return [self._recv(self._size)]
        except BlockingIOError:
            return []

    def receive_waiting(self) -> list[bytes]:
        """Return the messages that are there, in reverse order; never waits. Raises OSError."""
        return self._receive_many(socket.MSG_DONTWAIT)

    def _receive_many(self, flags: int = _WAIT_FOR_ONE) -> list[bytes]:
        messages = self._messages
        count = self._recvmmsg(self._descriptor, messages, self._most, flags, None)
        if count < 0:
            number = ctypes.get_errno()
            if number in _NOTHING:
                return []
            raise OSError(number, os.strerror(number))
        self._alone = _ALONE if count == 1 else 0
        buffer = self._buffer
        lengths = self._lengths[count].unpack_from(messages)
        received = [
            bytes(buffer[start : start + length])
            for start, length in zip(self._starts, lengths, strict=False)
        ]
        received.reverse()
        return received
