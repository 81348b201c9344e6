"""Socket filters: programs by which the kernel decides which packets it hands to a socket.

They are written in the machine language of classic BPF. They do nothing to packets on their way
through the gateway: a packet that is not handed to a socket still goes on.
"""

from __future__ import annotations

import socket
import struct
from ctypes import addressof, create_string_buffer

Program = tuple[tuple[int, int, int, int], ...]
"""Instructions as in linux/filter.h, each of a code, jump if true, jump if false, operand."""

KEEP_NOTHING: Program = ((0x06, 0, 0, 0),)
"""For a socket that only sends: the kernel copies no packets to it, since nobody reads them."""

_SO_ATTACH_FILTER = 26


def attach_filter(sock: socket.socket, program: Program) -> None:
    """Have the kernel hand the socket only the packets that the program keeps. Raises OSError."""
    code = create_string_buffer(b"".join(struct.pack("@HBBI", *step) for step in program))
    described = struct.pack("@HP", len(program), addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
