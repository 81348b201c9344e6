"""The soak in short (`soak.py`): its traffic passes, and what should not be is seen."""

from __future__ import annotations

import pytest

from tests.traffic import soak
from tests.traffic.soak import SETTLED, Moment

SECONDS = 40


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    """The soak has a lab of its own, and takes nfmasq's defaults."""
    return ()


def test_mixed_traffic_passes_and_nothing_is_refused() -> None:
    told: list[str] = []
    assert soak.soaked(SECONDS, told.append) == []
    assert len(told) >= 4


MB = 1_000_000


def at(seconds: float, rss: int, **errors: int) -> Moment:
    return Moment(seconds, rss, 500, 1000, errors, 0)


@pytest.mark.parametrize(
    ("moments", "log", "found"),
    [
        ([at(60, 50 * MB), at(SETTLED, 80 * MB), at(3600, 87 * MB, unsolicited=9)], "", 0),
        ([at(SETTLED, 80 * MB), at(1200, 89 * MB), at(3600, 80 * MB)], "", 1),
        ([at(60, 50 * MB, no_port=1)], "", 1),
        ([at(60, 50 * MB, exception=2)], "Traceback (most recent call last):\n", 2),
        ([at(60, 50 * MB)], "nfmasq: ready\n", 0),
    ],
)
def test_what_should_not_be_is_found(moments: list[Moment], log: str, found: int) -> None:
    assert len(soak.findings({}, moments, log)) == found
