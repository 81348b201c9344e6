"""What `nfmasq doctor` reads from a machine's rules and settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from nfmasq import config, rules_script
from nfmasq.cli import doctor, doctor_rules
from nfmasq.cli.finding import Finding
from nfmasq.rules import parse_rules

WANTED: dict[str, Any] = config.Configuration().as_table()
BY_ADDRESS = WANTED | {"other-protocols": "by-address"}
PPTP = WANTED | {"apps": {"pptp": [1723]}}

RULES = Path(__file__).parents[2] / "iptables" / "nfmasq-rules"


def nfmasq_rules(*more: str, script: Path = RULES) -> str:
    """What nfmasq-rules loads, as iptables-save shows it then."""
    command = [str(script), "print", "--inside", "lan", "--outside", "wan", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.sub(r"^-I (\S+) 1 ", r"-A \1 ", done.stdout, flags=re.MULTILINE)


OURS = nfmasq_rules()
# The rule that fills in checksums only spares nfmasq work.
NEEDED = nfmasq_rules("--no-checksum-fill")
EACH_RULE = [line for line in NEEDED.splitlines() if line.startswith("-A")]


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def check_ours(saved: str, running: bool = True, wanted: dict[str, Any] = WANTED) -> list[Finding]:
    return list(doctor_rules.our_rules(list(parse_rules(saved)), wanted, running))


def check_foreign(rule: str, ours: str = OURS) -> list[Finding]:
    saved = f"{ours}*nat\n{rule}\nCOMMIT\n"
    return list(doctor_rules.foreign_translations(parse_rules(saved)))


class TestOurRules:
    def test_they_agree(self) -> None:
        assert levels(check_ours(OURS)) == ["ok"]
        assert levels(check_ours(NEEDED)) == ["ok"]

    def test_none_is_a_problem_only_where_nfmasq_runs(self) -> None:
        assert levels(check_ours("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n")) == ["problem"]
        assert levels(check_ours("", running=False)) == ["note"]

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
        assert "--inside=lan --inside=ppp+ --outside=wan" in found[0].advice

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
        assert "nfmasq-rules up --queue 0 --ports 61000-65095 --other-protocols" in str(findings)

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
            assert option in finding.advice

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
    "a forwarded port is one of the masquerade ports": re.compile("--dport 61005 "),
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
            [finding] = doctor_rules.our_rules(rest, wanted, running=True)
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


class TestForeignTranslations:
    @pytest.mark.parametrize(
        ("rule", "level"),
        [
            ("-A POSTROUTING -o wan -j MASQUERADE", "problem"),
            ("-A POSTROUTING -s 10.0.0.0/24 -o wan -j MASQUERADE", "problem"),
            ("-A POSTROUTING -j SNAT --to-source 198.51.100.2", "problem"),
            ("-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", "warning"),
        ],
    )
    def test_they_are_told(self, rule: str, level: str) -> None:
        [finding] = check_foreign(rule)

        assert finding.level == level
        assert f"-t nat {rule}" in finding.what

    @pytest.mark.parametrize(
        "rule",
        [
            "-A POSTROUTING -o vpn -j MASQUERADE",
            "-A PREROUTING -i wan -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5",
            "-A POSTROUTING -m comment --comment MASQUERADE -j ACCEPT",
        ],
    )
    def test_what_translates_no_source_of_ours_is_not(self, rule: str) -> None:
        assert check_foreign(rule) == []

    @pytest.mark.parametrize(
        ("ours", "theirs", "found"),
        [("ppp+", "ppp0", 1), ("ppp0", "ppp+", 1), ("ppp+", "pp+", 1), ("ppp+", "wan", 0)],
    )
    def test_a_rule_may_name_the_beginning_of_an_interface(
        self, ours: str, theirs: str, found: int
    ) -> None:
        rule = f"-A POSTROUTING -o {theirs} -j MASQUERADE"
        rules = OURS.replace("wan", ours)
        assert levels(check_foreign(rule, rules)) == ["problem"] * found


class TestOverlappingNetworks:
    @pytest.mark.parametrize(("outside", "told"), [("wan", True), ("wa+", True), ("ppp+", False)])
    def test_they_are_told(self, outside: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        networks = [("lan", IPv4Network("10.0.0.0/8")), ("wan", IPv4Network("10.1.0.0/16"))]
        monkeypatch.setattr(doctor_rules, "_networks", lambda: iter(networks))
        rules = parse_rules(OURS.replace("wan", outside))
        assert levels(list(doctor_rules.overlapping_networks(rules))) == ["warning"] * told


class TestSysctls:
    @pytest.fixture(autouse=True)
    def _machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "SYSCTLS", tmp_path)
        self.root = tmp_path

    def set(self, name: str, value: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")

    @pytest.mark.parametrize(
        ("local", "reserved", "level"),
        [
            ("32768\t60999", "", "ok"),
            ("32768\t61000", "", "problem"),
            ("1024\t65535", "", "problem"),
            ("1024\t65535", "61000-65095", "ok"),
            ("1024\t65535", "8080,61000-65094", "problem"),
            ("1024\t65535", "61000-65094,65095", "ok"),
        ],
    )
    def test_local_ports(self, local: str, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", local)
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert levels(list(doctor.local_ports("61000-65095"))) == [level]

    @pytest.mark.parametrize(
        ("reserved", "level"), [("", "problem"), ("61001-65095", "problem"), ("7-65535", "ok")]
    )
    def test_ports_that_are_to_be_reserved(self, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", "32768\t60999")
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert levels(list(doctor.local_ports("61000-65095", reserve=True))) == [level]

    @pytest.mark.parametrize(
        ("local", "reserved", "level"),
        [
            ("32768\t60999", "", "ok"),
            ("1023\t60999", "", "problem"),
            ("1023\t65535", "61000-65095", "problem"),
            ("1023\t65535", "1023,61000-65095", "ok"),
        ],
    )
    def test_local_ports_and_several_ranges(self, local: str, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", local)
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert levels(list(doctor.local_ports("600-1023,61000-65095"))) == [level]

    def test_forwarding(self) -> None:
        self.set("ipv4/ip_forward", "0")
        assert levels(list(doctor.forwarding())) == ["problem"]
        self.set("ipv4/ip_forward", "1")
        assert levels(list(doctor.forwarding())) == ["ok"]

    def test_a_small_socket_buffer_is_a_note(self) -> None:
        self.set("core/rmem_max", "212992")
        assert levels(list(doctor.socket_buffer(32 << 20))) == ["note"]
        assert levels(list(doctor.socket_buffer(1 << 16))) == []


def test_as_any_user_and_with_nfmasq_not_running_it_still_answers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nfmasq", "doctor", "--json", "--control", tmp_path / "none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    findings = json.loads(done.stdout)
    problems = [finding for finding in findings if finding["level"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    assert done.stderr == ""
    assert any("no nfmasq is running" in finding["what"] for finding in findings)
