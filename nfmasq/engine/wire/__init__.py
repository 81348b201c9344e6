"""The bytes of packets: what stands in them, and how it is read, verified and written.

Nothing here knows of entries.
"""
