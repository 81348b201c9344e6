"""Application helpers: what a helper is, what it sees of a packet, and what it may do."""
