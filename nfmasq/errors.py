"""The kind of error whose message is meant for a person's eyes."""


class NfmasqError(Exception):
    """An error that a person can mend; its message is one line: what is wrong and what to do."""
