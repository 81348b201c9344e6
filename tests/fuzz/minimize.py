"""Makes the kept corpus of a target anew: `python -m tests.fuzz.minimize TARGET [FILES]`

Of all programs that are kept and that the fuzzer has found (`build/fuzz`), it keeps those that
together take every step from line to line that any of them takes, short programs first. With
FILES it keeps so many at most: those that reach most.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nfmasq
from tests.fuzz.__main__ import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path("build/fuzz")
LONGEST_KEPT = 400
"""The most bytes that a program has that is kept."""
SOURCES = str(Path(nfmasq.__file__).parent)

Reached = set[tuple[CodeType, int, int]]
"""Steps from a line to another line of the same function."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in TARGETS:
        raise SystemExit(f"usage: python -m tests.fuzz.minimize {'|'.join(TARGETS)} [FILES]")
    target, *most = arguments
    run = import_module(f"tests.fuzz.{target}").run
    files = [*(CORPUS / target).glob("*"), *(FOUND / target).glob("*")]
    programs = {file.read_bytes() for file in files if file.stat().st_size <= LONGEST_KEPT}
    reached = {program: reached_by(run, program) for program in programs}
    kept = fewest(reached)[: int(most[0]) if most else None]
    shutil.rmtree(CORPUS / target)
    (CORPUS / target).mkdir()
    for program in kept:
        (CORPUS / target / sha1(program).hexdigest()[:16]).write_bytes(program)
    every, by_kept = set[Any]().union(*reached.values()), {p: reached[p] for p in kept}
    total = len(set[Any]().union(*by_kept.values()))
    print(f"{len(kept)} of {len(programs)} programs reach {total} of {len(every)}")


def reached_by(run: Callable[[bytes], object], program: bytes) -> Reached:
    """Run a program, and return what of nfmasq it reaches."""
    reached: Reached = set()
    with tracing(reached):
        run(program)
    return reached


@contextmanager
def tracing(reached: Reached) -> Iterator[None]:
    """Note what of nfmasq is reached in the block."""

    def enter(frame: FrameType, event: str, _: object) -> Any:
        code, last = frame.f_code, 0
        if not code.co_filename.startswith(SOURCES):
            return None

        def line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal last
            if event == "line":
                reached.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def fewest(reached: dict[bytes, Reached]) -> list[bytes]:
    """Return programs that together reach all that is reached; those that add most come first."""
    left, kept = set[Any]().union(*reached.values()), list[bytes]()
    while left:
        best = max(reached, key=lambda program: (len(reached[program] & left), -len(program)))
        kept.append(best)
        left -= reached[best]
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
