"""The example configuration in contrib/ is right, complete, and shows the defaults."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

from nfmasq.config import Configuration, load

EXAMPLE = Path(__file__).parents[2] / "contrib/nfmasq.toml"


def without_comment_marks() -> str:
    """Return the example with every setting in it in force."""
    return re.sub(r"^# (?=[a-z-]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_as_shipped_it_changes_nothing() -> None:
    assert load(EXAMPLE, {}) == Configuration()


def test_what_is_commented_out_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text(without_comment_marks())
    # The one setting whose default cannot be written down.
    example = (int(IPv4Address("198.51.100.2")),)
    assert load(file, {}) == replace(Configuration(), masquerade_addresses=example)


def test_it_has_every_setting() -> None:
    table = Configuration().as_table()
    timeouts, apps = table.pop("timeouts"), table.pop("apps")
    assert isinstance(timeouts, dict)
    assert isinstance(apps, dict)
    settings = re.findall(r"^([a-z-]+) = ", without_comment_marks(), re.MULTILINE)
    assert sorted(settings) == sorted([*table, *timeouts, "profile", *apps])
