"""Why an entry ends: each entry that ended did so for one of these reasons."""

from __future__ import annotations

EXPIRED = "expired"
"""Its time was over without a packet."""
CLOSED = "closed"
"""Its connection was over, and then its time was."""
REPLACED = "replaced"
"""Its connection was over, and another one between the two ends took its place."""
EVICTED = "evicted"
"""Another entry needed its place in the table, or its port."""
ADDRESS = "address"
"""The gateway has its masquerade address no more."""
FLUSHED = "flushed"
"""A person removed all entries."""
DELETED = "deleted"
"""A person removed entries that met certain criteria."""
SERVER = "server"
"""Its server inside was dead, and another one took the connection over."""
HELPER = "helper"
"""A helper expects it no more, or could not be bound to it."""

ENDINGS = (EXPIRED, CLOSED, REPLACED, EVICTED, ADDRESS, FLUSHED, DELETED, SERVER, HELPER)
"""Why an entry ended. An entry that another one controls ends for the reason of that one."""
