"""How many entries fit into memory: the default of max-entries."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from nfmasq import config
from nfmasq.config import memory
from nfmasq.config.memory import BYTES_AN_ENTRY, BYTES_IN_KERNEL, LEAST, fitting

MOST = 1_048_576
WHOLE = BYTES_AN_ENTRY + BYTES_IN_KERNEL


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the machine 64 GB, no cgroup and no limit of addresses; returns the folder of /proc."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemFree: 5 kB\nMemTotal: {64 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/nfmasq.service\n")
    return tmp_path


def limit(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_on_a_large_machine_there_are_the_most() -> None:
    assert fitting(MOST).entries == MOST


def test_entries_take_half_of_a_small_machine_at_most(machine: Path) -> None:
    (machine / "proc/meminfo").write_text(f"MemTotal: {512 << 10} kB\n")
    fits = fitting(MOST)
    assert fits.entries * WHOLE <= 256 << 20 < (fits.entries + 1) * WHOLE
    assert fits.what == "half of the machine's memory of 512 MB"


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/system.slice/nfmasq.service", "system.slice/nfmasq.service/memory.max"),
        ("0::/system.slice/nfmasq.service", "system.slice/memory.max"),
        ("0::/system.slice/nfmasq.service", "system.slice/nfmasq.service/memory.high"),
        ("0::/not/to/be/seen/here", "memory.max"),
        ("5:cpu,memory:/nfmasq", "memory/nfmasq/memory.limit_in_bytes"),
    ],
)
def test_they_fit_into_the_limit_of_the_unit_or_of_what_it_is_in(
    machine: Path, own: str, file: str
) -> None:
    (machine / "proc/self/cgroup").write_text(f"{own}\n")
    limit(machine / "cgroup" / file, f"{400 << 20}\n")
    fits = fitting(MOST)
    assert fits.entries > LEAST
    assert fits.entries * WHOLE < (400 << 20) - memory.BYTES_WITHOUT
    assert fits.what == "the cgroup's memory limit of 400 MB"


def test_of_several_limits_the_least_counts(machine: Path) -> None:
    limit(machine / "cgroup/system.slice/memory.max", str(400 << 20))
    limit(machine / "cgroup/system.slice/nfmasq.service/memory.max", str(300 << 20))
    assert "300 MB" in fitting(MOST).what


def test_a_limit_of_addresses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (500_000_000, 500_000_000))
    fits = fitting(MOST)
    assert fits.entries * BYTES_AN_ENTRY < 500_000_000 - memory.ADDRESSES_WITHOUT
    assert fits.what == "RLIMIT_AS of 476 MB"


@pytest.mark.parametrize("text", ["max\n", "", "nonsense\n", str(1 << 63)])
def test_what_is_no_limit_or_cannot_be_read_limits_nothing(machine: Path, text: str) -> None:
    limit(machine / "cgroup/memory.max", text)
    assert fitting(MOST).entries == MOST
    for file in ("proc/meminfo", "proc/self/cgroup"):
        (machine / file).unlink()
    assert fitting(MOST).entries == MOST


def test_a_limit_that_leaves_nothing_leaves_a_few_entries(machine: Path) -> None:
    limit(machine / "cgroup/memory.max", "4096\n")
    assert fitting(MOST).entries == LEAST


def test_what_fits_is_the_default_and_no_more(tmp_path: Path) -> None:
    assert config.load(None, {}, 5000).settings.max_entries == 5000
    assert config.load(None, {"max-entries": 9000}, 5000).settings.max_entries == 9000
    file = tmp_path / "nfmasq.toml"
    file.write_text("max-entries = 9000\n")
    assert config.load(file, {}, 5000).settings.max_entries == 9000
