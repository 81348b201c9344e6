"""The packet filter of this machine, as the programs print it that can load it again.

There are up to three: iptables-nft, iptables-legacy and nft. The kernel has packets pass the tables
of all of them. A table that iptables-nft prints is left to it; nft has only the others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nfmasq.cli.doctor.finding import Finding, as_root
from nfmasq.rules import Rule, parse_rules, save_programs

PLACES = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
"""Where programs are looked for: the PATH of an ordinary user may lack the administrator's."""


class Saved(NamedTuple):
    """What one iptables has loaded: `text` is what its iptables-save prints."""

    program: str
    """The program that changes these rules: iptables, iptables-nft or iptables-legacy."""
    text: str
    rules: list[Rule]


class NftTable(NamedTuple):
    """A table that only nft prints; `text` is how nft loads it again."""

    family: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.family} {self.name}"

    @property
    def is_owned(self) -> bool:
        """Say whether only the program that made it may change it."""
        return re.search(r"^\s*flags [\w,]*\bowner\b", self.text, re.MULTILINE) is not None

    @property
    def is_stateful(self) -> bool:
        """Say whether a rule asks for the state of a connection."""
        return re.search(r"\bct state\b", self.text) is not None

    def forward_chains(self) -> list[str]:
        """Return the chains through which forwarded packets go."""
        return re.findall(r"\bchain (\S+) \{\s*type filter hook forward\b", self.text)


class Tables(NamedTuple):
    """All tables of this machine, and the sets that rules of iptables look addresses up in.

    `sets` is what `ipset save` prints; None where there are such rules and no ipset here.
    """

    saved: list[Saved]
    nft: list[NftTable]
    sets: str | None

    @property
    def rules(self) -> list[Rule]:
        """The rules of iptables-nft and iptables-legacy together."""
        return [rule for saved in self.saved for rule in saved.rules]

    @property
    def program_of_ours(self) -> str:
        """The program that has loaded the rules of nfmasq-rules, or else would load them."""
        ours = (each.program for each in self.saved if any(r.our_chain for r in each.rules))
        return next(ours, "iptables")


def loaded_tables(privileged: bool) -> tuple[Tables | None, list[Finding]]:
    """Return the tables of this machine, and findings; no tables where they cannot be seen."""
    programs = save_programs()
    if not programs:
        install = as_root("apt", "install", "iptables")
        return None, [Finding("problem", "no iptables here", "install it", (install,))]
    if not privileged:
        return None, [Finding("note", "the rules cannot be seen without CAP_NET_ADMIN")]
    saved = []
    for program in programs:
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return None, [Finding("warning", f"{program} failed: {reason}")]
        name = Path(program).name.removesuffix("-save")
        saved.append(Saved(name, done.stdout, [*parse_rules(done.stdout)]))
    nft, findings = _nft_tables(_names_of_iptables_nft(programs, saved))
    return Tables(saved, nft, _sets(saved)), [Finding("ok", "iptables is here"), *findings]


def _names_of_iptables_nft(programs: Iterable[str], saved: Iterable[Saved]) -> set[str]:
    """Return the names of the tables that iptables-nft has printed."""
    return {
        name
        for program, each in zip(programs, saved, strict=True)
        if "nft" in os.path.realpath(program)
        for name in re.findall(r"^\*(\w+)", each.text, re.MULTILINE)
    }


def _sets(saved: Iterable[Saved]) -> str | None:
    if not any("--match-set" in rule.words for each in saved for rule in each.rules):
        return ""
    program = shutil.which("ipset", path=PLACES)
    if program is None:
        return None
    done = subprocess.run([program, "save"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _nft_tables(of_iptables: set[str]) -> tuple[list[NftTable], list[Finding]]:
    """Return the tables of IPv4 that iptables-nft does not print, and findings."""
    program = shutil.which("nft", path=PLACES)
    if program is None:
        install = as_root("apt", "install", "nftables")
        what = "tables that only nft shows, such as firewalld's, cannot be seen: there is no nft"
        return [], [Finding("note", what, "install it and ask again", (install,))]
    listed = subprocess.run([program, "list", "tables"], capture_output=True, text=True)
    if listed.returncode != 0:
        reason = " ".join(listed.stderr.split())
        return [], [Finding("warning", f"{program} failed: {reason}")]
    names = (line.split()[1:3] for line in listed.stdout.splitlines())
    return [*_listed(program, names, of_iptables)], []


def _listed(program: str, names: Iterable[list[str]], of_iptables: set[str]) -> Iterator[NftTable]:
    for family, name in names:
        if family == "inet" or (family == "ip" and name not in of_iptables):
            command = [program, "--stateless", "list", "table", family, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            yield NftTable(family, name, done.stdout)
