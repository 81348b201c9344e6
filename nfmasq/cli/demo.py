"""`nfmasq demo`: real traffic through a masquerade, shown and verified step by step.

The hosts are network namespaces (`nfmasq.lab`). The inside hosts run programs of the system: curl,
ping, traceroute. The servers of the outside host run in this process: a web server and a UDP echo,
which note who came.

A step does something and returns what there is to say about it, or raises where it did not see
what it should. When a step of the preparation fails, no traffic is tried. When a step with traffic
fails, the other steps are still taken. Whatever happens, the lab is taken down.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Address, IPv4Network
from socket import AF_INET, SOCK_DGRAM
from socketserver import BaseRequestHandler, BaseServer, ThreadingTCPServer, UDPServer
from typing import NamedTuple

import click
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from nfmasq.cli import output
from nfmasq.config import Configuration
from nfmasq.errors import NfmasqError
from nfmasq.lab import Lab

INSIDE = IPv4Network("10.77.0.0/24")
WEB_PORT = 80
ECHO_PORT = 7
SOURCE_PORT = 40000
PAGE = b"Hello from the outside.\n"
LARGE = 100_000_000  # bytes
DATAGRAMS = (100, 1472, 3000, 65507)  # bytes
# No limit to the whole time: a slow machine may take long, as long as something comes.
CURL = "curl --silent --show-error --connect-timeout 20 --speed-limit 1 --speed-time 20"
ROWS = 8  # lines that are shown of a list


@click.command()
def demo() -> None:
    """Show nfmasq at work, with real traffic in a lab of its own.

    Builds hosts in network namespaces, masquerades between them, verifies and tells every step, and
    removes the hosts. Needs root, and takes some ten seconds. The exit status is 0 only where every
    step did what it should.
    """
    if os.geteuid() != 0:
        raise NfmasqError("the demo makes network namespaces: run it as root (sudo nfmasq demo)")
    started = time.monotonic()
    steps = Steps(output.console(highlight=False, markup=False, soft_wrap=True))
    with ExitStack() as stack:
        _show(Scene(stack, steps.console), steps)
    steps.take("take it all down", _nothing_is_left)
    if steps.failed:
        raise NfmasqError(f"the demo failed at: {', '.join(steps.failed)}")
    steps.console.print(f"\nAll {steps.taken} steps passed, in {time.monotonic() - started:.1f} s.")


def _show(scene: Scene, steps: Steps) -> None:
    steps.console.print(scene.picture())
    preparation = (
        ("build the lab", scene.build),
        ("load the rules", scene.load_rules),
        ("start nfmasq", scene.start_nfmasq),
    )
    if not all(steps.take(name, step) for name, step in preparation):
        return
    for name, step in (
        ("fetch a web page", scene.web_page),
        ("fetch a large file", scene.large_file),
        ("ask by UDP", scene.udp),
        ("ping", scene.ping),
        ("trace the route", scene.traceroute),
        ("who came, outside", scene.visits),
        ("what was on the wire", scene.wire),
        ("nfmasq list", scene.entries),
        ("metrics", scene.metrics),
        ("stop nfmasq", scene.stop_nfmasq),
    ):
        steps.take(name, partial(scene.while_nfmasq_runs, step))
    steps.take("remove the rules", scene.remove_rules)


class Steps:
    """Takes steps, says how each went, and remembers which failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.taken = 0
        self.failed: list[str] = []

    def take(self, name: str, step: Callable[[], str]) -> bool:
        """Take a step, and return whether it passed; a step that raises anything has failed."""
        self.taken += 1
        try:
            told, outcome, style = step(), "ok", "green"
        except Exception as error:
            self.failed.append(name)
            told, outcome, style = str(error) or repr(error), "FAILED", "bold red"
        first, *more = told.splitlines()
        self.console.print(f"{outcome:<7}", style=style, end="")
        self.console.print(f"{name:<21} {first}")
        for line in more:
            self.console.print(f"{'':9}{line}", style="dim")
        return outcome == "ok"


class Scene:
    """The lab, what runs in it, and the steps; `stack` ends whatever the steps start."""

    def __init__(self, stack: ExitStack, console: Console) -> None:
        self._stack = stack
        self._console = console
        self._lab = Lab(inside=2, outside=1)
        self._client, self._server = self._lab.inside[0], self._lab.outside[0]
        self._visits: list[Visit] = []

    def picture(self) -> str:
        """Return a picture of the lab: a line of hosts, and a line of their addresses below."""
        gateway, router = self._lab.gateway.interfaces, self._lab.router.interfaces
        hosts = {
            "inside": ", ".join(host.address for host in self._lab.inside),
            "gateway with nfmasq": f"{gateway['lan']} | {gateway['wan']}",
            "router": f"{router['wan']} | {router['net']}",
            "outside": self._server.address,
        }
        names = "     ".join(f"{name:^{len(addresses)}}" for name, addresses in hosts.items())
        return f"\n  {names}\n  {' --- '.join(hosts.values())}\n"

    # ---- preparation ----

    def build(self) -> str:
        self._stack.enter_context(self._lab)
        self._file = os.urandom(LARGE)
        pages = {"/": PAGE, "/large": self._file}
        self._serve(partial(_WebServer, pages, self._visits))
        self._serve(partial(_EchoServer, self._visits))
        # All TCP would be too much to capture: only what has an inside address is of interest.
        seen = self._lab.capture(self._lab.router, "wan", f"udp or icmp or src net {INSIDE}")
        self._capture = self._stack.enter_context(ExitStack())
        self._packets = self._capture.enter_context(seen)
        return f"{len(self._lab.hosts)} hosts, each a network namespace"

    def _serve(self, make: Callable[[], BaseServer]) -> None:
        """Run a server in this process, with a socket of the outside host."""
        server = self._server.call(make)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)

    def load_rules(self) -> str:
        self._rules_before = self._rules()
        self._lab.rules("up")
        _verify(self._rules() != self._rules_before, "no rule was loaded")
        return "nfmasq-rules up --inside lan --outside wan"

    def start_nfmasq(self) -> str:
        self._nfmasq = self._lab.nfmasq()
        return "nfmasq run --queue 0"

    def while_nfmasq_runs(self, step: Callable[[], str]) -> str:
        """Take a step, but not where nfmasq has ended and the step would wait in vain."""
        status = self._nfmasq.poll()
        last = _last_line(self._nfmasq.log.read_text())
        _verify(status is None, f"nfmasq has ended, exit status {status}: {last}")
        return step()

    # ---- traffic ----

    def web_page(self) -> str:
        page = self._client.run([*CURL.split(), self._url("/")]).stdout
        _verify(page == PAGE.decode(), f"another page came: {page!r}")
        return f"curl {self._url('/')} says: {page.strip()}"

    def large_file(self) -> str:
        with tempfile.TemporaryFile() as copy:
            started = time.monotonic()
            curl = self._client.popen(
                [*CURL.split(), self._url("/large")], stdout=copy, stderr=subprocess.PIPE
            )
            self._draw_progress(curl, copy.fileno())
            _, errors = curl.communicate()
            took = time.monotonic() - started
            _verify(curl.returncode == 0, errors.strip())
            copy.seek(0)
            digests = [hashlib.sha256(data).hexdigest() for data in (self._file, copy.read())]
        _verify(digests[0] == digests[1], "what arrived is not what was sent")
        rate = LARGE * 8 / took / 1e6
        return f"{LARGE / 1e6:.0f} MB, {rate:.0f} Mbit/s, sha256 {digests[0][:16]}... as sent"

    def _draw_progress(self, curl: subprocess.Popen[str], copy: int) -> None:
        """Wait until curl ends, and show on a terminal how the file that it writes grows."""
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        quiet = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=quiet) as progress:
            bar = progress.add_task("", total=LARGE)
            while curl.poll() is None:
                progress.update(bar, completed=os.fstat(copy).st_size)
                time.sleep(0.05)

    def udp(self) -> str:
        for host in self._lab.inside:
            with host.socket(AF_INET, SOCK_DGRAM) as asking:
                asking.bind(("", SOURCE_PORT))
                for size in DATAGRAMS:
                    question = os.urandom(size)
                    asking.sendto(question, (self._server.address, ECHO_PORT))
                    answer = asking.recv(65535)
                    _verify(answer == question, f"{size} bytes came back as something else")
        sizes = ", ".join(map(str, DATAGRAMS))
        return f"{sizes} bytes came back whole, to two hosts from the same port {SOURCE_PORT}"

    def ping(self) -> str:
        line = f"ping -n -c 3 -i 0.2 -W 10 {self._server.address}"
        told = self._client.run(line.split(), check=False).stdout
        _verify(" 3 received" in told, f"{line}: " + _last_line(told))
        return f"{line}: {_last_line(told)}"

    def traceroute(self) -> str:
        # Without the zeros it waits only ten times as long as the next hop took to answer.
        line = f"traceroute -n -q 1 -w 10,0,0 -m 5 {self._server.address}"
        told = self._client.run(line.split()).stdout
        hops = re.findall(r"^ *\d+ +(\S+)", told, re.MULTILINE)
        _verify(hops == self._hops(), f"the hops are {' '.join(hops)}")
        return " > ".join(hops)

    # ---- what was seen of the traffic ----

    def visits(self) -> str:
        """Return what the outside servers noted; raise where it is not the gateway that came."""
        _verify(bool(self._visits), "nobody came")
        for visit in self._visits:
            _verify(visit.address == self._lab.gateway.address, f"{visit}: not the gateway")
            ours = any(visit.port in ports for ports in Configuration().ports)
            _verify(ours, f"{visit}: not a masquerade port")
        return _some("all from the gateway's address and a masquerade port", self._visits)

    def wire(self) -> str:
        """Return what was between gateway and router; raise where there was an inside address."""
        self._capture.close()
        sources = [IPv4Address(packet.data[12:16]) for packet in self._packets]
        _verify(IPv4Address(self._lab.gateway.address) in sources, "nothing was captured")
        leaked = [source for source in sources if source in INSIDE]
        _verify(not leaked, f"{len(leaked)} packets from inside addresses, as {leaked[:1]}")
        return f"{len(sources)} packets of UDP and ICMP; no packet at all from an inside address"

    def entries(self) -> str:
        entries = json.loads(self._nfmasq.ask("list", "--json"))
        protocols = {entry["protocol"] for entry in entries}
        _verify(protocols == {"tcp", "udp", "icmp"}, f"entries only for {sorted(protocols)}")
        for entry in entries:
            _verify(entry["maddr"] == self._lab.gateway.address, f"a wrong address: {entry}")
        rows = (
            "{protocol:<5}{saddr}:{sport} > {maddr}:{mport} > {daddr}:{dport} {state}".format(**e)
            for e in reversed(entries)
        )
        return _some(f"{len(entries)} entries", list(rows))

    def metrics(self) -> str:
        url = f"http://{self._nfmasq.metrics}/metrics"
        page = self._lab.gateway.run([*CURL.split(), url]).stdout
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]

        def total(name: str, **labels: str) -> float:
            wanted = labels.items()
            return sum(s.value for s in samples if s.name == name and wanted <= s.labels.items())

        def packets(direction: str) -> float:
            handled = total("nfmasq_packets_total", direction=direction, verdict="accept")
            return handled + total("nfmasq_cached_packets_total", direction=direction)

        figures = {
            "packets out": packets("out"),
            "packets in": packets("in"),
            "bytes in": total("nfmasq_bytes_total", direction="in"),
            "entries made": total("nfmasq_entries_created_total"),
        }
        for name, value in figures.items():
            _verify(value > 0, f"{name}: {value:.0f}")
        _verify(figures["bytes in"] > LARGE, "the large file was not counted")
        _verify(
            total("nfmasq_errors_total", reason="exception") == 0, "the handler met an exception"
        )
        return ", ".join(f"{name} {value:,.0f}" for name, value in figures.items())

    def stop_nfmasq(self) -> str:
        status = self._nfmasq.stop()
        _verify(status == 0, f"exit status {status}")
        return "ended by SIGTERM, exit status 0"

    def remove_rules(self) -> str:
        self._lab.rules("down")
        _verify(self._rules() == self._rules_before, "the rules are not as they were before")
        return "nfmasq-rules down; the rules are as they were before"

    # ---- parts of the steps ----

    def _url(self, path: str) -> str:
        return f"http://{self._server.address}{path}"

    def _hops(self) -> list[str]:
        gateway, router = self._lab.gateway.interfaces, self._lab.router.interfaces
        return [gateway["lan"], router["wan"], self._server.address]

    def _rules(self) -> str:
        saved = self._lab.gateway.run(["iptables-save"]).stdout
        return re.sub(r"^#.*\n| \[[0-9:]+\]", "", saved, flags=re.MULTILINE)


def _nothing_is_left() -> str:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    _verify(f"nfmasq-{os.getpid()}-" not in listed.stdout, "a network namespace is left")
    return "no network namespace is left"


def _verify(seen: bool, complaint: str) -> None:
    if not seen:
        raise NfmasqError(complaint)


def _last_line(text: str) -> str:
    return (text.splitlines() or ["nothing"])[-1]


def _some(heading: str, rows: Sequence[object]) -> str:
    """Return a heading and the first rows below it."""
    shown = [str(row) for row in rows[:ROWS]]
    if len(rows) > ROWS:
        shown.append(f"and {len(rows) - ROWS} more")
    return "\n".join([heading, *shown])


# ---- the outside --------------------------------------------------------------------------------


class Visit(NamedTuple):
    """A request as an outside server saw it: what was asked for, and by which endpoint."""

    what: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.what} from {self.address} port {self.port}"


class _WebServer(ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, pages: Mapping[str, bytes], visits: list[Visit]) -> None:
        self.pages = pages
        self.visits = visits
        super().__init__(("", WEB_PORT), _WebRequest)

    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing: a client that gives up half-way fails its own step."""


class _WebRequest(BaseHTTPRequestHandler):
    server: _WebServer

    def do_GET(self) -> None:
        self.server.visits.append(Visit(self.requestline, *self.client_address))
        page = self.server.pages[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Do nothing: visits are noted already."""


class _EchoServer(UDPServer):
    max_packet_size = 65535

    def __init__(self, visits: list[Visit]) -> None:
        self.visits = visits
        super().__init__(("", ECHO_PORT), _Echo)


class _Echo(BaseRequestHandler):
    server: _EchoServer

    def handle(self) -> None:
        datagram, answering = self.request
        self.server.visits.append(Visit(f"UDP, {len(datagram)} bytes", *self.client_address))
        answering.sendto(datagram, self.client_address)
