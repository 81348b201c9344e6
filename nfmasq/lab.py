"""A lab: hosts in network namespaces, for the demo, the tests and the benchmarks.

    inside1 eth0 ──┐                                                      ┌── eth0 outside1
           .11     │ lan              wan         wan              net    │     .11
    inside2 eth0 ──┼───── gateway ─────────────────────── router ─────────┼── eth0 outside2
           .12     │ .1            .2              .1            .1       │     .12
              10.77.0.0/24            198.51.100.0/24            203.0.113.0/24

`lan` and `net` are bridges; their ports are lan1, lan2, ... and net1, net2, ... No outside host
has a route to 10.77.0.0/24, and none drops a packet because of its source address: an inside
address that leaks is seen outside, and gets no answer.

A namespace is called nfmasq-PID-NUMBER-HOST, after the process that made it. So several labs can
be up at once, and what a killed process left is recognized: the next lab removes it. A lab that
ends, in whatever way, ends what runs in its namespaces and removes them. For this it takes SIGTERM
and SIGHUP as Ctrl-C while it is up, and puts all three signals off while it starts a process or
takes things down.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import dpkt
from pyroute2 import netns

from nfmasq import rules_script
from nfmasq.errors import NfmasqError

_ROOT = Path(__file__).parents[1]
_NFMASQ = [sys.executable, "-m", "nfmasq"]
_NAMESPACES = Path("/run/netns")

# Seconds for what takes milliseconds on an idle machine, and is a fault only if it never comes.
_PATIENCE = 20

_PING = ["ping", "-q", "-c", "1", "-i", "0.05", "-w", str(_PATIENCE)]
# The kernel's buffer has a place of the full snapshot length for each packet, however short: 64 MiB
# are 4096 places of 16,000 bytes, and only 256 of the default length.
_TCPDUMP = ["-n", "-U", "--immediate-mode", "-s", "16000", "-B", "65536", "-Z", "root"]
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_T = TypeVar("_T")
_numbers = count(1)


class Packet(NamedTuple):
    """A captured packet: `time` in seconds since 1970, `data` from the IP header on."""

    time: float
    data: bytes


class Host:
    """A host of a lab: a network namespace, and the processes and sockets that were opened in it.

    `interfaces` has the address of each interface by the interface's name; `address` is the first
    of these addresses. The outside knows a gateway by its first address.
    """

    def __init__(self, name: str, namespace: str, interfaces: dict[str, str]) -> None:
        self.name = name
        self.namespace = namespace
        self.interfaces = interfaces
        self.address = next(iter(interfaces.values()))
        self.processes: list[subprocess.Popen[str]] = []
        self.sockets: list[socket.socket] = []

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    def command(self, command: Sequence[str | Path]) -> list[str | Path]:
        """Return the command that runs `command` on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def popen(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host; `options` go to `subprocess.Popen`.

        Its input is empty, and its output goes where the caller's goes, unless told otherwise. It
        leads a process group of its own, and is ended with the lab if not before.
        """
        line = self.command(command)
        usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "errors": "replace"}
        with _signals_put_off():
            process = subprocess.Popen(line, text=True, start_new_session=True, **usual | options)
            self.processes.append(process)
        return process

    def run(
        self,
        command: Sequence[str | Path],
        *,
        input: str | None = None,
        timeout: float = 60,
        check: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end, and return its output and exit status.

        Raises NfmasqError, with what it wrote on stderr, where it fails (unless `check` is false),
        and `subprocess.TimeoutExpired` after `timeout` seconds.
        """
        pipe = subprocess.PIPE
        stdin = subprocess.DEVNULL if input is None else pipe
        process = self.popen(command, **{"stdin": stdin, "stdout": pipe, "stderr": pipe} | options)
        try:
            output, errors = process.communicate(input, timeout)
        finally:
            _end(process)
            self.processes.remove(process)
        if check and process.returncode:
            line = " ".join(map(str, command))
            raise NfmasqError(
                f"{self.name}: {line}: exit status {process.returncode}: "
                f"{_one_line(errors or output or '')}"
            )
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def ip(self, line: str) -> str:
        """Run `ip` on this host: `gateway.ip("address add 198.51.100.3/24 dev wan")`.

        Returns what it prints. Raises NfmasqError where it fails.
        """
        return _ip("-n", self.namespace, *line.split())

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function of this process on this host: in a thread that enters the namespace."""

        def enter_and_call() -> _T:
            netns.setns(self.namespace, flags=0)
            return function(*arguments)

        with ThreadPoolExecutor(max_workers=1) as executor:
            return executor.submit(enter_and_call).result()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket of this host in the calling process: `host.socket(AF_INET, SOCK_DGRAM)`.

        It times out after 20 seconds, and is closed with the lab if not before.
        """
        opened = self.call(socket.socket, family, kind, protocol)
        opened.settimeout(_PATIENCE)
        self.sockets.append(opened)
        return opened

    def sysctl(self, name: str, value: str | int | None = None) -> str:
        """Return a sysctl of this host ("net.ipv4.ip_forward"); set it first to a given value."""
        path = Path("/proc/sys", *name.split("."))
        if value is not None:
            self.call(path.write_text, str(value))
        return self.call(path.read_text).strip()

    def wait_until_bound(
        self, port: int, protocol: str = "tcp", timeout: float = _PATIENCE
    ) -> None:
        """Wait until a socket of this host is bound to a port (TCP: and listens).

        Raises NfmasqError where no socket is bound to it after `timeout` seconds.
        """
        state = {"tcp": "0A", "udp": "07"}[protocol]
        bound = re.compile(rf"^ *\d+: [0-9A-F]+:{port:04X} \S+ {state} ", re.MULTILINE)
        # A socket of IPv6 may well serve IPv4 too.
        tables = [Path("/proc/thread-self/net", protocol + version) for version in ("", "6")]
        deadline = time.monotonic() + timeout
        while not any(bound.search(self.call(_read, table)) for table in tables):
            if time.monotonic() > deadline:
                raise NfmasqError(f"{self.name}: nothing is bound to {protocol} port {port}")
            time.sleep(0.02)


class Daemon(subprocess.Popen[str]):
    """A running `nfmasq run`; `control` is its socket, `log` what it writes on stderr.

    `metrics` is ADDRESS:PORT, within the namespace of the gateway.
    """

    def __init__(self, gateway: Host, folder: Path, metrics: str, options: Sequence[str]) -> None:
        self.gateway = gateway
        self.metrics = metrics
        self.control = folder / "control"
        self.log = folder / "log"
        # The machine's own configuration is not for the lab.
        own = ["--config", os.devnull, "--control", str(self.control), "--metrics", metrics]
        with self.log.open("w") as log:
            super().__init__(
                gateway.command([*_NFMASQ, "run", "--queue", "0", *own, *options]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                cwd=_ROOT,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout: float = _PATIENCE) -> None:
        """Wait until nfmasq is ready.

        Raises NfmasqError, with the last line of the log, where it ends before, or is not ready
        after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (self.control.exists() and "ready" in self.log.read_text()):
            if self.poll() is not None or time.monotonic() > deadline:
                lines = self.log.read_text().splitlines() or ["nothing in its log"]
                raise NfmasqError(f"nfmasq does not start in the lab: {lines[-1]}")
            time.sleep(0.02)

    def ask(self, verb: str, *options: str) -> str:
        """Return what a command prints about this nfmasq: `daemon.ask("list", "--json")`."""
        line = [*_NFMASQ, verb, "--control", str(self.control), *options]
        return self.gateway.run(line, cwd=_ROOT).stdout

    def stop(self) -> int:
        """End nfmasq as a service manager does; returns the exit status."""
        _end(self)
        return self.wait()


class Lab:
    """A lab of `inside` and `outside` hosts (1 to 200 each), a gateway and a router.

    It is up within its `with` block. Each `nfmasq run` of the lab has these `options` before its
    own, which win over them.

    Entering the block raises NfmasqError where the lab cannot be built: not root, or no network
    namespaces.
    """

    def __init__(self, inside: int = 2, outside: int = 2, options: Sequence[str] = ()) -> None:
        self._name = f"nfmasq-{os.getpid()}-{next(_numbers)}-"
        self.inside = [
            self._host(f"inside{n}", eth0=f"10.77.0.{10 + n}") for n in range(1, inside + 1)
        ]
        self.gateway = self._host("gateway", wan="198.51.100.2", lan="10.77.0.1")
        self.router = self._host("router", wan="198.51.100.1", net="203.0.113.1")
        self.outside = [
            self._host(f"outside{n}", eth0=f"203.0.113.{10 + n}") for n in range(1, outside + 1)
        ]
        self.hosts = [*self.inside, self.gateway, self.router, *self.outside]
        self._options = options
        self._links: dict[str, list[tuple[Host, str]]] = {}
        self._signals = ExitStack()
        self._metrics = count(9469)
        self._folder = Path()

    def _host(self, name: str, **interfaces: str) -> Host:
        return Host(name, self._name + name, interfaces)

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise NfmasqError("a lab of network namespaces takes root: run this with sudo")
        # An interrupt between `__enter__` and the block is not followed by `__exit__`.
        atexit.register(self.close)
        self._signals.enter_context(_ended_like_interrupted())
        try:
            with _signals_put_off():
                # Python tries the folder with a file, which an interrupt would leave there.
                tempfile.gettempdir()
            _remove_what_the_dead_left()
            self._folder = Path(tempfile.mkdtemp(prefix=self._name))
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in the lab and remove the lab; do nothing where that is done already."""
        with self._signals, _signals_put_off():
            _end(*(process for host in self.hosts for process in host.processes))
            for host in self.hosts:
                for opened in host.sockets:
                    opened.close()
            _remove(self._name)
        atexit.unregister(self.close)

    def _build(self) -> None:
        _ip("-batch", "-", script=[f"netns add {host.namespace}" for host in self.hosts])
        for host in self.hosts:
            _disable_ipv6(host)
        for host in (self.router, *self.outside):
            _drop_nothing(host)
        for host in (self.gateway, self.router):
            host.sysctl("net.ipv4.ip_forward", 1)
            _keep_iptables_off_bridges(host)

        self._bridge(self.gateway, "lan", self.inside)
        self._bridge(self.router, "net", self.outside)
        self._connect("wan", self.gateway, "wan", self.router, "wan")

        for host in self.inside:
            _bring_up(host, f"default via {self.gateway.interfaces['lan']}")
        _bring_up(self.gateway, f"default via {self.router.interfaces['wan']}")
        _bring_up(self.router)
        for host in self.outside:
            _bring_up(host, f"198.51.100.0/24 via {self.router.interfaces['net']}")
        self._wait_for_links()

    def _bridge(self, host: Host, bridge: str, members: Iterable[Host]) -> None:
        host.ip(f"link add {bridge} type bridge")
        self._links[bridge] = [(host, bridge)]
        for number, member in enumerate(members, 1):
            port = f"{bridge}{number}"
            self._connect(bridge, host, port, member, "eth0")
            host.ip(f"link set {port} master {bridge} up")

    def _connect(self, link: str, host: Host, interface: str, peer: Host, peers: str) -> None:
        host.ip(f"link add {interface} type veth peer name {peers} netns {peer.namespace}")
        self._links.setdefault(link, []).extend([(host, interface), (peer, peers)])

    def _wait_for_links(self) -> None:
        # A link may take a second to carry packets after it is up.
        for host in self.inside:
            host.run([*_PING, self.gateway.interfaces["lan"]])
        self.gateway.run([*_PING, self.router.interfaces["wan"]])
        for host in self.outside:
            self.router.run([*_PING, host.address])

    def set_mtu(self, link: str, mtu: int) -> None:
        """Set the MTU, in bytes, of all ends of "lan", "wan" or "net".

        For one end alone use `host.ip("link set wan mtu 1400")`. Where only the gateway's `lan` is
        narrow, inside hosts do not know it, and the gateway has to tell the senders.
        """
        for host, interface in self._links[link]:
            host.ip(f"link set {interface} mtu {mtu}")

    @contextmanager
    def capture(self, host: Host, interface: str, expression: str = "ip") -> Iterator[list[Packet]]:
        """Capture IP packets on an interface; `expression` is tcpdump's.

        It captures from the start of the block on, and the list is filled at its end:

            with lab.capture(lab.outside[0], "eth0", "udp") as seen:
                ...
            assert seen[0].data[12:16] == ...

        A packet is cut after 16,000 bytes; longer packets are on no wire, only between hosts of the
        same machine. Raises NfmasqError where it cannot capture, and where it missed packets.
        """
        packets: list[Packet] = []
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".pcap") as file:
            line = ["tcpdump", "-i", interface, "-w", file.name, *_TCPDUMP, expression]
            with host.popen(line, stderr=subprocess.PIPE) as tcpdump:
                try:
                    _wait_until_listening(tcpdump)
                    yield packets
                    _wait_until_written(tcpdump)
                finally:
                    _end(tcpdump)
            packets += _ip_packets(Path(file.name))

    def nfmasq(self, *options: str) -> Daemon:
        """Start `nfmasq run` on the gateway, and wait until it is ready.

        nfmasq is ended with the lab if not before. Raises NfmasqError where it does not start.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        metrics = f"127.0.0.1:{next(self._metrics)}"
        with _signals_put_off():
            daemon = Daemon(self.gateway, folder, metrics, [*self._options, *options])
            self.gateway.processes.append(daemon)
        try:
            daemon.wait_until_ready()
        except BaseException:
            daemon.stop()
            raise
        return daemon

    def rules(
        self, verb: str, *options: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run iptables/nfmasq-rules on the gateway: `lab.rules("up", "--ports", "61000-61009")`.

        Keywords go into its environment: `IPTABLES="iptables-legacy"`.
        """
        script = rules_script.find()
        if script is None:
            raise NfmasqError(f"{rules_script.NOT_FOUND}: install nfmasq again")
        line = [script, verb, "--inside", "lan", "--outside", "wan", *options]
        return self.gateway.run(line, check=check, env=os.environ | environment)

    @contextmanager
    def masquerading(
        self, *options: str, ports: str = "61000-65095", rules: Sequence[str] = ()
    ) -> Iterator[Daemon]:
        """Masquerade within the block: the rules loaded, and nfmasq running with `options`.

        `rules` are more options for the rules.
        """
        with ExitStack() as stack:
            self.rules("up", "--ports", ports, *rules)
            stack.callback(self.rules, "down")
            daemon = self.nfmasq("--ports", ports, *options)
            stack.callback(daemon.stop)
            yield daemon


# ---- hosts --------------------------------------------------------------------------------------


def _disable_ipv6(host: Host) -> None:
    if Path("/proc/sys/net/ipv6").exists():
        host.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        host.sysctl("net.ipv6.conf.default.disable_ipv6", 1)


def _drop_nothing(host: Host) -> None:
    # A namespace has the machine's rp_filter, which may drop the very packets to be looked for.
    host.sysctl("net.ipv4.conf.all.rp_filter", 0)
    host.sysctl("net.ipv4.conf.default.rp_filter", 0)
    # An error about one packet must not keep back an error about the next.
    host.sysctl("net.ipv4.icmp_ratelimit", 0)


def _keep_iptables_off_bridges(host: Host) -> None:
    # With br_netfilter, bridged packets meet the rules twice, and the kernel does not queue some.
    if Path("/proc/sys/net/bridge").exists():
        host.sysctl("net.bridge.bridge-nf-call-iptables", 0)


def _bring_up(host: Host, *routes: str) -> None:
    script = ["link set lo up"]
    for interface, address in host.interfaces.items():
        script += [f"address add {address}/24 dev {interface}", f"link set {interface} up"]
    script += [f"route add {route}" for route in routes]
    _ip("-n", host.namespace, "-batch", "-", script=script)


def _ip(*arguments: str, script: Iterable[str] = ()) -> str:
    """Run `ip` and return what it writes. `ip` always runs to its end, even after Ctrl-C."""
    with _signals_put_off():
        try:
            done = subprocess.run(
                ["ip", *arguments],
                input="\n".join(script),
                capture_output=True,
                text=True,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise NfmasqError("a lab takes the ip command: install iproute2") from None
    if done.returncode:
        line = " ".join(["ip", *arguments])
        raise NfmasqError(f"the lab fails at {line}: {_one_line(done.stderr)}")
    return done.stdout


# ---- captures -----------------------------------------------------------------------------------


def _wait_until_listening(tcpdump: subprocess.Popen[str]) -> None:
    assert tcpdump.stderr
    told = []
    for line in tcpdump.stderr:
        if "listening on" in line:
            return
        told.append(line)
    raise NfmasqError(f"cannot capture: {_one_line(' '.join(told))}")


def _wait_until_written(tcpdump: subprocess.Popen[str]) -> None:
    """Wait until tcpdump has written each packet that the kernel has counted for it.

    Fewer packets may be written than counted: until the expression is in force, the kernel counts
    all packets, and packets that do not match are left out later. A packet that is not written when
    tcpdump sleeps will never be written.
    """
    assert tcpdump.stderr
    deadline = time.monotonic() + _PATIENCE
    before, slept = None, False
    while True:
        tcpdump.send_signal(signal.SIGUSR1)
        told = tcpdump.stderr.readline()
        counts = re.search(r"(\d+) packets? captured, (\d+) .* filter, (\d+) .* dropped", told)
        if not counts:
            raise NfmasqError(f"the capture ended early: {_one_line(told)}")
        captured, received, dropped = map(int, counts.groups())
        if dropped or time.monotonic() > deadline:
            raise NfmasqError(f"the capture missed {received - captured} of {received} packets")
        if captured >= received or (slept and (captured, received) == before):
            return
        before = captured, received
        time.sleep(0.01)
        slept = _sleeps(tcpdump.pid)


def _sleeps(pid: int) -> bool:
    """Say whether a process waits for something to do."""
    _, _, stat = Path("/proc", str(pid), "stat").read_text().rpartition(") ")
    return stat.startswith("S")


def _ip_packets(path: Path) -> Iterator[Packet]:
    with path.open("rb") as file:
        for moment, frame in dpkt.pcap.Reader(file):
            if frame[12:14] == b"\x08\x00":
                yield Packet(float(moment), frame[14:])


# ---- ends ---------------------------------------------------------------------------------------


def _end(*processes: subprocess.Popen[str]) -> None:
    """End processes and their children: by SIGTERM, and by SIGKILL after 10 seconds."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + 10
    for process in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _remove_what_the_dead_left() -> None:
    left = [path.name for folder in _places() for path in folder.glob("nfmasq-*")]
    for pid in {match[1] for name in left if (match := re.match(r"nfmasq-(\d+)-\d+-", name))}:
        if not Path("/proc", pid).exists():
            _remove(f"nfmasq-{pid}-")


def _places() -> tuple[Path, Path]:
    return _NAMESPACES, Path(tempfile.gettempdir())


def _remove(prefix: str) -> None:
    """Remove namespaces and folders by the prefix of their names; first end what runs there."""
    namespaces, folders = (list(place.glob(f"{prefix}*")) for place in _places())
    deadline = time.monotonic() + 10
    while (pids := list(_processes_in(namespaces))) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for namespace in namespaces:
        # Another lab may be removing the same namespace.
        with suppress(NfmasqError):
            _ip("netns", "delete", namespace.name)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _processes_in(namespaces: Iterable[Path]) -> Iterator[int]:
    inodes = set()
    for namespace in namespaces:
        with suppress(FileNotFoundError):
            inodes.add(namespace.stat().st_ino)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "ns/net").stat().st_ino in inodes:
                yield int(process.name)


# ---- signals ------------------------------------------------------------------------------------


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt in the block, where they would just kill."""
    deadly = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    with _handling(deadly, signal.default_int_handler):
        yield


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Put off SIGINT, SIGTERM and SIGHUP: what comes within the block takes effect after it."""
    noted: list[int] = []
    try:
        with _handling(_ENDINGS, lambda number, _: noted.append(number)):
            yield
    finally:
        for number in noted:
            signal.raise_signal(number)


@contextmanager
def _handling(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    # Python handles signals in the main thread, so nothing interrupts any other thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in reversed(before.items()):
            signal.signal(number, former)


# ---- texts --------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
