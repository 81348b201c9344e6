"""The rules that lead packets to the queue: loaded where that is asked for, and watched.

Theory of operation. Which rules there are to be, the script nfmasq-rules alone knows. So it loads
them, and says whether they are all there. Where no interfaces are configured, nobody can say which
rules there should be; then rules are to lead to the queue from each of the kernel's chains that
they have led to it from before: what is flushed in one table is missed, and what is changed is not.

A thread looks every `LOOK_SECONDS`, and as soon as the kernel announces that rules have changed:
without rules the gateway may send inside addresses out. What iptables-nft changes is announced;
what iptables-legacy changes is found by `legacy_tables.py`. An announcement may come for each of
thousands of rules, so there is a pause between any two looks. Each look is a process of its own,
which takes nothing of the packets' time but its start.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Sequence

from nfmasq import rules_script
from nfmasq.config.configuration import KEEP, LOAD, OFF, Configuration
from nfmasq.daemon.announcements import RULES, Announcements
from nfmasq.daemon.legacy_tables import LegacyTables
from nfmasq.daemon.log import RateLimit
from nfmasq.errors import NfmasqError, shortage
from nfmasq.rules import Rule, parse_rules, save_programs, ways_to_queue

log = logging.getLogger(__name__)
log.addFilter(RateLimit(limit=20, period=60))

LOOK_SECONDS = 5.0
PAUSE_SECONDS = 0.5


class LoadedRules:
    """Loads the rules and watches them, as the configuration says, from `start` to `stop`.

    `present` says whether they were there at the last look; None: nobody looks, or they cannot be
    seen. `lost` is how often they were gone. `tell` is told all rules of iptables after each look
    that has found ours.
    """

    def __init__(
        self,
        configuration: Configuration,
        tell: Callable[[Sequence[Rule]], None] = lambda rules: None,
    ) -> None:
        self.present: bool | None = None
        self.lost = 0
        self._tell_rules = tell
        self._saved: list[bytes] = []
        self._rules: list[Rule] = []
        self._ways: frozenset[tuple[str, str]] = frozenset()
        self._configuration = configuration
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="rules", daemon=True)

    def start(self) -> None:
        """Load the rules where nfmasq is to load them, look at them, and begin to watch them.

        Raises NfmasqError, and changes nothing, where they cannot be loaded, or where others should
        have loaded them for the configured interfaces, and have not.
        """
        self.follow(self._configuration)
        if self._configuration.rules == KEEP and self._configuration.inside and not self._look():
            raise NfmasqError(
                "the rules are not loaded, or not all of them (nfmasq-rules status says which): "
                "--rules load loads them, --rules off serves without them"
            )
        self._changes, self._legacy = Announcements(RULES), LegacyTables()
        with self._one_at_a_time:
            self._look_after()
        self._thread.start()

    def follow(self, configuration: Configuration) -> None:
        """Go by another configuration, whose rules are loaded now where nfmasq is to load them.

        Raises NfmasqError, and changes nothing, where they cannot be loaded.
        """
        with self._one_at_a_time:
            if configuration.rules == LOAD:
                _load(configuration)
                self.present = True
            self._configuration = configuration
            self._ways = frozenset()

    def stop(self) -> None:
        """Watch the rules no longer; they stay."""
        self._changes.end()
        self._thread.join()
        self._changes.close()
        self._legacy.close()

    def _watch(self) -> None:
        while self._changes.wait(
            PAUSE_SECONDS,
            LOOK_SECONDS,
            self._legacy.have_changed if self._legacy.are_used else None,
        ):
            with self._one_at_a_time:
                self._look_after()

    def _look_after(self) -> None:
        """Look at the rules, load them again where they are gone, and tell what has changed."""
        self._legacy.have_changed()  # what changes from now on is looked at once more
        try:
            present = self._look()
            if present is False and self.present:
                self.lost += 1
            if present is False and self._configuration.rules == LOAD:
                log.warning("rules were gone: loading them again")
                present = _is_loaded(self._configuration)
            # A look at the rules of all queues has read them all already.
            read = present and (not self._configuration.inside or self._read_rules())
        except NfmasqError as error:
            log.error("%s", error)
            present = read = None
        except Exception as error:  # no process can be started, for now, or the like
            log.error("the rules cannot be seen: %s", shortage(error) or repr(error))
            present = read = None
        self._tell(present)
        if read:
            self._tell_rules(self._rules)

    def _look(self) -> bool | None:
        """Say whether the rules are there; None where nobody is to know, or can.

        Raises NfmasqError, with what the script says, where it cannot see them.
        """
        if self._configuration.rules == OFF:
            return None
        if not self._configuration.inside:
            return self._all_ways_are_there(self._configuration.queue)
        done = rules_script.run("status", self._configuration.as_table())
        if done.returncode != 0 and not done.stdout:
            raise NfmasqError(f"the rules cannot be seen: {_complaint(done)}")
        return done.returncode == 0

    def _all_ways_are_there(self, queue: int) -> bool | None:
        """Say whether rules lead to the queue from everywhere that they have led to it from.

        None where rules cannot be seen. When none is left, it begins anew.
        """
        if not self._read_rules():
            return None
        ways = ways_to_queue(self._rules, queue)
        if ways >= self._ways or not ways:
            self._ways = ways
        return bool(ways) and ways == self._ways

    def _read_rules(self) -> bool:
        """Read all rules of iptables, of nft and legacy; false where they cannot be seen.

        `_rules` stays the same list as long as they do: to read thousands of rules takes time.
        """
        programs = [
            subprocess.run([program], capture_output=True, stdin=subprocess.DEVNULL, check=False)
            for program in save_programs()
        ]
        if not any(done.returncode == 0 for done in programs):
            return False
        saved = [_without_counts(done.stdout) for done in programs]
        if saved != self._saved:
            texts = (text.decode(errors="replace") for text in saved)
            self._rules = [rule for text in texts for rule in parse_rules(text)]
            self._saved = saved
        return True

    def _tell(self, present: bool | None) -> None:
        """Note whether the rules are there, and log it where it has changed."""
        before, self.present = self.present, present
        queue = self._configuration.queue
        if present is before or present is None:
            return
        if not present and before is None:
            log.warning("no rules lead to queue %d yet: nothing comes until they are loaded", queue)
        elif not present:
            log.warning("the rules for queue %d are gone: inside addresses may get out", queue)
        elif before is False:
            log.info("the rules for queue %d are there", queue)


def _load(configuration: Configuration) -> None:
    """Load the rules, and log what the script has to say; raises NfmasqError where it fails."""
    done = rules_script.run("up", configuration.as_table())
    if done.returncode != 0:
        raise NfmasqError(f"the rules cannot be loaded: {_complaint(done)}")
    log.info("the rules are loaded")
    for line in done.stderr.splitlines():
        log.warning("%s", line)


def _is_loaded(configuration: Configuration) -> bool:
    """Load the rules; returns whether that went well, and logs why not."""
    try:
        _load(configuration)
    except NfmasqError as error:
        log.error("%s", error)
        return False
    return True


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return what the script says, on one line and without its name."""
    return " ".join(done.stderr.split()).removeprefix("nfmasq-rules: ")


def _without_counts(saved: bytes) -> bytes:
    """Return the tables and rules that iptables-save printed, less what changes by itself."""
    return b"\n".join(line for line in saved.splitlines() if line.startswith((b"*", b"-A ")))
