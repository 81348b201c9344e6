"""Streams of lines, for helpers of protocols that are made of them.

A line ends with a newline; a carriage return before it belongs to it. Only the start of a line that
may yet concern the helper is held back until the rest of it has come. A newline is the
one thing that ends a line, so whatever stands within one is never taken for another.
"""

from __future__ import annotations

from collections.abc import Callable

LONGEST = 1000
"""Bytes; a line that is longer by far than those of any command does not concern a helper."""


class Lines:
    """The lines of one direction, as units of a stream (`engine/stream.py`).

    `rewrite` gets each line and returns what is to be sent in its place. Of a line that is too
    long, or comes in pieces and does not concern the helper, it gets the first piece only.
    `may_concern` gets the start of a line, some bytes of it, and tells whether the
    line, whatever comes, may be one to rewrite.
    """

    def __init__(
        self, rewrite: Callable[[bytes], bytes], may_concern: Callable[[bytes], bool]
    ) -> None:
        self._rewrite = rewrite
        self._may_concern = may_concern
        self._within_line = False

    def length(self, text: bytes, at: int) -> int:
        """Up to the end of the line, or of what there is of it; 0 where that is to be held back."""
        end = text.find(b"\n", at) + 1 or len(text)
        if self._within_line:
            return end - at
        start = text[at : min(end, at + LONGEST)]
        is_held = not start.endswith(b"\n") and len(start) < LONGEST and self._may_concern(start)
        return 0 if is_held else len(start)

    def rewrite(self, unit: bytes) -> bytes:
        """A line or a piece of one."""
        begins_line = not self._within_line
        self._within_line = not unit.endswith(b"\n")
        return self._rewrite(unit) if begins_line else unit
