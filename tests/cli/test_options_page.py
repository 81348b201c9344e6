"""docs/options.md is what its script writes, and has every option and every key."""

from __future__ import annotations

import runpy
from pathlib import Path

import click
import pytest

from nfmasq.cli.run import run
from nfmasq.config.readers import READERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "options.md").read_text()


def test_it_is_what_the_script_writes() -> None:
    written = runpy.run_path(str(ROOT / "script" / "write-options-page"))["page"]()

    assert written == PAGE, "write it anew: script/write-options-page"


@pytest.mark.parametrize("key", READERS)
def test_it_has_every_key(key: str) -> None:
    assert f"`{key}`" in PAGE


@pytest.mark.parametrize("option", run.params, ids=lambda option: str(option.name))
def test_it_has_every_option(option: click.Parameter) -> None:
    for name in (*option.opts, *option.secondary_opts):
        assert f"`{name}`" in PAGE
