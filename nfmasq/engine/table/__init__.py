"""The table of entries: the entry itself, how it is found, its states, timers, ports and limits."""
