"""The control socket: what a running nfmasq answers, and what no client can do to it."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfmasq.daemon import control
from nfmasq.daemon.control import ControlServer, describe, request
from nfmasq.engine import TCP, UDP, IpMasq, Masquerade
from nfmasq.engine.cached import FlowCache, Usage
from nfmasq.engine.table.entry import NO_REPLY
from nfmasq.errors import NfmasqError

GATEWAY, INSIDE, OUTSIDE = 0xC6336402, 0x0A000005, 0xCB007107
NOW = 100.0

FIGURES: list[tuple[str, dict[str, str], float]] = [
    ("nfmasq_entries", {"protocol": "tcp"}, 2.0),
    ("nfmasq_build_info", {"version": "x"}, 1.0),
]


def make_entry(masquerade: Masquerade, protocol: int, sport: int, dport: int) -> IpMasq:
    masquerade.sessions.now = NOW
    ms = masquerade.sessions.ip_masq_new(
        protocol, GATEWAY, 0, INSIDE, sport, OUTSIDE, dport, NO_REPLY
    )
    assert ms is not None
    masquerade.sessions.ip_masq_put(ms)
    return ms


@pytest.fixture
def masquerade() -> Masquerade:
    masquerade = Masquerade(lock=threading.RLock())
    for protocol, sport, dport in ((TCP, 40001, 443), (TCP, 40002, 80), (UDP, 40003, 53)):
        make_entry(masquerade, protocol, sport, dport)
    return masquerade


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nfmasq.sock"


@pytest.fixture
def server(masquerade: Masquerade, path: Path) -> Iterator[ControlServer]:
    server = ControlServer(
        path,
        masquerade,
        configuration=lambda: {"queue": 7},
        figures=lambda: FIGURES,
        reload=reload,
        clock=lambda: NOW + 10,
    )
    server.start()
    yield server
    server.close()


def reload() -> list[str]:
    raise NfmasqError("nfmasq.toml:3: queue is not what it was")


def say(path: Path, line: bytes) -> bytes:
    """Send bytes as they are, end the sending half, and return all that comes back."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(os.fspath(path))
        client.sendall(line)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as reply:
            return reply.read()


@pytest.mark.usefixtures("server")
class TestRequests:
    def test_list_gives_every_entry_oldest_first(self, path: Path) -> None:
        assert [entry["sport"] for entry in request(path, "list")] == [40001, 40002, 40003]

    def test_an_entry_is_told_with_all_its_fields(self, path: Path) -> None:
        entry, *_ = request(path, "list")

        assert entry == {
            "protocol": "tcp",
            "saddr": "10.0.0.5",
            "sport": 40001,
            "maddr": "198.51.100.2",
            "mport": 61000,
            "daddr": "203.0.113.7",
            "dport": 443,
            "state": "NONE",
            "expires": 1790.0,
            "refcnt": 2,
            "flags": ["HASHED", "NO_REPLY"],
            "packets_out": 0,
            "packets_in": 0,
            "bytes_out": 0,
            "bytes_in": 0,
            "app": None,
            "control": None,
            "cached": False,
        }

    @pytest.mark.parametrize(
        ("criteria", "sports"),
        [
            ({"protocol": "tcp"}, [40001, 40002]),
            ({"saddr": "10.0.0.5", "dport": 53}, [40003]),
            ({"saddr": "10.0.0.6"}, []),
            ({"maddr": "198.51.100.2", "mport": 61001}, [40002]),
            ({"daddr": "203.0.113.7", "sport": 40001}, [40001]),
        ],
    )
    def test_list_keeps_to_the_criteria(
        self, path: Path, criteria: dict[str, object], sports: list[int]
    ) -> None:
        assert [entry["sport"] for entry in request(path, "list", **criteria)] == sports

    def test_delete_removes_what_meets_the_criteria(
        self, path: Path, masquerade: Masquerade
    ) -> None:
        assert list(request(path, "delete", protocol="tcp")) == [2]
        assert [ms.protocol for ms in masquerade.sessions.entries()] == [UDP]
        assert list(request(path, "delete", protocol="tcp")) == [0]

    def test_delete_without_criteria_removes_nothing(
        self, path: Path, masquerade: Masquerade
    ) -> None:
        with pytest.raises(NfmasqError, match="needs a criterion"):
            list(request(path, "delete"))
        assert len(masquerade.sessions.entries()) == 3

    def test_flush_removes_all(self, path: Path, masquerade: Masquerade) -> None:
        assert list(request(path, "flush")) == [3]
        assert masquerade.sessions.entries() == []

    def test_stats_are_the_figures(self, path: Path) -> None:
        assert list(request(path, "stats")) == [list(figure) for figure in FIGURES]

    def test_the_configuration_can_be_asked_for(self, path: Path) -> None:
        assert list(request(path, "configuration")) == [{"queue": 7}]

    def test_a_reload_that_fails_is_told_of(self, path: Path) -> None:
        with pytest.raises(NfmasqError, match="toml:3: queue is not what it was"):
            list(request(path, "reload"))

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            (b"", "one line of JSON"),
            (b"hello\n", "one line of JSON"),
            (b"[]\n", "one line of JSON"),
            (b"\xff\n", "one line of JSON"),
            (b"[" * 4000 + b"\n", "one line of JSON"),
            (b'{"request": "list"}', "one line of JSON"),
            (b'{"request": "list", "saddr": "' + b"1" * 100_000 + b'"}\n', "one line of JSON"),
            (b"{}\n", "unknown request: null"),
            (b'{"request": "shutdown"}\n', 'unknown request: "shutdown"'),
            (b'{"request": ["list"]}\n', "with nothing nested"),
            (b'{"request": "list", "saddr": 5}\n', "no entry can have this"),
            (b'{"request": "list", "saddr": "10.0.0"}\n', "no entry can have this"),
            (b'{"request": "list", "sport": "80"}\n', "no entry can have this"),
            (b'{"request": "list", "sport": true}\n', "no entry can have this"),
            (b'{"request": "list", "protocol": "quic"}\n', "no entry can have this"),
            (b'{"request": "list", "protocol": []}\n', "with nothing nested"),
            (b'{"request": "list", "protocol": {}}\n', "with nothing nested"),
            (b'{"request": "list", "protocol": null}\n', "no entry can have this"),
            (b'{"request": "list", "timer": 1}\n', "no entry can have this"),
            (b'{"request": "servers", "forward": 80}\n', "the arguments are forward, server"),
            (b'{"request": "servers", "weight": "1"}\n', "the arguments are forward, server"),
            (b'{"request": "servers", "forward": "tcp:80"}\n', "nothing is forwarded as tcp:80"),
            (b'{"request": "weight", "server": "x", "weight": 1}\n', "the arguments are"),
            (b'{"request": "weight", "forward": "x", "server": "y"}\n', "a weight is a whole"),
            (
                b'{"request": "weight", "forward": "x", "server": "y", "weight": true}\n',
                "a weight is a whole number from 0 to 65535",
            ),
            (b'{"request": "reload", "now": 1}\n', "reload takes no arguments"),
            (b'{"request": "flush", "sport": 1}\n', "flush takes no arguments"),
            (b'{"request": "stats", "all": true}\n', "stats takes no arguments"),
            (b'{"request": "configuration", "": null}\n', "configuration takes no arguments"),
        ],
    )
    def test_a_bad_request_is_refused_and_the_next_is_answered(
        self, path: Path, line: bytes, error: str
    ) -> None:
        try:
            reply = say(path, line)
        except (BrokenPipeError, ConnectionResetError):
            assert len(line) > control.LONGEST_REQUEST  # the server has hung up halfway
        else:
            assert error in json.loads(reply)["error"]

        assert len(list(request(path, "list"))) == 3

    @pytest.mark.parametrize("name", ["list", "flush", "servers"])
    def test_a_request_is_answered_however_deep_it_is_nested(self, path: Path, name: str) -> None:
        """What Python can just read may be nested too deep for it to write."""
        for depth in (1, 2, 500, *range(900, 1010), 2000):
            nested = b"[" * depth + b"]" * depth
            line = b'{"request": "' + name.encode() + b'", "saddr": ' + nested + b"}\n"
            assert "one line of JSON" in json.loads(say(path, line))["error"]

    def test_a_client_that_says_nothing_keeps_nobody_waiting(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(os.fspath(path))
            assert len(list(request(path, "list"))) == 3

    def test_a_silent_client_is_hung_up_on(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control._ClientConnection, "timeout", 0.05)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.settimeout(30)
            silent.connect(os.fspath(path))
            assert silent.recv(1) == b""

    def test_a_client_that_does_not_read_keeps_nobody_waiting(
        self, path: Path, masquerade: Masquerade
    ) -> None:
        for sport in range(1, 3001):
            make_entry(masquerade, TCP, sport, 443)
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(os.fspath(path))
            deaf.sendall(b'{"request": "list"}\n')
            assert len(list(request(path, "list"))) == 3003
            assert list(request(path, "flush")) == [3003]


@pytest.mark.usefixtures("server")
class TestLongAnswers:
    """An answer that takes long gives signs of life, and a client waits as long as they come."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control, "SIGN", 0.1)
        monkeypatch.setattr(control, "PATIENCE", 1.0)  # and the client waits for twice as long

    @pytest.mark.parametrize("name", ["list", "reload"])
    def test_a_client_waits_for_an_answer_that_takes_longer_than_its_patience(
        self, path: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        def answer(request: object) -> Iterator[str]:
            yield "first"
            time.sleep(3)
            yield "second"

        monkeypatch.setattr(server, "answer", answer)
        assert list(request(path, name)) == ["first", "second"]

    def test_an_item_does_not_wait_for_the_items_after_it(
        self, path: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once it is asked for again: what is sent, is sent by the thread that answers."""
        go_on = threading.Event()

        def answer(request: object) -> Iterator[str]:
            for item in ("first", "second"):
                time.sleep(0.5)
                yield item
            assert go_on.wait(30)

        monkeypatch.setattr(server, "answer", answer)
        items = request(path, "list")
        assert [next(items), next(items)] == ["first", "second"]
        go_on.set()
        assert list(items) == []

    def test_signs_stand_between_whole_lines(self, path: Path, masquerade: Masquerade) -> None:
        for sport in range(1, 3001):
            make_entry(masquerade, TCP, sport, 443)
        reply = say(path, b'{"request": "list"}\n').splitlines()
        lines = [json.loads(line) for line in reply]
        assert len([line for line in lines if "item" in line]) == 3003
        assert lines[-1] == {"end": True}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", ["list", "delete"])
def test_entries_that_are_only_looked_at_cost_few_pauses(
    path: Path, masquerade: Masquerade, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of 4,003 entries one is wanted: to pause as often as for a list would take 25 seconds."""
    for sport in range(1, 4001):
        make_entry(masquerade, TCP, sport, 443)
    monkeypatch.setattr(control, "PAUSE", 0.2)
    began = time.monotonic()
    assert len(list(request(path, name, daddr="203.0.113.7", protocol="udp"))) == 1
    assert time.monotonic() - began < 15


@pytest.mark.usefixtures("server")
def test_a_flush_takes_no_pauses(
    path: Path, masquerade: Masquerade, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sport in range(1, 4001):
        make_entry(masquerade, TCP, sport, 443)
    monkeypatch.setattr(control, "PAUSE", 60)
    assert list(request(path, "flush")) == [4003]
    assert masquerade.sessions.entries() == []


class Carrier(FlowCache):
    """A flow cache that takes all flows; `carried` has the directions that it carries."""

    def __init__(self) -> None:
        self.carried: set[tuple[IpMasq, bool]] = set()

    def put(self, ms: IpMasq, outward: bool, interface: int) -> bool:
        self.carried.add((ms, outward))
        return True

    def drop(self, ms: IpMasq) -> Usage:
        self.carried -= {(ms, True), (ms, False)}
        return Usage(packets_out=5, bytes_out=500)

    def usage(self, ms: IpMasq) -> Usage:
        return Usage()


@pytest.mark.usefixtures("server")
def test_a_flush_has_the_flow_cache_give_back_its_flows_first(
    path: Path, masquerade: Masquerade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4,004 flows it carries one: to pause as often as for a list would take 25 seconds."""
    for sport in range(1, 4001):
        make_entry(masquerade, TCP, sport, 443)
    monkeypatch.setattr(control, "PAUSE", 0.2)
    began = time.monotonic()
    sessions, carrier = masquerade.sessions, Carrier()
    masquerade.use_cache(carrier)
    ms = make_entry(masquerade, UDP, 40004, 4500)
    sessions.ip_masq_replied(ms)
    sessions.cached.due.append((ms, True, 1))
    masquerade.enter_lasting()
    assert carrier.carried == {(ms, True)}
    sessions.cached.due.append((ms, False, 1))

    assert list(request(path, "flush")) == [4004]
    assert time.monotonic() - began < 15

    masquerade.enter_lasting()
    assert carrier.carried == set()
    assert (sessions.cached.flows, ms.packets_out) == (0, 5)
    assert not sessions.cached.is_paused


@pytest.mark.usefixtures("server")
def test_the_lock_is_free_while_a_list_is_on_its_way(path: Path, masquerade: Masquerade) -> None:
    """A reader that stops in the middle holds up no packet."""
    for sport in range(1, 3001):
        make_entry(masquerade, TCP, sport, 443)
    entries = request(path, "list")
    next(entries)

    assert masquerade.sessions.lock.acquire(timeout=30)  # type: ignore[attr-defined]
    masquerade.sessions.lock.release()  # type: ignore[attr-defined]
    assert len(list(entries)) == 3002


def test_the_controlling_entry_is_named(masquerade: Masquerade) -> None:
    first, second, _ = masquerade.sessions.entries()
    masquerade.sessions.ip_masq_control(second, first)

    assert describe(masquerade.sessions, second, NOW)["control"] == "tcp 198.51.100.2:61000"


def test_an_entry_in_use_is_told_with_its_whole_timeout(masquerade: Masquerade) -> None:
    ms = masquerade.sessions.ip_masq_out_get(TCP, INSIDE, 40001, OUTSIDE, 443)
    assert ms is not None

    told = describe(masquerade.sessions, ms, NOW + 500)

    assert (told["expires"], told["refcnt"]) == (ms.timeout, 3)


class TestSocketFile:
    def make(self, path: Path) -> ControlServer:
        return ControlServer(path, Masquerade(), dict, list, list)

    def test_only_the_owner_may_open_it_whatever_the_umask(self, path: Path) -> None:
        umask = os.umask(0)
        try:
            server = self.make(path)
        finally:
            os.umask(umask)

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        server.close()

    def test_it_goes_with_the_server(self, path: Path) -> None:
        server = self.make(path)
        server.start()
        server.close()

        assert not path.exists()

    def test_a_socket_that_nobody_listens_at_is_replaced(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(os.fspath(path))

        server = self.make(path)
        server.start()

        assert list(request(path, "list")) == []
        server.close()

    def test_a_socket_that_another_nfmasq_listens_at_is_left_alone(self, path: Path) -> None:
        first = self.make(path)
        first.start()

        with pytest.raises(NfmasqError, match=f"another nfmasq is listening at {path}"):
            self.make(path)

        assert list(request(path, "list")) == []
        first.close()

    def test_a_socket_whose_listener_is_busy_is_left_alone(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
            busy.bind(os.fspath(path))
            busy.listen(0)
            waiting.connect(os.fspath(path))

            with pytest.raises(NfmasqError, match="another nfmasq is listening"):
                self.make(path)

    def test_anything_but_a_socket_is_not_touched(self, path: Path) -> None:
        path.write_text("precious")

        with pytest.raises(NfmasqError, match="something else is there"):
            self.make(path)

        assert path.read_text() == "precious"

    def test_the_place_must_be_there(self, tmp_path: Path) -> None:
        with pytest.raises(NfmasqError, match="No such file or directory"):
            self.make(tmp_path / "nowhere" / "nfmasq.sock")

    def test_a_successor_keeps_its_file(self, path: Path) -> None:
        first = self.make(path)
        path.unlink()
        second = self.make(path)

        first.close()

        assert path.exists()
        second.close()


class TestClient:
    def test_nobody_there(self, path: Path) -> None:
        with pytest.raises(NfmasqError) as caught:
            list(request(path, "list"))
        assert str(caught.value) == (
            f"no nfmasq is running at {path} (start it with: sudo nfmasq run)"
        )

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (b"", "stopped in the middle"),
            (b'{"item": 1}\n', "stopped in the middle"),
            (b'{"item": 1}\n{"it', "cut off, or not from nfmasq"),
            (b"220 mail.example ESMTP\r\n", "not from nfmasq"),
            (b"5\n", "not from nfmasq"),
            (b"{}\n", "not from nfmasq"),
            (b'{"item": 1}\n[]\n', "not from nfmasq"),
            (b'["error"]\n', "not from nfmasq"),
            (b'"an error"\n', "not from nfmasq"),
            (b"[" * 3000 + b"\n", "not from nfmasq"),
            (b'{"item": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", "not from nfmasq"),
            (b'{"error": "no"}\n', "^no$"),
        ],
    )
    def test_an_answer_that_cannot_be_used_is_told_of(
        self, path: Path, reply: bytes, message: str
    ) -> None:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(os.fspath(path))
            stranger.listen()
            answering = threading.Thread(target=self.answer_once, args=(stranger, reply))
            answering.start()
            with pytest.raises(NfmasqError, match=message):
                list(request(path, "list"))
            answering.join()

    @staticmethod
    def answer_once(listener: socket.socket, reply: bytes) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1000)
            client.sendall(reply)

    def test_silence_is_told_of_after_a_while(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control, "PATIENCE", 0.05)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(os.fspath(path))
            stranger.listen()
            with pytest.raises(NfmasqError, match="does not answer: timed out"):
                list(request(path, "list"))


def test_what_is_asked_ends_in_one_line_of_json(path: Path, server: ControlServer) -> None:
    reply = say(path, b'{"request": "flush"}\n').splitlines()

    lines: list[dict[str, Any]] = [json.loads(line) for line in reply]

    assert lines == [{"item": 3}, {"end": True}]
