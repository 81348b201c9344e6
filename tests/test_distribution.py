"""What is given away: the source distribution, and what is installed from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from nfmasq import __version__

ROOT = Path(__file__).parents[1]
NAME = f"nfmasq-{__version__}"
WRITTEN = {"PKG-INFO", "nfmasq.egg-info"}
"""What setuptools itself writes into a source distribution."""

TYPES = """
from nfmasq.engine.option import allowed_names
reveal_type(allowed_names)
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command without this checkout on Python's path; returns what it prints."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment | variables, timeout=120, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def tracked() -> list[str]:
    """Return the files of this checkout that git knows, by their path."""
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("takes git, and a checkout: a source distribution has no list of its own")
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def build(kind: str, source: Path, target: Path) -> Path:
    """Build an "sdist" or a "wheel" as pip does, but with the setuptools of this Python."""
    program = f"from setuptools.build_meta import build_{kind} as build; build({str(target)!r})"
    run(sys.executable, "-c", program, cwd=source)
    [built] = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a source distribution from a copy of the tracked files, and unpack it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in tracked():
        copy = folder / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    # What has been run leaves something behind, which nobody wants.
    (folder / "checkout/tests/__pycache__").mkdir()
    (folder / "checkout/tests/__pycache__/conftest.cpython-311.pyc").touch()
    with tarfile.open(build("sdist", folder / "checkout", folder)) as archive:
        archive.extractall(folder)
    return folder / NAME


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install what is built from the sources; returns the folder of the virtual environment.

    The libraries that nfmasq uses are those of this Python.
    """
    folder = tmp_path_factory.mktemp("installed")
    wheel = build("wheel", sources, folder)
    venv.create(folder / "venv", symlinks=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("platlib") + "\n")
    return folder / "venv"


def test_the_source_distribution_has_all_that_a_checkout_has(sources: Path) -> None:
    found = {
        str(path.relative_to(sources))
        for path in sources.rglob("*")
        if path.is_file() and path.relative_to(sources).parts[0] not in WRITTEN
    }
    assert found == set(tracked())


def test_scripts_of_the_source_distribution_can_be_run(sources: Path) -> None:
    scripts = {name for name in tracked() if os.access(ROOT / name, os.X_OK)}

    assert "script/test" in scripts
    assert [name for name in scripts if not os.access(sources / name, os.X_OK)] == []


def test_what_is_installed_from_it_runs(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "bin/nfmasq", "--version", cwd=tmp_path) == (
        f"nfmasq, version {__version__}\n"
    )
    where = "import nfmasq.rules_script as rules; print(rules.__file__, rules.find())"
    module, script = run(installed / "bin/python", "-c", where, cwd=tmp_path).split()
    assert Path(module).is_relative_to(installed)
    assert script == str(installed / "bin/nfmasq-rules")
    assert "up" in run(script, "--help", cwd=tmp_path)


def test_its_types_are_seen_by_others(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TYPES)

    told = run(
        sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache",
        "--python-executable", installed / "bin/python", "program.py", cwd=tmp_path,
    )  # fmt: skip

    assert 'Revealed type is "def ' in told
