"""The demo itself: what it shows, what it says of a failed step, and that nothing is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.traffic.observed import eventually

# The demo runs nfmasq with superpackets, as people first do; it has no option to turn them off.
DEMO = "from nfmasq.cli import main; main(['demo'])"
STEPS = [
    "build the lab",
    "load the rules",
    "start nfmasq",
    "fetch a web page",
    "fetch a large file",
    "ask by UDP",
    "ping",
    "trace the route",
    "who came, outside",
    "what was on the wire",
    "nfmasq list",
    "metrics",
    "stop nfmasq",
    "remove the rules",
    "take it all down",
]


WAITING = """
import sys
from nfmasq.cli import demo
take = demo.Steps.take

def wait_and_take(steps, name, step):
    if name == "STEP":
        sys.stdin.read()
    return take(steps, name, step)

demo.Steps.take = wait_and_take
"""


def waiting_at(step: str) -> str:
    """Return statements that have the demo wait at a step until its input ends (`communicate`)."""
    return WAITING.replace("STEP", step)


@contextmanager
def demo(before: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run a demo in a process of its own, after the Python statements `before`.

    At the end of the block it is waited for, and must have left no namespace, no file, no process.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\n{DEMO}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        with process:
            try:
                yield process
                process.wait(120)
            finally:
                process.kill()
        assert list(Path(folder).iterdir()) == []
        assert processes_with(f"TMPDIR={folder}") == []
    assert f"nfmasq-{process.pid}-" not in output_of("ip", "netns", "list")


def processes_with(variable: str) -> list[str]:
    """Return the processes with this in their environment: all that the demo started have it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has just ended, or belongs to somebody else
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found


def has_ended(pid: str) -> bool:
    """Say whether nothing is left of a process but its exit status, which nobody has asked for."""
    threads = list(Path("/proc", pid, "task").glob("*/status"))
    return len(threads) == 1 and "\nState:\tZ" in threads[0].read_text()


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def outcomes(output: str) -> dict[str, str]:
    """Return how each step went, "ok" or "FAILED"."""
    return {
        name: line.split()[0]
        for line in output.splitlines()
        for name in STEPS
        if line[7:].startswith(f"{name} ") and not line.startswith(" ")
    }


def read_until(process: subprocess.Popen[str], step: str) -> str:
    """Return what the demo says until it has passed this step."""
    assert process.stdout
    read = ""
    for line in process.stdout:
        read += line
        if line.startswith("ok") and step in line:
            return read
    pytest.fail(f"the demo ended before it came to {step!r}: {read}")


def test_every_step_passes() -> None:
    with demo() as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert outcomes(output) == dict.fromkeys(STEPS, "ok")
    assert f"All {len(STEPS)} steps passed" in output
    assert "\x1b" not in output, "colours and progress bars are for terminals"


def test_the_capabilities_of_the_systemd_unit_are_enough() -> None:
    unit = (Path(__file__).parents[2] / "contrib/systemd/nfmasq.service").read_text()
    [names] = re.findall(r"^CapabilityBoundingSet=(.*)", unit, re.MULTILINE)
    allowed = ["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names.split())]
    bounded = [
        "setpriv",
        "--no-new-privs",
        "--inh-caps=-all",
        f"--bounding-set={','.join(allowed)}",
    ]
    with demo(f"import nfmasq.lab as lab; lab._NFMASQ = {bounded} + lab._NFMASQ") as process:
        output, errors = process.communicate(timeout=120)
    assert outcomes(output) == dict.fromkeys(STEPS, "ok")
    assert (process.returncode, errors) == (0, "")


def test_a_killed_handler_fails_what_comes_after_it() -> None:
    with demo(waiting_at("fetch a large file")) as process:
        read = read_until(process, "fetch a web page")
        for pid in output_of("ip", "netns", "pids", f"nfmasq-{process.pid}-1-gateway").split():
            os.kill(int(pid), signal.SIGKILL)
            assert eventually(partial(has_ended, pid))
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    went = outcomes(read + output)
    assert list(went) == STEPS
    for step in ("ask by UDP", "ping", "trace the route", "nfmasq list", "metrics", "stop nfmasq"):
        assert went[step] == "FAILED"
    assert went["remove the rules"] == went["take it all down"] == "ok"
    assert "nfmasq has ended, exit status -9" in output
    assert errors.startswith("nfmasq: the demo failed at: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("rules", ["false", "true"])
def test_without_its_rules_no_traffic_is_tried(rules: str) -> None:
    """The program `rules` takes the place of the rules script, and fails or does nothing."""
    with demo(f"from nfmasq import rules_script; rules_script.find = lambda: '{rules}'") as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert outcomes(output) == {
        "build the lab": "ok",
        "load the rules": "FAILED",
        "take it all down": "ok",
    }
    assert errors == "nfmasq: the demo failed at: load the rules\n"


def test_a_file_that_arrives_changed_fails() -> None:
    change = """
from nfmasq.cli import demo
send = demo._WebServer.__init__
demo._WebServer.__init__ = lambda server, pages, visits: send(
    server, {**pages, "/large": pages["/large"][::-1]}, visits
)
"""
    with demo(change) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert outcomes(output) == dict.fromkeys(STEPS, "ok") | {"fetch a large file": "FAILED"}
    assert errors == "nfmasq: the demo failed at: fetch a large file\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("step", ["build the lab", "fetch a web page", "ask by UDP"])
def test_an_interrupted_demo_takes_everything_down(name: str, step: str) -> None:
    # The demo is busy when the signal comes, and waits near its end for a signal that comes late.
    with demo(waiting_at("remove the rules")) as process:
        read_until(process, step)
        process.send_signal(signal.Signals[name])
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in output + errors


def test_a_reader_that_goes_away_is_told_nothing_and_everything_is_taken_down() -> None:
    with demo() as process:
        read_until(process, "build the lab")
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, "")


UNUSUAL = """
umask 077
unset HOME TERM
trap '' HUP INT
export LANG=C LC_ALL=C
exec "$@" <&- | cat
"""


def test_it_runs_in_unusual_surroundings() -> None:
    """As nohup, a shell's background or a service may start it: it passes, and leaves nothing."""
    shell = ["bash", "-o", "pipefail", "-c", UNUSUAL, "bash", sys.executable, "-c", DEMO]
    with tempfile.TemporaryDirectory(prefix="with spaces ") as folder:
        done = subprocess.run(
            shell, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, timeout=120
        )
        left = list(Path(folder).iterdir())

    assert (done.returncode, done.stderr, left) == (0, "", [])
    assert outcomes(done.stdout) == dict.fromkeys(STEPS, "ok")


def test_not_root_is_one_line() -> None:
    with demo("import os; os.geteuid = lambda: 1000") as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (1, "")
    assert "run it as root" in errors
    assert len(errors.splitlines()) == 1
