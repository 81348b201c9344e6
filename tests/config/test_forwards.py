"""Forwarded and triggered ports as people write them, right and wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfmasq.config import Configuration, ConfigurationError, UsageError, load
from nfmasq.config.forwards import ForwardSettings, ServerSettings, TriggerSettings, contradiction
from nfmasq.config.health import KINDS, HealthSettings
from nfmasq.engine import TCP, UDP
from nfmasq.engine.forward.schedulers import SCHEDULERS
from tests.packets import number

EIGHTY = range(80, 81)
FIRST = ServerSettings(number("10.0.0.2"), 80)
SECOND = ServerSettings(number("10.0.0.3"), 80)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nfmasq.toml"


# -- right ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "forward"),
    [
        ("tcp:80=10.0.0.2:80", ForwardSettings(TCP, None, EIGHTY, (FIRST,))),
        ("udp:80=10.0.0.2:80", ForwardSettings(UDP, None, EIGHTY, (FIRST,))),
        ("tcp:80=10.0.0.2:80,10.0.0.3:80", ForwardSettings(TCP, None, EIGHTY, (FIRST, SECOND))),
        (
            "tcp:8000-8010=10.0.0.2:80-90",
            ForwardSettings(TCP, None, range(8000, 8011), (FIRST,)),
        ),
        (
            "tcp:198.51.100.2:80=10.0.0.2:80",
            ForwardSettings(TCP, number("198.51.100.2"), EIGHTY, (FIRST,)),
        ),
    ],
)
def test_an_option_says_what_is_forwarded_and_to_which_servers(
    written: str, forward: ForwardSettings
) -> None:
    assert load(None, {"forward": (written,)}).forwards == (forward,)


def test_a_table_says_what_an_option_says_and_more(file: Path) -> None:
    file.write_text("""
        [[forward]]
        listen = "tcp:80"
        servers = ["10.0.0.2:80", { server = "10.0.0.3:80", weight = 3 }]
        scheduler = "wlc"
        persistence = 300
        check = "http"

        [[forward]]
        listen = "udp:80"
        servers = "10.0.0.2:80"
    """)
    assert load(file, {}).forwards == (
        ForwardSettings(
            TCP,
            None,
            EIGHTY,
            (FIRST, replace(SECOND, weight=3)),
            "wlc",
            300.0,
            HealthSettings("http"),
        ),
        ForwardSettings(UDP, None, EIGHTY, (FIRST,)),
    )


def test_a_check_says_how_and_when(file: Path) -> None:
    file.write_text("""
        [[forward]]
        listen = "tcp:80"
        servers = ["10.0.0.2:80"]
        check = { kind = "http", path = "/health", interval = 0.5, fall = 3 }
    """)
    (rule,) = load(file, {}).forwards
    assert rule.check == HealthSettings("http", "/health", 0.5, 1, 2, 3)


def test_a_trigger_says_what_opens_which_ports(file: Path) -> None:
    file.write_text("""
        [[trigger]]
        outbound = "tcp:6112,7000-7009"
        opens = "udp:27000-27009"
        seconds = 30
    """)
    outbound = (TCP, (range(6112, 6113), range(7000, 7010)))
    assert load(file, {}).triggers == (TriggerSettings(outbound, UDP, range(27000, 27010), 30.0),)


def test_options_stand_in_place_of_the_files_tables(file: Path) -> None:
    file.write_text('forward = ["tcp:80=10.0.0.2:80", "tcp:81=10.0.0.2:81"]')
    assert len(load(file, {}).forwards) == 2
    assert len(load(file, {"forward": ("tcp:80=10.0.0.3:80",)}).forwards) == 1


def test_one_port_may_be_forwarded_on_any_address_and_elsewhere_on_one() -> None:
    both = ("tcp:80=10.0.0.2:80", "tcp:198.51.100.2:80=10.0.0.3:80", "udp:80=10.0.0.2:80")
    assert len(load(None, {"forward": both}).forwards) == 3


def test_a_port_that_leads_inside_is_given_to_no_session(file: Path) -> None:
    file.write_text("""
        ports = "1000-1009"
        forward = ["tcp:1002-1004=10.0.0.2:2-4"]
        trigger = [{ outbound = "tcp:99", opens = "udp:1006" }]
    """)
    configuration = load(file, {})
    masquerade = configuration.masquerade()
    given = {masquerade.sessions.get_next_mport() for _ in range(20)}
    assert given == {1000, 1001, 1005, 1007, 1008, 1009}
    assert configuration.as_table()["ports"] == "1000-1009"


protocols = st.sampled_from([TCP, UDP])
addresses = st.integers(0x01000000, 0x7EFFFFFF) | st.integers(0x80000000, 0xDFFFFFFF)
ranges = st.tuples(st.integers(1, 65000), st.integers(1, 20)).map(lambda r: range(r[0], sum(r)))
servers = st.builds(ServerSettings, addresses, st.integers(1, 65000), st.integers(0, 65535))
times = st.floats(0.1, 3600)
counts = st.integers(1, 100)
checks = st.builds(
    HealthSettings, st.sampled_from(KINDS), st.just("/health?all=1"), times, times, counts, counts
) | st.sampled_from(KINDS).map(HealthSettings)
forwards = st.builds(
    ForwardSettings,
    protocols,
    st.none() | addresses,
    ranges,
    st.lists(
        servers, min_size=1, max_size=3, unique_by=lambda server: (server.address, server.port)
    ).map(tuple),
    st.sampled_from(list(SCHEDULERS)),
    st.integers(0, 86400).map(float),
    st.none() | checks,
)
triggers = st.builds(
    TriggerSettings,
    st.tuples(protocols, st.lists(ranges, min_size=1, max_size=3).map(tuple)),
    protocols,
    ranges,
    st.integers(1, 86400).map(float),
)


def toml(value: object) -> str:
    """Return a value as TOML writes it in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(forward=forwards, trigger=triggers)
def test_what_is_written_to_a_file_and_read_is_the_same(
    file: Path, forward: ForwardSettings, trigger: TriggerSettings
) -> None:
    one = Configuration(forwards=(forward,), triggers=(trigger,))
    if contradiction(one.forwards, one.triggers):
        one = Configuration(forwards=(forward,))
    table = one.as_table()
    file.write_text("".join(f"{key} = {toml(table[key])}\n" for key in ("forward", "trigger")))
    assert load(file, {}) == one


# -- wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("tcp:80", "must be LISTEN=SERVER[,SERVER]..., as tcp:8080=10.0.0.2:80"),
        ("tcp:80=10.0.0.2:80=10.0.0.3:80", "must be LISTEN=SERVER"),
        ("sctp:80=10.0.0.2:80", 'must be tcp:PORTS or udp:PORTS, not "sctp:80"'),
        ("80=10.0.0.2:80", "must be tcp:PORTS or udp:PORTS"),
        ("tcp:=10.0.0.2:80", "must be PORT or LO-HI, from 1 to 65535"),
        ("tcp:0=10.0.0.2:80", "must be PORT or LO-HI, from 1 to 65535"),
        ("tcp:65536=10.0.0.2:80", "must be PORT or LO-HI, from 1 to 65535"),
        ("tcp:8010-8000=10.0.0.2:80-90", 'with the lower port first, not "8010-8000"'),
        ("tcp:80=10.0.0.2:90-80", 'with the lower port first, not "90-80"'),
        ("tcp:80-90=10.0.0.2:80", "leads 80-90 to 10.0.0.2:80, ranges of different length"),
        ("tcp:80=10.0.0.2", "must be ADDRESS:PORT"),
        ("tcp:80=", "must be ADDRESS:PORT"),
        ("tcp:80=10.0.0.2:80,", "must be ADDRESS:PORT"),
        ("tcp:80=localhost:80", 'must be an IPv4 address, not "localhost"'),
        ("tcp:80=224.0.0.1:80", 'must be the address of a host, not "224.0.0.1"'),
        ("tcp:80=0.0.0.0:80", "must be the address of a host"),
        ("tcp:80=127.0.0.1:80", "must be the address of a host"),
        ("tcp:80=255.255.255.255:80", "must be the address of a host"),
        ("tcp:127.0.0.1:80=10.0.0.2:80", "must be a masquerade address"),
        ("tcp:80=10.0.0.2:80,10.0.0.2:80", "must name a server once"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(written: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(None, {"forward": (written,)})
    told = str(caught.value)
    assert told.startswith("--forward ")
    assert message in told
    assert "\n" not in told


def test_two_forwards_of_the_same_port_and_address_are_refused() -> None:
    with pytest.raises(UsageError, match="has tcp:80-90 and tcp:85, which overlap"):
        load(None, {"forward": ("tcp:80-90=10.0.0.2:80-90", "tcp:85=10.0.0.3:85")})
    with pytest.raises(UsageError, match=r"has tcp:1\.2\.3\.4:80 and"):
        load(None, {"forward": ("tcp:1.2.3.4:80=10.0.0.2:80", "tcp:1.2.3.4:80=10.0.0.3:80")})


SERVERS = 'servers = "10.0.0.2:80"'
CHECKED = f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\n'
WRONG_FILES = [
    ("forward = 80", 1, "forward must be LISTEN=SERVER"),
    ('[[forward]]\nlisten = "tcp:80"', 1, "forward lacks servers"),
    (f"queue = 1\n[[forward]]\n{SERVERS}", 2, "forward lacks listen"),
    (f'[[forward]]\n{SERVERS}\nlisten = "tcp"', 3, "forward.listen must be tcp:PORTS"),
    (f"[[forward]]\n{SERVERS}\nlisten = 80", 3, "forward.listen must be tcp:PORTS"),
    (
        '[[forward]]\nlisten = "tcp:80"\nservers = "10.0.0.2:80-90"',
        3,
        "forward.servers leads 80 to 10.0.0.2:80-90, ranges of different length",
    ),
    ('[[forward]]\nlisten = "tcp:80"\nservers = []', 3, "forward.servers must name a server"),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\n[[forward]]\nlisten = "tcp:80"\n{SERVERS}',
        4,
        "forward has tcp:80 and tcp:80, which overlap",
    ),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\nsheduler = "rr"',
        4,
        "forward.sheduler is unknown; known are listen, servers, scheduler",
    ),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\nscheduler = "fair"',
        4,
        "forward.scheduler must be one of rr, wrr, lc, wlc, sh",
    ),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\npersistence = -1',
        4,
        "forward.persistence must be seconds, from 0 to 86400, not -1",
    ),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\npersistence = nan',
        4,
        "forward.persistence must be seconds",
    ),
    (
        f'[[forward]]\nlisten = "tcp:80"\n{SERVERS}\ncheck = "ping"',
        4,
        "forward.check must be one of tcp, http",
    ),
    (
        '[[forward]]\nlisten = "tcp:80"\n[[forward.servers]]\nserver = "10.0.0.2:80"\nweight = -1',
        5,
        "forward.servers.weight must be a whole number from 0 to 65535, not -1",
    ),
    (
        '[[forward]]\nlisten = "tcp:80"\nservers = [{ server = "10.0.0.2:80", wheight = 1 }]',
        3,
        "forward.servers.wheight is unknown; known are server, weight",
    ),
    (
        '[[forward]]\nlisten = "tcp:80"\nservers = [{ weight = 1 }]',
        3,
        "forward.servers lacks server",
    ),
    (CHECKED + "check = {}", 4, "forward.check must have a kind, one of tcp, http"),
    (CHECKED + 'check = { kind = "icmp" }', 4, "forward.check.kind must be one of tcp, http"),
    (CHECKED + 'check = { kind = "tcp", every = 1 }', 4, "forward.check.every is unknown"),
    (
        CHECKED + 'check = { kind = "http", path = "health" }',
        4,
        'forward.check.path must be a path, which begins with / and has no spaces, not "health"',
    ),
    (
        CHECKED + 'check = { kind = "http", path = "/ HTTP/1.1\\r\\nX: y" }',
        4,
        "forward.check.path must be a path",
    ),
    (
        CHECKED + 'check = { kind = "tcp", interval = 0 }',
        4,
        "forward.check.interval must be seconds, from 0.1 to 3600, not 0",
    ),
    (
        CHECKED + 'check = { kind = "tcp", rise = 0 }',
        4,
        "forward.check.rise must be a whole number from 1 to 100, not 0",
    ),
    ('trigger = ["tcp:1"]', 1, "trigger must be a table with outbound and opens"),
    ('[[trigger]]\nopens = "tcp:113"', 1, "trigger lacks outbound"),
    (
        '[[trigger]]\noutbound = "tcp:6667,"\nopens = "tcp:113"',
        2,
        "trigger.outbound must be PORT or LO-HI",
    ),
    (
        '[[trigger]]\noutbound = "tcp:6667"\nopens = "113"',
        3,
        "trigger.opens must be tcp:PORTS or udp:PORTS",
    ),
    (
        '[[trigger]]\noutbound = "tcp:6667"\nopens = "tcp:113"\nseconds = 0',
        4,
        "trigger.seconds must be seconds, from 1 to 86400, not 0",
    ),
    (
        'trigger = [{ outbound = "tcp:1", opens = "tcp:9" },'
        '{ outbound = "tcp:2", opens = "tcp:9" }]',
        1,
        "trigger has tcp:9 and tcp:9, which overlap",
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG_FILES)
def test_a_wrong_table_is_told_with_its_line(
    file: Path, text: str, line: int, message: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(file, {})
    told = str(caught.value)
    assert told.startswith(f"{file}:{line}: {message}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('forward = ["tcp:113=10.0.0.2:113"]', "forward tcp:113 and trigger tcp:113-114 open"),
        ('ports = "113-114"', "ports: all of them are forwarded"),
    ],
)
def test_what_is_right_alone_and_wrong_together_is_told(
    file: Path, text: str, message: str
) -> None:
    file.write_text(text + '\n[[trigger]]\noutbound = "tcp:6667"\nopens = "tcp:113-114"')
    with pytest.raises(ConfigurationError) as caught:
        load(file, {})
    assert str(caught.value).startswith(message)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("tcpudp:=,-.0123456789 ", max_size=40))
def test_any_text_is_taken_or_refused_in_one_line(written: str) -> None:
    try:
        load(None, {"forward": (written,)})
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
