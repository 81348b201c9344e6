"""What there is too little of, as an error and what led to it tell."""

from __future__ import annotations

import errno
import threading

import pytest

from nfmasq.errors import NfmasqError, shortage


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOMEM, "no"), "not enough memory"),
        (OSError(errno.EMFILE, "no"), "LimitNOFILE="),
        (OSError(errno.ENFILE, "no"), "fs.file-max"),
        (OSError(errno.EAGAIN, "no"), "TasksMax="),
        (RuntimeError("can't start new thread"), "TasksMax="),
    ],
)
def test_a_shortage_is_one_line_also_where_it_led_to_another_error(
    error: Exception, said: str
) -> None:
    try:
        try:
            raise error
        except Exception as first:
            raise NfmasqError("the queue cannot be had") from first
    except NfmasqError as second:
        line = shortage(second)
    assert line is not None
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [ValueError("new"), OSError(errno.EPERM, "no"), threading.ThreadError()]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert shortage(error) is None


def test_what_an_error_hides_is_not_its_reason() -> None:
    """A client whose server is busy lacks nothing."""

    def ask() -> None:
        try:
            raise BlockingIOError(errno.EAGAIN, "busy")
        except BlockingIOError:
            raise NfmasqError("cannot talk to nfmasq") from None

    with pytest.raises(NfmasqError) as caught:
        ask()
    assert shortage(caught.value) is None
