"""Errors whose message is meant for a person's eyes, and what the machine has too little of."""

from __future__ import annotations

import errno


class NfmasqError(Exception):
    """An error that a person can mend; its message is one line: what is wrong and what to do."""


def shortage(error: BaseException | None) -> str | None:
    """Say in one line what there was too little of, by an error or what led to it; None: nothing.

    It is memory, file descriptors, or threads and processes.
    """
    while error is not None:
        said = _shortage(error)
        if said is not None:
            return said
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return None


def _shortage(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "there is not enough memory (ulimit -v, or MemoryMax= of the unit, may limit it)"
    if number == errno.EMFILE:
        return "too few open files are allowed: raise the limit (ulimit -n, or LimitNOFILE=)"
    if number == errno.ENFILE:
        return "the machine has too many open files: raise the sysctl fs.file-max"
    if number == errno.EAGAIN or (isinstance(error, RuntimeError) and "new thread" in str(error)):
        return (
            "no thread or process can be started: raise the limit of processes (ulimit -u, or "
            "TasksMax= of the unit) or of memory"
        )
    return None
