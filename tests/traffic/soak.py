"""A soak: mixed traffic through nfmasq by its defaults, for as long as one likes, as a program.

    python -m tests.traffic.soak [SECONDS]

Inside hosts fetch pages, ask questions, keep sockets open, ping, move large files and use FTP.
Hosts come with new addresses and go again. Strangers outside send what nobody asked for. Meanwhile
entries are listed, and metrics are scraped.

It tells every minute how much memory nfmasq has, its entries, and what it has refused and dropped.
It fails where nfmasq refuses anything, drops what is not a stranger's, or has an exception; where a
client gets no answer; and where memory goes on growing after it has settled (`MAY_GROW`).
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon, Host, Lab
from tests.packets import SYN, query, tcp, udp
from tests.traffic.servers import ECHO_PORT, WEB_PORT, udp_echo, web_server
from tests.traffic.test_ftp import WAYS, curl, vsftpd

SETTLED = 600
"""Seconds after which everything that lasts is there: no timeout of this traffic is longer."""

MAY_GROW = 0.1
"""How much of its memory nfmasq may have more at any time after it has settled.

Some 27 sessions begin in a second, 80,000 in the rest of an hour, and nfmasq has some 55 MB. So a
tenth is 70 bytes for each session: an object of Python that a session left behind, with its place
in a dictionary, would be larger. What comes and goes (a scrape, a list) moves the memory by some
hundredths.
"""

STRANGERS_DOING = {"unsolicited"}
"""Reasons of drops that strangers alone cause: they are no errors here."""

DNS_PORT = 53
PATIENCE = 10.0
ATTEMPTS = 3
"""How often a datagram is sent until there is an answer, as resolvers do it."""

LARGE = os.urandom(20_000_000)


class Moment(NamedTuple):
    """What nfmasq says of itself at one moment; `seconds` since the beginning, `rss` in bytes."""

    seconds: float
    rss: int
    entries: int
    sessions: int
    errors: dict[str, int]
    queue_dropped: int

    def __str__(self) -> str:
        errors = ", ".join(f"{reason} {n}" for reason, n in self.errors.items() if n) or "nothing"
        return (
            f"{self.seconds / 60:5.1f} min  memory {self.rss / 1e6:6.1f} MB"
            f"  entries {self.entries:5}  sessions {self.sessions:7,}"
            f"  dropped or refused: {errors}"
        )


class Soak:
    """The traffic of one soak: what its clients have done, and what has failed, by kind."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.done: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._over = threading.Event()

    @contextmanager
    def traffic(self, daemon: Daemon) -> Iterator[None]:
        """Have all the traffic go on within the block."""
        web, other = self.lab.outside
        first, second, third, fourth = self.lab.inside
        work: list[tuple[Host, float, Callable[[], None]]] = [
            (first, 0.2, lambda: self._fetch(web.address, "/page", 10_000)),
            (first, 60, lambda: self._fetch(web.address, "/large", len(LARGE))),
            (second, 0.05, self._kept_echoes(second, web.address)),
            (second, 0.05, lambda: self._ask(other.address)),
            (third, 1, lambda: self._ping(third, web.address)),
            (third, 20, lambda: self._ftp(third, web.address)),
            (fourth, 10, lambda: self._come_and_go(fourth, web.address)),
            (other, 0.05, lambda: self._strange(self.lab.gateway.address)),
            (self.lab.gateway, 5, lambda: self._look(daemon)),
        ]
        threads = [
            threading.Thread(target=host.call, args=(self._again_and_again, seconds, each))
            for host, seconds, each in work
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _again_and_again(self, seconds: float, work: Callable[[], None]) -> None:
        """Do some work every so many seconds, and count what fails."""
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + seconds, time.monotonic() - 1)
            try:
                work()
            except Exception as error:
                self.failures[f"{type(error).__name__}: {error}"[:200]] += 1

    # -- what hosts do -----------------------------------------------------------------

    def _fetch(self, address: str, path: str, size: int, source: str = "") -> None:
        there = http.client.HTTPConnection(address, WEB_PORT, PATIENCE, (source, 0))
        try:
            there.request("GET", path)
            body = there.getresponse().read()
            assert len(body) == size, f"{len(body)} bytes of {path}"
        finally:
            there.close()
        self.done[f"fetches of {path}"] += 1

    def _kept_echoes(self, host: Host, address: str) -> Callable[[], None]:
        """Return what sends a datagram over the next of some sockets that stay open."""
        sockets = [host.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(10)]
        for each in sockets:
            each.connect((address, ECHO_PORT))

        def echo() -> None:
            sockets.append(sockets.pop(0))
            self._echoed(sockets[-1], "echoes")

        return echo

    def _ask(self, address: str) -> None:
        """Ask a question from a port of its own, as a resolver does."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((address, DNS_PORT))
            self._echoed(asking, "questions")

    def _echoed(self, client: socket.socket, kind: str) -> None:
        said = os.urandom(40)
        client.settimeout(PATIENCE / ATTEMPTS)
        for _ in range(ATTEMPTS):
            client.send(said)
            try:
                while client.recv(100) != said:
                    pass  # the answer to what was sent once more
                self.done[kind] += 1
                return
            except TimeoutError:
                self.done[f"{kind} sent again"] += 1
        raise AssertionError(f"no answer: {kind}")

    def _ping(self, host: Host, address: str) -> None:
        host.run(["ping", "-q", "-c", "1", "-w", str(int(PATIENCE)), address])
        self.done["pings"] += 1

    def _ftp(self, host: Host, address: str) -> None:
        """Get two files, in the next of the four ways to a data connection."""
        way = list(WAYS)[self.done["files by FTP"] // 2 % len(WAYS)]
        urls = [word for name in "ab" for word in ("-o", "/dev/null", f"ftp://{address}/{name}")]
        curl(host, *WAYS[way], *urls)
        self.done["files by FTP"] += 2

    def _come_and_go(self, host: Host, address: str) -> None:
        """Take an address, use it for a while, and be gone."""
        number = 100 + self.done["hosts that came and went"] % 150
        taken = f"10.77.0.{number}"
        host.ip(f"address add {taken}/24 dev eth0")
        try:
            for _ in range(5):
                self._fetch(address, "/page", 10_000, taken)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                    asking.bind((taken, 0))
                    asking.connect((address, ECHO_PORT))
                    self._echoed(asking, "echoes")
        finally:
            host.ip(f"address del {taken}/24 dev eth0")
        self.done["hosts that came and went"] += 1

    def _strange(self, gateway: str) -> None:
        """Send the gateway something that nobody asked for."""
        stranger = f"192.0.2.{random.randrange(1, 255)}", random.randrange(1024, 65536)
        there = gateway, random.randrange(61000, 65096)
        packet = random.choice(
            [tcp(stranger, there, SYN), tcp(stranger, there), udp(stranger, there, b"?"),
             query(stranger, gateway)]
        )  # fmt: skip
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet, (gateway, 0))
        self.done["packets of strangers"] += 1

    def _look(self, daemon: Daemon) -> None:
        listed = sum(1 for _ in request(daemon.control, "list"))
        assert listed, "no entry is listed"
        url = f"http://{daemon.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE) as scraped:
            assert b"nfmasq_entries" in scraped.read()
        self.done["lists and scrapes"] += 1


def moment(daemon: Daemon, seconds: float) -> Moment:
    """Ask nfmasq how it is."""
    sums: Counter[str] = Counter()
    errors = {}
    for name, labels, value in request(daemon.control, "stats"):
        sums[name] += int(value)
        if name == "nfmasq_errors_total":
            errors[labels["reason"]] = int(value)
    pages = int(Path("/proc", str(daemon.pid), "statm").read_text().split()[1])
    return Moment(
        seconds,
        pages * os.sysconf("SC_PAGE_SIZE"),
        sums["nfmasq_entries"],
        sums["nfmasq_entries_created_total"],
        errors,
        sums["nfmasq_queue_dropped_total"],
    )


def findings(failures: Mapping[str, int], moments: list[Moment], log: str) -> list[str]:
    """List what should not be, one thing a line; nothing where all is well."""
    found = [f"{n} failed: {what}" for what, n in failures.items()]
    last = moments[-1]
    found += [
        f"{n} packets or sessions dropped or refused: {reason}"
        for reason, n in last.errors.items()
        if n and reason not in STRANGERS_DOING
    ]
    found += [line for line in log.splitlines() if "Traceback" in line or "ERROR" in line.upper()]
    settled = [each for each in moments if each.seconds >= SETTLED]
    if settled and max(each.rss for each in settled) > (1 + MAY_GROW) * settled[0].rss:
        most = max(each.rss for each in settled)
        found.append(f"memory grew from {settled[0].rss / 1e6:.1f} to {most / 1e6:.1f} MB")
    return found


def soaked(seconds: float, tell: Callable[[str], object] = print) -> list[str]:
    """Have traffic for some seconds; returns what should not be, a line each.

    `tell` gets a line about each minute, and about what was done.
    """
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(inside=4, outside=2))
        web, other = lab.outside
        lab.router.ip("route add 192.0.2.0/24 dev net")
        site = stack.enter_context(web_server(web))
        site.files |= {"/page": LARGE[:10_000], "/large": LARGE}
        stack.enter_context(udp_echo(web))
        stack.enter_context(udp_echo(other, DNS_PORT))
        stack.enter_context(vsftpd(web))
        daemon = stack.enter_context(lab.masquerading())
        soak, moments, began = Soak(lab), list[Moment](), time.monotonic()
        with soak.traffic(daemon):
            every = min(60.0, seconds / 4)
            for number in range(1, int(seconds / every) + 1):
                time.sleep(max(0.0, began + number * every - time.monotonic()))
                if daemon.poll() is not None:
                    return [f"nfmasq ended: {daemon.log.read_text()}"]
                moments.append(moment(daemon, time.monotonic() - began))
                tell(str(moments[-1]))
        tell("done: " + ", ".join(f"{n:,} {what}" for what, n in sorted(soak.done.items())))
        tell(f"lost before nfmasq, in the kernel's queue: {moments[-1].queue_dropped}")
        return findings(soak.failures, moments, daemon.log.read_text())


def main(arguments: list[str]) -> None:
    found = soaked(float(arguments[0]) if arguments else 3600, lambda line: print(line, flush=True))
    if found:
        raise SystemExit("\n".join(["FAILED:", *found]))
    print("Nothing was refused, nothing failed, and no exception was raised.")


if __name__ == "__main__":
    main(sys.argv[1:])
