"""Tests of the flow cache in the kernel, without traffic: in a network namespace of their own.

They need root and a kernel that loads the programs. Without these they fail where CI=true, and are
skipped elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
from pyroute2 import netns

from nfmasq.flowcache.programs import Programs

NAMESPACE = f"nfmasq-{os.getpid()}-0-flowcache"
"""Named as the hosts of a lab are, so that a lab removes what a killed test left."""


@pytest.fixture(scope="session")
def _kernel() -> None:
    try:
        Programs(1).close()
    except OSError as error:
        missing = f"takes root, libbpf and a kernel that loads the programs: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(scope="module")
def namespace(_kernel: None) -> Iterator[None]:
    """Have the tests of a module run in a network namespace of their own, which has only lo."""
    netns.create(NAMESPACE)
    try:
        netns.pushns(NAMESPACE)
        try:
            yield
        finally:
            netns.popns()
    finally:
        with suppress(OSError):
            netns.remove(NAMESPACE)


@pytest.fixture
def programs(namespace: None) -> Iterator[Programs]:
    """Load the programs, with room for 16 flows; they know nothing yet."""
    loaded = Programs(16)
    yield loaded
    loaded.close()
