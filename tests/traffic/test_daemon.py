"""The daemon on a real NFQUEUE: whole datagrams, starting and stopping, the masquerade address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfmasq.daemon.control import request
from nfmasq.daemon.queue_table import queue_row
from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.observed import eventually, figure, stand_still

ECHO_PORT = 7
SINK_PORT = 9
MOST_COPIED = 65_503  # bytes of UDP data in the longest packet that NFQUEUE hands over whole


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[list[tuple[str, int]]]:
    """Run a UDP echo server outside; yields the list of the sources of its datagrams."""
    sources: list[tuple[str, int]] = []
    echo = lab.outside[0].socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("", ECHO_PORT))
    echo.settimeout(0.2)
    closing = threading.Event()

    def serve() -> None:
        while not closing.is_set():
            try:
                data, source = echo.recvfrom(65535)
            except TimeoutError:
                continue
            sources.append(source)
            echo.sendto(data, source)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield sources
    closing.set()
    thread.join()


@pytest.fixture
def client(lab: Lab) -> Iterator[socket.socket]:
    with lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock


def echoed(client: socket.socket, host: Host, size: int) -> bool:
    """Say whether `size` bytes of random data come back as they were sent."""
    data = os.urandom(size)
    client.sendto(data, (host.address, ECHO_PORT))
    try:
        return client.recv(65535) == data
    except TimeoutError:
        return False


@contextmanager
def flood(host: Host, target: Host) -> Iterator[None]:
    """Send small datagrams as fast as one process can, to a port where nobody listens."""
    program = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "while True: sock.sendto(b'x', (sys.argv[1], int(sys.argv[2])))\n"
    )
    process = host.popen([sys.executable, "-c", program, target.address, str(SINK_PORT)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def no_answers(lab: Lab) -> Iterator[None]:
    """Keep the outside host from answering a flood with as many ICMP errors."""
    rule = ["INPUT", "-p", "udp", "--dport", str(SINK_PORT), "-j", "DROP"]
    lab.outside[0].run(["iptables", "-A", *rule])
    yield
    lab.outside[0].run(["iptables", "-D", *rule])


@pytest.fixture
def masquerading(lab: Lab) -> Iterator[Daemon]:
    with lab.masquerading() as daemon:
        yield daemon


def test_a_datagram_of_any_size_comes_back_whole(
    lab: Lab, server: object, client: socket.socket, masquerading: Daemon
) -> None:
    sizes = [0, 100, 1472, 1473, 3000, 4016, 60_000, MOST_COPIED, MOST_COPIED + 1, 65_507]
    assert [size for size in sizes if not echoed(client, lab.outside[0], size)] == []


def test_the_largest_ping_comes_back(lab: Lab, masquerading: Daemon) -> None:
    lab.inside[0].run(["ping", "-c", "1", "-W", "10", "-s", "65507", lab.outside[0].address])


def test_a_datagram_too_long_for_the_queue_loses_one_hop(
    lab: Lab, server: object, client: socket.socket, masquerading: Daemon
) -> None:
    """Every forwarded packet loses one, in both directions."""
    client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 60)
    with (
        lab.capture(lab.outside[0], "eth0", "src 198.51.100.2") as outside,
        lab.capture(lab.inside[0], "eth0", f"src {lab.outside[0].address}") as inside,
    ):
        assert echoed(client, lab.outside[0], 65_507)
    assert {packet.data[8] for packet in outside} == {60 - 2}
    assert {packet.data[8] for packet in inside} == {64 - 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_within_a_second_when_idle(lab: Lab, number: int) -> None:
    daemon = lab.nfmasq()
    assert stopped_after(daemon, number) < 1 + busyness()
    assert daemon.returncode == 0
    assert "stopped" in daemon.log.read_text()
    assert not daemon.control.exists()


@pytest.mark.usefixtures("no_answers")
def test_it_stops_within_a_second_when_more_comes_than_it_can_do(lab: Lab) -> None:
    with lab.masquerading("--queue-length", "1024") as daemon:
        with flood(lab.inside[0], lab.outside[0]):
            assert eventually(lambda: figure(daemon, "nfmasq_queue_dropped_total") > 0)
            assert stopped_after(daemon, signal.SIGTERM) < 1 + busyness()
        assert daemon.returncode == 0
        assert "ERROR" not in daemon.log.read_text()


def stopped_after(daemon: Daemon, number: int) -> float:
    began = time.monotonic()
    daemon.send_signal(number)
    daemon.wait(30)
    return time.monotonic() - began


def busyness() -> float:
    """Return a few times the seconds that it takes to start nfmasq and end it, now."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "nfmasq", "--version"], capture_output=True, check=True)
    return 4 * (time.monotonic() - began)


@pytest.mark.usefixtures("no_answers")
def test_an_overflow_of_the_socket_is_counted(lab: Lab) -> None:
    with lab.masquerading("--socket-buffer", "65536") as daemon:
        stand_still(daemon)
        with flood(lab.inside[0], lab.outside[0]):
            assert eventually(lambda: lost_by_the_socket(lab) > 0)
        daemon.send_signal(signal.SIGCONT)
        assert eventually(lambda: figure(daemon, "nfmasq_socket_overflows_total") > 0)
        assert figure(daemon, "nfmasq_queue_dropped_total", where="user") > 0


def lost_by_the_socket(lab: Lab) -> int:
    """Return how many packets the socket had no room for, as the kernel counts them."""
    row = lab.gateway.call(queue_row, 0)
    assert row
    return row.user_dropped


def test_the_socket_buffer_is_as_large_as_asked_whatever_rmem_max_says(lab: Lab) -> None:
    with lab.masquerading("--socket-buffer", str(64 << 20)) as daemon:
        assert "rmem_max" not in daemon.log.read_text()


WITHOUT_SUPERPACKETS = """
from nfmasq.cli import main
from nfmasq.daemon import nfnetlink

def refuse(*_):
    raise OSError(95, "Operation not supported")

nfnetlink.ask_for_superpackets = refuse
main()
"""


def test_a_kernel_without_superpackets_is_told_of_once(
    lab: Lab, server: object, client: socket.socket, data_path: tuple[str, ...], tmp_path: Path
) -> None:
    """The warning comes only where superpackets are wanted; packets pass without them."""
    own = ["--config", os.devnull, "--control", str(tmp_path / "control"), "--metrics", "off"]
    program = [sys.executable, "-c", WITHOUT_SUPERPACKETS, "run", *own, *data_path]
    log = tmp_path / "log"
    lab.rules("up")
    try:
        with log.open("w") as stderr:
            process = lab.gateway.popen(program, cwd=Path(__file__).parents[2], stderr=stderr)
        assert eventually(lambda: "ready" in log.read_text())
        assert echoed(client, lab.outside[0], 1000)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        lab.rules("down")
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line]
    assert ["superpackets" in warning for warning in warnings] == [True] * (
        "--no-gso" not in data_path
    )


def test_a_hang_up_with_the_same_configuration_changes_nothing(
    lab: Lab, server: object, client: socket.socket, masquerading: Daemon
) -> None:
    masquerading.send_signal(signal.SIGHUP)
    assert eventually(lambda: "nothing has changed" in masquerading.log.read_text())
    assert echoed(client, lab.outside[0], 100)


def test_signals_mean_the_same_where_they_were_ignored_at_the_start(
    lab: Lab, tmp_path: Path
) -> None:
    """After nohup, too, a hang-up has the configuration read; in the background Ctrl-C ends it."""
    ignoring = ["sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh", sys.executable, "-m", "nfmasq"]
    own = ["--config", os.devnull, "--control", str(tmp_path / "control"), "--metrics", "off"]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        nfmasq = lab.gateway.popen(
            [*ignoring, "run", *own], cwd=Path(__file__).parents[2], stderr=stderr
        )
    assert eventually(lambda: "ready" in log.read_text())

    nfmasq.send_signal(signal.SIGHUP)
    assert eventually(lambda: "nothing has changed" in log.read_text())
    nfmasq.send_signal(signal.SIGINT)
    assert nfmasq.wait(30) == 0


@pytest.mark.parametrize("redirection", ["", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_log_that_nobody_takes_harms_nothing(lab: Lab, tmp_path: Path, redirection: str) -> None:
    control = tmp_path / "control"
    own = ["--config", os.devnull, "--control", str(control), "--metrics", "off"]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "nfmasq"]
    reading, writing = os.pipe()
    os.close(reading)  # whoever read the log has gone away
    nfmasq = lab.gateway.popen([*shell, "run", *own], cwd=Path(__file__).parents[2], stderr=writing)
    os.close(writing)
    assert eventually(control.exists)

    nfmasq.send_signal(signal.SIGHUP)
    assert [*lab.gateway.call(lambda: [*request(control, "list")])] == []
    nfmasq.terminate()
    assert nfmasq.wait(30) == 0


def complaint(lab: Lab, folder: Path, *command: str) -> str:
    """Return the line that `nfmasq run`, started by `command`, writes where it cannot start."""
    own = ["--config", os.devnull, "--control", str(folder / "control"), "--metrics", "off"]
    done = lab.gateway.run(
        [*command, sys.executable, "-m", "nfmasq", "run", *own],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "control").exists()
    return done.stderr


def test_a_queue_in_use_is_refused(lab: Lab, tmp_path: Path, masquerading: Daemon) -> None:
    assert "queue 0 is in use" in complaint(lab, tmp_path)


def test_without_the_capability_it_says_so(lab: Lab, tmp_path: Path) -> None:
    without = ["setpriv", "--bounding-set", "-net_admin,-net_raw", "--inh-caps", "-all"]
    assert "CAP_NET_ADMIN" in complaint(lab, tmp_path, *without)


def test_the_masquerade_address_follows_the_interface(
    lab: Lab, server: list[tuple[str, int]], client: socket.socket, masquerading: Daemon
) -> None:
    gateway, outside = lab.gateway, lab.outside[0]
    assert echoed(client, outside, 100)
    assert server[-1][0] == "198.51.100.2"
    try:
        # The kernel removes the default route with the last address.
        gateway.ip("address flush dev wan")
        gateway.ip("address add 198.51.100.3/24 dev wan")
        gateway.ip("route add default via 198.51.100.1")
        # Until nfmasq hears of it, even an answer to the old address gets through.
        assert eventually(lambda: "addresses: 198.51.100.3" in masquerading.log.read_text())
        with lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as another:
            assert echoed(another, outside, 100)
        assert server[-1][0] == "198.51.100.3"
    finally:
        gateway.ip("address flush dev wan")
        gateway.ip("address add 198.51.100.2/24 dev wan")
        gateway.ip("route add default via 198.51.100.1")


def test_with_several_addresses_the_kernel_is_asked(
    lab: Lab, server: list[tuple[str, int]], client: socket.socket, masquerading: Daemon
) -> None:
    gateway, outside = lab.gateway, lab.outside[0]
    route = f"{outside.address}/32 via 198.51.100.1 src 198.51.100.4"
    gateway.ip("address add 198.51.100.4/24 dev wan")
    try:
        assert eventually(lambda: "198.51.100.4" in masquerading.log.read_text())
        assert echoed(client, outside, 100)
        assert server[-1][0] == "198.51.100.2"

        gateway.ip(f"route add {route}")

        def source_of_a_new_session() -> str:
            with lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as another:
                assert echoed(another, outside, 100)
            return server[-1][0]

        assert eventually(lambda: source_of_a_new_session() == "198.51.100.4")
        gateway.ip(f"route delete {route}")
        assert eventually(lambda: source_of_a_new_session() == "198.51.100.2")
    finally:
        gateway.ip("address delete 198.51.100.4/24 dev wan")


def test_without_an_address_nothing_leaves(
    lab: Lab, client: socket.socket, masquerading: Daemon
) -> None:
    """This is the case before a lease has come, where a route is there already."""
    gateway, outside = lab.gateway, lab.outside[0]
    before = figure(masquerading, "nfmasq_errors_total", reason="no_address")
    try:
        gateway.ip("address flush dev wan")
        gateway.ip("route add default dev wan")
        assert eventually(lambda: "addresses: none" in masquerading.log.read_text())
        with lab.capture(gateway, "wan", "src net 10.77.0.0/24") as leaked:
            client.sendto(b"x", (outside.address, ECHO_PORT))
            assert eventually(
                lambda: figure(masquerading, "nfmasq_errors_total", reason="no_address") > before
            )
        assert not leaked
    finally:
        gateway.ip("route delete default")
        gateway.ip("address add 198.51.100.2/24 dev wan")
        gateway.ip("route add default via 198.51.100.1")


def test_a_pool_gives_a_host_one_address(lab: Lab, server: list[tuple[str, int]]) -> None:
    """The sessions of 10.77.0.11 share one of the two addresses."""
    pool = ["--masquerade-address", "198.51.100.5", "--masquerade-address", "198.51.100.6"]
    lab.gateway.ip("address add 198.51.100.5/32 dev wan")
    lab.gateway.ip("address add 198.51.100.6/32 dev wan")
    before = len(server)
    try:
        with lab.masquerading(*pool):
            for _ in range(4):
                with lab.inside[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    assert echoed(sock, lab.outside[0], 100)
    finally:
        lab.gateway.ip("address delete 198.51.100.5/32 dev wan")
        lab.gateway.ip("address delete 198.51.100.6/32 dev wan")
    sources = {address for address, _ in server[before:]}
    assert len(sources) == 1
    assert sources < {"198.51.100.5", "198.51.100.6"}
