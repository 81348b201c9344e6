"""What commands print: readers that go away, no output, a full disk, and no colours."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dpkt
import pytest

from nfmasq.config import Configuration
from nfmasq.daemon.control import ControlServer
from nfmasq.engine import TCP, UDP, Masquerade
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import NO_REPLY

NFMASQ = [sys.executable, "-m", "nfmasq"]
ROOT = Path(__file__).parents[2]

PRINTING = ["--help", "--version", "run --help", "doctor", "doctor --json"]
"""Commands that print something on any machine."""

ASKING = ["list", "list --json", "stats", "stats --json", "servers", "servers --json", "flush",
          "delete --protocol tcp", "reload"]  # fmt: skip
"""Commands that print what a running nfmasq answers."""

REPLAY = "replay --inside 10.0.0.0/24 --masquerade-address 198.51.100.2 in.pcap /dev/stdout"

DRAWING = ["list", "servers", "doctor"]
"""Commands that draw in colours on a terminal."""


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Path]:
    """Serve the control socket of a masquerade with entries and a forwarded port."""
    forward = Forward(TCP, range(80, 81), [Server(0x0A000006, 80), Server(0x0A000007, 80)])
    masquerade = Masquerade(lock=threading.RLock())
    masquerade.sessions.forwards = Forwards([forward])
    masquerade.sessions.now = time.monotonic()
    for protocol in (TCP, UDP):
        ms = masquerade.sessions.ip_masq_new(
            protocol, 0xC6336402, 0, 0x0A000005, 40001, 0xCB007107, 443, NO_REPLY
        )
        assert ms is not None
        masquerade.sessions.ip_masq_put(ms)
    figures = [("nfmasq_entries", {"protocol": "tcp"}, 1.0)]
    path = tmp_path / "nfmasq.sock"
    server = ControlServer(
        path, masquerade, Configuration().as_table, lambda: figures, lambda: ["something"]
    )
    server.start()
    yield path
    server.close()


@pytest.fixture
def commands(control: Path, tmp_path: Path) -> list[str]:
    """Return all commands that print, for the folder `tmp_path`."""
    with (tmp_path / "in.pcap").open("wb") as file:
        packet = dpkt.ip.IP(src=b"\x0a\0\0\x05", dst=b"\xcb\0\x71\x07", p=17, data=bytes(8))
        dpkt.pcap.Writer(file, linktype=101).writepkt(bytes(packet), ts=0)
    return [*PRINTING, *(f"{command} --control {control}" for command in ASKING), REPLAY]


def run(command: str, folder: Path, redirection: str = "", **options: Any) -> tuple[int, str]:
    """Run a command with its output redirected by a shell; returns its status and its errors."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *NFMASQ, *command.split()],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False, **options,
    )  # fmt: skip
    return done.returncode, done.stderr


def outcomes(
    commands: list[str], folder: Path, redirection: str = "", **options: Any
) -> dict[str, tuple[int, str]]:
    return {command: run(command, folder, redirection, **options) for command in commands}


def test_a_reader_that_has_gone_away_ends_every_command_quietly(
    commands: list[str], tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = outcomes(commands, tmp_path, stdout=writing)
    finally:
        os.close(writing)

    assert ended == dict.fromkeys(commands, (1, ""))


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")],
)
def test_output_that_cannot_be_written_is_one_line(
    commands: list[str], tmp_path: Path, redirection: str, reason: str
) -> None:
    commands.remove(REPLAY)

    told = outcomes(commands, tmp_path, redirection)

    assert told == dict.fromkeys(commands, (1, f"nfmasq: cannot write: {reason}\n"))


def test_a_capture_that_fills_the_disk_is_one_line(commands: list[str], tmp_path: Path) -> None:
    assert run(REPLAY, tmp_path, ">/dev/full") == (
        1, "nfmasq: /dev/stdout: No space left on device\n"
    )  # fmt: skip


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "status"), [("list --control /nowhere", 1), ("list --frob", 2)]
)
def test_where_errors_cannot_be_told_the_status_says_it(
    tmp_path: Path, redirection: str, command: str, status: int
) -> None:
    assert run(command, tmp_path, redirection) == (status, "")


def test_nothing_takes_the_place_of_a_closed_stream(tmp_path: Path, control: Path) -> None:
    # The socket would be number 1, and what is printed go to the running nfmasq.
    assert run(f"list --control {control}", tmp_path, "<&- >&-")[0] == 1
    assert run(f"list --control {control}", tmp_path, ">/dev/null") == (0, "")


class TestColours:
    @pytest.mark.parametrize("command", DRAWING)
    def test_a_terminal_gets_colours(self, control: Path, command: str) -> None:
        assert "\x1b[" in on_terminal(command, control, TERM="xterm")

    @pytest.mark.parametrize("unwanted", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    @pytest.mark.parametrize("command", DRAWING)
    def test_none_where_they_are_unwanted(
        self, control: Path, command: str, unwanted: dict[str, str]
    ) -> None:
        output = on_terminal(command, control, **{"TERM": "xterm"} | unwanted)

        assert output
        assert "\x1b" not in output

    def test_an_empty_variable_does_not_count(self, control: Path) -> None:
        assert "\x1b[" in on_terminal("list", control, TERM="xterm", NO_COLOR="")

    def test_top_moves_the_cursor_and_so_wants_a_terminal_that_can(self, control: Path) -> None:
        output = on_terminal("top", control, TERM="dumb")

        assert output == "nfmasq: top wants a terminal; nfmasq list prints the entries once\r\n"

    def test_nobody_draws_otherwise(self) -> None:
        """One place knows whether colours are wanted, and all that draws has its console of it."""
        escape = re.compile(r"\\(033|x1b|e\[)|\x1b|\btput\b|\bConsole\(")
        drawing = [
            str(path.relative_to(ROOT))
            for folder in ("bench", "iptables", "nfmasq", "script")
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
            and path.suffix not in (".pyc", ".o")
            and escape.search(path.read_text())
        ]
        assert drawing == ["nfmasq/cli/output.py"]


def on_terminal(command: str, control: Path, **variables: str) -> str:
    """Return what a command writes to a terminal with these variables in its environment."""
    environment = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*NFMASQ, command, "--control", str(control)],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip
    os.close(theirs)
    overdue = threading.Timer(30, process.kill)
    overdue.start()
    output = b""
    with suppress(OSError):  # the other side is closed
        while data := os.read(ours, 65536):
            output += data
    os.close(ours)
    process.wait(60)
    overdue.cancel()
    return output.decode()
