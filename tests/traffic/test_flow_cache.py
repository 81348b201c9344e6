"""Flows that the kernel carries: what is counted, what expires, and that nothing else leaves.

Each test runs with the flow cache routed and direct. Other modules show that traffic passes with
the cache as without it; here is what only the cache could get wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, SOCK_STREAM

import pytest

from nfmasq.lab import Daemon, Lab
from tests.traffic.observed import entries, eventually, figure
from tests.traffic.servers import ECHO_PORT, udp_echo
from tests.traffic.tunnels import IP_IN_IP, tunnel

SIZE = 100
"""Bytes of the payload of each datagram."""

PACKET = 28 + SIZE

SINK_PORT = 5001

DMZ = "10.78.0.11"
"""The address of the first inside host on a second link."""

Masquerade = Callable[..., Daemon]


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    return ()


@pytest.fixture(scope="module", params=["routed", "direct"])
def mode(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def lab(mode: str) -> Iterator[Lab]:
    with Lab(inside=2, outside=1, options=[f"--flow-cache={mode}", "--flow-cache-after=8"]) as lab:
        yield lab


@pytest.fixture(autouse=True)
def _echo(lab: Lab) -> Iterator[None]:
    with udp_echo(lab.outside[0]):
        yield


# -- traffic -----------------------------------------------------------------------------------


class Pinger:
    """A socket of an inside host whose datagrams the outside host sends back."""

    def __init__(self, lab: Lab, host: int = 0) -> None:
        self._server = lab.outside[0].address, ECHO_PORT
        self.socket = lab.inside[host].socket(AF_INET, SOCK_DGRAM)
        self.socket.settimeout(5)

    def echo(self, count: int = 1) -> None:
        """Send datagrams, each after the answer to the one before. Raises TimeoutError."""
        for number in range(count):
            sent = number.to_bytes(4, "big") * (SIZE // 4)
            self.socket.sendto(sent, self._server)
            assert self.socket.recv(2 * SIZE) == sent

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def pinger(lab: Lab) -> Iterator[Pinger]:
    with closing(Pinger(lab)) as pinger:
        yield pinger


def cached(daemon: Daemon, **criteria: object) -> bool:
    """Say whether there is an entry that meets the criteria, and all such entries are cached."""
    found = entries(daemon, **criteria)
    return bool(found) and all(entry["cached"] for entry in found)


def carried(daemon: Daemon, direction: str) -> float:
    return figure(daemon, "nfmasq_cached_packets_total", direction=direction)


class Upload:
    """A TCP connection that sends without a pause from an inside host, until it is closed.

    `received` is what has arrived outside, in bytes.
    """

    def __init__(self, lab: Lab) -> None:
        self.received = 0
        self._listener = lab.outside[0].socket(AF_INET, SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("", SINK_PORT))
        self._listener.listen()
        self.client = lab.inside[1].socket(AF_INET, SOCK_STREAM)
        self.client.connect((lab.outside[0].address, SINK_PORT))
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with suppress(OSError):
            while not self._ended.is_set():
                self.client.sendall(bytes(65536))
                time.sleep(0.001)
            self.client.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(1)
        with connection:
            while True:
                try:
                    data = connection.recv(1 << 20)
                except TimeoutError:
                    if self._ended.is_set():
                        return
                    continue
                if not data:
                    return
                self.received += len(data)

    def goes_on(self) -> bool:
        """Say whether more arrives from now on."""
        before = self.received
        return eventually(lambda: self.received > before + 1_000_000)

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.client.close()
        self._listener.close()


@pytest.fixture
def upload(lab: Lab) -> Iterator[Callable[[], Upload]]:
    uploads: list[Upload] = []

    def start() -> Upload:
        uploads.append(Upload(lab))
        return uploads[-1]

    yield start
    for each in uploads:
        each.close()


# -- what is carried, and counted -----------------------------------------------------------------


def test_a_flow_that_lasts_is_carried_and_counted_to_the_byte(
    masquerade: Masquerade, pinger: Pinger
) -> None:
    daemon = masquerade()
    pinger.echo(100)

    (entry,) = entries(daemon, protocol="udp")
    assert entry["cached"]
    assert entry["refcnt"] == 3
    assert (entry["packets_out"], entry["packets_in"]) == (100, 100)
    assert (entry["bytes_out"], entry["bytes_in"]) == (100 * PACKET, 100 * PACKET)
    for direction in ("out", "in"):
        here = figure(daemon, "nfmasq_packets_total", direction=direction, protocol="udp")
        assert 8 <= here <= 16
        assert carried(daemon, direction) == 100 - here
        assert figure(daemon, "nfmasq_bytes_total", direction=direction) == 100 * PACKET
        cached_bytes = figure(daemon, "nfmasq_cached_bytes_total", direction=direction)
        assert cached_bytes == (100 - here) * PACKET
    assert figure(daemon, "nfmasq_cached_flows") == 1


def test_what_the_cache_has_counted_stays_when_the_flow_leaves_it(
    masquerade: Masquerade, pinger: Pinger
) -> None:
    daemon = masquerade()
    pinger.echo(50)
    daemon.ask("flush")
    assert figure(daemon, "nfmasq_cached_flows") == 0
    assert figure(daemon, "nfmasq_bytes_total", direction="out") == 50 * PACKET


def test_a_flow_of_a_few_packets_is_not_entered(masquerade: Masquerade, pinger: Pinger) -> None:
    daemon = masquerade()
    pinger.echo(7)
    assert not cached(daemon, protocol="udp")
    assert figure(daemon, "nfmasq_cached_flows_entered_total") == 0


def test_an_unanswered_flow_is_not_entered(lab: Lab, masquerade: Masquerade) -> None:
    daemon = masquerade()
    with lab.inside[0].socket(AF_INET, SOCK_DGRAM) as client:
        for _ in range(50):
            client.sendto(b"hello?", (lab.outside[0].address, 9))
    assert eventually(lambda: entries(daemon, dport=9) != [])
    assert not cached(daemon, dport=9)


def test_a_connection_is_carried_until_it_closes(
    masquerade: Masquerade, upload: Callable[[], Upload]
) -> None:
    daemon = masquerade()
    sending = upload()
    assert eventually(lambda: cached(daemon, protocol="tcp"))
    assert sending.goes_on()
    before = figure(daemon, "nfmasq_packets_total", direction="out")
    assert sending.goes_on()
    assert figure(daemon, "nfmasq_packets_total", direction="out") == before
    sending.close()

    (entry,) = entries(daemon, protocol="tcp")
    assert not entry["cached"]
    assert entry["state"] not in ("ESTABLISHED", "NONE")
    assert entry["bytes_out"] > sending.received


# -- timers -------------------------------------------------------------------------------------


@pytest.fixture
def impatient(masquerade: Masquerade, tmp_path: Path) -> Daemon:
    """Masquerade with a timeout of 2 seconds for UDP."""
    file = tmp_path / "nfmasq.toml"
    file.write_text("[timeouts]\nudp = 2\n")
    return masquerade("--config", str(file))


def test_a_flow_in_use_does_not_expire_and_a_silent_one_does(
    impatient: Daemon, pinger: Pinger
) -> None:
    pinger.echo(20)
    (first,) = entries(impatient, protocol="udp")
    for _ in range(10):
        time.sleep(0.5)
        pinger.echo()
    (entry,) = entries(impatient, protocol="udp")
    assert entry["cached"]
    assert entry["mport"] == first["mport"]
    assert 1 < entry["expires"] <= 2

    silent_since = time.monotonic()
    assert eventually(lambda: not entries(impatient, protocol="udp"))
    assert 1.9 <= time.monotonic() - silent_since < 4


# -- no inside address leaves ---------------------------------------------------------------------


@contextmanager
def nothing_from_inside(lab: Lab) -> Iterator[None]:
    """Have no packet with an inside address on the wire outside within the block."""
    with lab.capture(lab.router, "net", "net 10.77.0.0/24") as leaked:
        yield
    assert [packet.data[:40].hex() for packet in leaked] == []


class Busy:
    """Traffic of all kinds from the inside: cached flows, a bulk upload, new flows all the time."""

    def __init__(self, lab: Lab) -> None:
        self._server = lab.outside[0].address
        self._ended = threading.Event()
        self._host = lab.inside[0]
        self._lasting = [self._host.socket(AF_INET, SOCK_DGRAM) for _ in range(4)]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            for client in self._lasting:
                for _ in range(20):
                    self._send(client)
            with self._host.socket(AF_INET, SOCK_DGRAM) as new:
                self._send(new)
            with self._host.socket(AF_INET, SOCK_STREAM) as opening:
                opening.setblocking(False)
                with suppress(OSError):
                    opening.connect((self._server, 80))
            self._host.sockets[:] = [s for s in self._host.sockets if s.fileno() >= 0]
            time.sleep(0.002)

    def _send(self, client: socket.socket) -> None:
        with suppress(OSError):
            client.sendto(bytes(SIZE), (self._server, ECHO_PORT))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for client in self._lasting:
            client.close()


Gateway = Callable[..., Daemon]


@pytest.fixture
def gateway(lab: Lab) -> Iterator[Gateway]:
    """Yield a function that masquerades with rules that nfmasq loads by itself."""
    with ExitStack() as stack:
        stack.callback(lab.rules, "down")

        def start(*options: str) -> Daemon:
            daemon = lab.nfmasq("--inside", "lan", "--outside", "wan", *options)
            stack.callback(daemon.stop)
            return daemon

        yield start


@pytest.fixture
def busy_gateway(lab: Lab, gateway: Gateway) -> Iterator[Gateway]:
    """Yield a function as `gateway` does; from the first call on there is traffic of all kinds."""
    traffic: list[Busy] = []

    def start(*options: str) -> Daemon:
        daemon = gateway(*options)
        if not traffic:
            traffic.append(Busy(lab))
        return daemon

    yield start
    for each in traffic:
        each.close()


def is_attached(lab: Lab, interface: str) -> bool:
    """Say whether a program of nfmasq is at an interface of the gateway."""
    shown = lab.gateway.run(["tc", "filter", "show", "dev", interface, "ingress"])
    return "side_" in shown.stdout


def carries(daemon: Daemon) -> bool:
    """Wait until flows of the traffic are carried."""
    return eventually(lambda: figure(daemon, "nfmasq_cached_flows") >= 4)


def test_nothing_leaks_when_the_rules_are_flushed(
    lab: Lab, busy_gateway: Gateway, upload: Callable[[], Upload]
) -> None:
    daemon = busy_gateway()
    sending = upload()
    assert carries(daemon)
    with nothing_from_inside(lab):
        for _ in range(3):
            for table in ("raw", "security", "mangle"):
                lab.gateway.run(["iptables", "-t", table, "-F"])
            time.sleep(1.5)
    assert sending.goes_on()
    assert carries(daemon)


def test_nothing_leaks_when_nfmasq_is_killed_and_known_flows_go_on(
    lab: Lab, busy_gateway: Gateway, upload: Callable[[], Upload]
) -> None:
    daemon = busy_gateway()
    sending = upload()
    assert carries(daemon)
    assert eventually(lambda: cached(daemon, protocol="tcp", dport=SINK_PORT))
    with nothing_from_inside(lab):
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        time.sleep(0.5)
        assert sending.goes_on()
        again = busy_gateway()
        assert carries(again)
    assert "of a former nfmasq" in again.log.read_text()


def test_nothing_leaks_when_nfmasq_ends_and_starts_anew(lab: Lab, busy_gateway: Gateway) -> None:
    with nothing_from_inside(lab):
        for _ in range(3):
            daemon = busy_gateway()
            assert carries(daemon)
            assert daemon.stop() == 0
            assert "nfmasq" not in lab.gateway.run(["tc", "qdisc", "show"]).stdout
            assert "clsact" not in lab.gateway.run(["tc", "qdisc", "show"]).stdout


def test_nothing_leaks_when_the_configuration_is_another(
    lab: Lab, busy_gateway: Gateway, tmp_path: Path
) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text("")
    daemon = busy_gateway("--config", str(file))
    assert carries(daemon)
    with nothing_from_inside(lab):
        for text in ('ports = "50000-50999"', "max-entries = 1000", ""):
            file.write_text(text)
            daemon.ask("reload")
            assert carries(daemon)


def test_programs_that_somebody_removes_come_back(lab: Lab, gateway: Gateway) -> None:
    daemon = gateway()
    with closing(Pinger(lab)) as pinger:
        pinger.echo(20)
        for interface in ("lan", "wan"):
            lab.gateway.run(["tc", "qdisc", "delete", "dev", interface, "clsact"])
        assert eventually(lambda: is_attached(lab, "lan") and is_attached(lab, "wan"))
        assert eventually(lambda: gets_through(lab))
        before = carried(daemon, "out")
        pinger.echo(20)
        assert carried(daemon, "out") == before + 20


def gets_through(lab: Lab) -> bool:
    """Say whether a datagram of another flow comes back; an interface may lose the first."""
    with closing(Pinger(lab)) as pinger, suppress(TimeoutError):
        pinger.socket.settimeout(0.2)
        pinger.echo()
        return True
    return False


def come_back(lab: Lab) -> None:
    """Make the outside interface, which has gone, anew."""
    gateway, router = lab.gateway, lab.router
    gateway.ip(f"link add wan type veth peer name wan netns {router.namespace}")
    for host in (gateway, router):
        host.ip(f"address add {host.interfaces['wan']}/24 dev wan")
        host.ip("link set wan up")
    gateway.ip(f"route replace default via {router.interfaces['wan']}")


def test_nothing_leaks_when_the_outside_interface_goes_and_comes(
    lab: Lab, busy_gateway: Gateway
) -> None:
    daemon = busy_gateway()
    assert carries(daemon)
    with nothing_from_inside(lab):
        for _ in range(3):
            lab.gateway.ip("link delete wan")
            come_back(lab)
            before = carried(daemon, "out")
            assert eventually(lambda before=before: carried(daemon, "out") > before + 100)  # type: ignore[misc]
        lab.gateway.ip("link set wan down")
        lab.gateway.ip("link set wan up")
        lab.gateway.ip(f"route replace default via {lab.router.interfaces['wan']}")
        before = carried(daemon, "out")
        assert eventually(lambda: carried(daemon, "out") > before + 100)


def test_the_guard_counts_what_it_drops(lab: Lab, gateway: Gateway) -> None:
    daemon = gateway()
    with closing(Pinger(lab)) as pinger, nothing_from_inside(lab):
        pinger.echo(20)
        daemon.send_signal(signal.SIGSTOP)  # the rules stay away
        lab.gateway.run(["iptables", "-t", "security", "-F"])
        with lab.inside[0].socket(AF_INET, SOCK_DGRAM) as new:
            for _ in range(5):
                new.sendto(b"hello", (lab.outside[0].address, ECHO_PORT))
        time.sleep(0.2)
        daemon.send_signal(signal.SIGCONT)
    dropped = "nfmasq_cached_packets_dropped_total"
    assert eventually(lambda: figure(daemon, dropped) == 5)


# -- beside others --------------------------------------------------------------------------------


def test_where_others_set_marks_packets_take_the_long_way(
    lab: Lab, masquerade: Masquerade, pinger: Pinger, mode: str
) -> None:
    """Who overwrites the whole mark, as policy routing does, gets what it asks for."""
    daemon = masquerade()
    rule = ["PREROUTING", "-i", "lan", "-j", "MARK", "--set-mark", "1"]
    lab.gateway.run(["iptables", "-t", "mangle", "-A", *rule])
    try:
        pinger.echo(50)
    finally:
        lab.gateway.run(["iptables", "-t", "mangle", "-D", *rule])
    (entry,) = entries(daemon, protocol="udp")
    assert (entry["packets_out"], entry["packets_in"]) == (50, 50)
    if mode == "routed":
        assert carried(daemon, "out") == 0
    assert figure(daemon, "nfmasq_cached_packets_dropped_total") == 0


def counted(lab: Lab, table: str, chain: str) -> list[int]:
    """Return how many packets the rules of a chain have seen."""
    shown = lab.gateway.run(["iptables", "-t", table, "-vnxL", chain]).stdout
    return [int(line.split()[0]) for line in shown.splitlines()[2:] if "NFMASQ" not in line]


def test_routed_the_kernel_s_chains_see_each_packet_and_direct_they_are_passed_by(
    lab: Lab, masquerade: Masquerade, pinger: Pinger, stack: ExitStack, mode: str
) -> None:
    """Firewalls and accounting have the packets in their inside form, both ways, without a mark."""
    masquerade()
    inside, server = lab.inside[0].address, lab.outside[0].address
    unmarked = ["-m", "mark", "--mark", "0/0xefffffff"]
    for table, chain in (("filter", "FORWARD"), ("mangle", "FORWARD")):
        for source, destination in ((inside, server), (server, inside)):
            rule = [chain, "-s", source, "-d", destination, "-p", "udp", *unmarked]
            lab.gateway.run(["iptables", "-t", table, "-A", *rule])
            stack.callback(lab.gateway.run, ["iptables", "-t", table, "-D", *rule])
    pinger.echo(100)
    seen = [counted(lab, "filter", "FORWARD"), counted(lab, "mangle", "FORWARD")]
    if mode == "routed":
        assert seen == [[100, 100], [100, 100]]
    else:
        assert all(8 <= packets <= 16 for chain in seen for packets in chain)


# -- interfaces of all kinds ----------------------------------------------------------------------


def goes_by_the_cache(daemon: Daemon, lab: Lab, source: str) -> bool:
    """Exchange datagrams from an address of the first inside host; say whether they were cached."""
    with closing(Pinger(lab)) as pinger:
        pinger.socket.bind((source, 0))
        before = carried(daemon, "out"), carried(daemon, "in")
        pinger.echo(50)
        (entry,) = entries(daemon, sport=pinger.socket.getsockname()[1])
        assert (entry["packets_out"], entry["bytes_in"]) == (50, 50 * PACKET)
        after = carried(daemon, "out"), carried(daemon, "in")
        return (after[0] > before[0] + 30, after[1] > before[1] + 30) == (True, True)


def packet_sockets(lab: Lab) -> int:
    """Count the packet sockets on the gateway, which make the kernel copy what comes in."""
    return len(lab.gateway.run(["cat", "/proc/net/packet"]).stdout.splitlines()) - 1


def echoes_the_largest(lab: Lab, source: str) -> bool:
    """Say whether datagrams come back of which the queue hands over no more than the beginning."""
    with closing(Pinger(lab)) as pinger:
        pinger.socket.bind((source, 0))
        for size in range(65_503, 65_508):
            sent = os.urandom(size)
            pinger.socket.sendto(sent, (lab.outside[0].address, ECHO_PORT))
            if pinger.socket.recv(65_536) != sent:
                return False
    return True


def test_the_largest_datagrams_need_no_packet_socket_where_all_interfaces_are_served(
    lab: Lab, gateway: Gateway, mode: str
) -> None:
    inside, server = lab.inside[0], lab.outside[0].address
    gateway("--inside", "tunnel")
    assert eventually(lambda: packet_sockets(lab) == 0)
    assert echoes_the_largest(lab, inside.address)
    here = (inside, "10.79.0.1", lab.gateway.interfaces["lan"])
    there = (lab.gateway, "10.79.0.2", inside.address)
    with tunnel(IP_IN_IP, here, there):
        inside.ip(f"route add {server} dev tunnel")
        served, sockets = (True, 0) if mode == "routed" else (False, 1)
        assert eventually(lambda: is_attached(lab, "tunnel") == served)
        assert eventually(lambda: packet_sockets(lab) == sockets)
        assert echoes_the_largest(lab, "10.79.0.1")
    assert eventually(lambda: packet_sockets(lab) == 0)


@contextmanager
def dmz(lab: Lab) -> Iterator[None]:
    """Have a second link between the first inside host and the gateway, within the block."""
    inside, gateway, server = lab.inside[0], lab.gateway, lab.outside[0].address
    gateway.ip(f"link add dmz type veth peer name eth1 netns {inside.namespace}")
    for host, interface, address in ((inside, "eth1", DMZ), (gateway, "dmz", "10.78.0.1")):
        host.ip(f"address add {address}/24 dev {interface}")
        host.ip(f"link set {interface} up")
    inside.ip(f"route add {server} via 10.78.0.1")
    inside.run(["ping", "-q", "-c", "1", "-i", "0.05", "-w", "20", "10.78.0.1"])
    try:
        yield
    finally:
        gateway.ip("link delete dmz")


def test_interfaces_without_headers_are_served_or_left_to_the_queue(
    lab: Lab, masquerade: Masquerade, mode: str
) -> None:
    """A tun device has no Ethernet headers; forwarding past the kernel's way needs them."""
    inside, gateway, server = lab.inside[0], lab.gateway, lab.outside[0].address
    here = (inside, "10.79.0.1", gateway.interfaces["lan"])
    there = (gateway, "10.79.0.2", inside.address)
    with tunnel(IP_IN_IP, here, there):
        inside.ip(f"route add {server} dev tunnel")
        daemon = masquerade(rules=["--inside", "tunnel"])
        assert goes_by_the_cache(daemon, lab, "10.79.0.1") == (mode == "routed")
    told = "the flow cache cannot serve" in daemon.log.read_text()
    assert told == (mode == "direct")


def test_an_interface_that_comes_later_is_served(lab: Lab, gateway: Gateway, mode: str) -> None:
    daemon = gateway("--inside", "dm+")
    for _ in range(2):
        with dmz(lab):
            assert eventually(lambda: is_attached(lab, "dmz"))
            assert goes_by_the_cache(daemon, lab, DMZ)


def test_interfaces_that_nfmasq_does_not_know_are_left_alone(lab: Lab, gateway: Gateway) -> None:
    """What comes from them passes as without nfmasq, with its own address."""
    gateway()
    with (
        dmz(lab),
        lab.capture(lab.router, "net", f"src {DMZ}") as seen,
        lab.inside[0].socket(AF_INET, SOCK_DGRAM) as client,
    ):
        client.bind((DMZ, 0))
        client.sendto(b"hello", (lab.outside[0].address, 9))
    assert len(seen) == 1
    tc = lab.gateway.run(["tc", "qdisc", "show"]).stdout
    assert "clsact" in tc
    assert "dmz" not in tc
