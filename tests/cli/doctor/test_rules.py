"""What `nfmasq doctor` says of the rules that are loaded."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from nfmasq import config, rules_script
from nfmasq.cli.doctor import rules as doctor_rules
from nfmasq.cli.doctor.finding import Finding
from nfmasq.cli.doctor.network import Sides
from nfmasq.rules import Rule, parse_rules
from tests.cli.doctor.machine import OURS, RULES, WANTED, levels, nfmasq_rules

BY_ADDRESS = WANTED | {"other-protocols": "by-address"}
PPTP = WANTED | {"apps": {"pptp": [1723]}}

# The rule that fills in checksums, alone in its table, only spares nfmasq work.
NEEDED = re.sub(r"\*mangle\n.*?COMMIT\n", "", OURS, flags=re.DOTALL)
EACH_RULE = [line for line in NEEDED.splitlines() if line.startswith("-A")]

LIKELY = Sides(["eth1"], ["eth0"])


def check_ours(saved: str, running: bool = True, wanted: dict[str, Any] = WANTED) -> list[Finding]:
    return check_rules(list(parse_rules(saved)), running, wanted)


def check_rules(rules: list[Rule], running: bool, wanted: dict[str, Any]) -> list[Finding]:
    load = doctor_rules.loading(wanted, "iptables")
    return list(doctor_rules.our_rules(rules, wanted, running, load, LIKELY))


def commands(findings: list[Finding]) -> list[list[str]]:
    """The commands of all findings, as lists of words."""
    return [shlex.split(line) for finding in findings for line in finding.commands]


class TestOurRules:
    def test_they_agree(self) -> None:
        assert levels(check_ours(OURS)) == ["ok"]
        assert levels(check_ours(NEEDED)) == ["ok"]

    def test_none_is_a_problem_only_where_nfmasq_runs(self) -> None:
        assert levels(check_ours("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n")) == ["problem"]
        assert levels(check_ours("", running=False)) == ["note"]

    def test_they_are_loaded_for_the_interfaces_that_are_there(self) -> None:
        [line] = commands(check_ours(""))

        script = line[0] if os.geteuid() == 0 else line[1]
        assert script == str(RULES)
        assert {"up", "--inside=eth1", "--outside=eth0"} <= {*line}

    def test_another_queue(self) -> None:
        [finding] = check_ours(OURS.replace("--queue-num 0", "--queue-num 5"))

        assert finding.level == "problem"
        assert finding.what == "queue: the rules have 5, nfmasq has 0"

    def test_configured_interfaces_need_not_be_guessed(self) -> None:
        wanted = WANTED | {"inside": ["lan", "ppp+"], "outside": ["wan"]}
        assert levels(check_ours(nfmasq_rules("--inside=ppp+"), wanted=wanted)) == ["ok"]

        found = check_ours(OURS, wanted=wanted)
        assert "problem" in levels(found)
        assert all("ppp+" in finding.what for finding in found)
        assert "--inside=lan --inside=ppp+ --outside=wan" in found[0].commands[0]

    def test_other_ports(self) -> None:
        [finding] = check_ours(OURS.replace("61000:65095", "50000:50009"))

        assert finding.level == "problem"
        assert finding.what == "ports: the rules have 50000-50009, nfmasq has 61000-65095"

    def test_several_ranges_of_ports(self) -> None:
        wanted = WANTED | {"ports": "600-1023,61000-65095"}
        rules = nfmasq_rules("--ports", "61000-65095,600-1023")
        assert levels(check_ours(rules, wanted=wanted)) == ["ok"]

        [finding] = check_ours(OURS, wanted=wanted)
        assert finding.what == (
            "ports: the rules have 61000-65095, nfmasq has 600-1023,61000-65095"
        )

    def test_a_range_may_be_in_the_rules_in_parts(self) -> None:
        assert levels(check_ours(nfmasq_rules("--ports", "62000-65095,61000-61999"))) == ["ok"]

    def test_one_range_missing_for_one_protocol(self) -> None:
        wanted = WANTED | {"ports": "7-7,61000-65095"}
        rules = nfmasq_rules("--ports", "7-7,61000-65095")

        [finding] = check_ours(re.sub("-A .* udp --dport 7 .*\n", "", rules), wanted=wanted)

        assert finding.level == "problem"
        assert finding.what == (
            "ports: the rules have 61000-65095 and 7-7,61000-65095, nfmasq has 7-7,61000-65095"
        )

    def test_all_ranges_missing_for_one_protocol(self) -> None:
        wanted = WANTED | {"ports": "600-1023,61000-65095"}
        rules = nfmasq_rules("--ports", wanted["ports"])

        [finding] = check_ours(re.sub("-A .* -i wan .* udp --dport .*\n", "", rules), wanted=wanted)

        assert finding.what.startswith("answers do not come in")
        assert "udp --dport 600:1023 " in finding.what
        assert "udp --dport 61000:65095 " in finding.what

    def test_a_bypass_lets_inside_addresses_out(self) -> None:
        [finding] = check_ours(OURS.replace("--queue-num 0", "--queue-num 0 --queue-bypass"))

        assert finding.level == "problem"
        assert "--queue-bypass" in finding.what

    def test_without_a_socket_match_fragments_are_lost(self) -> None:
        assert levels(check_ours(OURS.replace("-m socket ", ""))) == ["warning"]

    @pytest.mark.parametrize("rule", EACH_RULE)
    def test_none_may_be_missing(self, rule: str) -> None:
        # The security and the raw table have a rule or two in common: each goes by itself.
        for place in re.finditer(re.escape(f"{rule}\n"), NEEDED):
            [finding] = check_ours(NEEDED[: place.start()] + NEEDED[place.end() :])

            if "-m socket" in rule:
                assert finding.level == "warning"
            elif "0x10000000" in rule or "NFMASQ-KNOWN" in rule:
                assert finding.level == "warning"
                assert finding.what.startswith("the flow cache cannot carry")
            else:
                assert finding.level == "problem"
                assert rule in finding.what

    def test_without_forward_rules_inside_addresses_go_out(self) -> None:
        [finding] = check_ours(re.sub("-A NFMASQ-FORWARD .* -o wan .*\n", "", OURS))

        assert finding.what == (
            "inside addresses go out: missing is "
            "-t security -A NFMASQ-FORWARD -i lan -o wan -j NFQUEUE --queue-num 0"
        )

    def test_an_interface_that_no_rule_names_is_not_guessed(self) -> None:
        findings = check_ours(re.sub("-A .* lan .*\n", "", OURS))

        whats = [finding.what for finding in findings]
        assert "-t security -A NFMASQ-FORWARD -i INSIDE -o wan" in whats[0]
        assert "-i INSIDE" in whats[1]
        assert len(whats) == 2

    def test_without_hairpin_rules_inside_machines_are_cut_off_from_each_other(self) -> None:
        [finding] = check_ours(re.sub("-A .* NFMASQ-HAIRPIN\n", "", OURS))

        assert finding.what.startswith(
            "inside machines do not reach each other by the outside address: missing is"
        )

    def test_a_rule_that_takes_less_is_not_the_one(self) -> None:
        [finding] = check_ours(OURS.replace("-i lan -o wan", "-s 10.0.0.0/24 -i lan -o wan"))

        assert finding.what.startswith("inside addresses go out")

    def test_each_inside_interface_needs_each_outside_one(self) -> None:
        whole = nfmasq_rules("--inside", "dmz", "--outside", "vpn")
        assert levels(check_ours(whole)) == ["ok"]

        rule = "-A NFMASQ-FORWARD -i dmz -o vpn -j NFQUEUE --queue-num 0"
        [finding] = check_ours(whole.replace(f"{rule}\n", ""))

        assert finding.what == f"inside addresses go out: missing is -t security {rule}"

    def test_segments_kept_small_are_no_matter(self) -> None:
        assert levels(check_ours(nfmasq_rules("--clamp-mss"))) == ["ok"]


class TestOtherProtocols:
    """`--other-protocols` of the rules, and of nfmasq."""

    @pytest.mark.parametrize("wanted", [BY_ADDRESS, PPTP], ids=["by address", "pptp"])
    def test_they_agree(self, wanted: dict[str, Any]) -> None:
        rules = nfmasq_rules("--other-protocols")
        assert levels(check_ours(rules, wanted=wanted)) == ["ok"]

    @pytest.mark.parametrize("wanted", [BY_ADDRESS, PPTP], ids=["by address", "pptp"])
    def test_without_the_rules_no_answer_comes_in(self, wanted: dict[str, Any]) -> None:
        findings = check_ours(OURS, wanted=wanted)

        assert levels(findings) == ["problem", "problem"]
        assert findings[1].what.startswith("answers in other protocols do not come in")
        assert all("--other-protocols" in command for command in commands(findings))

    def test_the_rules_alone_cost_the_gateway_its_own(self) -> None:
        [finding] = check_ours(nfmasq_rules("--other-protocols"))

        assert finding.level == "warning"

    def test_none_may_be_missing(self) -> None:
        rules = nfmasq_rules("--other-protocols")
        each = re.findall("^-A .*NFMASQ-OTHER.*\n", rules, re.MULTILINE)
        for rule in each:
            findings = check_ours(rules.replace(rule, ""), wanted=BY_ADDRESS)
            assert levels(findings) == ["problem"]
            assert rule.strip() in findings[0].what
        assert len(each) == 5


class TestForwards:
    """`--forward` of the rules, and of nfmasq."""

    LISTENS = ("tcp:8080", "udp:198.51.100.2:5000-5009", "tcp:61005")
    WANTED = WANTED | {
        "forward": [{"listen": listen} for listen in LISTENS],
        "trigger": [{"opens": "udp:27000"}],
    }
    OPTIONS = (
        *("--forward", "tcp:8080", "--forward", "udp:5000-5009"),
        *("--forward", "tcp:61005", "--forward", "udp:27000"),
    )

    def test_they_agree(self) -> None:
        rules = nfmasq_rules(*self.OPTIONS)
        assert levels(check_ours(rules, wanted=self.WANTED)) == ["ok"]

    def test_one_among_the_masquerade_ports_needs_no_rule_of_its_own(self) -> None:
        wanted = WANTED | {"forward": [{"listen": "tcp:61005"}]}
        assert levels(check_ours(OURS, wanted=wanted)) == ["ok"]

    def test_without_rules_nobody_reaches_the_servers(self) -> None:
        [finding] = check_ours(OURS, wanted=self.WANTED)
        assert finding.level == "problem"
        assert finding.what == (
            "not everybody reaches tcp:8080 and udp:27000 and udp:5000-5009: a rule is missing"
        )
        for option in ("--forward tcp:8080", "--forward udp:5000-5009", "--forward udp:27000"):
            assert option in finding.commands[0]

    def test_half_a_range_is_not_enough(self) -> None:
        rules = nfmasq_rules(*self.OPTIONS).replace("5000:5009", "5000:5004")
        [finding] = check_ours(rules, wanted=self.WANTED)
        assert finding.what == "not everybody reaches udp:5000-5009: a rule is missing"

    def test_every_outside_interface_needs_them(self) -> None:
        rules = nfmasq_rules(*self.OPTIONS, "--outside", "wan2")
        rules = re.sub("-A .* -i wan2 .* --dport 8080 .*\n", "", rules)
        [finding] = check_ours(rules, wanted=self.WANTED)
        assert finding.what == "not everybody reaches tcp:8080: a rule is missing"

    def test_rules_for_more_than_is_forwarded_are_told(self) -> None:
        [finding] = check_ours(nfmasq_rules("--forward", "tcp:8080"))
        assert finding.what.startswith("ports: the rules have ")
        assert "8080-8080,61000-65095" in finding.what


# What nfmasq is told, and the options of nfmasq-rules that belong to it.
OPTION_SETS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "none": ({}, []),
    "queue": ({"queue": 7}, ["--queue", "7"]),
    "ports": (
        {"ports": "600-1023,50000-50000,61000-65095"},
        ["--ports", "600-1023,50000-50000,61000-65095"],
    ),
    "interfaces": ({}, ["--inside", "dmz", "--outside", "vpn"]),
    "other protocols": ({"other-protocols": "by-address"}, ["--other-protocols"]),
    "forwards": (
        {
            "forward": [
                "tcp:8080=10.0.0.2:80",
                "tcp:198.51.100.2:5060=10.0.0.2:5060",
                "tcp:198.51.100.3:5060=10.0.0.3:5060",
                "udp:60990-61010=10.0.0.2:60990-61010",
                "tcp:61005=10.0.0.2:22",
            ]
        },
        [
            *("--forward", "tcp:8080", "--forward", "tcp:5060"),
            *("--forward", "udp:60990-61010", "--forward", "tcp:61005"),
        ],
    ),
    "optional": ({}, ["--clamp-mss", "--masquerade-address", "198.51.100.2"]),
}

OPTIONAL = {
    "checksums are filled in, segments kept small": re.compile("-t mangle "),
    "a masquerade address is on no interface": re.compile("-d 198.51.100.2/32 "),
    "a forwarded port is one of the masquerade ports": re.compile("--[ds]port 61005 "),
}
"""Rules that may be loaded or not, whatever nfmasq is told, by what they are for."""


class TestOneSource:
    """Which rules there should be, nfmasq-rules says, and doctor has no knowledge of its own."""

    @pytest.mark.parametrize(("told", "options"), OPTION_SETS.values(), ids=OPTION_SETS)
    def test_what_it_loads_is_right(self, told: dict[str, Any], options: list[str]) -> None:
        wanted = config.load(None, told).as_table()

        assert levels(check_ours(nfmasq_rules(*options), wanted=wanted)) == ["ok"]

    @pytest.mark.parametrize(("told", "options"), OPTION_SETS.values(), ids=OPTION_SETS)
    def test_each_rule_of_it_is_missed(self, told: dict[str, Any], options: list[str]) -> None:
        wanted = config.load(None, told).as_table()
        loaded = list(parse_rules(nfmasq_rules(*options)))

        missed = []
        for place, rule in enumerate(loaded):
            rest = loaded[:place] + loaded[place + 1 :]
            [finding] = check_rules(rest, True, wanted)
            if finding.level != "ok":
                assert "the rules are not whole" not in finding.what
                missed.append(rule)

        assert missed == [
            rule for rule in loaded if not any(kind.search(str(rule)) for kind in OPTIONAL.values())
        ]

    @pytest.mark.parametrize("kind", OPTIONAL.values(), ids=OPTIONAL)
    def test_there_are_rules_of_each_optional_kind(self, kind: re.Pattern[str]) -> None:
        loaded = (nfmasq_rules(*options) for _, options in OPTION_SETS.values())

        assert any(kind.search(str(rule)) for saved in loaded for rule in parse_rules(saved))

    @pytest.fixture
    def changed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A script of other rules, in the place of nfmasq-rules."""
        script = tmp_path / "nfmasq-rules"
        text = RULES.read_text()
        text = text.replace("icmp_errors='3 4 11 12'", "icmp_errors='3 11 31'")
        text = text.replace("raw -A NFMASQ-DEFRAG", "raw -A NFMASQ-PIECES")
        script.write_text(text)
        script.chmod(0o755)
        monkeypatch.setattr(rules_script, "find", lambda: str(script))
        return script

    def test_where_it_loads_other_rules_these_are_right(self, changed: Path) -> None:
        assert levels(check_ours(nfmasq_rules(script=changed))) == ["ok"]

    @pytest.mark.usefixtures("changed")
    def test_where_it_loads_other_rules_these_are_missed(self) -> None:
        *others, last = check_ours(OURS)

        for finding in others:
            missing = finding.what.partition(": missing is ")[2].split(", ")
            assert all("--icmp-type 31 " in rule for rule in missing)
        assert {finding.level for finding in others} == {"problem"}
        assert last.what == (
            "the rules are not whole: missing is -t raw -A NFMASQ-PIECES -m socket -j RETURN"
        )

    def test_without_the_script_the_rest_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rules_script, "find", lambda: None)

        [finding] = check_ours(OURS)
        assert finding.level == "warning"
        assert finding.what.startswith("the rules cannot be compared: the script nfmasq-rules is")
        assert finding.advice == "install nfmasq again"

        bypass = OURS.replace("--queue-num 0", "--queue-num 5 --queue-bypass")
        assert levels(check_ours(bypass)) == ["problem", "warning", "problem"]

    def test_what_the_script_refuses_is_told(self) -> None:
        rule = "-A NFMASQ-FORWARD -i eth* -o wan -j NFQUEUE --queue-num 0"

        [finding] = check_ours(OURS.replace("*security\n", f"*security\n{rule}\n"))

        assert finding.level == "warning"
        assert finding.what.startswith(
            "the rules cannot be compared: nfmasq-rules: --inside: 'eth*' is not an interface name"
        )
