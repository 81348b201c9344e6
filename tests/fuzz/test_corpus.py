"""What the fuzzer has found worth keeping is without a finding, with the fuzzer or without."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz import engine
from tests.fuzz.__main__ import TARGETS
from tests.fuzz.minimize import LONGEST_KEPT

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
MOST = 100


def programs(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_no_program_that_is_kept_is_a_finding(target: str) -> None:
    run = import_module(f"tests.fuzz.{target}").run
    for file in programs(target):
        run(file.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_small(target: str) -> None:
    sizes = [file.stat().st_size for file in programs(target)]
    assert 5 <= len(sizes) <= MOST
    assert max(sizes) <= LONGEST_KEPT


@pytest.mark.parametrize("target", TARGETS)
def test_a_program_does_what_it_did_before(target: str) -> None:
    steps_of = import_module(f"tests.fuzz.{target}").steps_of
    file = programs(target)[0]
    assert steps_of(file.read_bytes()) == steps_of(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, file], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_kept_programs_take_every_kind_of_step() -> None:
    taken = {
        step.what for file in programs("engine") for step in engine.steps_of(file.read_bytes())
    }
    assert taken >= {
        "out", "into", "own", "hairpin", "hairpin_source", "hairpin_own_error", "sweep",
        "configure", "addresses", "server", "new", "gone", "remove", "follow", "retime",
    }  # fmt: skip
