"""Fixtures for the tests of the masquerade's behaviour: stations, and the masquerade itself.

The masquerade of a module has the default settings, unless the module starts another one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nfmasq.daemon.control import request
from nfmasq.lab import Daemon, Lab
from tests.packets import Endpoint, source, udp
from tests.traffic.behaviour.stations import CLIENT, SERVER, Station, Stations, stations


@pytest.fixture(scope="module")
def net(lab: Lab) -> Iterator[Stations]:
    with stations(lab) as net:
        yield net


@pytest.fixture(scope="module")
def by_default(lab: Lab) -> Iterator[Daemon]:
    """Run a masquerade without options, for all tests of a module."""
    with lab.masquerading() as daemon:
        yield daemon


@pytest.fixture
def daemon(net: Stations, by_default: Daemon) -> Daemon:
    """Return the masquerade without options; it has no entries, and no packet waits anywhere."""
    list(request(by_default.control, "flush"))
    for station in (*net.inside, *net.outside):
        station.forget()
    return by_default


@pytest.fixture
def inside(net: Stations) -> Station:
    """Return the station of `CLIENT`."""
    return net.inside[0]


@pytest.fixture
def outside(net: Stations) -> Station:
    """Return the station of `SERVER`."""
    return net.outside[0]


@pytest.fixture
def stranger(net: Stations) -> Station:
    """Return an outside station that no inside host has sent anything to."""
    return net.outside[1]


@pytest.fixture
def mapped(daemon: Daemon, net: Stations, inside: Station, outside: Station) -> Endpoint:
    """Send a datagram from `CLIENT` to `SERVER`; returns the endpoint at which `SERVER` sees it."""
    return source(net.passed(udp(CLIENT, SERVER, b"hello"), inside, outside))
