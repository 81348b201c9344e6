"""A forger, as a program of its own (`test_forged_sources`): it sends in the name of 230 others.

`python -m tests.traffic.forger '["tcp", "10.77.0", "203.0.113.11", 4000, 5000]'` sends SYNs, or
datagrams with "udp", to an endpoint, so many a second, until its input ends.
"""

from __future__ import annotations

import json
import select
import sys
from itertools import cycle
from socket import AF_INET, IPPROTO_RAW, SOCK_RAW, socket
from time import monotonic

from tests.packets import SYN, tcp, udp

FIRST, HOSTS = 20, 230
PACKETS = 30_000
PAUSE = 0.002


def forge(protocol: str, network: str, address: str, port: int, rate: int) -> None:
    ends = [((f"{network}.{FIRST + n % HOSTS}", 1024 + n // HOSTS), (address, port))
            for n in range(PACKETS)]  # fmt: skip
    packets = cycle([tcp(*each, SYN) if protocol == "tcp" else udp(*each, b"x") for each in ends])
    began, sent = monotonic(), 0
    with socket(AF_INET, SOCK_RAW, IPPROTO_RAW) as raw:
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            due = int((monotonic() - began) * rate)
            for _ in range(due - sent):
                raw.sendto(next(packets), (address, 0))
            sent = due


if __name__ == "__main__":
    forge(*json.loads(sys.argv[1]))
