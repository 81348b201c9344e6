"""Reading the configuration again: what changes, what cannot, and what is said of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from nfmasq.config import Configuration, load
from nfmasq.config.configuration import key_of
from nfmasq.daemon.health import HealthChecks
from nfmasq.daemon.reload import FIXED, Reload
from nfmasq.engine import TCP, UDP, Masquerade, Settings
from nfmasq.engine.table.entry import NO_REPLY
from nfmasq.errors import NfmasqError

GATEWAY, INSIDE, OUTSIDE = 0xC6336402, 0x0A000005, 0xCB007107

WEB = """
[[forward]]
listen = "tcp:8080"
servers = ["10.0.0.2:80", { server = "10.0.0.3:80", weight = 2 }]
"""


class Running:
    """A masquerade, and the file that its configuration is read from."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.write(WEB)
        configuration = self.read()
        self.engine = configuration.masquerade(threading.RLock())
        self.engine.sessions.now = time.monotonic()
        self.health_checks = HealthChecks()
        self.rules_follow: Callable[[Configuration], None] = lambda _: None
        self.reload = Reload(
            configuration,
            self.read,
            self.engine,
            self.health_checks,
            lambda configuration: self.rules_follow(configuration),
        )

    def write(self, text: str) -> None:
        self._file.write_text(text)

    def read(self) -> Configuration:
        return load(self._file, {"log-level": "debug"})

    def weights(self) -> list[int]:
        return [server.weight for server in self.engine.sessions.forwards.all[0].servers]

    def make_entry(self) -> None:
        ms = self.engine.sessions.ip_masq_new(UDP, GATEWAY, 0, INSIDE, 5000, OUTSIDE, 123, NO_REPLY)
        assert ms is not None
        self.engine.sessions.ip_masq_put(ms)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    logger = logging.getLogger("nfmasq")
    before = logger.handlers, logger.level, logger.propagate
    running = Running(tmp_path / "nfmasq.toml")
    yield running
    running.reload.stop()
    running.health_checks.stop()
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_a_file_that_is_the_same_changes_nothing(running: Running) -> None:
    forwards = running.engine.sessions.forwards
    assert running.reload.now() == []
    assert running.engine.sessions.forwards is forwards


def test_what_changed_is_in_force_and_told(running: Running) -> None:
    running.write(
        'filtering = "endpoint-independent"\n'
        + WEB.replace("weight = 2", "weight = 5")
        + '[[forward]]\nlisten = "udp:53"\nservers = "10.0.0.4:53"\n'
        + "[timeouts]\nudp = 60\n"
    )
    assert sorted(running.reload.now()) == [
        'filtering: "address-dependent" -> "endpoint-independent"',
        'forward tcp:8080 servers: ["10.0.0.2:80", {"server": "10.0.0.3:80", "weight": 2}] -> '
        '["10.0.0.2:80", {"server": "10.0.0.3:80", "weight": 5}]',
        "forward udp:53: added",
        "timeouts udp: 300 -> 60.0",
    ]
    assert running.weights() == [1, 5]
    assert running.engine.inbound._filtering[TCP] == "endpoint-independent"
    assert running.engine.sessions.forwards.find(UDP, GATEWAY, 53) is not None
    assert running.reload.configuration == running.read()
    running.write(WEB)
    assert "forward udp:53: removed" in running.reload.now()
    assert running.engine.sessions.forwards.find(UDP, GATEWAY, 53) is None


def test_entries_that_are_there_have_the_new_timeouts(running: Running) -> None:
    running.make_entry()
    running.write("[timeouts]\nudp = 100\n" + WEB)
    running.reload.now()
    assert not running.engine.sweep(time.monotonic() + 50, 10)
    assert running.engine.sessions.entry_count(UDP) == 1
    running.engine.sweep(time.monotonic() + 110, 10)
    assert running.engine.sessions.entry_count(UDP) == 0


def test_a_port_that_is_forwarded_now_is_not_given_to_sessions(running: Running) -> None:
    running.write(WEB.replace("8080", "61000"))
    running.reload.now()
    running.make_entry()
    assert [ms.mport for ms in running.engine.sessions.entries()] == [61001]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue = 1\n", "queue can change only at a restart; nothing was changed"),
        ('metrics = "off"\ngso = false\n', "metrics, gso can change only at a restart"),
        ("filtering = 5\n", "nfmasq.toml:1: filtering must be one of"),
        ("filtering =\n", "nfmasq.toml:1: not TOML"),
    ],
)
def test_a_file_that_cannot_be_put_in_force_changes_nothing_at_all(
    running: Running, text: str, message: str
) -> None:
    before, forwards = running.reload.configuration, running.engine.sessions.forwards
    running.write(text + WEB.replace("weight = 2", "weight = 5"))
    with pytest.raises(NfmasqError, match=message) as caught:
        running.reload.now()
    assert "\n" not in str(caught.value)
    assert running.reload.configuration is before
    assert running.engine.sessions.forwards is forwards
    assert running.weights() == [1, 2]


def test_the_rules_follow_first_since_that_may_fail(running: Running) -> None:
    before, forwards = running.reload.configuration, running.engine.sessions.forwards

    def refuse(configuration: Configuration) -> None:
        assert running.engine.sessions.forwards is forwards
        assert configuration.forwards == ()
        raise NfmasqError("the rules cannot be loaded")

    running.write("")
    running.rules_follow = refuse
    with pytest.raises(NfmasqError, match="the rules cannot be loaded"):
        running.reload.now()
    assert running.reload.configuration is before
    assert running.engine.sessions.forwards is forwards


def test_the_command_line_wins_over_the_file_as_at_the_start(running: Running) -> None:
    running.write(WEB + "[timeouts]\nudp = 60\n")
    running.reload.now()
    assert running.reload.configuration.log_level == "debug"


def test_every_key_can_be_reloaded_or_is_among_those_that_cannot() -> None:
    """A setting that is added later must be in one of the two sets."""
    settings = {key_of(field.name) for field in fields(Settings)}
    reloaded = settings | {"apps", "forward", "trigger", "log-level", "log-format"}
    reloaded |= {"inside", "outside", "rules", "clamp-mss", "checksum-fill", "reserve"}
    reloaded |= {"only-inside", "only-answers", "ipv6-forward"}
    assert reloaded | set(FIXED) == set(Configuration().as_table())
    assert not reloaded & set(FIXED)


def test_a_signal_has_the_reload_done_by_a_thread_and_logged(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nfmasq")
    logging.getLogger("nfmasq").propagate = True

    def logged(text: str) -> bool:
        deadline = time.monotonic() + 30
        while text not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return text in caplog.text

    with running.engine.sessions.lock:
        running.reload.soon()
    assert logged("reloaded: nothing has changed")
    running.write("queue = 1")
    running.reload.soon()
    assert logged("not reloaded: queue can change only at a restart")


def test_health_checks_follow_the_configuration(running: Running) -> None:
    """No server listens: both are taken out, and pass for alive when they are not checked."""
    local = WEB.replace("10.0.0.2:80", "192.0.2.1:1").replace("10.0.0.3:80", "192.0.2.2:1")
    running.write(local + 'check = { kind = "tcp", interval = 0.1, timeout = 0.1, fall = 1 }\n')
    running.reload.now()
    servers = running.engine.sessions.forwards.all[0].servers

    def alive(expected: bool) -> bool:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if all(server.alive is expected for server in servers):
                return True
            time.sleep(0.01)
        return False

    assert alive(False)
    running.write(local)
    running.reload.now()
    assert running.engine.sessions.forwards.all[0].servers == servers
    assert alive(True)


def test_a_new_masquerade_and_a_reloaded_one_are_alike(running: Running) -> None:
    running.write('port-selection = "random"\nmax-entries = 7\nports = "50000-50009"\n')
    running.reload.now()
    fresh: Masquerade = running.read().masquerade()
    one, other = running.engine.sessions, fresh.sessions
    assert one.timeout_table == other.timeout_table
    assert one.choice._mapping == other.choice._mapping
    for way in ("inbound", "outbound"):
        ours, theirs = getattr(running.engine, way), getattr(fresh, way)
        assert ours._by_address == theirs._by_address
    assert running.engine.inbound._filtering == fresh.inbound._filtering
    assert one.room.max_entries == other.room.max_entries
    assert one.choice.ports.ports == other.choice.ports.ports
    assert one.choice._free_mport.func is other.choice._free_mport.func
    assert running.engine.sessions.forwards.all == ()
