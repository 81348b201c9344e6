"""Settings for all tests.

Where CI=true, properties are tried with the same examples at each run: a change is judged by what
it does, not by luck. Elsewhere the examples are new at each run. It never matters how long it takes
to make and to try examples: the time says something about the machine only.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", unhurried, derandomize=True)
settings.register_profile("here", unhurried)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")

# A process that a shell has started in the background ignores Ctrl-C. The processes that a test
# starts would ignore it too, but some tests end them with Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
