"""What on this machine reads whole marks, and would take a packet's mark for another with our bit.

From where it comes in to where it leaves, a packet of a known flow that goes out has a bit of its
mark set. Who masks marks, as is good custom, does not notice. A rule or a route that compares a
whole mark with a value would: then the flow cache, which may change nothing for others, stays off
unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from socket import AF_INET

from pyroute2 import IPRoute

from nfmasq.rules import Rule

KNOWN_MARK = 0x1000_0000
"""The bit, as in `flow_cache.bpf.c` and nfmasq-rules."""


def reader_of_marks(rules: Iterable[Rule]) -> str | None:
    """Name a rule of iptables or of policy routing that our bit would mislead; None: there is none.

    Raises OSError or NetlinkError where the kernel does not tell its rules.
    """
    return rule_that_reads_marks(rules) or route_that_reads_marks()


def rule_that_reads_marks(rules: Iterable[Rule]) -> str | None:
    """Name a rule of iptables that our bit would mislead; None: there is none."""
    for rule in rules:
        if not rule.our_chain and any(map(_covers_our_bit, _marks_read(rule))):
            return f"the rule {rule}"
    return None


def route_that_reads_marks() -> str | None:
    """Name a rule of policy routing that our bit would mislead; None: there is none.

    Raises OSError or NetlinkError where the kernel does not tell its rules.
    """
    with IPRoute() as kernel:
        for each in kernel.get_rules(family=AF_INET):
            mark, mask = each.get("fwmark"), each.get("fwmask")
            if mask is None:
                mask = 0 if mark is None else KNOWN_MARK
            if mask & KNOWN_MARK:
                return f"the routing rule of fwmark {mark or 0:#x}"
    return None


def _marks_read(rule: Rule) -> Iterable[str]:
    """Yield the marks, with their masks, that a rule compares, or saves with a connection."""
    yield from rule.values("--mark")
    if "--save-mark" in rule.words:
        masks = rule.values("--nfmask", "--mask")
        yield f"0/{masks[0]}" if masks else "0"


def _covers_our_bit(mark: str) -> bool:
    _, _, mask = mark.partition("/")
    try:
        return not mask or bool(int(mask, 0) & KNOWN_MARK)
    except ValueError:
        return True
