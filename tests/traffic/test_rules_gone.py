"""Rules that somebody flushes or replaces: what leaves meanwhile, and what is said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.observed import eventually, figure

SIDES = ("--inside", "lan", "--outside", "wan")
TABLES = "*filter\nCOMMIT\n*raw\nCOMMIT\n*mangle\nCOMMIT\n*security\nCOMMIT\n"
PRESENT, LOST = "nfmasq_rules_present", "nfmasq_rules_lost_total"
ETH_P_IP = 0x0800

WAYS = {
    "one table flushed": ("{iptables} -t {table} -F", ""),
    "one table replaced": ("{iptables}-restore", "*{table}\nCOMMIT\n"),
    "the jumps alone": ("{iptables} -t {table} -F {hook}", ""),
    "all tables replaced": ("{iptables}-restore", TABLES),
    "the whole ruleset flushed": ("nft flush ruleset", ""),
}
"""How rules go away: a command, and what it reads."""

HOOKS = {"raw": "PREROUTING", "mangle": "FORWARD", "security": "FORWARD"}


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    return ()


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    name: str = request.param
    yield name
    lab.rules("down", IPTABLES=name)


def spoil(lab: Lab, way: str, **names: str) -> None:
    command, read = (text.format(**names) for text in WAYS[way])
    lab.gateway.run(command.split(), input=read)


def is_whole(lab: Lab, iptables: str, *options: str) -> bool:
    """Wait until all rules are there again; say whether they have come."""

    def is_there() -> bool:
        return lab.rules("status", *options, check=False, IPTABLES=iptables).returncode == 0

    return eventually(is_there)


def comes_to(daemon: Daemon, name: str, value: float) -> bool:
    return eventually(lambda: figure(daemon, name) == value)


@contextmanager
def leaks(lab: Lab) -> Iterator[Callable[[], int]]:
    """Have an inside host send without a pause; yields how many of its packets have leaked."""
    ended, leaked, sent = threading.Event(), [0], [0]
    ethernet = socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)
    with (
        closing(lab.router.socket(*ethernet)) as wire,
        closing(lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM)) as known,
    ):
        wire.bind(("wan", ETH_P_IP))
        wire.settimeout(0.1)

        def send() -> None:
            while not ended.wait(0.0005):
                known.sendto(b"inside", (lab.outside[0].address, 9))
                sent[0] += 1

        def look() -> None:
            while not ended.is_set():
                try:
                    packet = wire.recv(64)
                except TimeoutError:
                    continue
                leaked[0] += packet[12:16] == socket.inet_aton(lab.inside[0].address)

        threads = [threading.Thread(target=each) for each in (send, look)]
        for thread in threads:
            thread.start()
        try:
            yield lambda: leaked[0]
            before = sent[0]
            assert eventually(lambda: sent[0] > before + 100)
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def ways(iptables: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each way in which rules of an iptables go, with the names for it."""
    for way, text in WAYS.items():
        if way.startswith("the whole") and iptables != "iptables-nft":
            continue
        for table, hook in HOOKS.items() if "{table}" in "".join(text) else [("raw", "")]:
            yield way, {"iptables": iptables, "table": table, "hook": hook}


READS_MARKS = ["POSTROUTING", "-m", "mark", "--mark", "7", "-j", "RETURN"]
"""A rule that keeps the flow cache off, but not its guard."""


@pytest.mark.parametrize("carrying", [True, False], ids=["carrying", "only guarding"])
def test_however_rules_go_nothing_leaks_and_each_time_is_told_and_counted(
    lab: Lab, iptables: str, start: Callable[..., Daemon], carrying: bool
) -> None:
    with ExitStack() as stack:
        if not carrying:
            lab.gateway.run(["iptables-nft", "-t", "nat", "-A", *READS_MARKS])
            stack.callback(lab.gateway.run, ["iptables-nft", "-t", "nat", "-F"])
        daemon = start(*SIDES, "--iptables", iptables)
        expected = 0
        with leaks(lab) as leaked:
            for way, names in ways(iptables):
                if not carrying and way.startswith("the whole"):
                    continue
                spoil(lab, way, **names)
                expected += 1
                assert comes_to(daemon, LOST, expected), (way, names)
                assert is_whole(lab, iptables)
                assert comes_to(daemon, PRESENT, 1)
                assert leaked() == 0, (way, names)
    told = daemon.log.read_text().count("rules were gone: loading them again")
    assert told == expected
    assert carrying or "flow cache off" in daemon.log.read_text()


def test_without_the_flow_cache_rules_of_legacy_are_missed_as_soon_as_announced_rules(
    lab: Lab, iptables: str, start: Callable[..., Daemon]
) -> None:
    """The kernel announces nothing of iptables-legacy; between two looks are five seconds."""
    daemon = start(*SIDES, "--iptables", iptables, "--flow-cache=off")
    looks = []
    with leaks(lab) as leaked:
        for count in range(1, 4):
            before = leaked()
            spoil(lab, "one table flushed", iptables=iptables, table="security")
            assert comes_to(daemon, LOST, count)
            assert is_whole(lab, iptables, "--no-flow-cache")
            looks.append(leaked() - before)
    # One in half a millisecond: a look after five seconds would let some thousands out.
    assert min(looks) < 2000


@pytest.mark.parametrize("table", ["raw", "security"])
def test_kept_rules_that_go_in_one_table_are_told_of_without_known_interfaces(
    lab: Lab, iptables: str, start: Callable[..., Daemon], table: str
) -> None:
    """The rules of the other table lead to the queue as before."""
    lab.rules("up", IPTABLES=iptables)
    daemon = start()
    assert comes_to(daemon, PRESENT, 1)
    with leaks(lab) as leaked:
        spoil(lab, "the jumps alone", iptables=iptables, table=table, hook=HOOKS[table])
        gone = "the rules for queue 0 are gone"
        assert eventually(lambda: gone in daemon.log.read_text())
        assert figure(daemon, PRESENT) == 0
        assert figure(daemon, LOST) == 1
        lab.rules("up", "--ports=61000-65000", IPTABLES=iptables)
        assert comes_to(daemon, PRESENT, 1)
        assert leaked() == 0
    assert daemon.log.read_text().count(gone) == 1
