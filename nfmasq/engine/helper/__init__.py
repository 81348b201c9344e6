"""Application helpers: what one is, what it sees of a packet, and what it may do."""
