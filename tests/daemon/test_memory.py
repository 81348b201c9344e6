"""Memory after a flood: what its entries took goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.daemon.flood import FLOODS

PACKETS = 60_000


@pytest.mark.parametrize("kind", FLOODS)
def test_a_minute_after_a_flood_there_is_hardly_more_memory_than_before(kind: str) -> None:
    """Each flood in a process of its own, with the daemon's garbage collector and allocator."""
    line = [sys.executable, "-m", "tests.daemon.flood", kind, str(PACKETS)]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
    before, most, after = map(int, done.stdout.split())
    assert most > 1.3 * before, "no flood"
    assert after < 1.1 * before
