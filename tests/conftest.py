"""Settings for all tests.

Where CI=true, properties are tried with the same examples each time: a change is judged by what
it does, not by luck. Elsewhere the examples are new ones at each run. How long it takes to make
and to try them is no matter anywhere: that says something of the machine only.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", unhurried, derandomize=True)
settings.register_profile("here", unhurried)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")

# A process that was started in the background of a shell ignores Ctrl-C, and so would all that a
# test starts, those included that it ends in this way.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
