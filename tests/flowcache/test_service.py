"""The flow cache of a running nfmasq: when it is on, and what is said where it is off."""

from __future__ import annotations

import ctypes
import errno
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import if_nametoindex
from typing import Any

import pytest

from nfmasq.config.configuration import AUTO, DIRECT, OFF, ROUTED
from nfmasq.engine import Settings
from nfmasq.engine.table.entry import CACHED
from nfmasq.flowcache.libbpf import Libbpf
from nfmasq.flowcache.programs import Counts
from nfmasq.flowcache.service import KernelFlowCache
from nfmasq.rules import Rule, parse_rules
from tests.gateway import INSIDE, SERVER, Gateway

SCRIPT = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"
WHOLE_MARK = "*mangle\n-A FORWARD -m mark --mark 0x1 -j ACCEPT\nCOMMIT\n"


def rules(*options: str) -> list[Rule]:
    """Return the rules that nfmasq-rules would load."""
    line: list[str | Path] = [SCRIPT, "print", "--inside=lan", "--outside=wan", *options]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    jumps = re.sub(r"-I (\S+) 1 ", r"-A \1 ", printed)
    return list(parse_rules(jumps))


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def started(namespace: None, gateway: Gateway) -> Iterator[Callable[[str], KernelFlowCache]]:
    """Yield a function that starts a flow cache; there are the interfaces lan and wan."""
    for name in ("lan", "wan"):
        run_ip(f"link add {name} type veth peer name to-{name}")
    with ExitStack() as stack:

        def start(wanted: str) -> KernelFlowCache:
            cache = KernelFlowCache(gateway.masq, wanted, 0, 16)
            stack.callback(cache.close)
            cache.start()
            return cache

        yield start
    for name in ("lan", "wan"):
        run_ip(f"link delete {name}")


def run_ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def carries(gateway: Gateway) -> bool:
    """Send what lasts, and say whether its flow is carried in both directions."""
    for _ in range(Settings().flow_cache_after):
        assert gateway.lets_in(SERVER, gateway.send(INSIDE, SERVER))
        gateway.sessions.cached.lasts(if_nametoindex("wan"))
    gateway.masq.enter_lasting()
    (ms,) = gateway.sessions.entries()
    assert ms.flags & CACHED in (0, CACHED)
    return ms.flags & CACHED == CACHED


def has_programs() -> bool:
    shown = subprocess.run(
        ["tc", "filter", "show", "dev", "wan", "egress"], check=True, capture_output=True, text=True
    )
    return "leaving" in shown.stdout


# -- off -----------------------------------------------------------------------------


def test_off_loads_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)
    cache = KernelFlowCache(gateway.masq, OFF, 0, 16)
    cache.start()
    cache.follow(rules())
    cache.add_maddrs([1])
    cache.forget()
    assert (cache.mode, cache.reason, cache.counts()) == (OFF, "--flow-cache off", Counts())
    assert gateway.sessions.cached.cache is None
    cache.close()


@pytest.mark.parametrize("wanted", [AUTO, ROUTED, DIRECT])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("libbpf.so.1: cannot open shared object file"), "libbpf.so.1 is not installed"),
        (OSError("the programs are made for little-endian machines"), "little-endian"),
        (
            PermissionError(errno.EPERM, "Operation not permitted"),
            "CAP_BPF, CAP_PERFMON",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "CAP_BPF, CAP_PERFMON",
        ),
        (OSError(errno.EINVAL, "Invalid argument"), "kernel does not load its programs: Invalid"),
        (OSError(errno.ENOSYS, "Function not implemented"), "Function not implemented"),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
    error: OSError,
    said: str,
) -> None:
    def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr("nfmasq.flowcache.service.Programs", fails)
    caplog.set_level(logging.INFO)
    cache = KernelFlowCache(gateway.masq, wanted, 0, 16)
    cache.start()
    cache.follow(rules())
    assert cache.mode == OFF
    assert said in cache.reason
    assert [record.getMessage() for record in caplog.records] == [f"flow cache off: {cache.reason}"]
    assert gateway.sessions.cached.cache is None
    cache.close()


def test_without_libbpf_its_absence_is_what_is_said(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ctypes.cdll.LoadLibrary
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: load("libbpf-is-not-here.so.1"))
    with pytest.raises(OSError, match="libbpf"):
        Libbpf()
    cache = KernelFlowCache(gateway.masq, AUTO, 0, 16)
    cache.start()
    assert "apt install libbpf1" in cache.reason


def test_a_big_endian_machine_is_told(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    cache = KernelFlowCache(gateway.masq, AUTO, 0, 16)
    cache.start()
    assert "little-endian" in cache.reason


# -- on and off ----------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "mode"), [(AUTO, ROUTED), (ROUTED, ROUTED), (DIRECT, DIRECT)])
def test_it_is_on_as_long_as_the_rules_know_of_it(
    started: Callable[[str], KernelFlowCache],
    gateway: Gateway,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
    mode: str,
) -> None:
    caplog.set_level(logging.INFO)
    cache = started(wanted)
    assert cache.mode == OFF
    assert not carries(gateway)
    for _ in range(2):
        cache.follow(rules())
        assert cache.mode == mode
        assert has_programs()
        assert carries(gateway)
    for _ in range(2):
        cache.follow(rules("--no-flow-cache"))
        assert cache.mode == OFF
        assert "do not know of it" in cache.reason
        assert not has_programs()
        assert not carries(gateway)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"flow cache {mode}: inside lan, outside wan",
        f"flow cache off: {cache.reason}",
    ]


def test_no_rules_at_all_turn_it_off(
    started: Callable[[str], KernelFlowCache], gateway: Gateway
) -> None:
    cache = started(AUTO)
    cache.follow(rules())
    assert carries(gateway)
    cache.follow([])
    assert (cache.mode, has_programs(), carries(gateway)) == (OFF, False, False)


def test_a_rule_that_reads_whole_marks_turns_it_off_unless_it_was_asked_for(
    started: Callable[[str], KernelFlowCache], gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    with_reader = [*rules(), *parse_rules(WHOLE_MARK)]
    automatic = started(AUTO)
    automatic.follow(with_reader)
    assert automatic.mode == OFF
    assert "-t mangle -A FORWARD -m mark --mark 0x1 -j ACCEPT would see" in automatic.reason
    automatic.follow(rules())
    assert automatic.mode == ROUTED
    automatic.close()
    asked_for = started(ROUTED)
    asked_for.follow(with_reader)
    assert asked_for.mode == ROUTED
    assert "sees the mark of the flow cache" in caplog.text


def test_forgotten_and_closed_nothing_is_left(
    started: Callable[[str], KernelFlowCache], gateway: Gateway
) -> None:
    cache = started(AUTO)
    cache.follow(rules())
    assert carries(gateway)
    cache.forget()
    (ms,) = gateway.sessions.entries()
    assert (ms.flags & CACHED, ms.refcnt, gateway.sessions.cached.flows) == (0, 2, 0)
    assert carries(gateway)
    cache.close()
    assert (ms.flags & CACHED, ms.refcnt, gateway.sessions.cached.flows) == (0, 2, 0)
    assert not has_programs()
    assert gateway.sessions.cached.cache is None
    assert (cache.mode, cache.counts()) == (OFF, Counts())
    cache.close()


def test_flows_of_an_interface_that_has_gone_are_not_left_at_the_end(
    started: Callable[[str], KernelFlowCache], gateway: Gateway
) -> None:
    cache = started(AUTO)
    cache.follow(rules())
    assert carries(gateway)
    run_ip("link delete wan")
    cache.follow(rules())
    cache.close()
    (ms,) = gateway.sessions.entries()
    assert (ms.flags & CACHED, ms.refcnt, gateway.sessions.cached.flows) == (0, 2, 0)
    run_ip("link add wan type veth peer name to-wan")
