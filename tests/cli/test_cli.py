"""The commands as a person meets them: output, one line for what is wrong, exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nfmasq import __version__
from nfmasq.cli import main
from nfmasq.config import Configuration
from nfmasq.daemon.control import ControlServer
from nfmasq.engine import TCP, UDP, Masquerade
from nfmasq.engine.forward.forward import Forward
from nfmasq.engine.forward.forwards import Forwards
from nfmasq.engine.forward.server import Server
from nfmasq.engine.table.entry import CACHED_IN, CACHED_OUT, NO_REPLY

RELOADED: list[str] = []
GATEWAY, INSIDE, OUTSIDE = 0xC6336402, 0x0A000005, 0xCB007107
NFMASQ = [sys.executable, "-m", "nfmasq"]


def add(masquerade: Masquerade, protocol: int, sport: int, dport: int) -> None:
    ms = masquerade.sessions.ip_masq_new(
        protocol, GATEWAY, 0, INSIDE, sport, OUTSIDE, dport, NO_REPLY
    )
    assert ms is not None
    ms.bytes_out = 1000 * (dport % 100)
    masquerade.sessions.ip_masq_put(ms)


@pytest.fixture
def masquerade() -> Masquerade:
    masquerade = Masquerade(lock=threading.RLock())
    masquerade.sessions.now = time.monotonic()
    for protocol, sport, dport in ((TCP, 40001, 443), (TCP, 40002, 80), (UDP, 40003, 53)):
        add(masquerade, protocol, sport, dport)
    return masquerade


@pytest.fixture
def control(masquerade: Masquerade, tmp_path: Path) -> Iterator[str]:
    """Serve the control socket of a masquerade with three entries; yields its path."""
    figures = [
        ("nfmasq_entries", {"protocol": "tcp"}, 2.0),
        ("nfmasq_sweep_seconds_bucket", {"le": "+Inf"}, 9.0),
        ("process_open_fds", {}, 12.0),
    ]
    path = tmp_path / "nfmasq.sock"
    server = ControlServer(
        path, masquerade, Configuration().as_table, lambda: figures, lambda: RELOADED
    )
    server.start()
    yield str(path)
    server.close()


def nfmasq(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*NFMASQ, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


class TestList:
    def test_in_a_pipe_it_is_aligned_lines(self, control: str) -> None:
        header, *rows = nfmasq("list", "--control", control).stdout.splitlines()

        assert header.split()[:6] == [
            "protocol", "inside", "masquerade", "outside", "state", "expires",
        ]  # fmt: skip
        assert [row.split()[:4] for row in rows] == [
            ["tcp", "10.0.0.5:40001", "198.51.100.2:61000", "203.0.113.7:443"],
            ["tcp", "10.0.0.5:40002", "198.51.100.2:61001", "203.0.113.7:80"],
            ["udp", "10.0.0.5:40003", "198.51.100.2:61002", "203.0.113.7:53"],
        ]
        assert {row.index("198.51.100.2") for row in rows} == {header.index("masquerade")}

    def test_json_is_one_array(self, control: str) -> None:
        entries = json.loads(nfmasq("list", "--json", "--control", control).stdout)

        assert [entry["mport"] for entry in entries] == [61000, 61001, 61002]
        assert entries[0]["flags"] == ["HASHED", "NO_REPLY"]

    @pytest.mark.parametrize("half", [CACHED_OUT, CACHED_IN])
    def test_a_star_is_at_what_the_flow_cache_carries(
        self, control: str, masquerade: Masquerade, half: int
    ) -> None:
        """It takes no room of its own, and no line has a word more or less."""
        before = nfmasq("list", "--control", control).stdout.splitlines()
        masquerade.sessions.entries()[1].flags |= half

        after = nfmasq("list", "--control", control).stdout.splitlines()

        assert [line.split()[0] for line in after] == ["protocol", "tcp", "tcp*", "udp"]
        assert [len(line) for line in after] == [len(line) for line in before]
        entries = json.loads(nfmasq("list", "--json", "--control", control).stdout)
        assert [entry["cached"] for entry in entries] == [False, True, False]

    def test_json_of_no_entries_is_an_empty_array(self, control: str) -> None:
        result = nfmasq("list", "--json", "--saddr", "10.9.9.9", "--control", control)

        assert json.loads(result.stdout) == []

    @pytest.mark.parametrize(
        ("options", "sports"),
        [
            (["--protocol", "udp"], [40003]),
            (["--dport", "80", "--saddr", "10.0.0.5"], [40002]),
            (["--sort", "bytes"], [40001, 40003, 40002]),
            (["--sort", "bytes", "--reverse"], [40002, 40003, 40001]),
            (["--sort", "saddr", "--reverse"], [40003, 40002, 40001]),
            (["--reverse"], [40003, 40002, 40001]),
        ],
    )
    def test_filters_and_order(self, control: str, options: list[str], sports: list[int]) -> None:
        result = nfmasq("list", "--json", "--control", control, *options)

        assert [entry["sport"] for entry in json.loads(result.stdout)] == sports

    def test_on_a_terminal_it_is_a_table(self, control: str) -> None:
        output = on_terminal("list", "--control", control)

        assert output.count("10.0.0.5:4000") == 3
        assert "\x1b[1m" in output

    @pytest.mark.parametrize(("width", "headings"), [(107, 8), (106, 7), (80, 6), (76, 5), (40, 5)])
    def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_port(
        self, control: str, width: int, headings: int
    ) -> None:
        output = on_terminal("list", "--control", control, width=width)

        columns = "protocol inside masquerade outside state expires packets bytes"
        lines = re.sub(r"\x1b\[[0-9;]*m|out/in", "", output).splitlines()
        assert lines[0].split() == columns.split()[:headings]
        assert [line.split()[:5] for line in lines[1:]] == [
            ["tcp", "10.0.0.5:40001", "198.51.100.2:61000", "203.0.113.7:443", "NONE"],
            ["tcp", "10.0.0.5:40002", "198.51.100.2:61001", "203.0.113.7:80", "NONE"],
            ["udp", "10.0.0.5:40003", "198.51.100.2:61002", "203.0.113.7:53", "DNS"],
        ]
        if width > 40:
            assert max(map(len, lines)) <= width

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_a_full_disk_is_one_line(self, control: str, options: list[str]) -> None:
        with open("/dev/full", "w") as full:
            listing = subprocess.run(
                [*NFMASQ, "list", *options, "--control", control],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )

        assert listing.returncode == 1
        assert listing.stderr == "nfmasq: cannot write: No space left on device\n"

    def test_a_reader_that_goes_away_is_no_accident(
        self, control: str, masquerade: Masquerade
    ) -> None:
        for sport in range(1, 3000):
            add(masquerade, TCP, sport, 443)
        listing = subprocess.Popen(
            [*NFMASQ, "list", "--control", control],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.readline()
        listing.stdout.close()

        assert listing.stderr.read() == b""
        listing.stderr.close()
        listing.wait(60)


class TestDelete:
    def test_it_removes_what_meets_the_criteria_and_says_how_many(
        self, control: str, masquerade: Masquerade
    ) -> None:
        result = nfmasq("delete", "--protocol", "tcp", "--control", control)

        assert (result.exit_code, result.stdout) == (0, "2 entries removed\n")
        assert [ms.protocol for ms in masquerade.sessions.entries()] == [UDP]

    def test_one_is_an_entry(self, control: str) -> None:
        result = nfmasq("delete", "--maddr", "198.51.100.2", "--mport", "61001",
                        "--control", control)  # fmt: skip

        assert result.stdout == "1 entry removed\n"

    def test_without_criteria_it_is_wrong_usage(self, control: str, masquerade: Masquerade) -> None:
        result = nfmasq("delete", "--control", control)

        assert result.exit_code == 2
        assert result.stderr.startswith("nfmasq: delete needs a criterion")
        assert len(masquerade.sessions.entries()) == 3


def test_flush_says_how_many(control: str, masquerade: Masquerade) -> None:
    result = nfmasq("flush", "--control", control)

    assert (result.exit_code, result.stdout) == (0, "3 entries removed\n")
    assert masquerade.sessions.entries() == []


class TestStats:
    def test_the_figures_that_tell_something(self, control: str) -> None:
        [line] = nfmasq("stats", "--control", control).stdout.splitlines()

        assert line.split() == ["nfmasq_entries", "protocol=tcp", "2"]

    def test_all_of_them(self, control: str) -> None:
        assert len(nfmasq("stats", "--all", "--control", control).stdout.splitlines()) == 3

    def test_json_has_them_all(self, control: str) -> None:
        figures = json.loads(nfmasq("stats", "--json", "--control", control).stdout)

        assert figures[0] == {"name": "nfmasq_entries", "labels": {"protocol": "tcp"}, "value": 2.0}
        assert len(figures) == 3


class TestTop:
    def test_the_busiest_come_first(self, control: str, masquerade: Masquerade) -> None:
        def traffic() -> None:
            for ms in masquerade.sessions.entries():
                ms.bytes_in += 100_000 * (ms.sport - 40000)

        output = on_terminal("top", "--interval", "0.5", "--control", control, meanwhile=traffic)

        places = [output.rindex(f"10.0.0.5:{sport}") for sport in (40003, 40002, 40001)]
        assert places == sorted(places)
        assert "3 entries, 0 of them carried by the flow cache (*)" in output
        assert "Mbit/s" in output

    def test_a_star_is_at_what_the_flow_cache_carries(
        self, control: str, masquerade: Masquerade
    ) -> None:
        masquerade.sessions.entries()[0].flags |= CACHED_OUT | CACHED_IN
        masquerade.sessions.cached.flows = 1

        def traffic() -> None:
            for ms in masquerade.sessions.entries():
                ms.bytes_in += 100_000

        output = on_terminal("top", "--interval", "0.5", "--control", control, meanwhile=traffic)

        assert "tcp*" in output
        assert "3 entries, 1 of them carried by the flow cache (*)" in output

    def test_when_nfmasq_stops_so_does_it_and_says_why(
        self, masquerade: Masquerade, tmp_path: Path
    ) -> None:
        path = tmp_path / "stops.sock"
        server = ControlServer(path, masquerade, dict, list, list)
        server.start()

        output = on_terminal("top", "--control", str(path), meanwhile=server.close, status=1)

        # The line comes after the alternate screen is left, or it would vanish with the screen.
        *_, last = output.split("\x1b[?1049l")
        assert last.strip() == "nfmasq: nfmasq has stopped"

    def test_it_wants_a_terminal(self, control: str) -> None:
        result = run("top", "--control", control)

        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("nfmasq: top wants a terminal")


def on_terminal(
    *arguments: str, meanwhile: object = None, width: int = 160, status: int = 0
) -> str:
    """Return what the command writes to a terminal; `top` is ended with Ctrl-C."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(width), "LINES": "40"}
    process = subprocess.Popen(
        [*NFMASQ, *arguments], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    output = b""
    interrupted = False
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not data:
            break
        output += data
        if callable(meanwhile):
            meanwhile()
            if b"Mbit/s" in output and not interrupted:
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(ours)
    assert process.wait(60) == (130 if interrupted else status)
    assert b"Traceback" not in output
    return output.decode()


NOT_RUNNING = [["list"], ["list", "--json"], ["stats"], ["flush"], ["delete", "--sport", "1"]]


@pytest.mark.parametrize("arguments", NOT_RUNNING)
def test_where_none_is_running_it_says_how_to_start_one(
    arguments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "nfmasq.sock"

    result = nfmasq(*arguments, "--control", str(path))

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"nfmasq: no nfmasq is running at {path} (start it with: sudo nfmasq run)\n"
    )


WRONG_USAGE = [
    ([], "Missing command"),
    (["frobnicate"], "No such command 'frobnicate'"),
    (["list", "--saddr", "10.0.0"], "'10.0.0' is not an IPv4 address"),
    (["list", "--frob"], "No such option"),
    (["list", "--sort", "colour"], "'colour' is not one of"),
    (["delete", "--dport", "65536"], "65536 is not in the range"),
    (["delete", "--protocol", "quic"], "'quic' is neither a protocol's name nor its number"),
    (["run", "--queue", "65536"], "--queue must be a whole number from 0 to 65535, not 65536"),
    (["run", "--queue", "zero"], "'zero' is not a valid integer"),
    (["run", "--ports", "65095-61000"], "--ports must be LO-HI"),
    (["run", "--ports", "0-10"], "--ports must be LO-HI"),
    (["run", "--ports", "61000-70000"], "--ports must be LO-HI"),
    (["run", "--ports", "600-1023,1023-2000"], "--ports must not overlap, as 600-1023 and 1023-"),
    (["run", "--masquerade-address", "here"], "--masquerade-address must be an IPv4 address"),
    (["run", "--masquerade-address", "0.0.0.0"], "that the outside can answer to"),
    (["run", "--metrics", "9469"], "--metrics must be ADDRESS:PORT"),
    (["run", "--control", ""], "--control must be a path"),
    (["run", "--mapping", "symmetric"], "'symmetric' is not one of"),
    (["run", "--timeouts", "forever"], "'forever' is not one of"),
    (["run", "now"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = nfmasq(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"nfmasq: .*\n", result.stderr)
    assert message in result.stderr


def test_a_wrong_configuration_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text('queue = 1\nports = "9-1"\n')

    result = run("run", "--config", str(file))

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"nfmasq: {file}:2: ports must be LO-HI[,LO-HI]..., from 1 to 65535 with the lower port "
        'first, not "9-1"\n'
    )


class TestServers:
    @pytest.fixture(autouse=True)
    def forwards(self, masquerade: Masquerade) -> tuple[Server, Server]:
        """Forward TCP 80 to two servers, the second one dead, and UDP 53 to one server."""
        first, second = Server(INSIDE, 80, 3), Server(INSIDE + 1, 80)
        first.active, first.inactive, first.total = 5, 6, 70
        second.alive = False
        masquerade.sessions.forwards = Forwards(
            [
                Forward(TCP, range(80, 81), [first, second]),
                Forward(UDP, range(53, 54), [Server(INSIDE, 53)]),
            ]
        )
        return first, second

    def test_in_a_pipe_they_are_aligned_lines(self, control: str) -> None:
        assert nfmasq("servers", "--control", control).stdout.splitlines() == [
            "forward  server       state  weight  active  inactive  total",
            "tcp:80   10.0.0.5:80  up     3       5       6         70",
            "tcp:80   10.0.0.6:80  down   1       0       0         0",
            "udp:53   10.0.0.5:53  up     1       0       0         0",
        ]

    def test_on_a_terminal_they_are_a_table(self, control: str) -> None:
        output = on_terminal("servers", "--control", control)
        assert "10.0.0.6:80" in output
        assert "\x1b[31mdown" in output

    def test_json_is_one_array(self, control: str) -> None:
        first, *_ = json.loads(nfmasq("servers", "--json", "--control", control).stdout)
        assert first == {
            "forward": "tcp:80",
            "server": "10.0.0.5:80",
            "state": "up",
            "weight": 3,
            "active": 5,
            "inactive": 6,
            "total": 70,
        }

    def test_those_of_one_forward_alone(self, control: str) -> None:
        rows = json.loads(nfmasq("servers", "--json", "--control", control, "udp:53").stdout)
        assert [row["server"] for row in rows] == ["10.0.0.5:53"]

    def test_a_weight_is_set_and_the_server_shown(
        self, control: str, forwards: tuple[Server, Server]
    ) -> None:
        result = nfmasq("servers", "tcp:80", "10.0.0.5:80", "--weight", "0", "--control", control)
        assert result.stdout.splitlines()[1].split()[:4] == [
            "tcp:80",
            "10.0.0.5:80",
            "drained",
            "0",
        ]
        assert [server.weight for server in forwards] == [0, 1]

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (["tcp:81"], 1, "nothing is forwarded as tcp:81; there is tcp:80, udp:53"),
            (
                ["tcp:80", "10.0.0.9:80", "--weight", "1"],
                1,
                "there is no server 10.0.0.9:80; there is 10.0.0.5:80, 10.0.0.6:80",
            ),
            (["tcp:80", "--weight", "1"], 2, "--weight is of one server"),
            (["--weight", "1"], 2, "--weight is of one server"),
            (["tcp:80", "10.0.0.5:80", "--weight", "-1"], 2, "-1 is not in the range"),
            (["tcp:80", "10.0.0.5:80", "--weight", "65536"], 2, "65536 is not in the range"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_changes_nothing(
        self,
        control: str,
        forwards: tuple[Server, Server],
        arguments: list[str],
        status: int,
        message: str,
    ) -> None:
        result = run("servers", "--control", control, *arguments)
        assert result.returncode == status
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert [server.weight for server in forwards] == [3, 1]


class TestReload:
    def test_it_says_what_changed(self, control: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), "RELOADED", ["timeouts udp: 300.0 -> 60.0"])
        assert nfmasq("reload", "--control", control).stdout == "timeouts udp: 300.0 -> 60.0\n"

    def test_it_says_so_when_nothing_did(self, control: str) -> None:
        assert nfmasq("reload", "--control", control).stdout == "nothing has changed\n"


def test_version() -> None:
    assert run("--version").stdout == f"nfmasq, version {__version__}\n"


def test_help_names_every_command() -> None:
    result = nfmasq("--help")

    assert result.exit_code == 0
    for command in (
        "run",
        "list",
        "stats",
        "top",
        "flush",
        "delete",
        "servers",
        "reload",
        "doctor",
    ):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


def test_help_of_run_tells_the_defaults_and_ranges() -> None:
    text = " ".join(nfmasq("run", "--help").stdout.split())

    for default in (
        *("61000-65095", "127.0.0.1:9469", "/run/nfmasq.sock", "rfc", "sequential", "none", "ftp"),
        *("0; 0 to 65535", "8192; 1 to 1048576"),
    ):
        assert f"[default: {default}]" in text


def run_without_rights(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command where files of mode 0 cannot be opened, as by an ordinary user."""
    # Root may open anything unless it gives up this right.
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [*(without if os.geteuid() == 0 else []), *NFMASQ, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", [["list"], ["stats"], ["flush"]])
def test_a_socket_that_is_not_ours_to_open(control: str, command: list[str]) -> None:
    os.chmod(control, 0)

    result = run_without_rights(*command, "--control", control)

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"nfmasq: not permitted to talk to nfmasq at {control} (try with sudo)\n"
    )


def test_a_configuration_file_that_is_not_ours_to_read(tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.touch(mode=0)

    result = run_without_rights("run", "--config", file)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"nfmasq: {file}: cannot be read: Permission denied\n"

    result = run_without_rights("doctor", "--config", file, "--control", tmp_path / "none")
    assert result.returncode == 1
    assert f"{file}: cannot be read: Permission denied" in result.stdout
    assert result.stderr == ""


def test_an_interrupt_while_it_is_still_being_imported_is_no_accident() -> None:
    """The interrupt comes, as by Ctrl-C, at the import of the first module."""
    program = (
        "import runpy, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'nfmasq.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('nfmasq', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (130, "")
