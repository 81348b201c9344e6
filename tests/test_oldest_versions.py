"""nfmasq works with the oldest version of each library that it declares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = ["tests/cli/test_output.py", "tests/config", "tests/daemon/test_metrics.py",
         "tests/daemon/test_renumbering.py", "tests/engine/wire/test_messages.py"]  # fmt: skip
"""Tests that need every library, and of click no more than nfmasq does."""


def oldest() -> dict[str, str]:
    """Return the oldest version of each library, as setup.cfg declares it."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = setup["options"]["install_requires"]
    return dict(re.findall(r"^(\S+) >= ([^\s;]+)", declared, re.MULTILINE))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the oldest versions; returns its Python.

    What is not there is taken from the environment of this Python: pytest, and NetfilterQueue where
    it is the oldest one anyway, since it has to be compiled.
    """
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "pytest.pth").write_text(sysconfig.get_path("platlib") + "\n")
    wanted = [f"{name}=={version}" for name, version in oldest().items()]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin/python"),
        "install",
        "--quiet",
    ]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "bin/python"


def test_the_oldest_versions_will_do(python: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    versions = (
        "from importlib.metadata import version; import sys; print(*map(version, sys.argv[1:]))"
    )
    found = subprocess.check_output(
        [python, "-c", versions, *oldest()], env=environment, text=True
    ).split()
    assert dict(zip(oldest(), found, strict=True)) == oldest()

    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
