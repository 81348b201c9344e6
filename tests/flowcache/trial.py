"""The programs tried on single packets: BPF_PROG_TEST_RUN, and a session whose flow they know."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

from nfmasq.engine import TCP, IpMasq
from nfmasq.engine.table.entry import CACHED
from nfmasq.flowcache.flows import Flows
from nfmasq.flowcache.programs import Programs
from tests.gateway import Gateway
from tests.packets import ACK, Endpoint, tcp

PASS, DROP, REDIRECT = 0xFFFFFFFF, 2, 7
"""Verdicts: TC_ACT_UNSPEC, _SHOT and _REDIRECT of linux/pkt_cls.h."""

HEADER = bytes.fromhex("0200000000020200000000010800")
"""An Ethernet header of IPv4."""

LO = 1
_ROOM = 4096

_libbpf = ctypes.CDLL("libbpf.so.1")


class _Context(ctypes.Structure):
    """`struct __sk_buff` of linux/bpf.h, as far as it goes in and comes out."""

    _fields_ = (
        ("len", c_uint32),
        ("pkt_type", c_uint32),
        ("mark", c_uint32),
        ("between", c_uint32 * 6),
        ("ingress_ifindex", c_uint32),
        ("ifindex", c_uint32),
        ("more", c_uint32 * 27),
        ("tstamp", c_uint64),
        ("wire_len", c_uint32),
        ("gso_segs", c_uint32),
        ("sk", c_uint64),
        ("gso_size", c_uint32),
        ("last", c_uint8 * 12),
    )


class _Run(ctypes.Structure):
    """`struct bpf_test_run_opts` of bpf/bpf.h."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
    )


class Tried(NamedTuple):
    """What has become of a packet."""

    verdict: int
    frame: bytes
    mark: int


def attempt(
    programs: Programs,
    name: str,
    frame: bytes,
    *,
    mark: int = 0,
    came_by: int = 0,
    at: int = LO,
    segments: int = 0,
    segment_size: int = 0,
) -> Tried:
    """Run a program on a frame at the interface `at`; `came_by` is by which it came, 0: none."""
    context = _Context(
        mark=mark, ingress_ifindex=came_by, ifindex=at, gso_segs=segments, gso_size=segment_size
    )
    after = _Context()
    data, out = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(_ROOM)
    run = _Run(
        sz=ctypes.sizeof(_Run),
        data_in=ctypes.addressof(data),
        data_out=ctypes.addressof(out),
        data_size_in=len(frame),
        data_size_out=_ROOM,
        ctx_in=ctypes.addressof(context),
        ctx_out=ctypes.addressof(after),
        ctx_size_in=ctypes.sizeof(context),
        ctx_size_out=ctypes.sizeof(after),
        repeat=1,
    )
    tried = _libbpf.bpf_prog_test_run_opts(programs.program(name), ctypes.byref(run))
    assert tried == 0, os.strerror(-tried)
    return Tried(run.retval, out.raw[: run.data_size_out], after.mark)


# -- a session -----------------------------------------------------------------------


@contextmanager
def known(
    programs: Programs, protocol: int, inside: Endpoint, maddr: str, outside: Endpoint
) -> Iterator[tuple[Gateway, Flows, IpMasq]]:
    """Have the programs know a session in both directions, which leaves by lo.

    Yields a gateway, without a cache and without the fast path, with the session's entry; `Flows`,
    which has the flow; and the entry.
    """
    gateway = Gateway(fast=False)
    gateway.address = maddr
    if protocol == TCP:
        assert gateway.connects(inside, outside)
        assert gateway.out(tcp(inside, outside, ACK)) is not None
    else:
        assert gateway.lets_in(outside, gateway.send(inside, outside))
    (ms,) = gateway.sessions.entries()
    flows = Flows(programs, {LO})
    assert flows.put(ms, True, LO)
    assert flows.put(ms, False, 0)
    try:
        ms.flags |= CACHED
        yield gateway, flows, ms
    finally:
        flows.drop(ms)
