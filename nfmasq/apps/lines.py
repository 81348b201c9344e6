"""Streams of lines, for helpers of protocols that are made of lines.

A line ends with a newline; a carriage return before it belongs to the line. Only the start of a
line that may yet concern the helper is held back until the rest of the line has come. Nothing but a
newline ends a line, so whatever stands within a line is never taken for another line.

Lines that cannot concern the helper are found by a compiled pattern, and pass many at a time: a
text of 64 KB costs little, however many lines it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LONGEST = 1000
"""Bytes; far longer than the lines of any command. A line of this length or more comes to the
helper in pieces."""

Rewrite = Callable[[bytes], bytes]


class Lines:
    """Divides one direction into lines, which are units of a stream (`engine/helper/stream.py`).

    `rewrite` gets each line and returns what is to be sent in its place. Of a line that is too
    long, or comes in pieces and does not concern the helper, `rewrite` gets the first piece only.
    `may_concern` gets the first bytes of a line, and tells whether the line, whatever comes next,
    may have to be rewritten.

    `rest`, where there is one, gets the other pieces of a line, of less than `LONGEST` bytes each.
    Then no piece ends with a carriage return of which nobody knows whether a newline follows.

    `concerning` returns a pattern that finds the bytes that make a line concern the helper, as
    things are. The newline before the line is there to be found, too. A line in which the pattern
    finds nothing passes without `rewrite`, except the first line of what has come. None: every line
    concerns the helper.
    """

    def __init__(
        self,
        rewrite: Rewrite,
        may_concern: Callable[[bytes], bool],
        *,
        rest: Rewrite | None = None,
        concerning: Callable[[], re.Pattern[bytes] | None] | None = None,
    ) -> None:
        self._rewrite = rewrite
        self._may_concern = may_concern
        self._rest = rest
        self._concerning = concerning
        self._within_line = False

    def length(self, text: bytes, at: int) -> int:
        """Return the length to the line's end, or of what there is of it; 0 to hold it back.

        Return the length of several lines where none of them concerns the helper.
        """
        if self._within_line:
            return self._length_of_rest(text, at)
        return self._length_of_no_concern(text, at) or self._length_of_line(text, at)

    def rewrite(self, unit: bytes) -> bytes:
        """Return what is to be sent in the place of a line, of lines, or of a piece of a line."""
        begins_line = not self._within_line
        self._within_line = not unit.endswith(b"\n")
        if not begins_line:
            return self._rest(unit) if self._rest else unit
        are_several = 0 <= unit.find(b"\n") < len(unit) - 1
        return unit if are_several else self._rewrite(unit)

    def _length_of_no_concern(self, text: bytes, at: int) -> int:
        pattern = self._concerning() if self._concerning and at else None
        if pattern is None:
            return 0
        found = pattern.search(text, at - 1)
        end = found.start() + 1 if found else len(text)
        return text.rfind(b"\n", at - 1, end) + 1 - at

    def _length_of_line(self, text: bytes, at: int) -> int:
        end = text.find(b"\n", at, at + LONGEST) + 1
        if end:
            return end - at
        start = text[at : at + LONGEST]
        is_held = len(start) < LONGEST and self._may_concern(start)
        return 0 if is_held else self._length_of_piece(start)

    def _length_of_rest(self, text: bytes, at: int) -> int:
        most = LONGEST if self._rest else len(text)
        end = text.find(b"\n", at, at + most) + 1
        return end - at if end else self._length_of_piece(text[at : at + most])

    def _length_of_piece(self, piece: bytes) -> int:
        return len(piece.removesuffix(b"\r") if self._rest else piece)


def without_returns(line: bytes) -> bytes:
    """Return a line, or a piece of a line, with spaces for the carriage returns within.

    There are programs that take a carriage return alone for the end of a line.
    """
    within = line.rstrip(b"\r\n") if line.endswith(b"\n") else line
    return within.replace(b"\r", b" ") + line[len(within) :]
