"""The fast path and the plain way agree on long random walks, in which everything changes.

`test_fastpath.py` and `test_outbound.py` hold the two ways against each other on short sequences.
Here two masquerades are led along the same walk: packets of all kinds, reloads, servers that die,
addresses that come and go, sweeps and leaps of time, in a world so small that all of it meets.
After each step all that can be seen of the two is equal, and each is whole in itself
(`two_ways.py`).

A walk that fails is made short (`walks.py`): steps are left out as long as it still fails. What is
left is printed, and can be put into `retrace`. NFMASQ_FUZZ_SECONDS says for how long walks are
tried.
"""

from __future__ import annotations

import os

from tests.engine.walks import walk_for

SECONDS = float(os.environ.get("NFMASQ_FUZZ_SECONDS") or (60 if os.environ.get("CI") else 10))


def test_both_ways_agree_on_walks_through_all_that_may_happen() -> None:
    walk_for(SECONDS)
