"""The script nfmasq-rules, which loads the rules that lead packets to nfmasq."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# A checkout has a script of its own; an installation puts it with the Python that it is made for.
_FOLDERS = (Path(__file__).parents[1] / "iptables", Path(sys.executable).parent)

_PLACES = " nor ".join(f"{folder}/nfmasq-rules" for folder in _FOLDERS)

NOT_FOUND = f"the script nfmasq-rules is neither {_PLACES} nor on PATH"


def find() -> str | None:
    """Return the path of the script, or None where it is not found."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which("nfmasq-rules", path=os.pathsep.join((*map(str, _FOLDERS), path)))
