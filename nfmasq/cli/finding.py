"""A finding of `nfmasq doctor`, and the levels of findings."""

from __future__ import annotations

from dataclasses import dataclass

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
"""The colour of each level."""


@dataclass(frozen=True)
class Finding:
    """Something that doctor found; `level` is a key of STYLES, `advice` says what to do."""

    level: str
    what: str
    advice: str = ""
