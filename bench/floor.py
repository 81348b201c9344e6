"""The floor of a masquerade in Python over NFQUEUE: each packet's own bytes are handed back.

It does what every masquerade in Python over NFQUEUE must do, and nothing else: read the packet, and
return a packet. `python -m bench.floor`
"""

from __future__ import annotations

from netfilterqueue import Packet

from bench.baseline import serve


def handle(packet: Packet) -> None:
    packet.set_payload(packet.get_payload())
    packet.accept()


if __name__ == "__main__":
    serve(handle)
