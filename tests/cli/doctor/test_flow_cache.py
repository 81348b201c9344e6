"""What `nfmasq doctor` says of the flow cache."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from nfmasq.cli.doctor import flow_cache, machine
from nfmasq.cli.doctor.finding import Finding
from nfmasq.cli.doctor.network import Network, Sides
from nfmasq.cli.doctor.tables import NftTable, Saved, Tables
from nfmasq.config import Configuration
from nfmasq.daemon.control import ControlServer
from nfmasq.daemon.metrics import Metrics
from nfmasq.engine import Masquerade
from nfmasq.rules import parse_rules
from tests.cli.doctor.machine import OURS, levels, link

SIDES = Sides(["lan"], ["wan", "ppp+"])
ETHERNET, PPP, NONE, INFINIBAND = 1, 512, 0xFFFE, 32

ALL_OF_THEM = {"CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"}


class Programs:
    """The programs, of which `refusal` says why they cannot be loaded; None: they can."""

    refusal: OSError | None = None

    def __init__(self, size: int) -> None:
        if self.refusal is not None:
            raise self.refusal

    def close(self) -> None:
        """Unload them."""


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine that has what the cache takes, and whose sysctls are in a folder."""
    monkeypatch.setattr(machine, "SYSCTLS", tmp_path)
    monkeypatch.setattr(flow_cache, "Programs", Programs)
    monkeypatch.setattr(flow_cache, "reader_of_marks", lambda rules: None)
    give(monkeypatch, ALL_OF_THEM)


def give(monkeypatch: pytest.MonkeyPatch, capabilities: set[str]) -> None:
    bits = sum(getattr(machine, name) for name in capabilities)
    monkeypatch.setattr(machine, "has", lambda capability: bool(capability & bits))


def tables(filter_rules: str = "", nft: str = "") -> Tables:
    saved = f"*filter\n:FORWARD ACCEPT [0:0]\n:block - [0:0]\n{filter_rules}\nCOMMIT\n{OURS}"
    others = [NftTable("inet", "firewall", nft)] if nft else []
    return Tables([Saved("iptables", saved, [*parse_rules(saved)])], others, "")


def look(wanted: str, *interfaces: tuple[str, int], **more: str) -> list[Finding]:
    network = Network(link(name, kind=kind) for name, kind in interfaces)
    return [*flow_cache.flow_cache(wanted, tables(**more), network, SIDES)]


@pytest.mark.parametrize("wanted", ["auto", "routed", "direct"])
def test_a_machine_that_has_all(wanted: str) -> None:
    assert levels(look(wanted, ("lan", ETHERNET), ("wan", ETHERNET))) == ["ok"]


def test_the_programs_are_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may load programs")
    monkeypatch.undo()
    [finding] = flow_cache.flow_cache("routed", None, Network([]), Sides([], []))
    assert finding.level in ("ok", "warning")
    assert "programs" in finding.what or "libbpf" in finding.what


@pytest.mark.parametrize(("wanted", "level"), [("auto", "note"), ("direct", "warning")])
@pytest.mark.parametrize(
    ("refusal", "what", "command"),
    [
        (OSError("libbpf.so.1: cannot open shared object file"), "libbpf.so.1", "install libbpf1"),
        (OSError("the programs are made for little-endian machines"), "little-endian", ""),
        (OSError(errno.EINVAL, "Invalid argument"), "this kernel does not take", ""),
    ],
)
def test_what_is_lacking_matters_more_where_the_cache_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str, level: str, refusal: OSError, what: str, command: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Programs, "refusal", refusal)
    [finding] = look(wanted)
    assert finding.level == level
    assert what in finding.what
    assert finding.advice
    assert command in "".join(finding.commands)


@pytest.mark.parametrize(
    ("has", "told"),
    [
        (ALL_OF_THEM - {"CAP_BPF"}, "no CAP_BPF: there is no flow cache"),
        (ALL_OF_THEM - {"CAP_PERFMON"}, "no CAP_PERFMON: there is no flow cache"),
        ({"CAP_NET_ADMIN"}, "no CAP_BPF and no CAP_PERFMON: there is no flow cache"),
        ({"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}, "the kernel takes the programs of the flow cache"),
        ({"CAP_BPF", "CAP_PERFMON"}, "the flow cache cannot be tried without CAP_NET_ADMIN"),
    ],
)
def test_capabilities(monkeypatch: pytest.MonkeyPatch, has: set[str], told: str) -> None:
    give(monkeypatch, has)
    assert [finding.what for finding in look("auto")] == [told]


def test_off_is_a_note_and_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(flow_cache, "Programs")
    assert levels(look("off", ("lan", INFINIBAND))) == ["note"]


@pytest.mark.parametrize(
    ("wanted", "left_out"), [("auto", "ib0+"), ("routed", "ib0+"), ("direct", "ppp0, ppp1, ib0+")]
)
def test_interfaces_that_cannot_be_served(wanted: str, left_out: str) -> None:
    network = Network(
        link(name, kind=kind)
        for name, kind in (
            ("lan", ETHERNET), ("ppp0", PPP), ("ppp1", NONE), ("ib0+", INFINIBAND),
            ("elsewhere", INFINIBAND),
        )
    )  # fmt: skip
    sides = Sides(["lan", "ib0+"], ["ppp+"])
    _, finding = flow_cache.flow_cache(wanted, tables(), network, sides)
    assert finding.level == "note"
    assert f"cannot serve {left_out}: " in finding.what


@pytest.mark.parametrize(
    ("wanted", "expected"), [("auto", ["note"]), ("routed", ["warning"]), ("direct", [])]
)
def test_somebody_reads_whole_marks(
    monkeypatch: pytest.MonkeyPatch, wanted: str, expected: list[str]
) -> None:
    """With direct no packet of a known flow meets a rule, and so none that carries the mark."""
    monkeypatch.setattr(flow_cache, "reader_of_marks", lambda rules: "the rule -A FORWARD")
    _, *findings = look(wanted)
    assert levels(findings) == expected
    assert all("0xefffffff" in finding.advice for finding in findings)


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -s 10.0.0.5/32 -j DROP",
        "-A FORWARD -i lan -o ppp0 -p tcp -m tcp --dport 25 -j REJECT",
        "-A FORWARD -o wan",
        "-A FORWARD ! -i docker0 -j LOG",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j CONNMARK --restore-mark",
        "-A block -m limit --limit 10/sec -j DROP",
    ],
)
def test_rules_that_known_flows_pass_by(tmp_path: Path, rule: str) -> None:
    (tmp_path / "netfilter").mkdir()
    (tmp_path / "netfilter/nf_conntrack_tcp_be_liberal").write_text("1\n")
    rules = f"-A FORWARD -j block\n{rule}"
    _, finding = look("direct", filter_rules=rules)
    assert finding == Finding(
        "warning", f"known flows pass by rules in FORWARD: -t filter {rule}", flow_cache._INSTEAD
    )
    assert levels(look("routed", filter_rules=rules)) == ["ok"]


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -i lan -o wan -j ACCEPT",
        "-A FORWARD -j block",
        "-A FORWARD -p icmp -j DROP",
        "-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A FORWARD -m conntrack --ctstate NEW -m limit --limit 5/sec -j LOG",
        "-A FORWARD -o docker0 -j DROP",
        "-A INPUT -i wan -j DROP",
        "-A block -j DROP",
    ],
)
def test_rules_that_known_flows_would_not_meet(tmp_path: Path, rule: str) -> None:
    """The last of them is in a chain that FORWARD does not lead to."""
    (tmp_path / "netfilter").mkdir()
    (tmp_path / "netfilter/nf_conntrack_tcp_be_liberal").write_text("1\n")
    assert levels(look("direct", filter_rules=rule)) == ["ok"]


def test_of_many_rules_some_are_shown() -> None:
    rules = "\n".join(f"-A FORWARD -s 10.0.0.{host}/32 -j DROP" for host in range(1, 10))
    _, finding = look("direct", filter_rules=rules)
    assert "10.0.0.3/32" in finding.what
    assert finding.what.endswith(" and 6 more")


STATEFUL = "-A FORWARD -m conntrack --ctstate INVALID -j DROP"
STATEFUL_NFT = """
table inet firewall {
    chain theirs {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
    }
}
"""


@pytest.mark.parametrize(
    ("more", "asker"),
    [({"filter_rules": STATEFUL}, f"-t filter {STATEFUL}"), ({"nft": STATEFUL_NFT}, "inet firewa")],
)
def test_connection_tracking_that_is_not_liberal(
    tmp_path: Path, more: dict[str, str], asker: str
) -> None:
    liberal = tmp_path / "netfilter" / "nf_conntrack_tcp_be_liberal"
    liberal.parent.mkdir()
    liberal.write_text("0\n")
    *_, finding = look("direct", **more)
    assert finding.level == "warning"
    assert asker in finding.what
    assert "net.netfilter.nf_conntrack_tcp_be_liberal=1" in finding.commands[0]
    assert "warning" not in levels(look("routed", **more))

    liberal.write_text("1\n")
    assert "warning" not in levels(look("direct", **more))


def test_tables_of_nft_that_known_flows_pass_by() -> None:
    what = "known flows pass by chain theirs of table inet firewall, which nft shows"
    assert what in [finding.what for finding in look("direct", nft=STATEFUL_NFT)]


@pytest.mark.parametrize(
    ("wanted", "mode", "told"),
    [
        ("auto", "routed", ["ok: the kernel carries known flows: routed"]),
        ("auto", "off", ["note: --flow-cache is auto, and the kernel carries no flows"]),
        ("off", "off", []),
    ],
)
def test_a_running_nfmasq_says_how_flows_are_carried(
    tmp_path: Path, wanted: str, mode: str, told: list[str]
) -> None:
    control, engine = tmp_path / "nfmasq.sock", Masquerade(lock=threading.RLock())
    figures = Metrics(engine, 0, lambda: 0, flow_cache_mode=lambda: mode).figures
    server = ControlServer(control, engine, Configuration().as_table, figures, list)
    server.start()
    try:
        found = [*flow_cache.mode_in_force(control, wanted)]
    finally:
        server.close()
    assert [f"{finding.level}: {finding.what}" for finding in found] == told
