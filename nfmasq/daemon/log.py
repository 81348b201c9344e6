"""Log lines on stderr: as text for people, as JSON for machines, and not too many of a kind."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send nfmasq's log of `level` and above to `stream` (stderr), in `form` "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger("nfmasq")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


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
