"""The engine's table without a network: entries made, found and expired, and their memory.

`python -m bench.table ENTRIES` writes the results in JSON. Each size has a process of its own,
since a process keeps memory that it has used once.

The masquerade has its default settings, so at most 4,096 inside endpoints have a mapping at a time.
In a larger table these endpoints have sessions with ever more outside hosts.

The entries to look up are chosen at random, so that from some size on every access misses the
processor's caches. Two more look-ups are measured for comparison: in a bare dictionary of the same
keys, and of entries in the order in which they were made, where neighbours in time are neighbours
in memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from struct import Struct
from time import perf_counter
from typing import Any, NamedTuple

from bench.paths import ROOT
from nfmasq.daemon.sweeper import STEP
from nfmasq.engine import UDP, Masquerade, Settings, Timeouts
from nfmasq.engine.wire.checksum import checksum

SIZES = (1_000, 10_000, 100_000, 1_000_000)
LOOK_UPS = 200_000
"""The number of look-ups, whatever the size."""

MEASURABLE = 100_000
"""The number of entries whose memory shows beside what Python's allocator takes in advance."""

_BATCH = 10_000
_PORTS = range(61000, 65096)
_INSIDE = 0x0A000000  # 10.0.0.0
_OUTSIDE = 0xC6120000  # 198.18.0.0, for benchmarks (RFC 2544)
_MADDR = 0xC6336402  # 198.51.100.2

_header = Struct("!BBHHHBBHII")
_udp = Struct("!HHHH")


class Session(NamedTuple):
    """A session that an entry is made from; addresses are int, in host order."""

    saddr: int
    sport: int
    daddr: int
    dport: int
    maddr: int

    def packet(self) -> bytes:
        """Return a datagram of the session without payload, as the inside host sends it."""
        header = _header.pack(0x45, 0, 28, 0, 0, 64, UDP, 0, self.saddr, self.daddr)
        udp = _udp.pack(self.sport, self.dport, 8, 0)
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + udp


def session(number: int) -> Session:
    """Return a session by its number, from 0.

    There is one masquerade address, and its 4,096 ports are as many mappings, as by default.
    """
    session, endpoint = divmod(number, len(_PORTS))
    host, port = divmod(endpoint, 16)
    return Session(_INSIDE + host, 1024 + port, _OUTSIDE + session * 31 % 131_071, 53, _MADDR)


def measure(entries: int) -> dict[str, float]:
    """Make, find and expire `entries` entries; returns rates a second, and bytes an entry."""
    settings = Settings(ports=_PORTS, max_entries=entries, timeouts=Timeouts(udp=60))
    engine = Masquerade(settings, lock=threading.RLock())
    chosen = random.Random(1)
    results: dict[str, float] = {}

    def make(sessions: Iterable[Session]) -> Callable[[], None]:
        packets = [(s.packet(), s.maddr) for s in sessions]
        way = engine.ip_fw_masquerade

        def run() -> None:
            for packet, maddr in packets:
                way(packet, maddr, 0.0)

        return run

    def look_up(sessions: Iterable[Session]) -> Callable[[], None]:
        keys = [(UDP, s.saddr, s.sport, s.daddr, s.dport) for s in sessions]
        get, put = engine.sessions.ip_masq_out_get, engine.sessions.ip_masq_put

        def run() -> None:
            for key in keys:
                ms = get(*key)
                assert ms is not None
                put(ms)

        return run

    def expire() -> None:
        while engine.sweep(120.0, STEP):
            pass

    make([])()
    before = _resident_bytes()
    everything = (session(number) for number in range(entries))
    results["created"] = entries / sum(map(_seconds, map(make, _batches(everything))))
    made_entries = engine.sessions.entry_count(UDP)
    if made_entries != entries:
        raise RuntimeError(f"{made_entries} entries were made, and not {entries}")
    made = _resident_bytes()
    for again in _batches(session(number) for number in range(entries)):
        make(again)()
    if entries >= MEASURABLE:
        results["bytes_made"] = (made - before) / entries
        results["bytes_in_use"] = (_resident_bytes() - before) / entries

    def some() -> Iterator[list[Session]]:
        return _batches(session(chosen.randrange(entries)) for _ in range(LOOK_UPS))

    def in_order() -> Iterator[list[Session]]:
        return _batches(session(number % entries) for number in range(LOOK_UPS))

    results["found"] = LOOK_UPS / sum(map(_seconds, map(look_up, some())))
    results["found_in_order"] = LOOK_UPS / sum(map(_seconds, map(look_up, in_order())))
    results["packets"] = LOOK_UPS / sum(map(_seconds, map(make, some())))
    results["expired"] = entries / _seconds(expire)
    if engine.sessions.entry_count(UDP):
        raise RuntimeError("entries are left after their time")
    bare = {session(n).packet()[12:24]: n for n in range(entries)}

    def look_up_bare(sessions: Iterable[Session]) -> Callable[[], None]:
        keys = [s.packet()[12:24] for s in sessions]

        def run() -> None:
            for key in keys:
                bare[key]

        return run

    results["found_bare"] = LOOK_UPS / sum(map(_seconds, map(look_up_bare, some())))
    return results


def measure_apart(entries: int) -> dict[str, float]:
    """Measure a table of `entries` entries in a process of its own; returns what `measure` does."""
    line = [sys.executable, "-m", "bench.table", str(entries)]
    # Ctrl-C is for this process, which ends the other.
    pipe = subprocess.PIPE
    done = subprocess.run(line, cwd=ROOT, stdout=pipe, start_new_session=True, check=True)
    results: dict[str, float] = json.loads(done.stdout)
    return results


def _batches(items: Iterable[Session]) -> Iterator[list[Session]]:
    batch: list[Session] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _seconds(work: Callable[[], Any]) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
