"""What of this machine's filter goes into a rehearsal. Rehearsals themselves are real traffic."""

from __future__ import annotations

import pytest

from nfmasq.cli.doctor import rehearsal
from nfmasq.cli.doctor.tables import NftTable

FIREWALL = """table inet firewall { # progname firewalld
\tflags owner

\tset trusted {
\t\ttype ipv4_addr
\t\tflags interval
\t}

\tchain filter_FORWARD {
\t\ttype filter hook forward priority filter + 10; policy accept;
\t\tip saddr @trusted accept
\t\tqueue flags bypass,fanout to 0-3
\t}

\tchain filter_FORWARD_zones {
\t\tqueue to 1
\t}

\tchain nat_POSTROUTING {
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t}
}
"""


def test_only_base_chains_of_the_filter_stop_what_is_forwarded() -> None:
    assert NftTable("inet", "firewall", FIREWALL).forward_chains() == ["filter_FORWARD"]


@pytest.mark.parametrize(
    ("flags", "owned"), [("owner", True), ("owner,persist", True), ("dormant", False)]
)
def test_a_table_may_be_owned(flags: str, owned: bool) -> None:
    text = FIREWALL.replace("flags owner", f"flags {flags}")
    assert NftTable("inet", "firewall", text).is_owned is owned


def test_a_copied_table_is_nobodys_and_does_nothing_but_filter() -> None:
    copied = rehearsal._harmless(FIREWALL)
    assert "owner" not in copied
    assert "flags interval" in copied
    assert "hook postrouting" not in copied
    assert copied.count("queue flags bypass to ") == 2


@pytest.mark.parametrize(
    ("rule", "copied"),
    [
        ("-j NFQUEUE --queue-num 0", "-j NFQUEUE --queue-num 0 --queue-bypass"),
        ("-j NFQUEUE --queue-num 0 --queue-bypass", "-j NFQUEUE --queue-num 0 --queue-bypass"),
        ("-j NFQUEUE --queue-balance 0:3", "-j NFQUEUE --queue-balance 0:3 --queue-bypass"),
        ("-j ACCEPT", "-j ACCEPT"),
    ],
)
def test_packets_pass_queues_that_nobody_serves(rule: str, copied: str) -> None:
    chain = "-A FORWARD -o wan "
    assert rehearsal._with_queues_passed(f"{chain}{rule}\n") == f"{chain}{copied}\n"


def test_nat_is_not_rehearsed() -> None:
    saved = "*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n*filter\n-A FORWARD -j DROP\nCOMMIT\n"
    assert rehearsal._without_nat(saved) == "\n*filter\n-A FORWARD -j DROP\nCOMMIT\n"
