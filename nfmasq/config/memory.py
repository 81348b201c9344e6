"""How many entries fit into the memory that nfmasq may have.

The memory of the machine is for others, too: entries may take a half of it. A limit that is set for
nfmasq itself (a cgroup's, so MemoryMax of its unit, or RLIMIT_AS) is for nfmasq alone: entries may
take three quarters of what nfmasq does not take without them.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

BYTES_AN_ENTRY = 1200
"""Bytes that an entry takes at most: as one of a million sessions of one socket, whose packets the
queue brings (docs/bounds.md)."""

BYTES_IN_KERNEL = 300
"""Bytes that the flow cache takes in the kernel for an entry whose flow it carries both ways."""

BYTES_WITHOUT = 96 << 20
"""Bytes that nfmasq takes without any entry."""

ADDRESSES_WITHOUT = 192 << 20
"""Bytes of addresses that nfmasq takes without any entry, with the stacks of its threads."""

LEAST = 1024
"""The fewest entries that there may be by default: with less memory nfmasq does not run, either."""

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Fitting(NamedTuple):
    """How many entries fit, and into what."""

    entries: int
    what: str


def fitting(most: int) -> Fitting:
    """Return how many entries fit into the memory that this process may have, but not over `most`.

    What cannot be read limits nothing.
    """
    found = (Fitting(most, "the most there may be"),)
    entries, what = min(chain(found, _by_machine(), _by_cgroup(), _by_addresses()))
    return Fitting(max(LEAST, entries), what)


def _by_machine() -> Iterator[Fitting]:
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) << 10
            entries = memory // 2 // (BYTES_AN_ENTRY + BYTES_IN_KERNEL)
            yield Fitting(entries, f"half of the machine's memory of {memory >> 20} MB")


def cgroup_limit() -> int | None:
    """Return the bytes that this process's cgroup, and those above it, may have; None: no limit."""
    limits = chain.from_iterable(map(_lines, _cgroup_limits()))
    return min(map(int, filter(str.isdigit, limits)), default=None)


def _by_cgroup() -> Iterator[Fitting]:
    limit = cgroup_limit()
    if limit is not None:
        entries = (limit - BYTES_WITHOUT) * 3 // 4 // (BYTES_AN_ENTRY + BYTES_IN_KERNEL)
        yield Fitting(entries, f"the cgroup's memory limit of {limit >> 20} MB")


def _cgroup_limits() -> Iterator[Path]:
    """Yield the files that may have a limit, by version 2 of cgroups and by version 1.

    In a container a cgroup may have a path that the container does not see.
    """
    for line in _lines(PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = CGROUPS, ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            folder, names = CGROUPS / "memory", ["memory.limit_in_bytes"]
        else:
            continue
        group = folder / path.lstrip("/")
        groups = [each for each in (group, *group.parents) if each.is_relative_to(folder)]
        yield from (each / name for each in groups for name in names)


def address_limit() -> int | None:
    """Return the bytes of addresses that this process may have (RLIMIT_AS); None: no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _by_addresses() -> Iterator[Fitting]:
    limit = address_limit()
    if limit is not None:
        entries = (limit - ADDRESSES_WITHOUT) * 3 // 4 // BYTES_AN_ENTRY
        yield Fitting(entries, f"RLIMIT_AS of {limit >> 20} MB")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
