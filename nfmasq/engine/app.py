"""The names by which helpers in packages of others know what they are given (docs/apps.md)."""

from nfmasq.engine.helper.app import App, Apps, Packet, Session

__all__ = ["App", "Apps", "Packet", "Session"]
