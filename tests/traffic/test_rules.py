"""iptables/nfmasq-rules: what it loads, what it leaves behind, and what the rules do on the wire.

Everything is tried with iptables-nft and with iptables-legacy.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from socket import AF_INET, IPPROTO_RAW, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM
from threading import Timer

import dpkt
import netfilterqueue
import pytest

from nfmasq.daemon.netfilter import HAIRPIN_MARK
from nfmasq.daemon.nfnetlink import CHECKSUM_MISSING, skb_info
from nfmasq.daemon.queue import PacketQueue
from nfmasq.daemon.verdicts import Verdicts
from nfmasq.flowcache.marks import KNOWN_MARK
from nfmasq.lab import Lab, Packet
from tests.traffic.conftest import taking

# Not direct: a stateful firewall sees a connection begin, and then no more of it.
data_path = taking("no-gso", "routed")

SCRIPT = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"
INSIDE = IPv4Network("10.77.0.0/24")
ICMP_ERRORS = {3, 4, 11, 12}

EMPTY = """\
*raw
:PREROUTING ACCEPT
:OUTPUT ACCEPT
COMMIT
*mangle
:PREROUTING ACCEPT
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
COMMIT
*security
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
COMMIT
*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
COMMIT
"""

FOREIGN = """\
*raw
:PREROUTING ACCEPT
:OUTPUT ACCEPT
:NFMASQUERADE -
-A PREROUTING -i lan -j NFMASQUERADE
-A NFMASQUERADE -s 192.0.2.1/32 -j DROP
COMMIT
*mangle
:PREROUTING ACCEPT
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
-A FORWARD -s 192.0.2.7/32 -j RETURN
COMMIT
*security
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:Empty -
-A FORWARD -j Empty
-A FORWARD -s 192.0.2.0/24 -m comment --comment "-A FORWARD -j NFMASQ-FORWARD" -j Empty
COMMIT
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
-A FORWARD -i lan -j ACCEPT
COMMIT
"""

FIREWALL = """\
*filter
:INPUT DROP
:FORWARD DROP
:OUTPUT DROP
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -i lan -j ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -i lan -o wan -m conntrack --ctstate NEW -j ACCEPT
-A OUTPUT -m conntrack --ctstate INVALID -j DROP
-A OUTPUT -j ACCEPT
COMMIT
"""


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def iptables(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    """Yield the command to use; no rule, and no tracked connection, is left after the test."""
    command: str = request.param
    yield command
    load(lab, command, EMPTY)
    load(lab, command, "*raw\nCOMMIT\n*mangle\nCOMMIT\n*security\nCOMMIT\n*filter\nCOMMIT\n")
    lab.gateway.run(["conntrack", "-F"])
    reserved(lab, "\n")


def load(lab: Lab, iptables: str, rules: str) -> None:
    lab.gateway.run([f"{iptables}-restore"], input=rules)


def saved(lab: Lab, iptables: str) -> str:
    """Return what iptables-save prints, without counters and the time of day."""
    text = lab.gateway.run([f"{iptables}-save"]).stdout
    return re.sub(r"^#.*\n| \[\d+:\d+\]", "", text, flags=re.MULTILINE)


def reserved(lab: Lab, ports: str | None = None) -> str:
    """Return the reserved ports of the gateway; reserves `ports` first, where any are given."""
    return lab.gateway.sysctl("net.ipv4.ip_local_reserved_ports", ports)


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script without root, wherever the repository may be."""
    return subprocess.run(
        ["sh", "-s", "--", *arguments],
        input=SCRIPT.read_text(),
        capture_output=True,
        text=True,
        timeout=60,
        user="nobody" if os.geteuid() == 0 else None,
    )


# -- options ---------------------------------------------------------------------


def test_print_shows_the_rules_without_root() -> None:
    done = script("print", "--inside", "lan", "--outside", "wan", "--queue", "3")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "-A NFMASQ-FORWARD -i lan -o wan -j NFQUEUE --queue-num 3\n" in done.stdout
    assert {line for line in done.stdout.splitlines() if line.startswith("*")} == {
        "*raw",
        "*mangle",
        "*security",
    }


def test_each_pair_of_an_inside_and_an_outside_interface_is_masqueraded() -> None:
    done = script(
        "print", *("--inside=a", "--inside=b", "--inside=a"), *("--outside=c", "--outside=d")
    )
    for target in ("-j NFQUEUE", "-p udp -j CHECKSUM"):
        pairs = re.findall(rf"-A NFMASQ-FORWARD -i (\S+) -o (\S+) {target}", done.stdout)
        assert sorted(pairs) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def test_a_beginning_of_names_is_handed_to_iptables_as_it_is() -> None:
    printed = script("print", "--inside=lan+", "--outside=ppp+", "--outside=wan").stdout
    pairs = re.findall(r"-A NFMASQ-FORWARD -i (\S+) -o (\S+) -j NFQUEUE", printed)
    assert pairs == [("lan+", "ppp+"), ("lan+", "wan")]


def test_several_ranges_of_ports() -> None:
    done = script("print", "--inside=a", "--outside=b", "--ports", "600-1023,7-7")
    ranges = re.findall(r"-i b -p udp -m udp --dport (\S+)", done.stdout)
    assert ranges == ["600:1023", "7"]


def test_forwarded_ports_come_in_beside_the_masquerade_ports() -> None:
    forwards = ("--forward=tcp:8080", "--forward", "udp:5000-5009")
    plain = script("print", "--inside=a", "--outside=b").stdout.splitlines()
    with_them = script("print", "--inside=a", "--outside=b", *forwards).stdout.splitlines()
    assert [line for line in with_them if line not in plain] == [
        "-A NFMASQ-PREROUTING -i b -p tcp -m tcp --dport 8080 -j NFQUEUE --queue-num 0",
        "-A NFMASQ-PREROUTING -i b -p udp -m udp --dport 5000:5009 -j NFQUEUE --queue-num 0",
        "-A NFMASQ-PREROUTING -i a -p tcp -m tcp --dport 8080 -m addrtype --dst-type LOCAL "
        "-m addrtype ! --dst-type LOCAL --limit-iface-in -j NFMASQ-HAIRPIN",
        "-A NFMASQ-PREROUTING -i a -p udp -m udp --dport 5000:5009 -m addrtype --dst-type LOCAL "
        "-m addrtype ! --dst-type LOCAL --limit-iface-in -j NFMASQ-HAIRPIN",
        "-A NFMASQ-OUTPUT -o b -p tcp -m tcp --sport 8080 -j NFQUEUE --queue-num 0",
        "-A NFMASQ-OUTPUT -o b -p udp -m udp --sport 5000:5009 -j NFQUEUE --queue-num 0",
    ]


def test_other_protocols_come_in_through_a_chain_of_their_own() -> None:
    plain = script("print", "--inside=a", "--outside=b").stdout.splitlines()
    other = script("print", "--inside=a", "--outside=b", "--other-protocols").stdout.splitlines()
    assert [line for line in other if line not in plain] == [
        ":NFMASQ-OTHER - [0:0]",
        "-A NFMASQ-PREROUTING -i b -j NFMASQ-OTHER",
        "-A NFMASQ-OTHER -p tcp -j RETURN",
        "-A NFMASQ-OTHER -p udp -j RETURN",
        "-A NFMASQ-OTHER -d 224.0.0.0/4 -j RETURN",
        "-A NFMASQ-OTHER -j NFQUEUE --queue-num 0",
    ]


def test_without_the_flow_cache_no_packet_passes_by_because_its_flow_is_known() -> None:
    sides = "--inside=a", "--outside=b", "--outside=c"
    plain = script("print", *sides).stdout.splitlines()
    without = script("print", *sides, "--no-flow-cache").stdout.splitlines()
    known = f"{KNOWN_MARK:#x}/{KNOWN_MARK:#x}"
    assert [line for line in plain if line not in without] == [
        ":NFMASQ-KNOWN - [0:0]",
        f"-A NFMASQ-KNOWN -j MARK --set-xmark 0x0/{KNOWN_MARK:#x}",
        "-A NFMASQ-KNOWN -j ACCEPT",
        f"-A NFMASQ-PREROUTING -i b -m mark --mark {known} -j NFMASQ-KNOWN",
        f"-A NFMASQ-PREROUTING -i c -m mark --mark {known} -j NFMASQ-KNOWN",
        f"-A NFMASQ-PREROUTING -m mark --mark {known} -j RETURN",
        f"-A NFMASQ-FORWARD -m mark --mark {known} -j RETURN",
        f"-A NFMASQ-FORWARD -o b -m mark --mark {known} -j ACCEPT",
        f"-A NFMASQ-FORWARD -o c -m mark --mark {known} -j ACCEPT",
    ]
    assert [line for line in without if line not in plain] == []
    assert without == [line for line in plain if line in without]


def test_what_is_known_passes_before_any_other_rule_of_ours_sees_it() -> None:
    """The first rules of each chain are those of the flow cache."""
    printed = script("print", "--inside=a", "--outside=b", "--clamp-mss").stdout
    for chain in ("NFMASQ-PREROUTING", "NFMASQ-FORWARD"):
        for table in printed.split("\n*"):
            rules = re.findall(rf"^-A {chain} .*", table, re.MULTILINE)
            known = [f"{KNOWN_MARK:#x}" in rule for rule in rules]
            assert known == sorted(known, reverse=True)


def test_only_what_comes_from_the_inside_is_marked_as_a_hairpin() -> None:
    """With the mark, a packet of an outside host would pass for a packet of an inside host."""
    printed = script("print", "--inside=a", "--inside=b", "--outside=c", "--outside=d").stdout
    raw, _ = printed.split("*security")
    assert set(re.findall(r"-i (\S+) .*-j NFMASQ-HAIRPIN", raw)) == {"a", "b"}
    assert all("-i " in line for line in raw.splitlines() if line.endswith("-j NFMASQ-HAIRPIN"))


def test_the_marks_are_those_that_nfmasq_looks_for_and_sets() -> None:
    marks = re.findall(r"(0x\S+)/(0x\S+)", script("print", "--inside=a", "--outside=b").stdout)
    assert marks
    assert {int(text, 16) for pair in marks for text in pair} == {HAIRPIN_MARK, KNOWN_MARK, 0}


def test_a_masquerade_address_that_is_not_on_the_gateway_is_told_to_the_rules() -> None:
    addresses = ("--masquerade-address=192.0.2.7", "--masquerade-address=192.0.2.8")
    printed = script("print", "--inside=a", "--outside=b", *addresses).stdout
    hairpins = re.findall(r"-A NFMASQ-PREROUTING (-d \S+ )?-i a .*-j NFMASQ-HAIRPIN", printed)
    assert set(hairpins) == {"", "-d 192.0.2.7/32 ", "-d 192.0.2.8/32 "}
    assert len(hairpins) == 3 * (2 + 4)  # two protocols, and the ICMP errors


def test_no_queue_is_ever_bypassed() -> None:
    assert "bypass" not in script("print", "--inside=a", "--outside=b").stdout


BAD_USAGE = [
    [],
    ["upwards"],
    ["up", "down"],
    ["up", "--outside", "b"],
    ["up", "--inside", "a"],
    ["up", "--inside"],
    ["print", "--inside", "", "--outside", "b"],
    ["print", "--inside", "a b", "--outside", "c"],
    ["print", "--inside", "a;b", "--outside", "c"],
    ["print", "--inside", "p+p", "--outside", "c"],
    ["print", "--inside", "+", "--outside", "c"],
    ["print", "--inside", "ppp++", "--outside", "c"],
    ["print", "--inside", "sixteen-letters-", "--outside", "c"],
    ["print", "--inside", "fifteen-letters+", "--outside", "c"],
    ["print", "--inside", "ppp+", "--outside", "ppp0"],
    ["print", "--inside", "ppp0", "--outside", "ppp+"],
    ["print", "--inside", "ppp+", "--outside", "p+"],
    ["print", "--config"],
    ["print", "--config", "nfmasq.toml", "--inside", "a", "--outside", "b"],
    ["print", "--inside", "same", "--outside", "same"],
    ["print", "--inside", "a", "--outside", "b", "--quiet"],
    ["print", "--inside", "a", "--outside", "b", "--clamp-mss=1400"],
    *(
        ["print", "--inside", "a", "--outside", "b", "--queue", number]
        for number in ("", "-1", "65536", "1e3", "0x10", "007", "1 2", "99999999999999999999")
    ),
    *(
        ["print", "--inside", "a", "--outside", "b", "--ports", ports]
        for ports in ("", "5", "5-", "-5", "6-5", "0-5", "5-65536", "1-2-3", "1-2,", ",1-2", "a-b")
    ),
    *(
        ["print", "--inside", "a", "--outside", "b", "--masquerade-address", address]
        for address in (
            "",
            "1.2.3",
            "1.2.3.4.5",
            "1.2.3.256",
            "1.2.3.",
            ".1.2.3",
            "1..2.3",
            "a.b.c.d",
        )
    ),
    *(
        ["print", "--inside", "a", "--outside", "b", "--forward", forward]
        for forward in ("", "80", "tcp:", "tcp:0", "tcp:9-8", "icmp:8", "tcp:1-2,5", "tcp:a", "tcp")
    ),
]


@pytest.mark.parametrize("arguments", BAD_USAGE, ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str]) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"nfmasq-rules: .+\n", done.stderr)


@pytest.mark.parametrize("verb", ["down", "status", "restart"])
def test_without_root_it_says_so(verb: str) -> None:
    done = script(verb, "--inside", "a", "--outside", "b")
    assert done.returncode == 1
    assert done.stderr == f"nfmasq-rules: {verb}: must be root\n"


# -- loading and unloading -------------------------------------------------------


@pytest.fixture(
    params=[
        "",
        "--other-protocols",
        "--clamp-mss",
        "--no-checksum-fill",
        "--reserve",
        "--other-protocols --clamp-mss --forward=tcp:80",
    ]
)
def flags(request: pytest.FixtureRequest) -> list[str]:
    options: str = request.param
    return options.split()


def test_down_leaves_what_was_there(lab: Lab, iptables: str, flags: list[str]) -> None:
    load(lab, iptables, FOREIGN)
    before = saved(lab, iptables)
    lab.rules("up", *flags, IPTABLES=iptables)
    assert saved(lab, iptables) != before
    lab.rules("down", IPTABLES=iptables)
    assert saved(lab, iptables) == before


def test_down_takes_the_tables_away_that_up_made(lab: Lab, flags: list[str]) -> None:
    assert saved(lab, "iptables-nft") == ""
    lab.rules("up", *flags, IPTABLES="iptables-nft")
    lab.rules("up", *flags, IPTABLES="iptables-nft")
    lab.rules("down", IPTABLES="iptables-nft")
    assert saved(lab, "iptables-nft") == ""


def test_up_without_an_option_takes_away_what_the_option_brought(lab: Lab, iptables: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    tables = "*mangle" in saved(lab, iptables)
    without = saved(lab, iptables)
    lab.rules("up", "--clamp-mss", "--other-protocols", IPTABLES=iptables)
    assert saved(lab, iptables) != without
    lab.rules("up", IPTABLES=iptables)
    left = saved(lab, iptables)
    if iptables == "iptables-legacy" and not tables:
        left = re.sub(r"\*mangle\n(:[A-Z]+ ACCEPT\n)*COMMIT\n", "", left)
    assert left == without


def test_down_leaves_a_table_that_somebody_uses_meanwhile(lab: Lab, iptables: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    lab.gateway.run([iptables, "-t", "raw", "-A", "OUTPUT", "-s", "192.0.2.1", "-j", "DROP"])
    lab.rules("down", IPTABLES=iptables)
    assert "-A OUTPUT -s 192.0.2.1/32 -j DROP" in saved(lab, iptables)
    assert "NFMASQ" not in saved(lab, iptables)


def test_down_without_up_changes_nothing(lab: Lab, iptables: str) -> None:
    load(lab, iptables, FOREIGN)
    before = saved(lab, iptables)
    lab.rules("down", IPTABLES=iptables)
    assert saved(lab, iptables) == before


def test_up_again_leaves_the_same_set(lab: Lab, iptables: str, flags: list[str]) -> None:
    load(lab, iptables, FOREIGN)
    lab.rules("up", *flags, IPTABLES=iptables)
    first = saved(lab, iptables)
    for verb in ("up", "restart"):
        lab.rules(verb, *flags, IPTABLES=iptables)
        assert saved(lab, iptables) == first


def test_up_with_other_options_replaces_the_set(lab: Lab, iptables: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    first = saved(lab, iptables)
    address = ["--masquerade-address", "192.0.2.7"]
    options = ["--inside", "lan1", "--queue", "7", "--ports", "600-1023", *address]
    lab.rules("up", *options, IPTABLES=iptables)
    lab.rules("status", *options, IPTABLES=iptables)
    second = saved(lab, iptables)
    assert "-A NFMASQ-FORWARD -i lan1 -o wan -j NFQUEUE --queue-num 7" in second
    assert "--queue-num 0" not in second
    assert "61000" not in second
    lab.rules("up", IPTABLES=iptables)
    assert saved(lab, iptables) == first


def test_the_jumps_are_at_the_top_and_once(lab: Lab, iptables: str) -> None:
    load(lab, iptables, FOREIGN)
    lab.rules("up", IPTABLES=iptables)
    foreign = ["-I", "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT"]
    lab.gateway.run([iptables, "-t", "security", *foreign])
    lab.rules("up", IPTABLES=iptables)
    listed = lab.gateway.run([iptables, "-t", "security", "-S", "FORWARD"]).stdout.splitlines()
    assert listed[1] == "-A FORWARD -j NFMASQ-FORWARD"
    assert listed.count("-A FORWARD -j NFMASQ-FORWARD") == 1


def test_status_tells_each_missing_rule(lab: Lab, iptables: str) -> None:
    flags = ["--other-protocols", "--clamp-mss", "--forward=tcp:80", "--forward=udp:90-91"]
    lab.rules("up", *flags, IPTABLES=iptables)
    assert lab.rules("status", *flags, IPTABLES=iptables).stdout == ""

    table = ""
    for line in saved(lab, iptables).splitlines():
        table = line[1:] if line.startswith("*") else table
        if not line.startswith("-A"):
            continue
        lab.gateway.run([iptables, "-t", table, "-D", *line.split()[1:]])
        status = lab.rules("status", *flags, check=False, IPTABLES=iptables)
        assert status.returncode == 1
        assert status.stdout == f"missing: -t {table} {line}\n"
        lab.rules("up", *flags, IPTABLES=iptables)
    assert table


@pytest.mark.parametrize(
    "option",
    [
        "--queue=1",
        "--ports=1-2",
        "--inside=lan1",
        "--outside=lan1",
        "--masquerade-address=192.0.2.7",
        "--other-protocols",
        "--clamp-mss",
        "--reserve",
    ],
)
def test_status_is_about_these_options(lab: Lab, iptables: str, option: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    assert lab.rules("status", option, check=False, IPTABLES=iptables).returncode == 1


@pytest.mark.parametrize("verb", ["up", "restart"])
def test_interfaces_that_are_not_there_yet_are_told_in_one_line(
    lab: Lab, iptables: str, verb: str
) -> None:
    absent = ["--inside=nolan", "--inside=la+", "--outside=up+", "--outside=wa"]
    done = lab.rules(verb, *absent, IPTABLES=iptables)
    assert done.stderr == (
        "nfmasq-rules: not there yet: nolan up+ wa "
        "(the rules are loaded, and take effect when it comes)\n"
    )
    assert "-A NFMASQ-FORWARD -i nolan -o up+ -j NFQUEUE" in saved(lab, iptables)
    assert lab.rules("status", *absent, IPTABLES=iptables).stderr == ""
    lab.rules("down", *absent, IPTABLES=iptables)
    assert "NFMASQ" not in saved(lab, iptables)


@pytest.fixture
def reserved_before(lab: Lab, iptables: str) -> str:
    """Reserve some ports on the gateway, one of them a masquerade port; returns them."""
    return reserved(lab, "8080,61005")


def test_down_takes_back_exactly_the_ports_that_up_reserved(
    lab: Lab, iptables: str, reserved_before: str
) -> None:
    for _ in range(2):
        lab.rules("up", "--reserve", IPTABLES=iptables)
        assert reserved(lab) == "8080,61000-65095"
    lab.rules("up", "--reserve", "--ports=7-7,61000-61009", IPTABLES=iptables)
    assert reserved(lab) == "7,8080,61000-61009"
    lab.rules("down", IPTABLES=iptables)
    assert reserved(lab) == reserved_before


def test_what_others_reserve_meanwhile_stays(lab: Lab, iptables: str, reserved_before: str) -> None:
    lab.rules("up", "--reserve", IPTABLES=iptables)
    reserved(lab, "9000,61000-62000")
    status = lab.rules("status", "--reserve", check=False, IPTABLES=iptables)
    assert status.returncode == 1
    assert status.stdout == "missing: 62001-65095 in net.ipv4.ip_local_reserved_ports\n"
    lab.rules("up", "--reserve", IPTABLES=iptables)
    assert reserved(lab) == "9000,61000-65095"
    lab.rules("down", IPTABLES=iptables)
    assert reserved(lab) == "9000,61005"


def test_up_without_reserve_takes_the_ports_back(
    lab: Lab, iptables: str, reserved_before: str
) -> None:
    lab.rules("up", "--reserve", IPTABLES=iptables)
    lab.rules("up", IPTABLES=iptables)
    assert reserved(lab) == reserved_before
    lab.rules("down", IPTABLES=iptables)
    assert reserved(lab) == reserved_before


def test_the_gateways_own_programs_get_no_reserved_port(
    lab: Lab, iptables: str, reserved_before: str
) -> None:
    own = lab.gateway.sysctl("net.ipv4.ip_local_port_range")
    lab.gateway.sysctl("net.ipv4.ip_local_port_range", "60990 61099")
    try:
        lab.rules("up", "--reserve", "--ports=61000-61099", IPTABLES=iptables)
        for _ in range(30):
            with closing(lab.gateway.socket(AF_INET, SOCK_DGRAM)) as udp:
                udp.bind(("", 0))
                assert udp.getsockname()[1] in range(60990, 61000)
    finally:
        lab.gateway.sysctl("net.ipv4.ip_local_port_range", own)


def test_a_load_that_fails_half_way_leaves_nothing(lab: Lab, iptables: str) -> None:
    """Somebody else uses a chain of ours: the table security fails, after raw was loaded."""
    load(lab, iptables, FOREIGN)
    for rule in ("-N NFMASQ-OLD", "-A FORWARD -s 192.0.2.1 -j NFMASQ-OLD"):
        lab.gateway.run([iptables, "-t", "security", *rule.split()])
    before = saved(lab, iptables)
    for verb in ("up", "down"):
        done = lab.rules(verb, "--reserve", check=False, IPTABLES=iptables)
        assert done.returncode == 1
        assert re.fullmatch(rf"nfmasq-rules: {verb} failed, nothing was changed: .+\n", done.stderr)
        assert saved(lab, iptables) == before
        assert reserved(lab) == ""


def test_ports_that_cannot_be_reserved_leave_everything_as_it_was(lab: Lab, iptables: str) -> None:
    before = saved(lab, iptables)
    read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys"
    up = f"{SCRIPT} up --inside lan --outside wan --reserve --iptables {iptables}"
    done = lab.gateway.run(["sh", "-c", f"{read_only} && exec {up}"], check=False)
    assert done.returncode == 1
    assert re.fullmatch("nfmasq-rules: up failed, nothing was changed: cannot .+\n", done.stderr)
    assert saved(lab, iptables) == before


# -- the configuration file ------------------------------------------------------

FILE = """\
inside = ["lan", "lan.7"]
outside = ["wan"]
queue = 3
ports = "600-700,61000-61009"
clamp-mss = true
checksum-fill = false
reserve = true
masquerade-address = "192.0.2.7"
forward = ["tcp:192.0.2.7:80=10.77.0.11:80", "udp:61000=10.77.0.11:53"]
[apps]
pptp = [1723]
"""

WRITTEN_OUT = [
    *(
        "--inside=lan",
        "--inside=lan.7",
        "--outside=wan",
        "--queue=3",
        "--ports=600-700,61000-61009",
    ),
    *("--clamp-mss", "--no-checksum-fill", "--reserve", "--masquerade-address=192.0.2.7"),
    *("--forward=tcp:80", "--other-protocols"),
]


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """Copy the script to a folder, with an nfmasq beside it; returns the copy."""
    copy = tmp_path / "bin" / "nfmasq-rules"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    program = copy.with_name("nfmasq")
    root = Path(__file__).parents[2]
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m nfmasq "$@"\n')
    program.chmod(0o755)
    return copy


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"}
    )


def test_without_interfaces_all_is_taken_from_the_file(beside: Path, tmp_path: Path) -> None:
    file = tmp_path / "a file.toml"
    file.write_text(FILE)
    done = run(beside, "print", "--config", file)
    assert done.stderr == ""
    assert done.stdout == script("print", *WRITTEN_OUT).stdout
    over = run(beside, "print", f"--config={file}", "--queue=5")
    assert over.stdout == script("print", *WRITTEN_OUT, "--queue=5").stdout


def test_the_iptables_of_the_file_is_used(lab: Lab, iptables: str, beside: Path) -> None:
    file = beside.with_name("nfmasq.toml")
    file.write_text(f'inside = "lan"\noutside = "wan"\niptables = "{iptables}"\n')
    lab.gateway.run([beside, "up", "--config", file])
    loaded = saved(lab, iptables)
    lab.gateway.run([beside, "status", "--config", file])
    lab.gateway.run([beside, "restart", "--config", file])
    assert saved(lab, iptables) == loaded
    assert "-A NFMASQ-FORWARD -i lan -o wan -j NFQUEUE --queue-num 0" in loaded
    lab.gateway.run([beside, "down", "--config", file])
    assert "NFMASQ" not in saved(lab, iptables)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("inside =\n", "nfmasq: {}:1: not TOML: .+"),
        ('inside = "a b"\n', "nfmasq: {}:1: inside must be .+"),
        ("", "nfmasq-rules: up needs --inside IF, here or as inside in {} .+"),
        (None, "nfmasq: {}: there is no such configuration file"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_in_one_line(
    beside: Path, text: str | None, complaint: str
) -> None:
    file = beside.with_name("nfmasq.toml")
    if text is not None:
        file.write_text(text)
    done = run(beside, "up", "--config", file)
    assert done.returncode in (1, 2)
    assert re.fullmatch(complaint.format(re.escape(str(file))) + "\n", done.stderr)


def test_without_nfmasq_the_file_is_not_read(lab: Lab, iptables: str, beside: Path) -> None:
    """Down goes on without it: it can remove what is there."""
    beside.with_name("nfmasq").unlink()
    file = beside.with_name("nfmasq.toml")
    file.write_text(FILE)
    path = {"PATH": "/usr/bin:/bin", "IPTABLES": iptables}
    done = lab.gateway.run([beside, "up", "--config", file], check=False, env=path)
    assert done.returncode == 1
    assert re.fullmatch(rf"nfmasq-rules: {file} is not read, .+ not found: .+\n", done.stderr)
    assert "NFMASQ" not in saved(lab, iptables)

    lab.rules("up", IPTABLES=iptables)
    done = lab.gateway.run([beside, "down", "--config", file], env=path)
    assert done.stderr.count("\n") == 1
    assert "NFMASQ" not in saved(lab, iptables)


def test_an_iptables_that_is_not_there(lab: Lab) -> None:
    done = lab.rules("up", check=False, IPTABLES="noiptables")
    assert done.returncode == 1
    assert done.stderr == "nfmasq-rules: noiptables-save: not found, install iptables\n"


# -- on the wire -----------------------------------------------------------------


def inside_addresses(packets: Iterable[Packet]) -> list[Packet]:
    """Return the packets with an inside address, in their own header or in a quoted header."""
    return [packet for packet in packets if any(a in INSIDE for a in addresses(packet.data))]


def addresses(packet: bytes) -> Iterator[IPv4Address]:
    yield IPv4Address(packet[12:16])
    yield IPv4Address(packet[16:20])
    transport = packet[(packet[0] & 15) * 4 :]
    if packet[9] == dpkt.ip.IP_PROTO_ICMP and transport[0] in ICMP_ERRORS:
        yield from addresses(transport[8:])


def send_of_each_kind(lab: Lab) -> None:
    """Send packets from the inside to the outside: TCP, UDP, ICMP, others, malformed ones."""
    outside = lab.outside[0].address
    with closing(lab.inside[0].socket(AF_INET, SOCK_RAW, IPPROTO_RAW)) as raw:
        for protocol in (1, 2, 6, 17, 33, 41, 47, 50, 51, 89, 108, 132, 136, 253):
            for payload in (b"", b"\x08", b"\x08\x00" + bytes(30), bytes(40)):
                source = IPv4Address(lab.inside[0].address).packed
                packet = dpkt.ip.IP(
                    src=source, dst=IPv4Address(outside).packed, p=protocol, data=payload
                )
                raw.sendto(bytes(packet), (outside, 0))
    with closing(lab.inside[0].socket(AF_INET, SOCK_DGRAM)) as udp:
        udp.sendto(bytes(3000), (outside, 9))


def send_a_last_one(lab: Lab) -> None:
    """Send a packet of the gateway's own: all that was let through before is outside before it."""
    with closing(lab.gateway.socket(AF_INET, SOCK_DGRAM)) as udp:
        udp.sendto(b"last", (lab.router.interfaces["wan"], 9))


def test_without_nfmasq_nothing_from_the_inside_leaves(lab: Lab, iptables: str) -> None:
    outgoing = "src net 10.77.0.0/24 or udp port 9"

    with lab.capture(lab.router, "wan", outgoing) as without_rules:
        send_of_each_kind(lab)
        send_a_last_one(lab)
    assert len(inside_addresses(without_rules)) > 50

    lab.rules("up", IPTABLES=iptables)
    with lab.capture(lab.router, "wan", outgoing) as with_rules:
        send_of_each_kind(lab)
        send_a_last_one(lab)
    assert [packet.data[28:] for packet in with_rules] == [b"last"]


def echo(lab: Lab, size: int) -> bool:
    """Say whether a datagram of `size` bytes goes to the outside host and comes back whole."""
    with (
        closing(lab.outside[0].socket(AF_INET, SOCK_DGRAM)) as server,
        closing(lab.inside[0].socket(AF_INET, SOCK_DGRAM)) as client,
    ):
        server.bind(("", 7))
        sent = os.urandom(size)
        client.sendto(sent, (lab.outside[0].address, 7))
        received, peer = server.recvfrom(65535)
        server.sendto(received, peer)
        return client.recv(65535) == sent


def download(lab: Lab, size: int) -> int:
    """Return how many of `size` bytes reach the inside host over TCP from the outside host."""
    with (
        closing(lab.outside[0].socket(AF_INET, SOCK_STREAM)) as server,
        closing(lab.inside[0].socket(AF_INET, SOCK_STREAM)) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        server.bind(("", 0))
        server.listen()
        client.connect((lab.outside[0].address, server.getsockname()[1]))
        connection, _ = server.accept()

        def serve() -> None:
            with connection:
                connection.sendall(bytes(size))

        thread.submit(serve)
        return sum(len(piece) for piece in iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(("flag", "said"), [([], 0), (["--no-checksum-fill"], CHECKSUM_MISSING)])
def test_a_checksum_that_was_left_to_a_card_reaches_nfmasq_filled_in(
    lab: Lab, iptables: str, flag: list[str], said: int
) -> None:
    heard: list[int] = []

    def note(packet: netfilterqueue.Packet, message: bytes, verdicts: Verdicts) -> None:
        heard.append(skb_info(message, packet.get_payload_len()))
        verdicts.drop(packet.id)
        queue.stop()

    lab.rules("up", *flag, IPTABLES=iptables)
    with (
        lab.gateway.call(PacketQueue, 0, note) as queue,
        closing(lab.inside[0].socket(AF_INET, SOCK_DGRAM)) as udp,
    ):
        udp.sendto(b"left to the card", (lab.outside[0].address, 9))
        too_late = Timer(5, queue.stop)
        too_late.start()
        queue.run()
        too_late.cancel()
    assert heard == [said]


def test_datagrams_reach_nfmasq_whole_and_no_flow_is_tracked(lab: Lab, iptables: str) -> None:
    lab.rules("up", IPTABLES=iptables)
    daemon = lab.nfmasq()
    try:
        assert echo(lab, 3000)
        assert echo(lab, 65507)
        assert lab.gateway.sysctl("net.netfilter.nf_conntrack_count") == "0"
    finally:
        daemon.stop()


@pytest.mark.parametrize("firewall", ["before", "after"])
def test_beside_a_stateful_firewall(lab: Lab, iptables: str, firewall: str) -> None:
    """The firewall drops INVALID packets and accepts ESTABLISHED ones.

    It is loaded before nfmasq's rules, or after them.
    """
    if firewall == "before":
        load(lab, iptables, FIREWALL)
    lab.rules("up", IPTABLES=iptables)
    if firewall == "after":
        load(lab, iptables, FIREWALL)
        lab.rules("status", IPTABLES=iptables)

    inside, gateway, outside = lab.inside[0], lab.gateway, lab.outside[0]
    daemon = lab.nfmasq()
    try:
        with lab.capture(lab.router, "wan") as seen:
            assert download(lab, 1_000_000) == 1_000_000
            assert echo(lab, 100)
            assert echo(lab, 3000)
            inside.run(["ping", "-q", "-c", "1", "-W", "2", outside.address])

            # An error from the outside reaches the program that sent.
            with closing(inside.socket(AF_INET, SOCK_DGRAM)) as udp:
                udp.connect((outside.address, 9))
                udp.send(b"anybody?")
                with pytest.raises(ConnectionRefusedError):
                    udp.recv(1)

            # An error that the gateway itself sends, about a rewritten packet, reaches it, too.
            with closing(inside.socket(AF_INET, SOCK_STREAM)) as tcp:
                with pytest.raises(OSError, match="No route to host") as caught:
                    tcp.connect(("198.51.100.77", 80))
                assert caught.value.errno == errno.EHOSTUNREACH

            # nfmasq does not touch the gateway's own traffic.
            gateway.run(["ping", "-q", "-c", "1", "-W", "2", outside.address])
            with (
                closing(gateway.socket(AF_INET, SOCK_STREAM)) as tcp,
                pytest.raises(ConnectionRefusedError),
            ):
                tcp.connect((outside.address, 9))

        assert inside_addresses(seen) == []

        # A tracked connection has the inside address both ways.
        tracked = gateway.run(["conntrack", "-L", "-p", "udp", "--dport", "7"]).stdout
        there = f"src={inside.address} dst={outside.address} "
        back = f"src={outside.address} dst={inside.address} "
        assert re.search(f"{there}.*{back}", tracked)
    finally:
        daemon.stop()


@pytest.mark.parametrize("tracking", [False, True], ids=["no firewall", "stateful firewall"])
def test_a_narrow_inside_network_is_told_of(lab: Lab, iptables: str, tracking: bool) -> None:
    """The sender of a packet that is too large for the inside network sends smaller ones."""
    if tracking:
        load(lab, iptables, FIREWALL)
    lab.rules("up", IPTABLES=iptables)
    daemon = lab.nfmasq()
    lab.gateway.ip("link set lan mtu 1300")
    try:
        with lab.capture(lab.router, "wan", "icmp[0] = 3 and icmp[1] = 4") as errors:
            assert download(lab, 300_000) == 300_000
        assert errors
        assert inside_addresses(errors) == []
    finally:
        daemon.stop()
        lab.gateway.ip("link set lan mtu 1500")
        lab.outside[0].ip("route flush cache")


def test_a_reset_in_an_inside_hosts_name_does_not_leave(lab: Lab, iptables: str) -> None:
    """A firewall that rejects a packet from the outside sends a reset from an inside address."""
    lab.rules("up", IPTABLES=iptables)
    daemon = lab.nfmasq()
    reject = "FORWARD -i wan -p tcp -j REJECT --reject-with tcp-reset"
    try:
        with (
            closing(lab.outside[0].socket(AF_INET, SOCK_STREAM)) as server,
            closing(lab.inside[0].socket(AF_INET, SOCK_STREAM)) as client,
            lab.capture(lab.router, "wan") as seen,
        ):
            server.bind(("", 0))
            server.listen()
            client.connect((lab.outside[0].address, server.getsockname()[1]))
            connection, _ = server.accept()
            lab.gateway.run([iptables, "-I", *reject.split()])
            connection.send(b"refused")
            connection.close()
            send_a_last_one(lab)
        listed = lab.gateway.run([iptables, "-t", "security", "-nvxL", "NFMASQ-OUTPUT"]).stdout
        dropped = re.search(r"^ *(\d+) +\d+ DROP", listed, re.MULTILINE)
        assert dropped
        assert int(dropped[1]) > 0
        assert inside_addresses(seen) == []
    finally:
        daemon.stop()
