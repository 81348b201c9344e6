"""What a quiet neighbour has left while others attack: through nfmasq, and through the kernel.

Beside the neighbour and the attacker there is a lab for each of both paths, so the figures of an
attack are taken within the same minute. The neighbour's server answers nobody else; what the
attacker sends goes to another address outside, or to the gateway.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from bench import attacks, traffic
from bench.network import Results, answer, percentile, running
from bench.paths import kernel_masquerade, run_module
from bench.targets import Outcome
from nfmasq.lab import Daemon, Host, Lab

HTTP, ECHO = 7080, 7007
SECONDS = 20.0
SETTLED = 1.0
"""Seconds of the neighbour's alone, before an attack begins, that do not count."""

REST = 1.0
"""Seconds after an attack in which what it has left in queues and sockets goes."""

KEPT = 0.95
"""The share of its connections and echoes that the neighbour keeps in an attack."""

LONGER = 3.0
"""How many times as long as without an attack the neighbour's slowest connection in a hundred may
take."""


Starting = Callable[[Lab, float], "subprocess.Popen[str] | None"]


class Attack(NamedTuple):
    """An attack: its `key` in results, a title for people, and what starts it in a lab.

    `start` takes a lab and for how many seconds; it returns the attacker's process, or None where
    there is no attack.
    """

    key: str
    title: str
    start: Starting


def _from_inside(program: Callable[..., int], rate: int, to_gateway: bool = False) -> Starting:
    def start(lab: Lab, seconds: float) -> subprocess.Popen[str]:
        attacker = lab.inside[1]
        target = lab.gateway if to_gateway else lab.outside[1]
        return _run(attacker, program, attacker.address, target.address, rate, seconds)

    return start


def _forged(rate: int) -> Starting:
    def start(lab: Lab, seconds: float) -> subprocess.Popen[str]:
        network = lab.inside[1].address.rpartition(".")[0]
        return _run(lab.inside[1], attacks.forged, network, lab.outside[1].address, rate, seconds)

    return start


def _from_outside(program: Callable[..., int], rate: int) -> Starting:
    def start(lab: Lab, seconds: float) -> subprocess.Popen[str]:
        return _run(lab.outside[1], program, lab.gateway.address, rate, seconds)

    return start


def _run(host: Host, program: Callable[..., object], *arguments: object) -> subprocess.Popen[str]:
    written = [json.dumps(argument) for argument in arguments]
    return run_module(host, "bench.attacks", program.__name__, *written, stdout=subprocess.PIPE)


PATHS: Mapping[str, Callable[[Lab], object]] = {
    "masquerade": kernel_masquerade,
    "nfmasq": lambda lab: default_nfmasq(lab),
}
"""The data paths that are compared, by their key: the kernel's, and nfmasq as it is by default."""

QUIET = "quiet"

ATTACKS = (
    Attack(QUIET, "no attack", lambda lab, seconds: None),
    Attack("syns_20", "20,000 SYNs a second of one host", _from_inside(attacks.syns, 20_000)),
    Attack("syns_40", "40,000 SYNs a second of one host", _from_inside(attacks.syns, 40_000)),
    Attack("one_flow", "120,000 datagrams of one flow", _from_inside(attacks.one_flow, 120_000)),
    Attack("many_flows", "32,000 datagrams, a flow each", _from_inside(attacks.many_flows, 32_000)),
    Attack(
        "gateway",
        "40,000 to the gateway's own address",
        _from_inside(attacks.one_flow, 40_000, to_gateway=True),
    ),
    Attack("forged", "5,000 SYNs from 230 forged sources", _forged(5_000)),
    Attack("strangers", "60,000 SYNs from outside", _from_outside(attacks.strangers, 60_000)),
    Attack("errors", "60,000 ICMP errors from outside", _from_outside(attacks.errors, 60_000)),
)
"""All attacks; packets are a second."""


@contextmanager
def scene(path: Callable[[Lab], object]) -> Iterator[Lab]:
    """Build a lab with a data path, and with the neighbour's server, within the block."""
    with Lab(inside=2, outside=2) as lab, ExitStack() as stack:
        handler = path(lab)
        if isinstance(handler, Daemon):
            stack.callback(handler.stop)
        server = lab.outside[0]
        for program, port in ((traffic.http, HTTP), (traffic.echo, ECHO)):
            line = ("bench.traffic", program.__name__, json.dumps(port))
            stack.enter_context(running(run_module(server, *line, stdout=subprocess.DEVNULL)))
        server.wait_until_bound(HTTP)
        server.wait_until_bound(ECHO, "udp")
        yield lab


def default_nfmasq(lab: Lab) -> Daemon:
    """Start nfmasq as nearly everybody does."""
    lab.rules("up")
    return lab.nfmasq()


def outcomes(by_path: Mapping[str, Mapping[str, Results]]) -> Iterator[Outcome]:
    """Yield what nfmasq must have left a neighbour in each attack."""
    found = by_path["nfmasq"]
    for attack in ATTACKS[1:]:
        had = found[attack.key]
        for kept in ("fetches", "echoes"):
            yield Outcome(f"{attack.title}: {kept} kept", had[kept], KEPT, True)
        longer = had["fetch_p99"] / found[QUIET]["fetch_p99"]
        yield Outcome(f"{attack.title}: p99 of a fetch, against no attack", longer, LONGER, False)


def suffer(lab: Lab, attack: Attack, seconds: float = SECONDS) -> Results:
    """Attack, and return what the neighbour had of it: shares, and times in milliseconds."""
    server = lab.outside[0].address
    neighbour = _run(lab.inside[0], attacks.neighbour, server, HTTP, ECHO, SETTLED + seconds)
    with running(neighbour), ExitStack() as stack:
        time.sleep(SETTLED)
        attacker = attack.start(lab, seconds)
        if attacker:
            stack.enter_context(running(attacker))
        had = answer(neighbour, timeout=seconds + 60)
        sent = answer(attacker) if attacker else 0
    time.sleep(REST)
    fetches = had["fetches"][int(SETTLED * attacks.FETCHES) :]
    echoes = had["echoes"][int(SETTLED * attacks.ECHOES) :]
    return {
        "rate": sent / seconds,
        "fetches": _share(fetches),
        "fetch_median": _milliseconds(fetches, 50),
        "fetch_p99": _milliseconds(fetches, 99),
        "echoes": _share(echoes),
        "echo_p99": _milliseconds(echoes, 99),
    }


def _share(took: Sequence[float | None]) -> float:
    return sum(seconds is not None for seconds in took) / len(took)


def _milliseconds(took: Sequence[float | None], percent: int) -> float:
    """Return a percentile of what came to its end; a failure took all of the patience."""
    return 1e3 * percentile([attacks.PATIENCE if s is None else s for s in took], percent)
