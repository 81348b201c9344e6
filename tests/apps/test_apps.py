"""Helpers: how they are found, bound and ended; the helper in docs/apps.md is among them."""

from __future__ import annotations

import configparser
import re
from importlib import import_module
from pathlib import Path

import pytest

from nfmasq import apps
from nfmasq.config import Configuration, ConfigurationError, UsageError, load
from nfmasq.engine import TCP, UDP, Timeouts
from nfmasq.engine.helper.app import LONGEST_KEPT, MOST_EXPECTED, Packet, Session
from nfmasq.errors import NfmasqError
from tests.apps.connection import Connection
from tests.gateway import GATEWAY, INSIDE, SERVER, Gateway
from tests.packets import ACK, RST, SYN, checksums_are_right, destination, source, tcp, udp

ROOT = Path(__file__).parents[2]
BACKUP_SERVER = ("198.51.100.7", 7000)


class Noting:
    """A helper that notes what happens to it, and can replace every payload by its own."""

    name = "noting"
    protocol = UDP
    ports = (443,)

    def __init__(self, payload: bytes | None = None) -> None:
        self.seen: list[object] = []
        self.payload = payload

    def bind(self, session: Session) -> None:
        self.seen.append("bound")

    def unbind(self, session: Session) -> None:
        self.seen.append("unbound")

    def packet_out(self, session: Session, packet: Packet) -> None:
        self._see("out", packet)

    def packet_in(self, session: Session, packet: Packet) -> None:
        self._see("in", packet)

    def _see(self, direction: str, packet: Packet) -> None:
        self.seen.append((direction, packet.payload))
        packet.payload = packet.payload if self.payload is None else self.payload


# -- bound ---------------------------------------------------------------------------------


def test_a_helper_sees_the_packets_of_its_port_from_the_first_to_the_end() -> None:
    helper = Noting()
    gateway = Gateway(apps={(UDP, 443): helper})
    mapped = gateway.send(INSIDE, SERVER, b"question")
    gateway.into(udp(SERVER, mapped, b"answer"))
    gateway.send(INSIDE, ("198.51.100.7", 444), b"other port")
    gateway.passes(400)
    assert helper.seen == ["bound", ("out", b"question"), ("in", b"answer"), "unbound"]


@pytest.mark.parametrize("payload", [b"", b"x", b"longer than it was before", bytes(65_507)])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_payload_of_another_length_makes_a_right_packet(payload: bytes, checksum: bool) -> None:
    gateway = Gateway(apps={(UDP, 443): Noting(payload)})
    sent = gateway.out(udp(INSIDE, SERVER, b"before", checksum=checksum))
    assert sent is not None
    assert sent == udp(source(sent), SERVER, payload, checksum=checksum)
    assert checksums_are_right(sent)


def test_a_payload_that_no_packet_can_carry_is_dropped() -> None:
    gateway = Gateway(apps={(UDP, 443): Noting(bytes(65_508))})
    assert gateway.out(udp(INSIDE, SERVER, b"before")) is None
    assert gateway.errors == {"malformed": 1}


def test_flows_without_a_helper_take_the_fast_way_beside_those_with_one() -> None:
    gateway = Gateway(apps=apps.helpers({"ftp": (21,)}))
    for server in (SERVER, ("198.51.100.7", 21)):
        for _ in range(2):
            gateway.out(tcp(INSIDE, server, SYN))
    rewrites = {ms.dport: ms.rewrite is not None for ms in gateway.sessions.entries()}
    assert rewrites == {443: True, 21: False}


def test_unanswered_expected_sessions_are_few_and_end_with_their_session() -> None:
    gateway = Gateway(apps={(UDP, 443): Noting()})
    gateway.send(INSIDE, SERVER)
    (control,) = gateway.sessions.entries()
    session: Session = control.app_data
    mports = [session.expect(UDP, port, anyone=True) for port in range(5000, 5050)]
    assert len(set(mports)) == 50
    assert control.n_control == MOST_EXPECTED
    assert session.expected_port(UDP, mports[-1] or 0) == 5049
    assert session.expected_mport(UDP, 5000) is None
    gateway.passes(310)
    gateway.passes(310)
    assert gateway.sessions.entries() == []


class Lasting(Noting):
    """A helper of TCP whose two sides agree on an hour at the beginning of each connection."""

    protocol = TCP

    def bind(self, session: Session) -> None:
        session.keep(3600, b"lease")


class Leased:
    """A connection whose helper keeps it; `tcp_established` is 100 seconds, `tcp_close` 10."""

    def __init__(self) -> None:
        timeouts = Timeouts(tcp_established=100, tcp_close=10)
        self.gateway = Gateway(apps={(TCP, 443): Lasting()}, timeouts=timeouts)
        self.open(seq=1000)

    def open(self, seq: int) -> None:
        sent = self.gateway.out(tcp(INSIDE, SERVER, SYN, seq=seq))
        assert sent is not None
        self.gateway.into(tcp(SERVER, source(sent), SYN | ACK, ack=seq + 1))
        self.gateway.out(tcp(INSIDE, SERVER, ACK, seq=seq + 1))

    @property
    def lives(self) -> float:
        (ms,) = self.gateway.sessions.entries()
        assert ms.timer is not None
        return ms.timer - self.gateway.now


def test_a_connection_is_kept_as_long_as_agreed_and_no_longer_when_it_is_over() -> None:
    leased = Leased()
    assert leased.lives == 3600
    leased.gateway.passes(1000)
    leased.gateway.out(tcp(INSIDE, SERVER, RST | ACK))
    assert leased.lives == 10


def test_what_was_agreed_in_a_connection_is_over_when_the_next_begins() -> None:
    leased = Leased()
    leased.gateway.passes(1000)
    leased.open(seq=50_000)
    assert leased.lives == 3600
    (ms,) = leased.gateway.sessions.entries()
    ms.app_data.keep(0, b"lease")
    assert leased.lives == 100


@pytest.mark.parametrize("seconds", [LONGEST_KEPT + 1, 1e300])
def test_nothing_is_kept_for_longer_than_a_day(seconds: float) -> None:
    leased = Leased()
    (ms,) = leased.gateway.sessions.entries()
    ms.app_data.keep(seconds, b"lease")
    assert leased.lives == LONGEST_KEPT


def test_an_agreement_that_is_over_is_forgotten() -> None:
    leased = Leased()
    (ms,) = leased.gateway.sessions.entries()
    leased.gateway.passes(3000)
    leased.gateway.out(tcp(INSIDE, SERVER, ACK))
    ms.app_data.keep(1000, b"another")
    leased.gateway.passes(700)
    leased.gateway.out(tcp(INSIDE, SERVER, ACK))
    assert leased.lives == 300
    ms.app_data.keep(0, b"another")
    assert leased.lives == 100


@pytest.mark.parametrize("port", [0, 1, 80, 1023, 65536])
def test_ports_of_the_system_s_services_are_never_opened(port: int) -> None:
    gateway = Gateway(apps={(UDP, 443): Noting()})
    gateway.send(INSIDE, SERVER)
    (control,) = gateway.sessions.entries()
    assert control.app_data.expect(TCP, port) is None
    assert control.n_control == 0


# -- configured ----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nfmasq.toml"


def test_only_ftp_is_on_by_default() -> None:
    assert Configuration().apps == {"ftp": (21,)}
    masq = Configuration().masquerade()
    assert {key: app.name for key, app in masq.sessions.helpers.apps.items()} == {(TCP, 21): "ftp"}


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("[apps]\nirc = [6667, 6668]", {"ftp": (21,), "irc": (6667, 6668)}),
        ("[apps]\nftp = [2121]", {"ftp": (2121,)}),
        ("[apps]\nftp = []\ntftp = [69]", {"tftp": (69,)}),
    ],
)
def test_the_file_turns_helpers_on_and_off(
    file: Path, text: str, on: dict[str, tuple[int, ...]]
) -> None:
    file.write_text(text)
    assert load(file, {}).apps == on


@pytest.mark.parametrize(
    ("options", "on"),
    [
        (("irc",), {"ftp": (21,), "irc": (6667,)}),
        (("ftp=21,2121", "tftp=69"), {"ftp": (21, 2121), "tftp": (69,)}),
        (("ftp=off",), {}),
        (("off", "irc=7000"), {"irc": (7000,)}),
    ],
)
def test_the_command_line_turns_helpers_on_and_off_in_place_of_the_file(
    file: Path, options: tuple[str, ...], on: dict[str, tuple[int, ...]]
) -> None:
    file.write_text("[apps]\nftp = [2121]\ntftp = [1069]")
    assert load(file, {"apps": options}).apps == on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[apps]\nhttp = [80]", ":2: apps.http is unknown; known are ftp, irc, pptp, sip, tftp"),
        ("[apps]\nftp = 21", ":2: apps.ftp must be a list of ports, from 1 to 65535, not 21"),
        ("[apps]\nftp = [0]", ":2: apps.ftp must be a list of ports"),
        ("apps = 'ftp'", ":1: apps must be a table of helpers and their ports"),
    ],
)
def test_a_wrong_table_of_helpers_is_told(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(file, {})
    assert str(caught.value).startswith(f"{file}{message}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("http", "--app http is unknown; known are ftp, irc, pptp, sip, tftp"),
        ("http=80", "--app http is unknown; known are"),
        ("ftp=ftp", "--app ftp must be a list of ports, from 1 to 65535"),
        ("ftp=", "--app ftp must be a list of ports"),
        ("ftp=21,99999", "--app ftp must be a list of ports"),
    ],
)
def test_a_wrong_option_for_a_helper_is_told(option: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(None, {"apps": (option,)})
    assert str(caught.value).startswith(message)


def test_two_helpers_cannot_have_one_port() -> None:
    with pytest.raises(NfmasqError, match="helpers ftp and irc both have port 21"):
        Configuration(apps={"ftp": (21,), "irc": (21,)}).masquerade()


# -- found ---------------------------------------------------------------------------------


def test_the_installation_names_each_helper_that_there_is() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"][apps.GROUP].strip().splitlines()
    named = [[word.strip() for word in line.split("=")] for line in lines]
    for name, place in named:
        module, _, attribute = place.partition(":")
        assert getattr(import_module(module), attribute) is apps.OWN[name]
        assert apps.helper(name).name == name
    assert {name for name, _ in named} == set(apps.OWN)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the example of the documentation, as a package of a person's own."""
    text = (ROOT / "docs/apps.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (entry_point,) = re.findall(r'"nfmasq\.apps"\]\n(\w+) = "(.*?)"', text)
    module = entry_point[1].partition(":")[0]
    (tmp_path / f"{module}.py").write_text(code)
    metadata = tmp_path / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[nfmasq.apps]\n{entry_point[0]} = {entry_point[1]}\nbroken = no_such_module:Helper\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_the_helper_in_the_documentation_works() -> None:
    on = load(None, {"apps": ("backup",)}).apps
    assert on == {"ftp": (21,), "backup": (7000,)}
    over = Connection(Gateway(apps=apps.helpers(on)), INSIDE, BACKUP_SERVER)
    said = over.say(over.client, b"HELLO\nCALL")
    said += over.say(over.client, b"BACK 10.0.0.2 5000\nBYE\n")
    (expected,) = (ms for ms in over.gateway.sessions.entries() if ms.control)
    assert said == b"HELLO\nCALLBACK 203.0.113.1 %d\nBYE\n" % expected.mport
    syn = over.gateway.into(tcp(("198.51.100.7", 999), (GATEWAY, expected.mport), SYN))
    assert syn is not None
    assert destination(syn) == ("10.0.0.2", 5000)
    assert b" 0\n" in over.say(over.client, b"CALLBACK 10.0.0.3 5000\n")


@pytest.mark.usefixtures("installed")
def test_a_helper_that_cannot_be_loaded_is_told_in_one_line() -> None:
    with pytest.raises(NfmasqError, match="the helper broken cannot be loaded: ModuleNotFound"):
        apps.helper("broken")
