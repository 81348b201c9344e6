"""The round trip while 100,000 entries expire in the same second.

A masquerade in Python cannot make 100,000 entries within a second. So they are made in four waves,
one second apart, and the entries of each wave live one second less than those of the wave before.
The flags of the TCP segment that begins an entry decide its state, and the state decides its
timeout. All entries of all waves expire within the same second, `_LIFE` seconds after the first
wave began.

         0s     1s     2s     3s     4s     5s     6s     7s     8s     9s
    ACK  ├ made ┤- - - - - - - - - - - - - - - - - - - - - - - - ├ expire
    FIN         ├ made ┤- - - - - - - - - - - - - - - - - - - - -├ expire
    SYN                ├ made ┤- - - - - - - - - - - - - - - - - ├ expire
    RST                       ├ made ┤- - - - - - - - - - - - - -├ expire
    round trips                         ├───── quiet ────┤       ├ expiring ─ ...
"""

from __future__ import annotations

import tempfile
import time

from bench import traffic
from bench.network import PORT, Results, answer, percentile, running, start
from bench.paths import PORTS
from nfmasq.daemon.control import request
from nfmasq.engine.wire.protocols import ACK, FIN, RST, SYN
from nfmasq.errors import NfmasqError
from nfmasq.lab import Daemon, Lab

ENTRIES = 100_000

_WAVES = {"tcp-established": ACK, "tcp-time-wait": FIN, "tcp-syn-sent": SYN, "tcp-close": RST}
_WAVE_SECONDS = 1.0
_LIFE = 8.0
_QUIET = (4.5, 7.5)
_PING = (4.0, 15.5)
_POLL_SECONDS = 0.1


class TooBusy(NfmasqError):
    """Raised where the machine had too little time for what was to be measured."""


def measure() -> Results:
    """Measure the 99th percentile of the round trip, in µs: `quiet`, `expiring` and their `ratio`.

    `seconds` is how long it took from the first expiry to the last. Raises TooBusy.
    """
    timeouts = "".join(f"{key} = {_LIFE - n * _WAVE_SECONDS}\n" for n, key in enumerate(_WAVES))
    with Lab(1, 1) as lab, tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(f"[timeouts]\n{timeouts}")
        file.flush()
        lab.rules("up", "--ports", PORTS)
        # The segments to these addresses have done their work at the gateway.
        lab.router.ip("route add blackhole 198.18.0.0/15")
        daemon = lab.nfmasq("--ports", PORTS, "--config", file.name)
        with running(start(lab.outside[0], traffic.echo, PORT)):
            lab.outside[0].wait_until_bound(PORT, "udp")
            return _measure(lab, daemon)


def _measure(lab: Lab, daemon: Daemon) -> Results:
    inside, outside = lab.inside[0], lab.outside[0]
    begin = time.monotonic() + 0.5
    waves = (begin, _WAVE_SECONDS, ENTRIES // len(_WAVES), list(_WAVES.values()))
    with running(start(inside, traffic.scatter, *waves)):
        _sleep_until(begin + _PING[0])
    made = _figure(daemon, "nfmasq_entries_created_total")
    if made < ENTRIES:
        raise TooBusy(f"only {made:,} of {ENTRIES:,} entries were made: this machine is too busy")
    ping = (outside.address, PORT, 64, _PING[1] - _PING[0])
    pinging = start(inside, traffic.ping, *ping)
    with running(pinging):
        expired_at = _wait_until_expired(daemon, begin + _PING[1])
        trips = answer(pinging)
    quiet = _p99(trips, begin + _QUIET[0], begin + _QUIET[1])
    expiring = _p99(trips, begin + _LIFE, expired_at)
    seconds = expired_at - begin - _LIFE
    return {"quiet": quiet, "expiring": expiring, "ratio": expiring / quiet, "seconds": seconds}


def _wait_until_expired(daemon: Daemon, deadline: float) -> float:
    while time.monotonic() < deadline:
        if _figure(daemon, "nfmasq_entries_expired_total") >= ENTRIES:
            return time.monotonic()
        time.sleep(_POLL_SECONDS)
    raise TooBusy(f"not all of {ENTRIES:,} entries have expired in time")


def _figure(daemon: Daemon, wanted: str) -> int:
    """Return a figure of nfmasq's statistics, of TCP."""
    for name, labels, value in request(daemon.control, "stats"):
        if name == wanted and labels == {"protocol": "tcp"}:
            return int(value)
    raise NfmasqError(f"nfmasq does not tell {wanted}")


def _p99(trips: list[tuple[float, float]], begin: float, end: float) -> float:
    return percentile([trip * 1e6 for at, trip in trips if begin <= at < end], 99)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
