"""The command `nfmasq doctor`, as any user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_as_any_user_and_with_nfmasq_not_running_it_still_answers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nfmasq", "doctor", "--json", "--control", tmp_path / "none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    findings = json.loads(done.stdout)
    problems = [finding for finding in findings if finding["level"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    assert done.stderr == ""
    assert any("no nfmasq is running" in finding["what"] for finding in findings)
