"""nfmasq: IP masquerade as a netfilter-queue plugin."""

__version__ = "0.1.0"
