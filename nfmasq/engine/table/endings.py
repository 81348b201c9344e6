"""Why an entry ends: every entry ends for one of these reasons."""

from __future__ import annotations

EXPIRED = "expired"
"""Its timeout passed without a packet."""
CLOSED = "closed"
"""It was over, and then its timeout passed, or another session needed its place or its port."""
REPLACED = "replaced"
"""Another session with its outside endpoint took its place: its connection was over, or the outside
came by a forwarded port."""
EVICTED = "evicted"
"""It was not over, but another session needed its place in the table, or its port."""
ADDRESS = "address"
"""The gateway no longer has its masquerade address, or its packets leave by another interface."""
FLUSHED = "flushed"
"""A person removed all entries."""
DELETED = "deleted"
"""A person removed entries that met certain criteria."""
SERVER = "server"
"""Its server inside was dead, drained or gone, or its port forwarded no more; it may begin anew."""
HELPER = "helper"
"""A helper no longer expects it, or could not be bound to it, or refused the packet that made
it."""

ENDINGS = (EXPIRED, CLOSED, REPLACED, EVICTED, ADDRESS, FLUSHED, DELETED, SERVER, HELPER)
"""All reasons. An entry that is ended with its controlling entry ends for the same reason."""
