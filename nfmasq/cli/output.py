"""Standard output and error: when nobody takes what is written, and how it may be drawn.

A reader that has gone away (`nfmasq list | head`) ends a command quietly. Where output is closed,
or the disk is full, a command says so in one line. The exit status is 1 in each case.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_STDOUT, _STDERR = 1, 2


class OutputError(Exception):
    """Standard output cannot be written.

    It is no OSError, which a command may take for an error of its own files.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.reader_is_gone = error.errno == errno.EPIPE


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from None


def prepare_streams() -> None:
    """Have standard output raise OutputError, and no other file take the place of a closed stream.

    Output that the caller has put somewhere else (a test, say) stays as it is.
    """
    _open_closed_streams()
    if sys.stdout is not sys.__stdout__:
        return
    output = io.BufferedWriter(_Output(_STDOUT, "w", closefd=False))
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(output)
    else:
        sys.stdout = io.TextIOWrapper(
            output,
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=sys.stdout.line_buffering,
        )


def _open_closed_streams() -> None:
    """Open each of the first three descriptors that is closed.

    What is opened takes the lowest number. Opened to read alone, output fails as if it were closed.
    Errors go nowhere: nobody is left to be told.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
            if number == _STDERR:
                sys.stderr = open(_STDERR, "w", closefd=False)  # noqa: SIM115 (until the end)


def is_taken(patience: float = 1.0) -> bool:
    """Say whether a line for standard error is taken within `patience` seconds.

    A reader that is stuck must not keep a command from ending.
    """
    if sys.stderr is not sys.__stderr__:
        return True
    writable = select.poll()
    writable.register(_STDERR, select.POLLOUT)
    return bool(writable.poll(patience * 1000))


def end(work: Callable[[], int], complain: Callable[[str], None]) -> int:
    """Do the work of a command, write all that it prints, and return its exit status."""
    try:
        status = work()
        sys.stdout.flush()
    except OutputError as error:
        _send_nowhere(_STDOUT)
        if not error.reader_is_gone:
            complain(f"cannot write: {error}")
        status = 1
    try:
        sys.stderr.flush()
    except OSError:
        _send_nowhere(_STDERR)
    return status


def _send_nowhere(number: int) -> None:
    # What is still buffered would fail again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def is_plain() -> bool:
    """Say whether colours and the like are unwanted (https://no-color.org) or not understood."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def console(**options: Any) -> Console:
    """Make a console of rich's that draws plainly where that is asked for."""
    from rich.console import Console

    return Console(color_system=None if is_plain() else "auto", **options)
