"""The one kind of error that is meant for a person's eyes."""


class NfmasqError(Exception):
    """Something a person can mend; the message is one line: what is wrong and what to do."""
