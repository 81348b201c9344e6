"""Where the rules script is found: in a checkout, with the Python of an installation, on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import nfmasq

FIND = """
import sys
sys.executable = sys.argv[1]
import nfmasq.lab
import nfmasq.rules_script
print(nfmasq.rules_script.find())
try:
    nfmasq.lab.Lab.rules(None, "up")
except nfmasq.lab.NfmasqError as error:
    print(error)
except AttributeError:
    print("a gateway is all that is missing")
"""


@dataclass
class Installation:
    """The package in a folder, and another folder with a Python."""

    root: Path

    def found(self, path: Path) -> list[str]:
        """Return the lines that are printed about the script when the variable PATH is `path`."""
        command = [sys.executable, "-c", FIND, str(self.root / "bin" / "python")]
        environment = os.environ | {"PYTHONPATH": str(self.root / "lib"), "PATH": str(path)}
        return subprocess.check_output(
            command, cwd=self.root, env=environment, text=True, timeout=60
        ).splitlines()

    def script(self, *folders: str) -> Path:
        """Make an empty script in a folder; returns its path."""
        script = self.root.joinpath(*folders, "nfmasq-rules")
        script.parent.mkdir(parents=True, exist_ok=True)
        script.touch(0o755)
        return script


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    shutil.copytree(
        nfmasq.__path__[0],
        tmp_path / "lib" / "nfmasq",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return Installation(tmp_path)


def test_the_rules_script_is_found_beside_python(installation: Installation) -> None:
    nothing, message = installation.found(Path("/nowhere"))
    assert nothing == "None"
    assert str(installation.root / "bin" / "nfmasq-rules") in message
    assert "install nfmasq again" in message

    script = installation.script("bin")
    assert installation.found(Path("/nowhere")) == [str(script), "a gateway is all that is missing"]


def test_a_nearer_rules_script_is_taken(installation: Installation) -> None:
    elsewhere = installation.script("elsewhere")
    assert installation.found(elsewhere.parent)[0] == str(elsewhere)

    beside_python = installation.script("bin")
    assert installation.found(elsewhere.parent)[0] == str(beside_python)

    of_the_checkout = installation.script("lib", "iptables")
    assert installation.found(elsewhere.parent)[0] == str(of_the_checkout)
