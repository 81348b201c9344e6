"""One forwarded port, two servers: nginx on the two inside hosts, and clients outside.

Each server answers with its name, so a client knows which server it has reached.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import pytest

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon, Host, Lab
from tests.programs import program
from tests.traffic.observed import eventually, figure

GATEWAY = "198.51.100.2"
PORT = 8080
LARGE = 32_000_000  # bytes
SLOWLY = 16_384  # bytes that are read at a time, fifty times a second: 40 seconds for all
FIRST, SECOND = "10.77.0.11:80", "10.77.0.12:80"

NGINX = """
daemon off;
master_process off;
error_log "{folder}/error.log";
pid "{folder}/pid";
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path "{folder}";
    proxy_temp_path "{folder}";
    fastcgi_temp_path "{folder}";
    uwsgi_temp_path "{folder}";
    scgi_temp_path "{folder}";
    server {{
        listen {address}:80 backlog=1024;
        location / {{ return 200 "{address}:80"; }}
        location /large {{ root "{folder}"; }}
    }}
}}
"""


class Web:
    """The two servers; each can be killed, and started again."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self._nginx = program("nginx", "nginx")
        self._hosts = {f"{host.address}:80": host for host in hosts}
        self._folder = folder
        self._running: dict[str, Popen[str]] = {}
        content = bytes(range(256)) * (LARGE // 256)
        self.digest = sha256(content).hexdigest()
        for name in self._hosts:
            (folder / name).mkdir()
            (folder / name / "large").write_bytes(content)
            self.start(name)

    def start(self, name: str) -> None:
        host, folder = self._hosts[name], self._folder / name
        configuration = folder / "nginx.conf"
        configuration.write_text(NGINX.format(folder=folder, address=host.address))
        process = host.popen([self._nginx, "-e", folder / "error.log", "-c", configuration])
        self._running[name] = process
        host.wait_until_bound(80)

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)


@pytest.fixture
def web(lab: Lab, tmp_path: Path) -> Iterator[Web]:
    web = Web(lab.inside, tmp_path)
    yield web
    web.close()


class Balanced:
    """A running nfmasq that reads its configuration from a file."""

    def __init__(self, start: Callable[[Path], Daemon], file: Path) -> None:
        self._file = file
        self.write()
        self.daemon = start(file)

    def write(
        self,
        scheduler: str = "rr",
        weights: tuple[int, int] = (1, 1),
        more: str = "",
        before: str = "",
    ) -> None:
        servers = ", ".join(
            f'{{ server = "{name}", weight = {weight} }}'
            for name, weight in zip((FIRST, SECOND), weights, strict=True)
        )
        self._file.write_text(
            f'{before}\n[[forward]]\nlisten = "tcp:{PORT}"\nservers = [{servers}]\n'
            f'scheduler = "{scheduler}"\n{more}\n'
        )

    def reload(self) -> None:
        self.daemon.ask("reload")

    def servers(self) -> dict[str, dict[str, object]]:
        """Return what `nfmasq servers` shows, by server, without the time to start the command."""
        return {row["server"]: row for row in request(self.daemon.control, "servers")}

    def state(self, server: str) -> object:
        return self.servers()[server]["state"]

    def weigh(self, server: str, weight: int) -> None:
        self.daemon.ask("servers", f"tcp:{PORT}", server, "--weight", str(weight))


@pytest.fixture
def balanced(lab: Lab, web: Web, masquerade: Callable[..., Daemon], tmp_path: Path) -> Balanced:
    def start(file: Path) -> Daemon:
        return masquerade("--config", str(file), rules=["--forward", f"tcp:{PORT}"])

    return Balanced(start, tmp_path / "nfmasq.toml")


class Answer(NamedTuple):
    """The server that answered a request, or the exception; when the request began and ended."""

    server: str
    began: float
    ended: float


def ask(path: str = "/", client: str | None = None) -> Answer:
    """Send one request on a connection of its own, from the namespace of the calling thread."""
    began = time.monotonic()
    source = (client, 0) if client else None
    connection = HTTPConnection(GATEWAY, PORT, timeout=20, source_address=source)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        server = connection.getresponse().read().decode()
    except (OSError, HTTPException) as error:
        server = repr(error)
    finally:
        connection.close()
    return Answer(server, began, time.monotonic())


def asked(host: Host, requests: int, *, at_once: int = 4) -> Counter[str]:
    """Count the answers of each server to `requests` requests of a host, `at_once` at a time."""

    def some() -> list[str]:
        return [ask().server for _ in range(requests // at_once)]

    return Counter(answer for answers in on(host, [some] * at_once) for answer in answers)


def on(host: Host, works: Sequence[Callable[[], list[str]]]) -> list[list[str]]:
    """Run functions on a host at the same time; returns their results."""
    results: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda work=work: results.append(host.call(work))) for work in works
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextmanager
def load(host: Host, *, at_once: int = 2) -> Iterator[list[Answer]]:
    """Send requests without end within the block; yields the list of all that have ended."""
    answers: list[Answer] = []
    ending = threading.Event()

    def again() -> list[str]:
        while not ending.is_set():
            answers.append(ask())
        return []

    thread = threading.Thread(target=on, args=(host, [again] * at_once))
    thread.start()
    try:
        yield answers
    finally:
        ending.set()
        thread.join()


def more(answers: Sequence[Answer], number: int = 30) -> bool:
    """Wait until `number` more answers have come; says whether they came."""
    enough = len(answers) + number
    return eventually(lambda: len(answers) >= enough)


class Download:
    """A download that goes on, slowly, until it is hurried."""

    def __init__(self, host: Host) -> None:
        self.result = "not at its end"
        self._hurried = threading.Event()
        self._thread = threading.Thread(target=host.call, args=(self._fetch,))
        self._thread.start()

    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def hurry(self) -> None:
        """Fetch the rest at once, and wait for it."""
        self._hurried.set()
        self._thread.join()

    def _fetch(self) -> None:
        content = sha256()
        connection = HTTPConnection(GATEWAY, PORT, timeout=20)
        try:
            connection.request("GET", "/large")
            answer = connection.getresponse()
            while piece := answer.read(SLOWLY):
                content.update(piece)
                self._hurried.wait(0.02)
            self.result = content.hexdigest()
        except (OSError, HTTPException) as error:
            self.result = repr(error)
        finally:
            connection.close()


@contextmanager
def download(host: Host) -> Iterator[Download]:
    """Download slowly within the block, and wait for the rest at its end."""
    downloaded = Download(host)
    try:
        yield downloaded
    finally:
        downloaded.hurry()


def between(answers: Sequence[Answer], start: float, stop: float = float("inf")) -> Counter[str]:
    """Count the answers of each server to requests that began in [`start`, `stop`)."""
    return Counter(answer.server for answer in answers if start <= answer.began < stop)


# -- who gets the next connection ------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "share", "at_once", "tolerance"),
    [
        ("rr", 500, 4, 0),
        ("wrr", 250, 4, 0),
        # By load: the connections that are open at a time, and the order in which they close,
        # make a difference.
        ("lc", 500, 1, 20),
        ("wlc", 250, 1, 20),
        ("lc", 500, 4, 200),
        ("wlc", 250, 4, 200),
    ],
)
def test_a_thousand_requests_are_shared_as_the_scheduler_says(
    lab: Lab,
    balanced: Balanced,
    scheduler: str,
    share: int,
    at_once: int,
    tolerance: int,
) -> None:
    balanced.write(scheduler, (1, 3))
    balanced.reload()
    answers = asked(lab.outside[0], 1000, at_once=at_once)
    assert answers.keys() == {FIRST, SECOND}
    assert answers.total() == 1000
    assert abs(answers[FIRST] - share) <= tolerance


@contextmanager
def many_addresses(lab: Lab, count: int) -> Iterator[list[str]]:
    """Give an outside host `count` more addresses within the block; yields them."""
    addresses = [f"203.0.113.{100 + n}" for n in range(count)]
    with ExitStack() as stack:
        for address in addresses:
            lab.outside[0].ip(f"address add {address}/24 dev eth0")
            stack.callback(lab.outside[0].ip, f"address delete {address}/24 dev eth0")
        yield addresses


def test_by_source_hash_each_client_has_its_server_by_weight(lab: Lab, balanced: Balanced) -> None:
    balanced.write("sh", (1, 3))
    balanced.reload()
    with many_addresses(lab, 100) as clients:

        def some() -> list[str]:
            return [f"{client} {ask(client=client).server}" for client in clients * 10]

        (answers,) = on(lab.outside[0], [some])
    assert len(answers) == 1000
    servers = Counter(pair.split()[1] for pair in set(answers))
    assert servers.total() == 100
    assert servers.keys() == {FIRST, SECOND}
    assert 10 <= servers[FIRST] <= 40


def test_a_connection_that_lasts_counts_for_least_connection(lab: Lab, balanced: Balanced) -> None:
    balanced.write("lc")
    balanced.reload()
    with download(lab.outside[1]):
        assert eventually(lambda: any(row["active"] for row in balanced.servers().values()))
        (busy,) = (name for name, row in balanced.servers().items() if row["active"])
        answers = asked(lab.outside[0], 50, at_once=1)
    assert answers[busy] <= 2
    assert answers.total() == 50


def test_with_persistence_a_client_keeps_its_server(lab: Lab, balanced: Balanced) -> None:
    balanced.write(more="persistence = 300")
    balanced.reload()
    with many_addresses(lab, 10) as clients:

        def some() -> list[str]:
            return [f"{client} {ask(client=client).server}" for client in clients * 5]

        (answers,) = on(lab.outside[0], [some])
    assert len(set(answers)) == 10
    assert Counter(pair.split()[1] for pair in set(answers)) == {FIRST: 5, SECOND: 5}


# -- servers that die ------------------------------------------------------------------


@pytest.mark.parametrize("check", ['"tcp"', '{ kind = "http", path = "/", interval = 0.5 }'])
def test_a_dead_server_gets_nothing_after_the_interval_and_its_share_when_it_is_back(
    lab: Lab, balanced: Balanced, web: Web, check: str
) -> None:
    interval = 2.0 if check == '"tcp"' else 0.5
    known_after = interval * 1.2  # two more checks, each after a tenth of the interval
    balanced.write(more=f"check = {check}")
    balanced.reload()
    with load(lab.outside[0]) as answers:
        assert more(answers)
        killing = time.monotonic()
        web.kill(FIRST)
        killed = time.monotonic()
        assert eventually(lambda: balanced.state(FIRST) == "down")
        down = time.monotonic()
        assert more(answers)
        started = time.monotonic()
        web.start(FIRST)
        assert eventually(lambda: balanced.state(FIRST) == "up")
        up = time.monotonic()
        assert more(answers)
    alive = Counter(answer.server for answer in answers if answer.ended < killing)
    assert alive.keys() == {FIRST, SECOND}
    assert abs(alive[FIRST] - alive[SECOND]) <= 4
    slowest = max(answer.ended - answer.began for answer in answers if answer.server == SECOND)
    late = 0.5 + 3 * slowest  # as a busy machine may be
    assert between(answers, killed + known_after + late, started).keys() <= {SECOND}
    assert between(answers, down, started).keys() == {SECOND}
    back = between(answers, up)
    assert back.keys() == {FIRST, SECOND}
    assert abs(back[FIRST] - back[SECOND]) <= 4
    log = balanced.daemon.log.read_text()
    assert f"tcp:{PORT}: {FIRST} is taken out: connection refused" in log
    assert f"tcp:{PORT}: {FIRST} is back" in log


def test_a_server_that_is_cut_off_is_taken_out_too(lab: Lab, balanced: Balanced) -> None:
    balanced.write(more='check = { kind = "tcp", interval = 0.3, timeout = 1 }')
    balanced.reload()
    lab.inside[0].ip("link set eth0 down")
    try:
        assert eventually(lambda: balanced.state(FIRST) == "down")
        assert asked(lab.outside[0], 20, at_once=1) == {SECOND: 20}
    finally:
        lab.inside[0].ip("link set eth0 up")
        lab.inside[0].ip("route replace default via 10.77.0.1")
    assert eventually(lambda: balanced.state(FIRST) == "up")


def test_when_all_are_dead_nothing_is_let_in(lab: Lab, balanced: Balanced, web: Web) -> None:
    balanced.write(more='check = { kind = "tcp", interval = 0.2 }')
    balanced.reload()
    web.close()
    assert eventually(lambda: {row["state"] for row in balanced.servers().values()} == {"down"})
    line = ["curl", "-sS", "--max-time", "1", f"http://{GATEWAY}:{PORT}/"]
    assert lab.outside[0].run(line, check=False).returncode == 28
    refused = partial(figure, balanced.daemon, "nfmasq_errors_total", reason="no_server")
    assert eventually(lambda: refused() > 0)


# -- weights ---------------------------------------------------------------------------


def test_a_weight_changed_under_load_takes_effect_and_breaks_nothing(
    lab: Lab, balanced: Balanced, web: Web
) -> None:
    balanced.write("wrr")
    balanced.reload()
    with download(lab.outside[1]) as downloaded, load(lab.outside[0]) as answers:
        assert more(answers)
        changing = time.monotonic()
        balanced.weigh(FIRST, 4)
        changed = time.monotonic()
        assert more(answers, 50)
    assert downloaded.result == web.digest
    before, after = between(answers, 0, changing), between(answers, changed)
    assert before.keys() == after.keys() == {FIRST, SECOND}
    assert abs(before[FIRST] - before[SECOND]) <= 4
    assert abs(after[FIRST] - 4 * after[SECOND]) <= 20


def test_a_drained_server_gets_nothing_new_and_its_connections_go_on(
    lab: Lab, balanced: Balanced, web: Web
) -> None:
    with download(lab.outside[1]) as downloaded:
        assert eventually(lambda: any(row["active"] for row in balanced.servers().values()))
        (busy,) = (name for name, row in balanced.servers().items() if row["active"])
        (other,) = {FIRST, SECOND} - {busy}
        balanced.weigh(busy, 0)
        assert asked(lab.outside[0], 100) == {other: 100}
        row = balanced.servers()[busy]
        assert (row["state"], row["active"]) == ("drained", 1)
    assert downloaded.result == web.digest
    balanced.weigh(busy, 1)
    assert asked(lab.outside[0], 100) == {FIRST: 50, SECOND: 50}


# -- while it runs ---------------------------------------------------------------------


@pytest.mark.parametrize("by", ["command", "signal"])
def test_a_reload_under_load_loses_no_connection(
    lab: Lab, balanced: Balanced, web: Web, by: str
) -> None:
    def logged() -> int:
        return balanced.daemon.log.read_text().count("reloaded: ")

    def more_logged_than(before: int) -> bool:
        return logged() > before

    with download(lab.outside[1]) as downloaded, load(lab.outside[0]) as answers:
        for n in range(8):
            balanced.write(
                ("wrr", "lc", "sh", "rr")[n % 4],
                (1 + n, 1),
                more=f"persistence = {n % 2}",
                before=f"ports = '{61000 + n}-65000'\n"
                f"filtering = '{('address-dependent', 'endpoint-independent')[n % 2]}'\n"
                f"timeouts.tcp-established = {1000 + n}",
            )
            before = logged()
            if by == "command":
                balanced.reload()
            else:
                balanced.daemon.send_signal(signal.SIGHUP)
            assert eventually(partial(more_logged_than, before))
            assert more(answers, 15)
    assert downloaded.result == web.digest
    assert between(answers, 0).keys() <= {FIRST, SECOND}


def test_a_reload_takes_out_a_server_whose_connections_go_on(
    lab: Lab, balanced: Balanced, web: Web, tmp_path: Path
) -> None:
    with download(lab.outside[1]) as downloaded:
        assert eventually(lambda: any(row["active"] for row in balanced.servers().values()))
        (busy,) = (name for name, row in balanced.servers().items() if row["active"])
        (other,) = {FIRST, SECOND} - {busy}
        (tmp_path / "nfmasq.toml").write_text(f'forward = "tcp:{PORT}={other}"\n')
        balanced.reload()
        assert asked(lab.outside[0], 40) == {other: 40}
        assert downloaded.goes_on()
    assert downloaded.result == web.digest


def test_a_wrong_file_changes_nothing_and_is_one_line(
    lab: Lab, balanced: Balanced, tmp_path: Path
) -> None:
    def complaint(text: str) -> str:
        (tmp_path / "nfmasq.toml").write_text(text)
        with pytest.raises(Exception, match="exit status 1: nfmasq: ") as caught:
            balanced.reload()
        return str(caught.value)

    assert "nfmasq.toml:1: not TOML" in complaint("forward = [\n")
    assert "nfmasq.toml:1: scheduling is unknown" in complaint("scheduling = 1\n")
    assert "queue-length can change only at a restart; nothing was changed" in complaint(
        "queue-length = 5\n"
    )
    assert asked(lab.outside[0], 40) == {FIRST: 20, SECOND: 20}


def test_the_servers_are_shown_while_they_work(lab: Lab, balanced: Balanced) -> None:
    with load(lab.outside[0], at_once=4) as answers:
        for _ in range(3):
            header, *rows = balanced.daemon.ask("servers").splitlines()
            assert header.split()[:3] == ["forward", "server", "state"]
            assert [row.split()[:4] for row in rows] == [
                [f"tcp:{PORT}", FIRST, "up", "1"],
                [f"tcp:{PORT}", SECOND, "up", "1"],
            ]
    assert json.loads(balanced.daemon.ask("servers", "--json")) == list(balanced.servers().values())
    totals = [row["total"] for row in balanced.servers().values()]
    assert totals == [
        figure(balanced.daemon, "nfmasq_server_sessions_created_total", server=name)
        for name in (FIRST, SECOND)
    ]
    assert sum(map(int, map(str, totals))) == len(answers)
    assert figure(balanced.daemon, "nfmasq_server_up") == 2
