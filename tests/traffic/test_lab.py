"""The lab: who reaches whom, what a capture sees, and that nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, SOCK_STREAM

import pytest

from nfmasq.daemon.control import request
from nfmasq.errors import NfmasqError
from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.observed import eventually

INSIDE1 = bytes([10, 77, 0, 11])


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    # What is tested here is the lab, however its nfmasq takes packets.
    return ()


def answers(host: Host, address: str, *options: str, seconds: int = 20) -> bool:
    """Say whether one ping is answered within `seconds`."""
    ping = ["ping", "-c", "1", "-W", str(seconds), *options, address]
    return host.run(ping, check=False).returncode == 0


def is_silent(host: Host, address: str, *options: str) -> bool:
    """Say whether one ping is not answered within a second."""
    return not answers(host, address, *options, seconds=1)


# ---- who reaches whom ---------------------------------------------------------------------------


def test_neighbours_reach_each_other(lab: Lab) -> None:
    assert answers(lab.inside[0], lab.inside[1].address)
    assert answers(lab.inside[0], lab.gateway.interfaces["lan"])
    assert answers(lab.gateway, lab.inside[1].address)
    assert answers(lab.gateway, lab.router.address)
    assert answers(lab.router, lab.gateway.address)
    assert answers(lab.outside[0], lab.outside[1].address)


def test_the_gateway_and_the_outside_reach_each_other(lab: Lab) -> None:
    for host in lab.outside:
        assert answers(lab.gateway, host.address)
        assert answers(host, lab.gateway.address)


def test_an_inside_address_is_seen_outside_and_gets_no_answer(lab: Lab) -> None:
    with lab.capture(lab.outside[0], "eth0", "icmp") as seen:
        assert is_silent(lab.inside[0], lab.outside[0].address)
    assert INSIDE1 in {packet.data[12:16] for packet in seen}
    assert is_silent(lab.outside[0], lab.inside[0].address)
    assert is_silent(lab.router, lab.inside[0].address)


def test_only_the_gateway_and_the_router_forward(lab: Lab) -> None:
    forwarding = [host.name for host in lab.hosts if host.sysctl("net.ipv4.ip_forward") == "1"]
    assert forwarding == ["gateway", "router"]


def test_there_is_no_ipv6(lab: Lab) -> None:
    for host in lab.hosts:
        assert host.ip("-6 address show") == ""


def test_masquerading_lasts_for_its_block(lab: Lab) -> None:
    with lab.masquerading("--filtering", "endpoint-independent", ports="61000-61009") as daemon:
        assert answers(lab.inside[0], lab.outside[0].address)
        assert "10.77.0.11" in daemon.ask("list", "--json")
        assert "61000-61009" in daemon.log.read_text()
        assert lab.rules("status", "--ports", "61000-61009", check=False).returncode == 0
        assert lab.rules("status", check=False).returncode == 1
        metrics = lab.gateway.run(["curl", "-s", f"http://{daemon.metrics}/metrics"])
        assert "nfmasq_packets_total" in metrics.stdout
    assert daemon.returncode == 0
    assert lab.rules("status", "--ports", "61000-61009", check=False).returncode == 1
    assert is_silent(lab.inside[0], lab.outside[0].address)


def test_masquerading_ends_with_its_block_where_that_fails(lab: Lab) -> None:
    with pytest.raises(ZeroDivisionError), lab.masquerading() as daemon:
        raise ZeroDivisionError
    assert daemon.returncode == 0
    assert lab.rules("status", check=False).returncode == 1


def test_each_masquerade_of_a_test_is_its_own(lab: Lab, masquerade: Callable[..., Daemon]) -> None:
    daemon = masquerade()
    assert daemon.ask("list", "--json").strip() == "[]"
    assert answers(lab.inside[0], lab.outside[0].address)
    assert daemon.ask("list", "--json").strip() != "[]"


def test_each_nfmasq_has_the_options_of_its_lab_unless_its_own_say_otherwise() -> None:
    def takes_superpackets(daemon: Daemon) -> bool:
        (configuration,) = request(daemon.control, "configuration")
        return bool(configuration["gso"])

    with Lab(inside=1, outside=1, options=["--no-gso"]) as lab:
        with lab.masquerading() as daemon:
            assert not takes_superpackets(daemon)
        with lab.masquerading("--gso") as daemon:
            assert takes_superpackets(daemon)


def test_an_nfmasq_that_does_not_start_says_why(lab: Lab) -> None:
    with pytest.raises(NfmasqError, match=r"--ports must be .*9-1"):
        lab.nfmasq("--ports", "9-1")


# ---- what runs on a host ------------------------------------------------------------------------


def test_a_socket_is_the_host_s_while_the_process_stays_where_it_is(lab: Lab) -> None:
    here = os.stat("/proc/self/ns/net").st_ino
    with (
        lab.gateway.socket(AF_INET, SOCK_DGRAM) as receiver,
        lab.inside[0].socket(AF_INET, SOCK_DGRAM) as sender,
    ):
        receiver.bind(("", 7000))
        sender.sendto(b"hello", (lab.gateway.interfaces["lan"], 7000))
        data, (address, _) = receiver.recvfrom(100)
    assert (data, address) == (b"hello", lab.inside[0].address)
    assert os.stat("/proc/self/ns/net").st_ino == here


def test_a_command_gets_its_input_and_gives_its_output(lab: Lab) -> None:
    done = lab.inside[0].run(["sh", "-c", "cat; echo oops >&2; exit 3"], input="in", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "in", "oops\n")


def test_a_failed_command_says_what_it_said(lab: Lab) -> None:
    with pytest.raises(NfmasqError, match=r"inside1: sh .*exit status 3: oops$"):
        lab.inside[0].run(["sh", "-c", "echo oops >&2; exit 3"])


def test_a_command_that_takes_too_long_ends_with_its_children(lab: Lab, mark: str) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        lab.inside[0].run(["sh", "-c", "sleep 600 & sleep 600"], timeout=0.3)
    # The processes were killed; the kernel takes a moment until they are gone.
    assert eventually(lambda: processes(mark) == [])


def test_a_server_is_waited_for(lab: Lab) -> None:
    host = lab.outside[0]
    with pytest.raises(NfmasqError, match="outside1: nothing is bound to tcp port 8080"):
        host.wait_until_bound(8080, timeout=0.1)
    late = "sleep 0.2; exec socat TCP-LISTEN:8080,fork EXEC:date"
    server = host.popen(["sh", "-c", late])
    host.wait_until_bound(8080)
    with lab.gateway.socket(AF_INET, SOCK_STREAM) as client:
        client.connect((host.address, 8080))
        assert client.recv(100)
    server.terminate()
    server.wait()


def test_a_narrow_link_is_narrow_at_both_ends() -> None:
    with Lab(inside=1, outside=1) as lab:
        lab.set_mtu("net", 1400)
        assert answers(lab.gateway, lab.outside[0].address, "-M", "do", "-s", "1372")
        assert is_silent(lab.gateway, lab.outside[0].address, "-M", "do", "-s", "1373")
        assert answers(lab.outside[0], lab.gateway.address, "-M", "do", "-s", "1372")
        assert is_silent(lab.outside[0], lab.gateway.address, "-M", "do", "-s", "1373")


# ---- captures -----------------------------------------------------------------------------------


def test_a_capture_has_each_packet_of_its_block_and_no_other(lab: Lab) -> None:
    to = (lab.gateway.interfaces["lan"], 7000)
    numbers = [b"%d" % number for number in range(1000)]
    with (
        lab.gateway.socket(AF_INET, SOCK_DGRAM) as receiver,
        lab.inside[0].socket(AF_INET, SOCK_DGRAM) as sender,
    ):
        receiver.bind(("", 7000))
        for _ in range(5):
            sender.sendto(b"before", to)
            started = time.time()
            with lab.capture(lab.gateway, "lan", "udp port 7000") as seen:
                for number in numbers:
                    sender.sendto(number, to)
            ended = time.time()
            sender.sendto(b"after", to)
            assert [packet.data[28:] for packet in seen] == numbers
            assert {packet.data[12:16] for packet in seen} == {INSIDE1}
            moments = [packet.time for packet in seen]
            assert started <= moments[0] <= moments[-1] <= ended
            assert moments == sorted(moments)


def test_a_capture_is_whole_though_others_come_while_it_begins(lab: Lab) -> None:
    """Until the capture's expression is in force, the kernel counts packets it does not want."""
    address = lab.gateway.interfaces["lan"]
    ending = threading.Event()
    with (
        lab.inside[0].socket(AF_INET, SOCK_DGRAM) as sender,
        lab.inside[1].socket(AF_INET, SOCK_DGRAM) as other,
    ):

        def send_others() -> None:
            while not ending.is_set():
                other.sendto(b"not wanted", (address, 7001))

        others = threading.Thread(target=send_others)
        others.start()
        try:
            for _ in range(5):
                with lab.capture(lab.gateway, "lan", "udp dst port 7000") as seen:
                    for number in range(100):
                        sender.sendto(b"%d" % number, (address, 7000))
                assert [packet.data[28:] for packet in seen] == [b"%d" % n for n in range(100)]
        finally:
            ending.set()
            others.join()


@pytest.mark.parametrize(
    ("interface", "expression", "complaint"),
    [("nope", "ip", "nope"), ("lan", "no such thing", "syntax error")],
)
def test_a_capture_that_cannot_be_says_why(
    lab: Lab, interface: str, expression: str, complaint: str
) -> None:
    with (
        pytest.raises(NfmasqError, match=f"cannot capture: .*{complaint}"),
        lab.capture(lab.gateway, interface, expression),
    ):
        pytest.fail("captured")


# ---- nothing is left behind ---------------------------------------------------------------------


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a mark in the environment of each process that the test starts, and of no other."""
    mark = f"NFMASQ_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*mark.split("="))
    return mark


def processes(mark: str) -> list[str]:
    """Return the ids of the living processes with this mark."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def left_behind(prefix: str, mark: str) -> list[str]:
    places = Path("/run/netns"), Path(tempfile.gettempdir())
    return [str(path) for place in places for path in place.glob(f"{prefix}*")] + processes(mark)


def prefix_of(lab: Lab) -> str:
    return lab.gateway.namespace.removesuffix("gateway")


LIFE_OF_A_LAB = """
import signal, socket, sys, time
from nfmasq.lab import Lab

# A process that was started in the background of a shell ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("builds", flush=True)
with Lab(inside=1, outside=1) as lab:
    lab.outside[0].popen(["sh", "-c", "sleep 600 & sleep 600"])
    lab.gateway.popen(["sh", "-c", "setsid sleep 600 & sleep 600"])
    kept = lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM)
    print("stands", flush=True)
    ENDING
"""


@pytest.fixture
def living(mark: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield a function that starts processes, which each build a lab; they end with the test."""
    children = []

    def start(until: str, ending: str = "time.sleep(60)") -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", LIFE_OF_A_LAB.replace("ENDING", ending)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout
        for line in child.stdout:
            if line.strip() == until:
                return child
        pytest.fail(f"the lab never {until}")

    yield start
    for child in children:
        child.terminate()
        child.communicate(timeout=60)


Living = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize(
    ("ending", "status"), [("pass", 0), ("raise ValueError", 1), ("sys.exit(7)", 7)]
)
def test_nothing_is_left_of_a_lab_that_ends(
    living: Living, mark: str, ending: str, status: int
) -> None:
    child = living("stands", ending)
    assert child.wait(60) == status
    assert left_behind(f"nfmasq-{child.pid}-", mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(living: Living, mark: str, number: int) -> None:
    child = living("stands")
    assert left_behind(f"nfmasq-{child.pid}-", mark)
    child.send_signal(number)
    assert child.wait(60) == -signal.SIGINT
    assert left_behind(f"nfmasq-{child.pid}-", mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("milliseconds", [0, 15, 30, 60])
def test_nothing_is_left_after_a_signal_in_the_middle_of_the_building(
    living: Living, mark: str, milliseconds: int, number: int
) -> None:
    child = living("builds")
    time.sleep(milliseconds / 1000)
    child.send_signal(number)
    child.wait(60)
    assert left_behind(f"nfmasq-{child.pid}-", mark) == []


def test_nothing_is_left_after_many_signals(living: Living, mark: str) -> None:
    child = living("stands")
    while child.poll() is None:
        child.send_signal(signal.SIGINT)
        time.sleep(0.003)
    assert left_behind(f"nfmasq-{child.pid}-", mark) == []


def test_nothing_is_left_of_a_lab_interrupted_at_any_step(
    monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """A step is a process that the building or the removing of a lab starts.

    Ctrl-C comes with the first step, then, in a new lab, with the second step, and so on until a
    lab has no more steps.
    """
    start = subprocess.Popen
    to_go = 0

    def start_interrupted(*arguments: object, **options: object) -> object:
        nonlocal to_go
        to_go -= 1
        if to_go == 0:
            signal.raise_signal(signal.SIGINT)
        return start(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", start_interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for step in range(1, 100):
            to_go = step
            lab = Lab(inside=1, outside=1)
            with suppress(KeyboardInterrupt), lab:
                pass
            assert left_behind(prefix_of(lab), mark) == [], f"interrupted at step {step}"
            if to_go > 0:
                break
    finally:
        signal.signal(signal.SIGINT, handler)
    assert step > 10


def test_nothing_is_left_where_python_looks_for_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python tries the folder with a file; Ctrl-C comes before it has removed the file."""
    unlink = os.unlink

    def interrupted(path: str) -> None:
        signal.raise_signal(signal.SIGINT)
        unlink(path)

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Lab(inside=1, outside=1).__enter__()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_will_not_end_is_ended(mark: str) -> None:
    with Lab(inside=1, outside=1) as lab:
        lab.gateway.popen(["sh", "-c", "trap '' TERM; while :; do sleep 600; done"])
        time.sleep(0.1)
    assert left_behind(prefix_of(lab), mark) == []


def test_what_a_killed_process_left_is_removed_by_the_next_lab(living: Living, mark: str) -> None:
    dead, alive = living("stands"), living("stands")
    dead.kill()
    # Until the process is waited for, no lab of another test takes it for dead.
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert [*Path("/run/netns").glob(f"nfmasq-{dead.pid}-*")]
    dead.wait()
    with Lab(inside=1, outside=1) as lab:
        assert not [*Path("/run/netns").glob(f"nfmasq-{dead.pid}-*")]
        assert [*Path("/run/netns").glob(f"nfmasq-{alive.pid}-*")]
        assert answers(lab.inside[0], lab.gateway.interfaces["lan"])
    alive.terminate()
    alive.wait(60)
    assert left_behind(f"nfmasq-{dead.pid}-", mark) == []
    assert left_behind(f"nfmasq-{alive.pid}-", mark) == []


def test_signals_are_what_they_were_once_a_lab_is_gone() -> None:
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    with Lab(inside=1, outside=1):
        pass
    assert [signal.getsignal(number) for number in numbers] == before


# ---- where there can be no lab ------------------------------------------------------------------

COMPLAINT = """
import os
from nfmasq.errors import NfmasqError
from nfmasq.lab import Lab

RESTRICTION
try:
    Lab().__enter__()
except NfmasqError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("command", "restriction", "complaint"),
    [
        ([], "os.setuid(65534)", "sudo"),
        (["setpriv", "--bounding-set=-sys_admin"], "", "Operation not permitted"),
        ([], "os.environ['PATH'] = '/nowhere'", "install iproute2"),
    ],
    ids=["not root", "root without the capability", "without ip"],
)
def test_a_lab_that_cannot_be_built_says_why_in_one_line(
    command: list[str], restriction: str, complaint: str, mark: str
) -> None:
    child = subprocess.Popen(
        [*command, sys.executable, "-c", COMPLAINT.replace("RESTRICTION", restriction)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = child.communicate(timeout=60)
    assert complaint in output
    assert output.count("\n") == 1
    assert (child.returncode, errors) == (0, "")
    assert left_behind(f"nfmasq-{child.pid}-", mark) == []
