"""Runs a target of the fuzzer: `python -m tests.fuzz TARGET [FILE | FOLDER | -OPTION=VALUE]...`

A target is the name of a module here whose `run` takes a program, the bytes that the fuzzer writes,
and raises an exception where the program finds a fault. Files are programs to run again, without
the fuzzer. Folders are the fuzzer's: it runs what is in all of them, and keeps in the first what
gets to new places. Options are libFuzzer's (`-help=1` lists them). The fuzzer takes atheris, from
the extra `fuzz`; files do not.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TARGETS = "engine", "control"
LONGEST = 1000
"""The most bytes that a program has."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in TARGETS:
        raise SystemExit(
            f"usage: python -m tests.fuzz {'|'.join(TARGETS)} [FILE | FOLDER | -OPTION]..."
        )
    target, *rest = arguments
    if rest and all(Path(each).is_file() for each in rest):
        module = import_module(f"tests.fuzz.{target}")
        for file in rest:
            replay(module, Path(file))
        return
    fuzz(target, rest)


def replay(module: Any, file: Path) -> None:
    """Run a program from a file, and print its steps where it is a finding."""
    program = file.read_bytes()
    try:
        module.run(program)
    except Exception:
        print(file, *module.steps_of(program), sep="\n")
        raise


def fuzz(target: str, arguments: list[str]) -> None:
    """Have the fuzzer write programs, until its options have it stop or it finds something."""
    import atheris

    with atheris.instrument_imports(include=["nfmasq"]):
        module = import_module(f"tests.fuzz.{target}")
    usual = f"-max_len={LONGEST}", "-len_control=0"
    atheris.Setup([sys.argv[0], *usual, *arguments], module.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
