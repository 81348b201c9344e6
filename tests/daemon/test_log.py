"""What the log looks like, and that nobody outside can fill it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from nfmasq.daemon.log import RateLimit, set_up


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("nfmasq")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_text_is_a_line_with_the_extras_at_its_end() -> None:
    out = io.StringIO()
    set_up("info", "text", out)

    logging.getLogger("nfmasq.x").warning("queue %d is full", 3, extra={"dropped": 7})
    logging.getLogger("nfmasq.x").debug("not asked for")

    assert out.getvalue().endswith(" WARNING queue 3 is full dropped=7\n")
    assert out.getvalue().count("\n") == 1


def test_json_is_an_object_a_line() -> None:
    out = io.StringIO()
    set_up("debug", "json", out)
    log = logging.getLogger("nfmasq.x")

    try:
        raise ValueError("bad\nluck")
    except ValueError:
        log.exception("it failed", extra={"packet": b"\x45"})

    [line] = map(json.loads, out.getvalue().splitlines())
    assert line.pop("time") > 0
    assert "ValueError: bad\nluck" in line.pop("exception")
    assert line == {
        "level": "error",
        "logger": "nfmasq.x",
        "message": "it failed",
        "packet": "b'E'",
    }


def test_set_up_twice_logs_once() -> None:
    out = io.StringIO()
    set_up("info", "text", io.StringIO())
    set_up("info", "text", out)

    logging.getLogger("nfmasq").info("once")

    assert out.getvalue().count("once") == 1


class TestRateLimit:
    @pytest.fixture(autouse=True)
    def _clock(self) -> None:
        self.now = 0.0
        self.limit = RateLimit(limit=2, period=60, clock=lambda: self.now)

    def passes(self, message: str, *arguments: object) -> logging.LogRecord | None:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, message, arguments, None)
        return record if self.limit.filter(record) else None

    def test_no_more_than_the_limit_of_a_kind_in_a_period(self) -> None:
        passed = [self.passes("packet from %s", address) for address in range(100)]

        assert [record is not None for record in passed] == [True] * 2 + [False] * 98
        assert self.passes("another kind") is not None

    def test_the_next_period_begins_with_what_was_suppressed(self) -> None:
        for _ in range(100):
            self.passes("again")
        self.now = 60.0

        first, second = self.passes("again"), self.passes("again")

        assert first is not None
        assert second is not None
        assert vars(first)["suppressed"] == 98
        assert "suppressed" not in vars(second)
