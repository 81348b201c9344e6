"""The NFQUEUE: binding it, reading it until told to stop, giving it back.

Theory of operation. NetfilterQueue binds the queue and takes the messages apart. But its own
`run()` reads one packet at a time, of 4,096 bytes at most. So its `run_socket()` is given a
`PacketQueue` in the place of a socket. `PacketQueue.recv` takes one packet after the other from a
batch of whole packets. Between two batches it sends the verdicts, reads what has come meanwhile
(`receive.py`, `turns.py`), counts the socket's overflows, and stops where it has been told to. A
batch is what waits, one packet or many: nothing is ever waited for to fill a batch.

* The queue is bound in a mode that copies nothing, in which the kernel drops what comes. Then it is
  told to copy whole packets. So no packet ever comes cut short by NetfilterQueue's limit.
* A signal's handler in Python runs between two bytecodes of the main thread, and a blocking read
  may be started again after it (PEP 475). So `stop` only sets a flag, which is looked at before
  each read; packets that have been read get their verdicts. A read that finds nothing ends after
  `_IDLE_SECONDS` (SO_RCVTIMEO), so that the flag is looked at again.
* What still waits in the queue at the end is dropped by the kernel: nothing leaves unmasqueraded.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import warnings
from collections.abc import Callable, Sized
from pathlib import Path
from types import TracebackType
from typing import cast

from netfilterqueue import COPY_NONE, NetfilterQueue, Packet

from nfmasq.daemon import nfnetlink
from nfmasq.daemon.handler import Handler
from nfmasq.daemon.lines import Lines
from nfmasq.daemon.queue_table import QUEUE_TABLE, queue_row
from nfmasq.daemon.receive import Receiver
from nfmasq.daemon.turns import Turns
from nfmasq.daemon.verdicts import ENOUGH, MOST, Verdicts
from nfmasq.errors import NfmasqError

_IDLE_SECONDS = 0.2
_MESSAGE_BYTES = 65535 + 4096  # a whole packet, and room for the netlink headers around it
_BATCH = 32
"""The most packets that are read at once: the verdict on the first waits for the last."""
_WAITING = 8
"""The part of the kernel's queue that may wait in lines here, as the kernel counts these, too: the
other seven eighths are for what comes at once."""
_SO_SNDBUFFORCE = 32
_CAP_NET_ADMIN = 12


class PacketQueue:
    """A bound NFQUEUE whose packets go to `handler`, one at a time, in the thread that calls `run`.

    `number` is the NFQUEUE's, `length` is how many packets may wait in the kernel, `buffer` how
    many bytes of them the socket holds (beyond net.core.rmem_max where the kernel lets us). With
    `gso` superpackets come as they are (`offload.py`), where the kernel is able to hand them over;
    the attribute `gso` says whether it is. Packets come from construction on, and wait for `run`.
    Hosts take turns where packets pile up: `whose` and `hold` are those of `Turns`.
    `settle` is called between two batches while there is something in `due`.

    Raises NfmasqError where the queue cannot be had.
    """

    def __init__(
        self,
        number: int,
        handler: Handler,
        *,
        length: int = 8192,
        buffer: int = 32 * 1024 * 1024,
        gso: bool = True,
        whose: Callable[[bytes], int] = lambda message: 0,
        hold: Callable[[int], None] = lambda host: None,
        due: Sized = (),
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = number
        self.overflows = 0
        """Times that the socket had no room and lost packets (ENOBUFS)."""
        self.crowded_out = 0
        """Packets that were dropped because their host had its share of what may wait."""
        self.looks = 0
        """Times that packets were looked for: some a second, also where none come."""
        self._handler = handler
        self._due, self._settle = due, settle
        self._message = b""
        self._batch: list[bytes] = []
        self._stopped = False
        try:
            self._queue = NetfilterQueue()
            with warnings.catch_warnings():
                # NetfilterQueue warns of a capped buffer, whose size `buffer_size` tells.
                warnings.simplefilter("ignore", RuntimeWarning)
                self._queue.bind(number, self._received, length, COPY_NONE, sock_len=buffer)
        except OSError as error:
            raise NfmasqError(_why_not(number, error)) from error
        self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        receiver = Receiver(self._socket, _MESSAGE_BYTES, _BATCH)
        lines = Lines(length // _WAITING)
        self._turns = Turns(receiver, _BATCH, lines, whose, self._crowd_out, hold)
        try:
            self._verdicts = Verdicts(self._socket, number)
            self._set_up_socket()
            self.gso = gso and self._superpackets_come()
            nfnetlink.copy_whole_packets(self._socket, number)
        except OSError as error:
            self.close()
            raise NfmasqError(
                f"the kernel does not hand over whole packets on queue {number}: {error.strerror}"
            ) from error

    @property
    def buffer_size(self) -> int:
        """Bytes that the socket holds: what was asked for, or less where the kernel capped it."""
        # The kernel doubles what it is asked for, for its own book-keeping (socket(7)).
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def run(self) -> None:
        """Hand packets to the handler until `stop`. Raises OSError where the queue is lost.

        Where memory does not suffice to read or to answer a packet, it goes on with the next.
        """
        while True:
            try:
                self._queue.run_socket(cast(socket.socket, self))
                return
            except MemoryError:
                continue

    def stop(self) -> None:
        """Have `run` return after the batch at hand; for any thread, and for signal handlers."""
        self._stopped = True

    def close(self) -> None:
        """Give the queue back; the kernel drops the packets that wait in it."""
        self._queue.unbind()
        self._socket.close()

    def recv(self, _size: int) -> bytes:
        """Return the next message, whole, whatever size `run_socket` asks for.

        Raises BlockingIOError when stopped, which makes `run_socket` return.
        """
        batch, verdicts = self._batch, self._verdicts
        if not batch:
            verdicts.send()
            if self._due:
                self._settle()
            batch = self._batch = self._next_batch()
        elif verdicts.load >= ENOUGH:
            verdicts.send()
        self._message = message = batch.pop()
        return message

    def _next_batch(self) -> list[bytes]:
        """Read at least one message, in reverse order. Raises BlockingIOError when stopped."""
        while not self._stopped:
            self.looks += 1
            try:
                batch = self._turns.receive()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overflows += 1
            else:
                if batch:
                    return batch
        raise BlockingIOError(errno.EAGAIN, "stopped")

    def _crowd_out(self, message: bytes) -> None:
        self.crowded_out += 1
        self._verdicts.drop(nfnetlink.number_of(message))
        if self._verdicts.load >= ENOUGH:
            self._verdicts.send()

    def _received(self, packet: Packet) -> None:
        self._handler(packet, self._message, self._verdicts)

    def _superpackets_come(self) -> bool:
        try:
            nfnetlink.ask_for_superpackets(self._socket, self.number)
        except OSError:
            return False
        return True

    def _set_up_socket(self) -> None:
        # Forced, so that net.core.wmem_max does not limit it.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, MOST)
        # Not settimeout(), which would poll before each read, a system call a packet.
        timeval = struct.pack("@ll", 0, int(_IDLE_SECONDS * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def __enter__(self) -> PacketQueue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _why_not(number: int, error: OSError) -> str:
    """Find why the queue cannot be had: NetfilterQueue's errors do not carry the kernel's errno."""
    if not _has_net_admin():
        return "not allowed to use NFQUEUE: run as root, or with the capability CAP_NET_ADMIN"
    if not QUEUE_TABLE.exists():
        return "this kernel has no NFQUEUE; load or build the module nfnetlink_queue"
    if queue_row(number):
        return f"queue {number} is in use by another program; stop it, or give another --queue"
    return f"cannot use queue {number}: {error.strerror or error}"


def _has_net_admin() -> bool:
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return True
