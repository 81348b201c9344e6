"""The bytes of packets: what stands in them, and how it is read, checked and written.

Nothing here knows of entries.
"""
