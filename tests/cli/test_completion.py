"""Completion of commands, options and values, as a shell asks for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nfmasq.cli import main

# The shells call nfmasq by its name.
NFMASQ = f'#!/bin/sh\nexec {sys.executable} -m nfmasq "$@"\n'

COMPLETE = """
eval "$(_NFMASQ_COMPLETE=bash_source nfmasq)"
COMP_WORDS=(nfmasq "$@")
COMP_CWORD=$#
"$(complete -p nfmasq | sed 's/.*-F \\([^ ]*\\).*/\\1/')" nfmasq
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which nfmasq is a command."""
    (tmp_path / "nfmasq").write_text(NFMASQ)
    (tmp_path / "nfmasq").chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def completions(environment: dict[str, str], *words: str) -> list[str]:
    """Return what bash offers for the last of these words."""
    return subprocess.check_output(
        ["bash", "-c", COMPLETE, "bash", *words], env=environment, text=True, timeout=60
    ).splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["st"], ["stats"]),
        (["run", "--port-"], ["--port-selection"]),
        (["run", "--mapping", "address"], ["address-dependent", "address-and-port-dependent"]),
        (["list", "--sort", ""], ["saddr", "maddr", "daddr", "expires", "packets", "bytes"]),
    ],
)
def test_bash_offers_commands_options_and_values(
    environment: dict[str, str], words: list[str], offered: list[str]
) -> None:
    assert completions(environment, *words) == offered


@pytest.mark.parametrize(("shell", "register"), [("zsh", "compdef"), ("fish", "complete")])
def test_the_other_shells_have_theirs(
    environment: dict[str, str], shell: str, register: str
) -> None:
    def ask(instruction: str, **variables: str) -> str:
        asked = environment | {"_NFMASQ_COMPLETE": f"{shell}_{instruction}"} | variables
        return subprocess.check_output(["nfmasq"], env=asked, text=True, timeout=60)

    assert re.search(rf"^\s*{register} .*nfmasq", ask("source"), re.MULTILINE)
    words = ask(
        "complete",
        COMP_WORDS="nfmasq run --mapping end",
        COMP_CWORD={"zsh": "3", "fish": "end"}[shell],
    )
    assert "endpoint-independent" in words


def test_the_help_says_how_to_have_it() -> None:
    told = CliRunner().invoke(main, ["--help"]).stdout

    for shell in ("bash", "zsh", "fish"):
        assert f"_NFMASQ_COMPLETE={shell}_source nfmasq" in told
