"""Reading the configuration again, while packets pass (SIGHUP, `nfmasq reload`).

Theory of operation. A configuration comes into force as a whole or not at all: a file that has a
mistake, or that changes what nfmasq cannot change without a restart (`FIXED`), changes nothing. All
other changes take effect between two packets, and no session ends by them. Only timeouts and
forwards need longer: each entry holds its own timeout and port, so all entries are gone through,
with pauses for the packets.

A signal comes between any two steps of the thread that handles packets, which may be holding the
engine's lock. So the signal's handler only wakes another thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue

from nfmasq.apps import helpers
from nfmasq.config import Configuration
from nfmasq.daemon import log as daemon_log
from nfmasq.daemon.health import HealthCheck, HealthChecks
from nfmasq.daemon.pace import paced
from nfmasq.engine import Masquerade
from nfmasq.engine.forward.server import Server
from nfmasq.errors import NfmasqError

log = logging.getLogger(__name__)

FIXED = (
    "queue",
    "masquerade-address",
    "metrics",
    "control",
    "queue-length",
    "socket-buffer",
    "gso",
    "iptables",
    "forwarding",
    "flow-cache",
)
"""Keys of the options whose values are set up once, at the start."""

WALK = 64  # entries between two pauses
PAUSE = 0.000_2  # seconds


class Reload:
    """Holds the `configuration` in force, and puts others in force, from construction to `stop`.

    `read` reads the configuration that is to be in force, and `follow_rules` has the iptables rules
    follow it; both may raise NfmasqError.
    """

    def __init__(
        self,
        configuration: Configuration,
        read: Callable[[], Configuration],
        engine: Masquerade,
        health_checks: HealthChecks,
        follow_rules: Callable[[Configuration], None],
    ) -> None:
        self.configuration = configuration
        self._read = read
        self._engine = engine
        self._health_checks = health_checks
        self._follow_rules = follow_rules
        self._one_at_a_time = threading.Lock()
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
        self._thread.start()
        health_checks.follow(_checks_by_server(configuration, engine))

    def now(self) -> list[str]:
        """Read the configuration and put it in force; returns what changed, a line for each change.

        Raises NfmasqError where it cannot be read or put in force; then nothing has changed.
        """
        with self._one_at_a_time:
            before, after = self.configuration, self._read()
            changes = list(_changes("", before.as_table(), after.as_table()))
            _forbid_changes_to_fixed(before.as_table(), after.as_table())
            if changes:
                apps = helpers(after.apps)
                if after.apps == before.apps:
                    # Helpers may remember something, so the same helpers stay.
                    apps = self._engine.sessions.helpers.apps
                # What can still fail comes first.
                self._follow_rules(after)
                daemon_log.set_up(after.log_level, after.log_format)
                self._engine.configure(after.engine_settings(), apps, after.live_forwards())
                self._health_checks.follow(_checks_by_server(after, self._engine))
                self.configuration = after
            if after.settings.timeouts != before.settings.timeouts:
                self._retime()
            if after.forwards != before.forwards:
                self._follow_forwards()
        for change in changes:
            log.info("reloaded: %s", change)
        return changes

    def soon(self) -> None:
        """Do what `now` does, in a thread, and log what changed. A signal handler may call this."""
        self._wanted.put(True)

    def stop(self) -> None:
        """Finish the reload that is under way, and end the thread."""
        self._wanted.put(False)
        self._thread.join()

    def _run(self) -> None:
        while self._wanted.get():
            try:
                if not self.now():
                    log.info("reloaded: nothing has changed")
            except NfmasqError as error:
                log.error("not reloaded: %s", error)
            except Exception as error:
                log.error("not reloaded: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))

    def _retime(self) -> None:
        for ms in paced(self._engine.sessions.walk(), WALK, PAUSE):
            self._engine.sessions.ip_masq_retime(ms, time.monotonic())

    def _follow_forwards(self) -> None:
        for ms in paced(self._engine.sessions.walk(), WALK, PAUSE):
            self._engine.sessions.ip_masq_follow_forward(ms)


def _checks_by_server(
    configuration: Configuration, engine: Masquerade
) -> dict[Server, HealthCheck]:
    """Return the health check of each server that is to have one."""
    live = engine.sessions.forwards.all  # made of the configuration's, in their order
    return {
        server: HealthCheck(written.check, str(forward))
        for written, forward in zip(configuration.forwards, live, strict=True)
        if written.check
        for server in forward.servers
    }


def _forbid_changes_to_fixed(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    changed = [key for key in FIXED if before[key] != after[key]]
    if changed:
        raise NfmasqError(f"{', '.join(changed)} can change only at a restart; nothing was changed")


def _changes(name: str, before: object, after: object) -> Iterator[str]:
    """Yield the differences between two configurations (plain data), a line for each."""
    before, after = _by_name(before), _by_name(after)
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _changes(f"{name} {key}".lstrip(), before.get(key), after.get(key))
    elif isinstance(before, dict):
        yield f"{name}: removed"
    elif isinstance(after, dict):
        yield f"{name}: added"
    else:
        yield f"{name}: {_written(before)} -> {_written(after)}"


def _by_name(value: object) -> object:
    """Turn a list of tables (forwards, triggers) into a table by name; leave any other value."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return value
    return {item.get("listen") or item.get("opens"): item for item in value}


def _written(value: object) -> str:
    return "none" if value is None else json.dumps(value)
