"""NFQUEUE and nothing else: every packet is accepted as it came. `python -m bench.accept`"""

from __future__ import annotations

from netfilterqueue import Packet

from bench.baseline import serve


def handle(packet: Packet) -> None:
    packet.accept()


if __name__ == "__main__":
    serve(handle)
