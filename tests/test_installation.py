"""What an installation without its checkout finds: the rules script is with its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nfmasq

FIND = """
import sys
sys.executable = sys.argv[1]
import nfmasq.lab
print(nfmasq.lab._RULES)
try:
    nfmasq.lab.Lab.rules(None, "up")
except nfmasq.lab.NfmasqError as error:
    print(error)
except AttributeError:
    print("a gateway is all that is missing")
"""


def test_the_rules_script_is_found_beside_python(tmp_path: Path) -> None:
    library, programs = tmp_path / "lib", tmp_path / "bin"
    shutil.copytree(
        nfmasq.__path__[0], library / "nfmasq", ignore=shutil.ignore_patterns("__pycache__")
    )
    programs.mkdir()
    script = programs / "nfmasq-rules"

    def found() -> list[str]:
        command = [sys.executable, "-c", FIND, str(programs / "python")]
        environment = os.environ | {"PYTHONPATH": str(library), "PATH": "/nowhere"}
        return subprocess.check_output(
            command, cwd=tmp_path, env=environment, text=True, timeout=60
        ).splitlines()

    nothing, message = found()
    assert nothing == "None"
    assert str(script) in message
    assert "install nfmasq again" in message
    script.touch()
    assert found() == [str(script), "a gateway is all that is missing"]
