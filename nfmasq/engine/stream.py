"""The names of streams and units, for helpers in other packages (docs/apps.md)."""

from nfmasq.engine.helper.stream import MAY_GROW_TO, Segment, Stream, Units

__all__ = ["MAY_GROW_TO", "Segment", "Stream", "Units"]
