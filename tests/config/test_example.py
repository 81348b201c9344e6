"""The example configuration in contrib/ is right, complete, and shows the defaults."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from nfmasq.config import Configuration, load
from nfmasq.config.forwards import ForwardSettings, TriggerSettings, forwards
from nfmasq.config.health import HealthSettings
from nfmasq.engine import TCP

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = Path(__file__).parents[2] / "contrib/nfmasq.toml"


def without_comment_marks() -> str:
    """Return the example with every setting in it in force."""
    return re.sub(r"^# (?=[a-z0-9-]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_as_shipped_it_changes_nothing() -> None:
    assert load(EXAMPLE, {}) == Configuration()


def test_what_is_commented_out_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text(without_comment_marks())
    # The settings whose default cannot be written down.
    example = (int(IPv4Address("198.51.100.2")),)
    assert load(file, {}) == replace(
        Configuration(), masquerade_addresses=example, inside=("eth1",), outside=("eth0",)
    )


def test_it_has_every_setting() -> None:
    table = Configuration().as_table()
    timeouts, apps = table.pop("timeouts"), table.pop("apps")
    assert isinstance(timeouts, dict)
    assert isinstance(apps, dict)
    settings = re.findall(r"^([a-z0-9-]+) = ", without_comment_marks(), re.MULTILINE)
    assert sorted(settings) == sorted([*table, *timeouts, "profile", *apps])


def indented_settings() -> dict[str, Any]:
    """Return the values that the example shows within a forward and a trigger, by key."""
    lines = re.findall(r"^#   ([a-z]+ = .*)$", EXAMPLE.read_text(), re.MULTILINE)
    values: dict[str, Any] = {}
    for line in lines:
        values |= tomllib.loads(line)  # of a key that stands there twice, the later value counts
    return values


def test_what_a_forward_a_trigger_and_a_check_are_shown_with_is_the_default() -> None:
    shown = indented_settings()
    assert shown["scheduler"] == ForwardSettings.scheduler
    assert shown["seconds"] == TriggerSettings.seconds
    assert shown["check"] == asdict(HealthSettings("http"))


def test_every_key_of_a_forward_and_a_trigger_is_shown() -> None:
    shown = indented_settings()
    for written in (forward_of("tcp:1=10.0.0.2:1"), TriggerSettings((TCP, ()), TCP, range(1, 2))):
        assert {*written.as_table()} - {*shown} == set()


def forward_of(text: str) -> ForwardSettings:
    """Read a forward as `--forward` has it."""
    (forward,) = forwards(text)
    return forward
