"""Programs of the system that a test cannot do without."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program; without it the test fails where CI=true, else is skipped."""
    path = shutil.which(name)
    if path is None:
        missing = f"takes {name} (Debian package {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path
