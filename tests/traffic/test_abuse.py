"""Attacks beside a quiet neighbour, which keeps what it has: those of `script/bench --abuse`.

How long the neighbour waits is measured there. On a machine that does other things too, it says
little.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.abuse import ATTACKS, Attack, default_nfmasq, scene, suffer
from nfmasq.lab import Lab

SECONDS = 4.0

KEPT = 0.85
"""The share of its connections and echoes that the neighbour keeps beside other tests."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with scene(default_nfmasq) as lab:
        yield lab


@pytest.mark.parametrize("attack", ATTACKS[1:], ids=[attack.key for attack in ATTACKS[1:]])
def test_a_neighbour_keeps_its_connections_and_echoes(lab: Lab, attack: Attack) -> None:
    had = suffer(lab, attack, SECONDS)
    assert had["rate"] > 1000, "no attack"
    assert had["fetches"] >= KEPT
    assert had["echoes"] >= KEPT
