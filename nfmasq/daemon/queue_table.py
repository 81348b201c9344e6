"""The kernel's table of the NFQUEUEs that are bound: who holds each, and what it has dropped.

Each queue has a line of nine numbers, of which the first eight tell something (Linux,
net/netfilter/nfnetlink_queue.c): the queue's number, the netlink port, packets that wait, copy
mode, copy range, packets that the queue dropped, packets that the socket dropped, the newest
packet's number.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# The thread's, and not /proc/net, which is the process's: threads of one process can be in network
# namespaces of their own.
QUEUE_TABLE = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
"""The queues of this network namespace. Only root and the group root may read it."""


class QueueRow(NamedTuple):
    """Holds what the kernel says of a queue."""

    number: int
    port: int  # the netlink port of the socket that has bound the queue
    waiting: int  # packets handed to user space or about to be, without a verdict yet
    queue_dropped: int  # packets for which the queue was too full
    user_dropped: int  # packets for which the netlink socket had no room
    newest: int  # number of the packet that was queued last; the first packet is 1


def queue_row(number: int, table: Path = QUEUE_TABLE) -> QueueRow | None:
    """Return the kernel's row about queue `number`.

    `None` where no queue of this number is bound, or where the table is absent or cannot be read.
    """
    try:
        lines = table.read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        queue, port, waiting, _, _, queue_dropped, user_dropped, newest, *_ = map(int, line.split())
        if queue == number:
            return QueueRow(queue, port, waiting, queue_dropped, user_dropped, newest)
    return None
