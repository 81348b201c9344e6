"""Attacks beside a quiet neighbour, which keeps what it has: those of `script/bench --abuse`.

How long the neighbour waits is measured there. On a machine that does other things too, it says
little.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from bench.abuse import ATTACKS, KEPT, Attack, scene, suffer
from nfmasq.lab import Daemon, Lab

SECONDS = 4.0


def nfmasq(options: tuple[str, ...], lab: Lab) -> Daemon:
    lab.rules("up")
    return lab.nfmasq(*options)


@pytest.fixture(scope="module", params=[(), ("--flow-cache=off",)], ids=["default", "queue"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with scene(partial(nfmasq, request.param)) as lab:
        yield lab


@pytest.mark.parametrize("attack", ATTACKS[1:], ids=[attack.key for attack in ATTACKS[1:]])
def test_a_neighbour_keeps_its_connections_and_echoes(lab: Lab, attack: Attack) -> None:
    had = suffer(lab, attack, SECONDS)
    assert had["rate"] > 1000, "no attack"
    assert had["fetches"] >= KEPT
    assert had["echoes"] >= KEPT
