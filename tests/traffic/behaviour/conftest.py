"""What the tests of the masquerade's behaviour have in common: stations, and what they know.

The masquerade of a module is as it is by default, unless the module has another one.
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
    """A masquerade with no options, for all tests of a module."""
    with lab.masquerading() as daemon:
        yield daemon


@pytest.fixture
def daemon(net: Stations, by_default: Daemon) -> Daemon:
    """The same, without entries, while no packet waits anywhere."""
    list(request(by_default.control, "flush"))
    for station in (*net.inside, *net.outside):
        station.forget()
    return by_default


@pytest.fixture
def inside(net: Stations) -> Station:
    """The host of `CLIENT`."""
    return net.inside[0]


@pytest.fixture
def outside(net: Stations) -> Station:
    """The host of `SERVER`."""
    return net.outside[0]


@pytest.fixture
def stranger(net: Stations) -> Station:
    """An outside host that nobody inside has sent anything to."""
    return net.outside[1]


@pytest.fixture
def mapped(daemon: Daemon, net: Stations, inside: Station, outside: Station) -> Endpoint:
    """What `SERVER` knows `CLIENT` as over UDP, having heard from it once."""
    return source(net.passed(udp(CLIENT, SERVER, b"hello"), inside, outside))
