"""What `nfmasq doctor` finds, and how bad that is."""

from __future__ import annotations

from dataclasses import dataclass

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """What one check found; `level` is a key of STYLES, `advice` says what to do."""

    level: str
    what: str
    advice: str = ""
