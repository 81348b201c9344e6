"""Application helpers, each in a file of its own, and how they are found.

nfmasq's own helpers are known by name. Others come from any installed package that has an entry
point in the group `nfmasq.apps`: the entry point's name is the helper's name, and it leads to a
class that makes the helper. docs/apps.md says how to write a helper; what a helper is and may do is
in `engine/helper/app.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points

from nfmasq.apps.ftp import Ftp
from nfmasq.apps.irc import Irc
from nfmasq.apps.pptp import Pptp
from nfmasq.apps.sip import Sip
from nfmasq.apps.tftp import Tftp
from nfmasq.engine.helper.app import App, Apps
from nfmasq.errors import NfmasqError

GROUP = "nfmasq.apps"

OWN: dict[str, Callable[[], App]] = {
    "ftp": Ftp,
    "irc": Irc,
    "pptp": Pptp,
    "sip": Sip,
    "tftp": Tftp,
}

DEFAULT: dict[str, tuple[int, ...]] = {"ftp": Ftp.ports}
"""The helpers that are on unless they are configured otherwise, and their ports."""


def names() -> list[str]:
    """List the names of all helpers, nfmasq's own and those of installed packages, sorted."""
    return sorted({*OWN, *_others()})


def helper(name: str) -> App:
    """Make the helper of a name.

    Raises NfmasqError where a helper of another package cannot be had.
    """
    if name in OWN:
        return OWN[name]()
    try:
        app: App = _others()[name].load()()
        return app
    except Exception as error:
        # Another package's code may raise anything, which is no fault of nfmasq.
        raise NfmasqError(f"the helper {name} cannot be loaded: {error!r}") from error


def helpers(ports: Mapping[str, Sequence[int]]) -> Apps:
    """Make the helpers of some ports: from ports by name, return helpers by protocol and port.

    Raises NfmasqError as `helper` does, and where two helpers are to have the same port.
    """
    by_port: dict[tuple[int, int], App] = {}
    for name in ports:
        app = helper(name)
        for port in ports[name]:
            other = by_port.setdefault((app.protocol, port), app)
            if other is not app:
                raise NfmasqError(f"the helpers {other.name} and {name} both have port {port}")
    return by_port


def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
