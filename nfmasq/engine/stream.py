"""The names by which helpers in packages of others know streams and units (docs/apps.md)."""

from nfmasq.engine.helper.stream import MAY_GROW_TO, Segment, Stream, Units

__all__ = ["MAY_GROW_TO", "Segment", "Stream", "Units"]
