"""Classic BPF: have the kernel hand a socket only the packets that a program keeps."""

from __future__ import annotations

import socket
import struct
from ctypes import addressof, create_string_buffer

Program = tuple[tuple[int, int, int, int], ...]
"""Instructions as in linux/filter.h: code, jump if true, jump if false, operand."""

KEEP_NOTHING: Program = ((0x06, 0, 0, 0),)

_SO_ATTACH_FILTER = 26


def attach_filter(sock: socket.socket, program: Program) -> None:
    """Hand over only what the program keeps. Raises OSError."""
    code = create_string_buffer(b"".join(struct.pack("@HBBI", *step) for step in program))
    described = struct.pack("@HP", len(program), addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
