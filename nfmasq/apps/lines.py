"""Streams of lines, for helpers of protocols that are made of lines.

A line ends with a newline; a carriage return before it belongs to the line. Only the start of a
line that may yet concern the helper is held back until the rest of the line has come. Nothing but a
newline ends a line, so whatever stands within a line is never taken for another line.
"""

from __future__ import annotations

from collections.abc import Callable

LONGEST = 1000
"""Bytes; far longer than the lines of any command. A line of this length or more does not concern a
helper."""


class Lines:
    """Divides one direction into lines, which are units of a stream (`engine/helper/stream.py`).

    `rewrite` gets each line and returns what is to be sent in its place. Of a line that is too
    long, or comes in pieces and does not concern the helper, `rewrite` gets the first piece only.
    `may_concern` gets the first bytes of a line, and tells whether the line, whatever comes next,
    may have to be rewritten.
    """

    def __init__(
        self, rewrite: Callable[[bytes], bytes], may_concern: Callable[[bytes], bool]
    ) -> None:
        self._rewrite = rewrite
        self._may_concern = may_concern
        self._within_line = False

    def length(self, text: bytes, at: int) -> int:
        """Return the length to the line's end, or of what there is of it; 0 to hold it back."""
        end = text.find(b"\n", at) + 1 or len(text)
        if self._within_line:
            return end - at
        start = text[at : min(end, at + LONGEST)]
        is_held = not start.endswith(b"\n") and len(start) < LONGEST and self._may_concern(start)
        return 0 if is_held else len(start)

    def rewrite(self, unit: bytes) -> bytes:
        """Return what is to be sent in the place of a line, or of a piece of a line."""
        begins_line = not self._within_line
        self._within_line = not unit.endswith(b"\n")
        return self._rewrite(unit) if begins_line else unit
