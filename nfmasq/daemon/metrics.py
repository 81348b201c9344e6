"""Prometheus metrics: what is counted, and the HTTP server that Prometheus scrapes.

Theory of operation. The packet path adds to plain integers (`engine/counters.py`) and
knows nothing of Prometheus. `Metrics` reads these integers when it is asked, by a scrape or by
`nfmasq stats`, so that each figure is counted in one place only. The two exceptions are
durations: the code that measures them calls `handler_seconds.observe` and `sweep_seconds.observe`.
Measuring and observing take a microsecond or more, so the packet path measures one packet in many.

The kernel itself counts the packets that it drops before the handler sees them (`queue_table.py`).
"""

from __future__ import annotations

import errno
import logging
import platform
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from socketserver import TCPServer
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nfmasq import __version__
from nfmasq.config.configuration import DIRECT, OFF, ROUTED
from nfmasq.daemon import servers
from nfmasq.daemon.connections import LOOK_SECONDS, BoundedServer
from nfmasq.daemon.queue_table import QUEUE_TABLE, queue_row
from nfmasq.engine import Masquerade
from nfmasq.engine.wire.protocols import PROTOCOLS
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.programs import Counts

log = logging.getLogger(__name__)

# Divided, not multiplied: 5 / 1e6 is written 5e-06, but 5 * 1e-6 is 4.9999999999999996e-06.
HANDLER_BUCKETS = (
    *(n / 1e6 for n in (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500)),
    *(n / 1e3 for n in (1, 2, 5, 10, 20, 50, 100)),
)
SWEEP_BUCKETS = (
    *(n / 1e6 for n in (10, 20, 50, 100, 200, 500)),
    *(n / 1e3 for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
)


class Figure(NamedTuple):
    """One value under the name and labels that Prometheus sees; JSON makes it an array."""

    name: str
    labels: dict[str, str]
    value: float


class Metrics(Collector):
    """All figures of a running nfmasq, in a registry of their own.

    `queue_number` is our NFQUEUE; `overflows` returns how often its socket reported ENOBUFS, and
    `rules_present` whether rules lead packets to it, or None where that is not known, and
    `rules_lost` how often they were gone. `in_kernel` returns what the flow cache has done, and
    `flow_cache_mode` how it carries flows: OFF, ROUTED or DIRECT. `crowded_out` returns how many
    packets of hosts that crowd the others were dropped, and `log_lines_lost` how many lines of the
    log nobody took.
    """

    def __init__(
        self,
        engine: Masquerade,
        queue_number: int,
        overflows: Callable[[], int],
        queue_table: Path = QUEUE_TABLE,
        rules_present: Callable[[], bool | None] = lambda: None,
        rules_lost: Callable[[], int] = lambda: 0,
        in_kernel: Callable[[], Counts] = Counts,
        crowded_out: Callable[[], int] = lambda: 0,
        flow_cache_mode: Callable[[], str] = lambda: OFF,
        log_lines_lost: Callable[[], int] = lambda: 0,
    ) -> None:
        self._engine = engine
        self._queue_number = queue_number
        self._overflows = overflows
        self._queue_table = queue_table
        self._rules_present = rules_present
        self._rules_lost = rules_lost
        self._in_kernel = in_kernel
        self._crowded_out = crowded_out
        self._flow_cache_mode = flow_cache_mode
        self._log_lines_lost = log_lines_lost
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self.handler_seconds = Histogram(
            "nfmasq_handler_seconds",
            "Time from a packet's arrival at the handler to its verdict, of a sample of packets.",
            registry=self.registry,
            buckets=HANDLER_BUCKETS,
        )
        self.sweep_seconds = Histogram(
            "nfmasq_sweep_seconds",
            "Time of one small step of expiry, during which packets wait.",
            registry=self.registry,
            buckets=SWEEP_BUCKETS,
        )

    def figures(self) -> list[Figure]:
        """List each value that a scrape would show at this moment."""
        return [
            Figure(sample.name, sample.labels, sample.value)
            for metric in self.registry.collect()
            for sample in metric.samples
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield all figures but the two histograms; prometheus_client calls this at each scrape."""
        yield InfoMetricFamily(
            "nfmasq_build",
            "The running version.",
            {"version": __version__, "python": platform.python_version()},
        )
        in_kernel = self._in_kernel()
        yield from self._traffic(in_kernel)
        yield from self._cached(in_kernel)
        yield from self._entries()
        yield from self._servers()
        yield from self._rules()
        yield from self._queue()
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_errors_total",
            "Packets that could not be handled, by reason.",
            "reason",
            self._engine.sessions.counters.errors,
        )
        yield CounterMetricFamily(
            "nfmasq_log_lines_lost_total",
            "Lines of the log that were dropped, since whoever reads it did not take them.",
            self._log_lines_lost(),
        )

    def _traffic(self, in_kernel: Counts) -> Iterator[Metric]:
        packets = CounterMetricFamily(
            "nfmasq_packets_total",
            "Packets that reached the handler, each once. Those of the flow cache do not.",
            labels=("direction", "protocol", "verdict"),
        )
        octets = CounterMetricFamily(
            "nfmasq_bytes_total",
            "Bytes of accepted packets, those of the flow cache among them, IP header included.",
            labels=("direction",),
        )
        counters = self._engine.sessions.counters
        for direction, traffic, cached in (
            ("out", counters.outbound, in_kernel.bytes_out),
            ("in", counters.inbound, in_kernel.bytes_in),
        ):
            for protocol, counted in traffic.items():
                packets.add_metric((direction, protocol, "accept"), counted.accepted)
                packets.add_metric((direction, protocol, "drop"), counted.dropped)
            here = sum(counted.bytes for counted in traffic.values())
            octets.add_metric((direction,), here + cached)
        yield packets
        yield octets

    def _cached(self, in_kernel: Counts) -> Iterator[Metric]:
        cached = self._engine.sessions.cached
        mode = self._flow_cache_mode()
        yield _by_label(
            GaugeMetricFamily,
            "nfmasq_flow_cache",
            "1 for the way in which the flow cache carries flows now, 0 for the others.",
            "mode",
            {each: each == mode for each in (OFF, ROUTED, DIRECT)},
        )
        yield GaugeMetricFamily(
            "nfmasq_cached_flows", "Entries whose flow the flow cache carries.", cached.flows
        )
        for name, documentation, out, into in (
            ("packets", "Packets", in_kernel.packets_out, in_kernel.packets_in),
            ("bytes", "Bytes of packets", in_kernel.bytes_out, in_kernel.bytes_in),
        ):
            yield _by_label(
                CounterMetricFamily,
                f"nfmasq_cached_{name}_total",
                f"{documentation} that the flow cache rewrote in the kernel.",
                "direction",
                {"out": out, "in": into},
            )
        yield CounterMetricFamily(
            "nfmasq_cached_flows_entered_total", "Flows entered into the cache.", cached.entered
        )
        yield CounterMetricFamily(
            "nfmasq_cached_flows_refused_total",
            "Flows that lasted and that the cache could not take.",
            cached.not_taken,
        )
        yield CounterMetricFamily(
            "nfmasq_cached_packets_dropped_total",
            "Packets dropped in the kernel, which would have left with an inside address.",
            in_kernel.dropped,
        )

    def _entries(self) -> Iterator[Metric]:
        sessions = self._engine.sessions
        account = sessions.account()
        yield _by_label(
            GaugeMetricFamily,
            "nfmasq_entries",
            "Entries in the table.",
            "protocol",
            account.live,
        )
        yield GaugeMetricFamily(
            "nfmasq_max_entries",
            "Entries that there may be.",
            value=sessions.room.max_entries,
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_entries_created_total",
            "Entries created.",
            "protocol",
            account.created,
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_entries_expired_total",
            "Entries that ended at their time, or were over and made room.",
            "protocol",
            account.expired,
        )
        ended = CounterMetricFamily(
            "nfmasq_entries_ended_total",
            "Entries ended, by why. What was created is what has ended and what is in the table.",
            labels=("protocol", "reason"),
        )
        for name, reasons in account.ended.items():
            for reason, count in reasons.items():
                ended.add_metric((name, reason), count)
        yield ended
        yield _by_label(
            GaugeMetricFamily,
            "nfmasq_ports_free",
            "Masquerade ports (ICMP: identifiers) that are not taken.",
            "protocol",
            {name: sessions.ports_free(number) for number, name in PROTOCOLS.items()},
        )
        yield _by_label(
            GaugeMetricFamily,
            "nfmasq_entries_over",
            "Entries whose session is over; they give up their ports when no port is free.",
            "protocol",
            sessions.over_counts(),
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_entries_overlapping_total",
            "Entries created on a port of another inside endpoint, since no port was free.",
            "protocol",
            sessions.counters.overlapping,
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_tcp_unbelieved_total",
            "Segments of TCP that did not fit their connection: passed on, and nothing changed.",
            "direction",
            sessions.counters.unbelieved,
        )

    def _servers(self) -> Iterator[Metric]:
        """Yield the figures of each server of a forwarded port: as many as are configured."""
        labels = ("forward", "server")
        up = GaugeMetricFamily(
            "nfmasq_server_up", "1 for a server that is alive, 0 for one found dead.", labels=labels
        )
        weight = GaugeMetricFamily(
            "nfmasq_server_weight", "A server's weight, 0 while it is drained.", labels=labels
        )
        sessions = GaugeMetricFamily(
            "nfmasq_server_sessions",
            "Sessions with a server: active while established, inactive else.",
            labels=(*labels, "state"),
        )
        created = CounterMetricFamily(
            "nfmasq_server_sessions_created_total",
            "Sessions that a server was given.",
            labels=labels,
        )
        for forward, server in servers.find(self._engine.sessions.forwards):
            names = (str(forward), str(server))
            up.add_metric(names, server.alive)
            weight.add_metric(names, server.weight)
            sessions.add_metric((*names, "active"), server.active)
            sessions.add_metric((*names, "inactive"), server.inactive)
            created.add_metric(names, server.total)
        yield from (up, weight, sessions, created)

    def _rules(self) -> Iterator[Metric]:
        present = self._rules_present()
        if present is None:  # nobody looks, or can see them
            return
        yield GaugeMetricFamily(
            "nfmasq_rules_present", "1 while rules lead packets to the queue, else 0.", present
        )
        yield CounterMetricFamily(
            "nfmasq_rules_lost_total",
            "Times that rules were found gone, whether or not they were loaded again.",
            self._rules_lost(),
        )

    def _queue(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "nfmasq_socket_overflows_total",
            "Times the queue's socket reported lost packets (ENOBUFS).",
            self._overflows(),
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_crowding_dropped_total",
            "Packets dropped because their host sent more than its share: from its line of packets "
            "that wait, or in the kernel, before they were queued.",
            "where",
            {"line": self._crowded_out(), "kernel": self._in_kernel().held},
        )
        row = queue_row(self._queue_number, self._queue_table)
        if row is None:  # no figure at all: a zero would say that nothing was dropped
            return
        yield GaugeMetricFamily(
            "nfmasq_queue_length", "Packets in the kernel's queue without a verdict.", row.waiting
        )
        yield _by_label(
            CounterMetricFamily,
            "nfmasq_queue_dropped_total",
            "Packets the kernel dropped before the handler saw them: queue full, or socket full.",
            "where",
            {"queue": row.queue_dropped, "user": row.user_dropped},
        )


def _by_label(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    documentation: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    metric = family(name, documentation, labels=(label,))
    for label_value, value in values.items():
        metric.add_metric((label_value,), value)
    return metric


class MetricsServer(BoundedServer, WSGIServer):
    """Answers scrapes over HTTP in a daemon thread of its own, from construction to `close`."""

    allow_reuse_port = False

    def __init__(self, registry: CollectorRegistry, address: str, port: int) -> None:
        """Listen on `address` (IPv4 or IPv6); port 0 takes any free port. Raises `OSError`."""
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), _QuietHandler)
        self.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(
            target=self.serve_forever, args=(LOOK_SECONDS,), name="metrics", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        """Bind without asking DNS for a host name, which may take long on a gateway."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log for debugging only that a scraper went away in the middle."""
        log.debug("scrape from %s broke off", client_address, exc_info=True)

    def close(self) -> None:
        """Stop listening, and wait until the thread has ended."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class _QuietHandler(WSGIRequestHandler):
    server: MetricsServer
    timeout = 10.0  # seconds that a client has to take its answer

    def parse_request(self) -> bool:
        """Read the request; says whether it can be answered."""
        is_whole = super().parse_request()
        self.server.heard(self.connection)
        return is_whole

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing about a scrape."""


def serve(registry: CollectorRegistry, address: str, port: int) -> MetricsServer:
    """Start to serve `registry` as `/metrics` on `address:port`; raises `NfmasqError`."""
    try:
        return MetricsServer(registry, address, port)
    except OSError as error:
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        raise NfmasqError(
            f"cannot serve metrics on {where}: {_reason(error)}; "
            "give another --metrics ADDRESS:PORT, or --metrics off"
        ) from error


def _reason(error: OSError) -> str:
    reasons = {
        errno.EADDRINUSE: "another program has this port",
        errno.EADDRNOTAVAIL: "this machine does not have this address",
        errno.EACCES: "not allowed to use this port",
    }
    return reasons.get(error.errno or 0, error.strerror or str(error))
