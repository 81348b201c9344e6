"""Settings for all tests.

Where CI=true, properties are tried with the same examples at each run: a change is judged by what
it does, not by luck. Elsewhere the examples are new at each run. It never matters how long it takes
to make and to try examples: the time says something about the machine only.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", unhurried, derandomize=True)
settings.register_profile("here", unhurried)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


# Servers that give up being root read what tests write, also where the umask is 077.
os.umask(0o022)


@pytest.fixture(scope="session", autouse=True)
def _signals_that_are_not_handed_down() -> None:
    """Have what tests start heed Ctrl-C and hang-ups, also where the tests themselves ignore them.

    A shell starts what is to run in the background without Ctrl-C, and nohup without hang-ups. A
    signal that is ignored is so in every process started from there, too, but some tests end theirs
    with these signals. A handler that does nothing ignores the signal only here.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
