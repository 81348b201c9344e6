"""What the log looks like, and that nobody outside can fill it."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from nfmasq.daemon.log import MOST_WAITING, LogWriter, RateLimit, set_up


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("nfmasq")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_text_is_a_line_with_the_extras_at_its_end() -> None:
    out = io.StringIO()
    set_up("info", "text", logging.StreamHandler(out))

    logging.getLogger("nfmasq.x").warning("queue %d is full", 3, extra={"dropped": 7})
    logging.getLogger("nfmasq.x").debug("not asked for")

    assert out.getvalue().endswith(" WARNING queue 3 is full dropped=7\n")
    assert out.getvalue().count("\n") == 1


def test_json_is_an_object_a_line() -> None:
    out = io.StringIO()
    set_up("debug", "json", logging.StreamHandler(out))
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
    set_up("info", "text", logging.StreamHandler(io.StringIO()))
    set_up("info", "text", logging.StreamHandler(out))

    logging.getLogger("nfmasq").info("once")

    assert out.getvalue().count("once") == 1


def test_set_up_again_goes_on_by_the_handler_that_there_is() -> None:
    out = io.StringIO()
    set_up("info", "text", logging.StreamHandler(out))
    set_up("debug", "json")

    logging.getLogger("nfmasq").debug("once")

    assert json.loads(out.getvalue())["message"] == "once"


class TestLogWriter:
    """A pipe stands for stderr; its reader is this test."""

    @pytest.fixture(autouse=True)
    def _pipe(self) -> Iterator[None]:
        self.reading, writing = os.pipe()
        self.writer = LogWriter(writing)
        set_up("info", "text", self.writer)
        self.log = logging.getLogger("nfmasq.x")
        yield
        os.close(self.reading)  # a thread that is stuck gets EPIPE, and ends
        self.writer._waiting.put(None)
        self.writer._thread.join(30)
        os.close(writing)

    def say(self, lines: int) -> None:
        for n in range(lines):
            self.log.info("line %d", n)

    def read(self, lines: int) -> list[str]:
        with os.fdopen(os.dup(self.reading)) as reader:
            return [reader.readline() for _ in range(lines)]

    def test_what_is_logged_is_written_in_order(self) -> None:
        self.say(100)
        assert [line.split()[-1] for line in self.read(100)] == [str(n) for n in range(100)]
        assert self.writer.lost == 0

    def test_nobody_waits_for_a_reader_that_is_stuck_and_the_lost_are_counted(self) -> None:
        logged = 20_000  # a pipe has room for some 64 KiB
        logging_lines = threading.Thread(target=self.say, args=(logged,), daemon=True)
        logging_lines.start()
        logging_lines.join(30)
        assert not logging_lines.is_alive()
        assert 0 < self.writer.lost < logged

        lines = self.read(logged - self.writer.lost)
        numbers = [int(line.split()[-1]) for line in lines]
        assert numbers == sorted(set(numbers))

    def test_at_the_end_what_is_left_is_written(self) -> None:
        for n in range(MOST_WAITING // 2):
            self.log.info("%d", n)
        self.writer.close()
        assert self.read(MOST_WAITING // 2)[-1].endswith(f" {MOST_WAITING // 2 - 1}\n")
        self.log.info("too late")
        assert self.writer.lost == 1

    def test_the_end_does_not_wait_for_a_reader_that_is_stuck(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nfmasq.daemon.log.LAST_WORDS", 0.1)
        for _ in range(2 * MOST_WAITING):
            self.log.info("x" * 100)
        self.writer.close()
        self.writer.close()
        assert self.writer._thread.is_alive()

    def test_a_reader_that_is_gone_is_no_fault(self) -> None:
        with os.fdopen(os.open(os.devnull, os.O_RDONLY)) as nobody:
            os.dup2(nobody.fileno(), self.reading)
        self.log.info("to nobody")
        self.writer.close()
        assert not self.writer._thread.is_alive()
        assert self.writer.lost == 1


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
