"""`nfmasq run`: masquerade until told to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from nfmasq import apps, config
from nfmasq.config import DEFAULT_PROFILE, Configuration, memory, setting_of
from nfmasq.engine import PROFILES, Settings
from nfmasq.engine.option import allowed_names, allowed_numbers, allowed_seconds

_F = TypeVar("_F", bound=Callable[..., Any])

_DEFAULTS = Configuration().as_table() | {
    "masquerade-address": "the source address of the kernel's route, followed when it changes",
    "timeouts": DEFAULT_PROFILE,
    "rules": "load with --inside, else keep",
}
"""Defaults by key: values as in the file, or words where the value would say nothing."""


class DescribedOption(click.Option):
    """An option whose help is made of parts. Click does not know its default, only the words.

    The help lists the names in `listed`, and shows the range in `allowed` beside the default.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        purpose: str,
        default_text: str,
        listed: Collection[str] = (),
        allowed: str = "",
        **attributes: Any,
    ) -> None:
        self.purpose = purpose
        self.default_text = default_text
        self.allowed = allowed
        text = f"{purpose}: {', '.join(listed)}" if listed else purpose
        shown = f"{default_text}; {allowed}" if allowed else default_text
        super().__init__(names, help=f"{text}.  [default: {shown}]", **attributes)


def _option(key: str, purpose: str, *names: str, **attributes: Any) -> Callable[[_F], _F]:
    """Make the option for a key; the key's field says the default and what the value may be.

    `names` are the names of an option that is not called like its key. `config.load` fills in the
    default.
    """
    setting = setting_of(key)
    if whole := allowed_numbers(setting):
        allowed = f"{whole.start} to {whole.stop - 1}"
        attributes |= {"type": int, "metavar": "N", "allowed": allowed}
    elif seconds := allowed_seconds(setting):
        allowed = f"{seconds[0]:g} to {seconds[1]:g}"
        attributes |= {"type": float, "metavar": "SECONDS", "allowed": allowed}
    elif choices := allowed_names(setting):
        attributes |= {"type": click.Choice(choices), "metavar": "NAME", "listed": choices}
    elif isinstance(_DEFAULTS[key], bool):
        names = (f"--{key}/--no-{key}",)
        attributes |= {"default": None}
    return click.option(
        *(names or (f"--{key}",)),
        cls=DescribedOption,
        purpose=purpose,
        default_text=_default(key),
        **attributes,
    )


def _default(key: str) -> str:
    """Return the default of an option, as the help shows it."""
    value = _DEFAULTS[key]
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    if isinstance(value, (list, dict)):
        return ", ".join(value) or "none"
    return str(value)


_ENGINE_OPTIONS = (
    _option("mapping", "When sessions share a masquerade port (RFC 4787)"),
    _option("filtering", "Who outside may answer (RFC 4787)"),
    _option("port-selection", "How a masquerade port is chosen"),
    _option(
        "when-ports-run-out",
        "When all ports are taken by what is alive: let a port serve several inside hosts, each "
        "with other destinations, or refuse new sessions",
    ),
    _option(
        "other-protocols",
        "What is done with other protocols than TCP, UDP and ICMP; by-address takes nfmasq-rules "
        "up --other-protocols",
    ),
    _option(
        "timeouts",
        "Timeout profile, in place of what the file says about timeouts",
        listed=PROFILES,
        type=click.Choice(tuple(PROFILES)),
        metavar="NAME",
    ),
    _option(
        "max-entries",
        "Entries at most; where it is not given, no more than fit into the memory that nfmasq may "
        "have",
    ),
    _option("max-entries-per-host", "Entries of one inside host at most; 0: no limit"),
    _option("max-ports-per-host", "Masquerade ports of one inside host at most; 0: no limit"),
    _option("max-new-per-host", "New entries of one inside host in a second at most; 0: no limit"),
    _option(
        "forward",
        "Ports on which the outside reaches servers inside: tcp:8080=10.0.0.2:80 and the like; "
        "may be repeated",
        multiple=True,
        metavar="LISTEN=SERVER[,SERVER]...",
    ),
    _option("inbound-refresh", "Packets from the outside, too, keep an entry from expiring"),
    _option(
        "unsolicited",
        "TCP connections from the outside for nobody inside (accept: the gateway may take them)",
    ),
    _option(
        "apps",
        "Application helpers that are on, in place of what the file says (NAME=off turns a helper "
        "off, off turns off all)",
        "--app",
        "apps",
        listed=apps.names(),
        multiple=True,
        metavar="NAME[=PORT,...]",
    ),
)


def engine_options(command: _F) -> _F:
    """Add to a command the options that mean the same wherever the packets come from."""
    for option in reversed(_ENGINE_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),
    cls=DescribedOption,
    purpose="TOML, with the long options as keys; the command line wins over it",
    default_text=f"{config.DEFAULT_FILE} where there is one",
)
@_option("queue", "NFQUEUE number; the same as in the rules")
@_option(
    "ports",
    "Masquerade ports, both ends included; the same as in the rules",
    metavar="LO-HI[,LO-HI]...",
)
@_option(
    "masquerade-address",
    "What the outside sees as the source; several make a pool",
    multiple=True,
    metavar="ADDRESS",
)
@_option(
    "inside",
    "An interface to the inside, which may come later; ppp+ stands for all that begin with ppp; "
    "may be repeated",
    multiple=True,
    metavar="INTERFACE",
)
@_option("outside", "An interface to the outside, likewise", multiple=True, metavar="INTERFACE")
@_option(
    "rules",
    "Who loads the rules: load, nfmasq does, also when somebody removed them; keep, others do; "
    "off, nfmasq does without",
)
@_option("clamp-mss", "The rules keep TCP segments as small as the path's MTU requires")
@_option("checksum-fill", "The rules have the kernel compute checksums that were left to a card")
@_option("reserve", "The gateway's own programs are given no masquerade ports")
@_option("only-inside", "What others than the inside have forwarded to the outside is dropped")
@_option("only-answers", "What the outside sends to the addresses of inside hosts is dropped")
@_option("ipv6-forward", "IPv6 between the inside and the outside is left alone, not dropped")
@_option("iptables", "The program that loads the rules")
@_option("forwarding", "What becomes of the kernel's forwarding (net.ipv4.ip_forward)")
@_option(
    "flow-cache",
    "How the kernel carries flows that last: routed, by its whole way; direct, past its FORWARD "
    "chain; auto, routed where the machine can, else off",
)
@_option(
    "flow-cache-after",
    "Packets of a flow, in one direction, that come here before the kernel carries it",
)
@engine_options
@_option(
    "reset-on-address-change",
    "When a TCP connection has lost its masquerade address, reset its inside end",
)
@_option("metrics", 'Where Prometheus scrapes /metrics, or "off"', metavar="ADDRESS:PORT")
@_option("control", "The control socket that list, stats and the like use", metavar="PATH")
@_option("log-level", "What is logged")
@_option("log-format", "How it is logged, on stderr")
@_option("queue-length", "Packets that wait in the kernel at most")
@_option("socket-buffer", "Bytes that wait in the kernel at most")
@_option("gso", "Take superpackets of up to 64 KiB as they are")
def run(path: Path | None, **options: Any) -> None:
    """Masquerade until told to stop.

    Takes packets from the queue, rewrites them, and gives them back. Loads the rules that send
    packets to the queue where it knows the interfaces; else these are loaded by nfmasq-rules. The
    rules stay when it ends. Needs root, or CAP_NET_ADMIN and CAP_NET_RAW.
    Stops on Ctrl-C and SIGTERM; SIGHUP has it read its configuration again (nfmasq reload).

    \b
    Examples:
      sudo nfmasq run --inside eth1 --outside eth0 --forwarding on
      sudo nfmasq run --queue 1 --ports 50000-59999 --masquerade-address 198.51.100.2
      sudo nfmasq run --forward tcp:8080=10.0.0.2:80 --forward udp:5000-5009=10.0.0.3:5000-5009
      sudo nfmasq run --forward tcp:198.51.100.2:80=10.0.0.2:80,10.0.0.3:80
    """
    command_line = {name.replace("_", "-"): value for name, value in options.items()}

    fitting = memory.fitting(Settings().max_entries)

    def read() -> Configuration:
        return config.load(path or config.default_file(), command_line, fitting.entries)

    configuration = read()
    # Only now: help and error messages need no netfilter on the machine.
    from nfmasq.daemon import service

    service.run(configuration, read, fitting)
