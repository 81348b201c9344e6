"""Log lines on stderr: as text for people, as JSON for machines, and not too many of a kind.

Theory of operation. Whoever reads the log may be stuck: then the pipe behind stderr is full, and a
write waits for as long as the reader does. So no thread that works writes the log itself. It hands
its line to `LogWriter`, whose own thread writes. What does not fit into the line of what waits is
dropped, and counted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

MOST_WAITING = 1000
"""Lines that wait to be written at most: some 100 KB."""

LAST_WORDS = 1.0
"""Seconds that `LogWriter.close` waits at most for what is left to be written."""


def set_up(level: str, form: str, handler: logging.Handler | None = None) -> None:
    """Log what nfmasq says of `level` and above, in `form` "text" or "json", by `handler`.

    Without a handler the log goes on by the handler that it goes by, or else to stderr.
    """
    logger = logging.getLogger("nfmasq")
    if handler is not None or not logger.handlers:
        logger.handlers = [handler or logging.StreamHandler(sys.stderr)]
    for each in logger.handlers:
        each.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger.setLevel(level.upper())
    logger.propagate = False


class LogWriter(logging.Handler):
    """Writes log lines to a file descriptor in a thread of its own, from construction to `close`.

    Nobody who logs waits for the reader. `lost` counts the lines that were dropped, since
    `MOST_WAITING` lines waited already, or since they could not be written. Raises RuntimeError
    where no thread can be started.
    """

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__()
        self.lost = 0
        self._descriptor = descriptor
        self._closed = False
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written soon, or count it as lost."""
        if self._closed or self._waiting.qsize() >= MOST_WAITING:
            self.lost += 1
            return
        try:
            self._waiting.put(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:
            self.lost += 1

    def close(self) -> None:
        """Write what is left, for `LAST_WORDS` at most; what is logged later is lost."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
            self._thread.join(LAST_WORDS)
        super().close()

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._write(line)

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            self.lost += 1


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """Writes a record as `2024-05-01 12:00:00,000 INFO message name=value ...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        extras = [f" {name}={value}" for name, value in _extras(record).items()]
        return super().formatMessage(record) + "".join(extras)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line, a JSON object.

    It has `time` (seconds since 1970), `level`, `logger`, `message`, `exception` where there is
    a traceback, and the extras.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | _extras(record), default=str)


@dataclass
class _Kind:
    """Counts the records of one kind that passed since `since`, and those that were held back."""

    since: float
    passed: int = 0
    suppressed: int = 0


class RateLimit(logging.Filter):
    """Lets at most `limit` records of a kind pass in `period` seconds.

    A kind is a message before its arguments are put in. The first record that passes after others
    were held back says how many they were, as the extra `suppressed`. `period` is in seconds. Put
    this filter on a logger whose lines an outsider can cause, say a line for each packet:

        log = logging.getLogger(__name__)
        log.addFilter(RateLimit(limit=5, period=60))
    """

    def __init__(
        self, limit: int, period: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._limit = limit
        self._period = period
        self._clock = clock
        self._kinds: dict[object, _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        kind = self._kinds.setdefault(record.msg, _Kind(now))
        if now - kind.since >= self._period:
            kind.since, kind.passed = now, 0
        if kind.passed >= self._limit:
            kind.suppressed += 1
            return False
        kind.passed += 1
        if kind.suppressed:
            record.suppressed = kind.suppressed
            kind.suppressed = 0
        return True
