"""A running nfmasq: what it is made of, in which order it comes up, and how it goes down.

What can fail for a reason that a person can mend comes up first, so a start that fails has changed
nothing. "ready" is logged when packets get verdicts. However nfmasq ends, everything is undone in
reverse order.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from types import FrameType

from pyroute2.netlink.exceptions import NetlinkError

from nfmasq.config import Configuration
from nfmasq.config.memory import Fitting
from nfmasq.daemon import forwarding, memory, metrics
from nfmasq.daemon import log as daemon_log
from nfmasq.daemon.addresses import GivenAddresses, RoutedAddresses
from nfmasq.daemon.conntrack import Conntrack
from nfmasq.daemon.control import ControlServer
from nfmasq.daemon.handler import packet_handler
from nfmasq.daemon.health import HealthChecks
from nfmasq.daemon.interpreter import (
    favour_packets,
    give_memory_back,
    secure_descriptors,
    secure_threads,
)
from nfmasq.daemon.loaded_rules import LoadedRules
from nfmasq.daemon.neighbours import Neighbours
from nfmasq.daemon.notify import ServiceManager
from nfmasq.daemon.outbox import Outbox
from nfmasq.daemon.oversize import Oversize
from nfmasq.daemon.queue import PacketQueue
from nfmasq.daemon.queue_table import queue_row
from nfmasq.daemon.reload import Reload
from nfmasq.daemon.renumbering import Renumbering
from nfmasq.daemon.sweeper import Sweeper
from nfmasq.daemon.whose import whose_packet
from nfmasq.engine import Masquerade, Settings
from nfmasq.errors import NfmasqError
from nfmasq.flowcache.service import KernelFlowCache
from nfmasq.rules import Rule

log = logging.getLogger(__name__)

ANNOUNCED = ("queue", "ports", "mapping", "filtering", "max-entries", "metrics", "control")
"""Keys of the options that the "ready" line shows."""


def run(configuration: Configuration, read: Callable[[], Configuration], fitting: Fitting) -> None:
    """Masquerade until SIGTERM or SIGINT.

    To be called in the main thread. `read` reads the configuration that is to be in force after a
    SIGHUP or `nfmasq reload`. `fitting` is how many entries fit into memory. Raises NfmasqError
    where nfmasq cannot start, or loses its queue.
    """
    forwarding.check(configuration.forwarding)
    with ExitStack() as stack:
        give_memory_back()
        secure_descriptors()
        secure_threads()
        writer = _log_writer(stack)
        daemon_log.set_up(configuration.log_level, configuration.log_format, writer)
        engine = configuration.masquerade(lock=threading.RLock())
        flow_cache = KernelFlowCache(
            engine,
            configuration.flow_cache,
            configuration.queue,
            configuration.settings.max_entries,
        )
        stack.callback(flow_cache.close)
        oversize = _oversize(flow_cache, stack)
        rules = LoadedRules(configuration, partial(_follow_rules, flow_cache, oversize))
        figures = metrics.Metrics(
            engine,
            configuration.queue,
            lambda: queue.overflows,
            rules_present=lambda: rules.present,
            rules_lost=lambda: rules.lost,
            in_kernel=flow_cache.counts,
            crowded_out=lambda: queue.crowded_out,
            flow_cache_mode=lambda: flow_cache.mode,
            log_lines_lost=lambda: writer.lost,
        )
        outbox = _outbox(engine, stack)
        send_own = outbox.send if outbox else engine.outbox.clear
        addresses = _addresses(configuration, engine, send_own, flow_cache, stack)
        conntrack = Conntrack()
        stack.callback(conntrack.close)
        queue = stack.enter_context(
            PacketQueue(
                configuration.queue,
                packet_handler(
                    engine,
                    addresses,
                    figures.handler_seconds.observe,
                    oversize,
                    conntrack.verifies,
                    send_own,
                ),
                length=configuration.queue_length,
                buffer=configuration.socket_buffer,
                gso=configuration.gso,
                whose=whose_packet(engine),
                hold=flow_cache.hold,
                due=engine.sessions.cached.due,
                settle=engine.enter_lasting,
            )
        )
        health_checks = HealthChecks()
        stack.callback(health_checks.stop)
        reload = Reload(configuration, read, engine, health_checks, rules.follow)
        stack.callback(reload.stop)
        # Before the control socket is made: a signal without a handler would leave its file behind.
        _heed_signals(queue, reload, stack)
        control = ControlServer(
            configuration.control,
            engine,
            lambda: reload.configuration.as_table(),
            figures.figures,
            reload.now,
        )
        stack.callback(control.close)
        if configuration.metrics:
            stack.callback(metrics.serve(figures.registry, *configuration.metrics).close)

        favour_packets(stack)
        sweeper = Sweeper(engine, figures.sweep_seconds.observe, send_own)
        sweeper.start()
        stack.callback(sweeper.stop)
        memory_watch = memory.watch(engine)
        stack.callback(memory_watch.stop)
        memory_watch.start()
        neighbours = Neighbours(engine)
        stack.callback(neighbours.stop)
        neighbours.start()
        control.start()
        if not oversize:
            log.warning("UDP datagrams of more than 65,503 bytes will be lost: give CAP_NET_RAW")
        if not outbox:
            log.warning("nobody is told of what is refused or ended: give CAP_NET_RAW")
        # Last, since a start that fails changes nothing. Until now nothing can have come in.
        flow_cache.start()
        rules.start()
        stack.callback(rules.stop)
        forwarding.settle(configuration.forwarding)
        manager = ServiceManager(lambda: queue.looks)
        stack.callback(manager.stop)
        _log_room(configuration.settings.max_entries, fitting)
        _log_ready(configuration, queue, flow_cache.mode)
        manager.ready()
        try:
            queue.run()
        except OSError as error:
            raise NfmasqError(f"queue {queue.number} is lost: {error.strerror}") from error
        finally:
            _log_totals(engine, queue)


def _log_writer(stack: ExitStack) -> daemon_log.LogWriter:
    """Have the log written by a thread until `stack` unwinds; threads that fail are logged, too."""
    logger = logging.getLogger("nfmasq")
    stack.callback(setattr, logger, "handlers", logger.handlers)
    writer = daemon_log.LogWriter()
    stack.callback(writer.close)
    stack.callback(setattr, threading, "excepthook", threading.excepthook)
    threading.excepthook = _log_failed_thread
    return writer


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else "a thread"
    trace = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    shown = trace if log.isEnabledFor(logging.DEBUG) and failed.exc_value else None
    log.error("%s failed: %r", name, failed.exc_value, exc_info=shown)  # type: ignore[arg-type]


def _addresses(
    configuration: Configuration,
    engine: Masquerade,
    send_own: Callable[[], None],
    flow_cache: KernelFlowCache,
    stack: ExitStack,
) -> GivenAddresses | RoutedAddresses:
    if configuration.masquerade_addresses:
        engine.inbound.maddrs = frozenset(configuration.masquerade_addresses)
        flow_cache.add_maddrs(configuration.masquerade_addresses)
        return GivenAddresses(configuration.masquerade_addresses)
    renumbering = Renumbering(engine, send_own)
    stack.callback(renumbering.stop)

    def follow(addresses: Mapping[str, Sequence[int]]) -> None:
        flow_cache.add_maddrs(chain.from_iterable(addresses.values()))
        renumbering.follow(addresses)

    try:
        routed = RoutedAddresses(follow)
    except (OSError, NetlinkError) as error:
        raise NfmasqError(
            f"cannot read this machine's addresses: {error}; give a --masquerade-address"
        ) from error
    stack.callback(routed.close)
    return routed


def _outbox(engine: Masquerade, stack: ExitStack) -> Outbox | None:
    try:
        outbox = Outbox(engine.outbox)
    except OSError:
        return None
    stack.callback(outbox.close)
    return outbox


def _oversize(flow_cache: KernelFlowCache, stack: ExitStack) -> Oversize | None:
    try:
        oversize = Oversize(flow_cache.take_end)
    except OSError:
        return None
    stack.callback(oversize.close)
    return oversize


def _follow_rules(
    flow_cache: KernelFlowCache, oversize: Oversize | None, rules: Sequence[Rule]
) -> None:
    flow_cache.follow(rules)
    try:
        if oversize:
            oversize.listen(not flow_cache.sees_all)
    except OSError as error:
        log.error("UDP datagrams of more than 65,503 bytes will be lost: %s", error)


def _heed_signals(queue: PacketQueue, reload: Reload, stack: ExitStack) -> None:
    """Heed signals until `stack` unwinds, also those that were ignored when nfmasq was started.

    Under nohup a terminal that goes away has the configuration read again, which harms nothing.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        queue.stop()

    def hang_up(_number: int, _frame: FrameType | None) -> None:
        reload.soon()

    for number, handler in (
        (signal.SIGTERM, stop),
        (signal.SIGINT, stop),
        (signal.SIGHUP, hang_up),
    ):
        stack.callback(signal.signal, number, signal.signal(number, handler))


def _log_room(max_entries: int, fitting: Fitting) -> None:
    if max_entries > fitting.entries:
        log.warning(
            "max-entries %d may take more memory than there is: %d fit into %s",
            max_entries,
            *fitting,
        )
    elif max_entries == fitting.entries < Settings().max_entries:
        log.info("max-entries %d: as many as fit into %s", *fitting)


def _log_ready(configuration: Configuration, queue: PacketQueue, flow_cache: str) -> None:
    if queue.buffer_size < configuration.socket_buffer:
        log.warning(
            "the kernel allows a socket buffer of %d bytes instead of %d: raise net.core.rmem_max",
            queue.buffer_size,
            configuration.socket_buffer,
        )
    if configuration.gso and not queue.gso:
        log.warning("this kernel hands over no superpackets: TCP will be slower than it could be")
    if queue_row(queue.number) is None:
        log.warning(
            "the kernel's figures of the queue cannot be read, and metrics lack them: "
            "run as root, or with the group root"
        )
    table = configuration.as_table()
    announced = {name: table[name] for name in ANNOUNCED}
    log.info("ready", extra=announced | {"flow-cache": flow_cache})


def _log_totals(engine: Masquerade, queue: PacketQueue) -> None:
    counters = engine.sessions.counters
    outbound, inbound = counters.outbound.values(), counters.inbound.values()
    log.info(
        "stopped",
        extra={
            "packets_out": sum(traffic.accepted for traffic in outbound),
            "packets_in": sum(traffic.accepted for traffic in inbound),
            "dropped": sum(traffic.dropped for traffic in (*outbound, *inbound)),
            "entries_created": sum(counters.created.values()),
            "overflows": queue.overflows,
        },
    )
