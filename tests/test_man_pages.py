"""The man pages that script/write-man-pages writes: every command, every option, well-formed."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import click
import pytest

from nfmasq.cli import main
from tests.programs import program

SCRIPT = Path(__file__).parents[1] / "script" / "write-man-pages"
TOP = click.Context(main, info_name="nfmasq")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    runpy.run_path(str(SCRIPT))["write"](folder)
    return folder


def shown(page: Path) -> str:
    """Return a page as it is read, with single spaces; it must have no mistake in it."""
    line: list[str | Path] = [
        program("groff", "groff-base"),
        "-man",
        "-ww",
        "-Tascii",
        "-P-cbou",
        "-rHY=0",
        page,
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("name", main.list_commands(TOP))
def test_a_command_has_a_page_with_its_options(pages: Path, name: str) -> None:
    command = main.get_command(TOP, name)
    assert command

    text = shown(pages / f"nfmasq-{name}.1")

    options = [option for parameter in command.params for option in parameter.opts]
    assert [option for option in options if option.startswith("-") and option not in text] == []
    for page in ("nfmasq(1)", "nfmasq-rules(8)"):
        assert page in text


def test_the_first_page_names_the_others(pages: Path) -> None:
    text = shown(pages / "nfmasq.1")

    assert [name for name in main.list_commands(TOP) if f"nfmasq-{name}(1)" not in text] == []
    assert "_NFMASQ_COMPLETE=bash_source nfmasq" in text


def test_the_rules_script_has_one(pages: Path) -> None:
    rules = SCRIPT.parents[1] / "iptables" / "nfmasq-rules"
    told = subprocess.check_output([rules, "--help"], text=True, timeout=60)

    text = shown(pages / "nfmasq-rules.8")

    assert [
        option for option in re.findall(r"^  (--[a-z-]+)", told, re.M) if option not in text
    ] == []


def test_no_control_character_is_left(pages: Path) -> None:
    assert [page for page in pages.iterdir() if re.search(r"[^\n -~]", page.read_text())] == []
