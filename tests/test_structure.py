"""Imports: no file imports itself by way of others, and no wing of the engine a wing above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WINGS = {
    "wire": {"wire"},
    "table": {"wire", "table"},
    "forward": {"wire", "table", "forward"},
    "helper": {"wire", "table", "helper"},
}
"""The wings of the engine, and what each may import of it."""

Modules = dict[str, Path]


@cache
def modules() -> Modules:
    """Return nfmasq's files by the names that they are imported by."""
    found = {}
    for path in (ROOT / "nfmasq").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    """Return the names of nfmasq's files that a file imports, in functions and for types too."""
    names = set(_imported(ast.parse(modules()[module].read_text())))
    return frozenset(name for name in names if name in modules()) - {module}


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                # Where a name is a file, the file is imported, and not a name of its folder.
                yield submodule if submodule in modules() else node.module


def circle_through(module: str) -> list[str]:
    """Find a way by imports from a file back to itself; empty where there is none."""
    ways = [[module]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for imported in imports_of(way[-1]):
            if imported == module:
                return [*way, module]
            if imported not in seen:
                seen.add(imported)
                ways.append([*way, imported])
    return []


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_file_imports_itself_by_way_of_others(module: str) -> None:
    assert circle_through(module) == []


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_of_the_engine_knows_only_itself_and_those_below(wing: str) -> None:
    prefix = "nfmasq.engine."
    for module in modules():
        if module.startswith(f"{prefix}{wing}."):
            beside = {name for name in imports_of(module) if name.startswith(prefix)}
            assert {name.removeprefix(prefix).split(".")[0] for name in beside} <= WINGS[wing]


def test_the_engine_imports_nothing_of_those_who_use_it() -> None:
    for module in modules():
        if module.startswith("nfmasq.engine"):
            assert all(name.startswith("nfmasq.engine") for name in imports_of(module))


def test_a_circle_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_structure.imports_of", {"a": {"b"}, "b": {"c", "a"}}.get)
    assert circle_through("a") == ["a", "b", "a"]


GATE = "nfmasq.engine.sessions"
"""The one file in which entries begin, change and end (`engine/watch.py`)."""

FIELDS = {
    *("sport", "maddr", "mport", "daddr", "dport"),
    *("state", "timeout", "server", "control", "n_control"),
}
"""Fields of an entry that may change, and that only this file changes."""


def written_fields(module: str) -> set[str]:
    """Return the fields in FIELDS that a file writes, of another object than `self`."""
    fields = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        else:
            continue
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) != "self":
                    fields.add(each.attr)
    return fields & FIELDS


def test_nobody_but_the_gate_writes_what_an_entry_is() -> None:
    assert written_fields(GATE) == FIELDS
    assert {module for module in modules() if written_fields(module)} == {GATE}
