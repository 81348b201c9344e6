"""A finding of `nfmasq doctor`, the levels of findings, and commands to paste."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
"""The colour of each level."""


@dataclass(frozen=True)
class Finding:
    """Something that doctor found.

    `level` is a key of STYLES, `advice` says what to do, and `commands` do it: lines for a shell on
    this machine. What doctor cannot know in them is written in capitals, and `advice` says so.
    """

    level: str
    what: str
    advice: str = ""
    commands: tuple[str, ...] = ()


def as_root(*words: str) -> str:
    """Return a command as a line for a shell, with sudo where the user is not root."""
    return shlex.join(words if os.geteuid() == 0 else ("sudo", *words))


def nfmasq(*words: str) -> str:
    """Return a command of nfmasq as a line for a shell, called as it is installed here."""
    program = shutil.which(sys.argv[0])
    if program is None or Path(program).name != "nfmasq":
        return as_root(sys.executable, "-m", "nfmasq", *words)
    return as_root(str(Path(program).absolute()), *words)
