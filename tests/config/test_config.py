"""The configuration: which source wins, and one clear line for every wrong value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfmasq import config
from nfmasq.config import Configuration, ConfigurationError, UsageError, load
from nfmasq.engine import (
    BEHAVIOURS,
    ICMP,
    OTHER_PROTOCOLS,
    PORT_SELECTIONS,
    TCP,
    UDP,
    Settings,
)
from nfmasq.engine.table.timeouts import PROFILES
from nfmasq.engine.unsolicited import UNSOLICITED


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nfmasq.toml"


@pytest.fixture(autouse=True)
def _no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "default.toml")


def test_without_anything_the_defaults_hold() -> None:
    configuration = load(None, {})

    assert configuration == Configuration()
    assert configuration.queue == 0
    assert configuration.ports == (range(61000, 65096),)
    assert configuration.metrics == ("127.0.0.1", 9469)
    assert str(configuration.control) == "/run/nfmasq.sock"
    assert configuration.settings.timeouts == PROFILES["rfc"]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    file.write_text('queue = 3\nports = "50000-50009"\n')

    configuration = load(file, {"queue": 4, "mapping": None, "masquerade-address": ()})

    assert configuration.queue == 4
    assert configuration.ports == (range(50000, 50010),)
    assert configuration.settings.mapping == dict.fromkeys((TCP, UDP, ICMP), "endpoint-independent")


def test_several_ranges_of_ports_are_sorted_and_all_masqueraded_with(file: Path) -> None:
    file.write_text('ports = "61000-61001,600-602"')

    configuration = load(file, {})

    assert configuration.ports == (range(600, 603), range(61000, 61002))
    assert configuration.as_table()["ports"] == "600-602,61000-61001"
    masquerade = configuration.masquerade()
    assert [masquerade.sessions.get_next_mport() for _ in range(6)] == [
        600,
        601,
        602,
        61000,
        61001,
        600,
    ]


@pytest.mark.parametrize("key", ["gso", "inbound-refresh", "reset-on-address-change"])
@pytest.mark.parametrize("value", [True, False])
def test_a_switch_is_on_unless_told_otherwise(file: Path, key: str, value: bool) -> None:
    assert load(None, {}).value(key) is True
    file.write_text(f"{key} = {str(not value).lower()}")
    assert load(file, {}).value(key) is not value
    assert load(file, {key: value}).value(key) is value


def test_interfaces_have_the_rules_loaded_unless_told_otherwise(file: Path) -> None:
    assert load(None, {}).rules == "keep"
    file.write_text('inside = ["lan", "ppp+"]\noutside = "wan"\n')
    configuration = load(file, {})
    assert (configuration.inside, configuration.outside) == (("lan", "ppp+"), ("wan",))
    assert configuration.rules == "load"
    assert load(file, {"rules": "off"}).rules == "off"
    assert load(file, {"inside": ("lan7",)}).inside == ("lan7",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('inside = "a"', "inside is given without outside"),
        ('outside = "a"', "outside is given without inside"),
        (
            'rules = "load"',
            "rules load needs to know for which interfaces: give inside and outside",
        ),
        ('inside = "a"\noutside = "a"', "inside a and outside a overlap"),
        ('inside = "a+"\noutside = ["b", "ab"]', "inside a[+] and outside ab overlap"),
        ('inside = "ab+"\noutside = "a+"', "inside ab[+] and outside a[+] overlap"),
    ],
)
def test_interfaces_that_contradict_each_other(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load(file, {})


def test_no_inside_host_is_limited_unless_told_otherwise(file: Path) -> None:
    unlimited = load(None, {}).settings
    assert unlimited.max_entries_per_host == 0
    assert unlimited.max_ports_per_host == 0
    assert unlimited.max_new_per_host == 0

    file.write_text("max-entries-per-host = 500\nmax-ports-per-host = 64\nmax-new-per-host = 20")
    limited = load(file, {"max-new-per-host": 0}).settings
    assert limited.max_entries_per_host == 500
    assert limited.max_ports_per_host == 64
    assert limited.max_new_per_host == 0


@pytest.mark.parametrize(
    ("key", "default"),
    [("mapping", Settings().mapping), ("filtering", Settings().filtering)],
)
class TestByProtocol:
    """Mapping and filtering have one value for all protocols, or a table by protocol."""

    STRICT = "address-and-port-dependent"

    def test_one_value_is_for_all_protocols(
        self, file: Path, key: str, default: dict[int, str]
    ) -> None:
        file.write_text(f'{key} = "{self.STRICT}"')

        assert load(file, {}).value(key) == dict.fromkeys((TCP, UDP, ICMP), self.STRICT)

    def test_what_a_table_does_not_name_keeps_the_default(
        self, file: Path, key: str, default: dict[int, str]
    ) -> None:
        file.write_text(f'[{key}]\ntcp = "{self.STRICT}"')

        assert load(file, {}).value(key) == default | {TCP: self.STRICT}

    def test_the_command_line_replaces_the_whole_table(
        self, file: Path, key: str, default: dict[int, str]
    ) -> None:
        file.write_text(f'[{key}]\nudp = "{self.STRICT}"')

        assert load(file, {key: default[TCP]}).value(key) == default

    def test_a_table_is_written_only_where_protocols_differ(
        self, file: Path, key: str, default: dict[int, str]
    ) -> None:
        file.write_text(f'{key}.udp = "{self.STRICT}"')

        assert load(None, {}).as_table()[key] == default[TCP]
        assert load(file, {}).as_table()[key] == {
            "tcp": default[TCP], "udp": self.STRICT, "icmp": default[ICMP],
        }  # fmt: skip


def test_the_default_file_is_read_where_there_is_one() -> None:
    config.DEFAULT_FILE.write_text("queue = 7")

    assert load(config.default_file(), {}).queue == 7


def test_a_file_that_is_named_must_be_there(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load(file, {})


def test_an_address_may_stand_alone_or_in_a_list(file: Path) -> None:
    file.write_text('masquerade-address = "198.51.100.2"')
    assert load(file, {}).masquerade_addresses == (0xC6336402,)

    file.write_text('masquerade-address = ["198.51.100.2", "198.51.100.3", "198.51.100.2"]')
    assert load(file, {}).masquerade_addresses == (0xC6336402, 0xC6336403)


def test_single_timeouts_stand_on_a_profile(file: Path) -> None:
    file.write_text('[timeouts]\nprofile = "linux-2.2"\ntcp-established = 7440\nudp = 0.5\n')

    timeouts = load(file, {}).settings.timeouts

    assert (timeouts.tcp_established, timeouts.udp) == (7440, 0.5)
    assert timeouts.tcp_close == PROFILES["linux-2.2"].tcp_close


def test_a_profile_on_the_command_line_replaces_all_timeouts_of_the_file(file: Path) -> None:
    file.write_text("[timeouts]\nudp = 30\n")

    assert load(file, {"timeouts": "linux-2.2"}).settings.timeouts == PROFILES["linux-2.2"]


def test_metrics_can_be_off_or_on_ipv6() -> None:
    assert load(None, {"metrics": "off"}).metrics is None
    assert load(None, {"metrics": "[::1]:9469"}).metrics == ("::1", 9469)


ports = (
    st.lists(st.integers(1, 65536), min_size=2, max_size=20, unique=True)
    .map(sorted)
    .map(lambda ends: tuple(map(range, ends[::2], ends[1::2])))
)
addresses = st.lists(
    st.integers(0x01000000, 0x7EFFFFFF) | st.integers(0x80000000, 0xDFFFFFFF), unique=True
).map(tuple)
behaviours = st.fixed_dictionaries(dict.fromkeys((TCP, UDP, ICMP), st.sampled_from(BEHAVIOURS)))
metrics = st.none() | st.tuples(st.sampled_from(["127.0.0.1", "::"]), st.integers(1, 65535))


def as_toml(table: dict[str, object], within: str = "") -> Iterator[str]:
    """Yield the lines of a file; tables become dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from as_toml(value, f"{within}{key}.")
        else:
            yield f"{within}{key} = {json.dumps(value)}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.builds(
        Configuration,
        settings=st.builds(
            Settings,
            ports=st.just(Settings().ports),
            mapping=behaviours,
            filtering=behaviours,
            port_selection=st.sampled_from(list(PORT_SELECTIONS)),
            other_protocols=st.sampled_from(OTHER_PROTOCOLS),
            timeouts=st.sampled_from(list(PROFILES.values())),
            max_entries=st.integers(1, 1 << 26),
            max_entries_per_host=st.integers(0, 1 << 26),
            max_ports_per_host=st.integers(0, 65535),
            max_new_per_host=st.integers(0, 1 << 26),
            inbound_refresh=st.booleans(),
            unsolicited=st.sampled_from(UNSOLICITED),
            reset_on_address_change=st.booleans(),
        ),
        queue=st.integers(0, 65535),
        ports=ports,
        masquerade_addresses=addresses,
        inside=st.just(("lan", "ppp+")),
        outside=st.just(("wan",)),
        rules=st.sampled_from(["load", "keep", "off"]),
        clamp_mss=st.booleans(),
        checksum_fill=st.booleans(),
        reserve=st.booleans(),
        iptables=st.sampled_from(["iptables", "iptables-legacy"]),
        forwarding=st.sampled_from(["on", "keep"]),
        metrics=metrics,
        log_level=st.sampled_from(config.LOG_LEVELS),
        apps=st.sampled_from([{}, {"ftp": (21, 2121)}, {"irc": (6667,), "tftp": (69,)}]),
    )
)
def test_a_configuration_written_to_a_file_and_read_is_the_same(
    file: Path, configuration: Configuration
) -> None:
    file.write_text("\n".join(as_toml(configuration.as_table())))

    assert load(file, {}) == configuration


WRONG_FILES = [
    ("\nqueu = 1", 2, "queu is unknown; known are queue, ports"),
    ("queue = 65536", 1, "from 0 to 65535, not 65536"),
    ("queue = -1", 1, "from 0 to 65535"),
    ('queue = "0"', 1, 'whole number from 0 to 65535, not "0"'),
    ("queue = true", 1, "not true"),
    ('# ports\n\nports = "65000-61000"', 3, "the lower port first"),
    ('ports = "0-10"', 1, "1 to 65535"),
    ('ports = "1-65536"', 1, "1 to 65535"),
    ("ports = [1, 2]", 1, "must be LO-HI"),
    ("ports = 61000", 1, "must be LO-HI"),
    ('ports = ["600-1023", "61000-65095"]', 1, "must be LO-HI"),
    (
        'ports = ""',
        1,
        'must be LO-HI[,LO-HI]..., from 1 to 65535 with the lower port first, not ""',
    ),
    ('ports = "600-1023,"', 1, 'not ""'),
    ('ports = "600-1023, 61000-65095"', 1, 'not " 61000-65095"'),
    ('ports = "600-1023,61000-70000"', 1, 'not "61000-70000"'),
    ('ports = "5-9,7-12"', 1, "ports must not overlap, as 5-9 and 7-12 do"),
    ('ports = "20-20,1-30"', 1, "ports must not overlap, as 1-30 and 20-20 do"),
    ('masquerade-address = "198.51.100.256"', 1, "an IPv4 address"),
    ("masquerade-address = 3325256706", 1, "an IPv4 address or a list of them"),
    ("masquerade-address = [\n  3325256706,\n]", 1, "an IPv4 address"),
    ('masquerade-address = ["198.51.100.2", "0.0.0.0"]', 1, "the outside can answer to"),
    ('masquerade-address = "127.0.0.1"', 1, "the outside can answer to"),
    ('masquerade-address = "224.0.0.1"', 1, "the outside can answer to"),
    ('masquerade-address = "255.255.255.255"', 1, "the outside can answer to"),
    *(
        (f'\ninside = ["lan", "{name}"]', 2, "inside must be the name of an interface, or the")
        for name in ("", "+", "a b", "a/b", "-a", ".", "..", "..+", "p+p", "x" * 16, "x" * 15 + "+")
    ),
    ("inside = 5", 1, "inside must be an interface or a list of them, not 5"),
    ('outside = ["wan", "wan"]', 1, "outside has wan twice"),
    ('rules = "on"', 1, "rules must be one of load, keep, off"),
    ('forwarding = "off"', 1, "forwarding must be one of on, keep"),
    ('iptables = "nft"', 1, "iptables must be one of iptables, iptables-nft, iptables-legacy"),
    ('reserve = "yes"', 1, "reserve must be true or false"),
    ('metrics = "9469"', 1, "must be ADDRESS:PORT"),
    ('metrics = "localhost:9469"', 1, "must be ADDRESS:PORT"),
    ('metrics = "127.0.0.1:70000"', 1, "must be ADDRESS:PORT"),
    ('control = ""', 1, "a path of at most 107 bytes"),
    (f'control = "/{"x" * 107}"', 1, "a path of at most 107 bytes"),
    ('mapping = "symmetric"', 1, "one of endpoint-independent, address-dependent"),
    ("mapping = 1", 1, "one of endpoint-independent, address-dependent"),
    (
        '[filtering]\ntcp = "address-dependent"\nudp = "full cone"',
        3,
        "filtering.udp must be one of",
    ),
    ('[mapping]\nsctp = "x"', 2, "mapping.sctp is unknown; known are tcp, udp, icmp"),
    ("max-entries-per-host = -1", 1, "whole number from 0"),
    ("max-ports-per-host = 65536", 1, "from 0 to 65535"),
    ("max-new-per-host = 1.5", 1, "whole number from 0"),
    ('inbound-refresh = "no"', 1, "must be true or false"),
    ('unsolicited = "reject"', 1, "must be one of drop, accept"),
    ("log-level = 10", 1, "one of debug, info"),
    ('timeouts = "linux"', 1, "one of rfc, linux-2.2"),
    ('queue = 1\n[timeouts]\nprofile = "x"', 3, "timeouts.profile must be one of rfc, linux-2.2"),
    ("[timeouts]\n\ntcp = 5", 3, "timeouts.tcp is unknown; known are profile, tcp-none"),
    ("[timeouts]\nudp = 0", 2, "timeouts.udp must be seconds, more than 0"),
    ("[timeouts]\nudp = nan", 2, "timeouts.udp must be seconds"),
    ("timeouts = { icmp = 'long' }", 1, "timeouts.icmp must be seconds"),
    ('queue = 1\n"timeouts".udp = false', 2, "timeouts.udp must be seconds"),
    ("[timeouts]\nprofile = []", 2, "one of rfc"),
    ("socket-buffer = 1", 1, "from 65536"),
    ("gso = 1", 1, "must be true or false, not 1"),
    ("queue = 1\nqueue 2", 2, "not TOML"),
    ("queue = 1\nqueue = 2", 2, "not TOML"),
    ("queue = 1\n\nmetrics = ", 3, "not TOML"),
    ('queue = 1\r\nmapping = "x"\r\n', 2, "mapping must be"),
    ('control = """\n/run/\nx"""\nports = 1', 4, "ports must be LO-HI"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG_FILES)
def test_a_wrong_file_is_told_with_its_line(file: Path, text: str, line: int, message: str) -> None:
    file.write_bytes(text.encode())

    with pytest.raises(ConfigurationError) as caught:
        load(file, {})

    told = str(caught.value)
    assert told.startswith(f"{file}:{line}: ")
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"queue = 1\n# caf\xe9\n", "{file}:2: not UTF-8 text"),
        (b"queue = " + b"9" * 5000, "{file}: "),
        (b"queue = " + b"[" * 100_000, "{file}: nested too deeply"),
    ],
    ids=["latin-1", "huge number", "deep"],
)
def test_a_file_that_is_no_configuration_at_all(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)

    with pytest.raises(ConfigurationError) as caught:
        load(file, {})

    assert str(caught.value).startswith(message.format(file=file))


def test_a_directory_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(tmp_path, {})


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_text_is_read_or_refused_in_one_line(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        load(file, {})
    except ConfigurationError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("queue", 65536, "--queue must be a whole number from 0 to 65535, not 65536"),
        ("ports", "65000-61000", "--ports must be LO-HI"),
        ("masquerade-address", ("10.0.0.300",), "--masquerade-address must be an IPv4 address"),
        ("metrics", "everywhere", "--metrics must be ADDRESS:PORT"),
        ("control", Path("x" * 200), "--control must be a path"),
    ],
)
def test_a_wrong_option_is_told_by_its_name(option: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(None, {option: value})

    assert str(caught.value).startswith(message)


def test_addresses_are_written_dotted() -> None:
    table = Configuration(masquerade_addresses=(int(IPv4Address("198.51.100.2")),)).as_table()

    assert table["masquerade-address"] == ["198.51.100.2"]
    assert table["ports"] == "61000-65095"
