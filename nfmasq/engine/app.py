"""The names of what helpers in other packages are given (docs/apps.md)."""

from nfmasq.engine.helper.app import App, Apps, Packet, Session

__all__ = ["App", "Apps", "Packet", "Session"]
