"""Commands that doctor prints: they can be pasted on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from nfmasq import rules_script
from nfmasq.cli.doctor import rules
from nfmasq.cli.doctor.finding import as_root, nfmasq
from nfmasq.cli.doctor.network import Sides
from tests.cli.doctor.machine import WANTED


@pytest.mark.parametrize(("user", "line"), [(0, "ip link"), (1000, "sudo ip link")])
def test_sudo_is_for_those_who_are_not_root(
    user: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert as_root("ip", "link") == line


def test_words_are_quoted_for_the_shell() -> None:
    words = ("nft", 'add rule inet t c iifname "lan" accept')
    assert shlex.split(as_root(*words))[-2:] == [*words]


def installed(folder: Path, name: str) -> str:
    script = folder / name
    folder.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return str(script)


def test_nfmasq_is_called_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    script = installed(tmp_path / "with space", "nfmasq")

    monkeypatch.setattr(sys, "argv", [script, "doctor"])
    assert shlex.split(nfmasq("list")) == [script, "list"]

    monkeypatch.setattr(sys, "argv", ["/checkout/nfmasq/__main__.py", "doctor"])
    assert shlex.split(nfmasq("list")) == [sys.executable, "-m", "nfmasq", "list"]


def test_nfmasq_rules_is_called_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(rules_script, "_FOLDERS", (tmp_path / "none", tmp_path / "bin"))
    script = installed(tmp_path / "bin", "nfmasq-rules")

    line = rules.loading(WANTED, "iptables-legacy")(Sides(["lan"], ["ppp+"]))

    assert shlex.split(line) == [
        *(script, "up", "--inside=lan", "--outside=ppp+", "--queue", "0"),
        *("--ports", "61000-65095", "--iptables", "iptables-legacy"),
    ]
