"""`nfmasq run`: masquerade until told to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nfmasq import apps, config
from nfmasq.config import Configuration
from nfmasq.engine import BEHAVIOURS, OTHER_PROTOCOLS, PORT_SELECTIONS, PROFILES
from nfmasq.engine.unsolicited import UNSOLICITED

_F = TypeVar("_F", bound=Callable[..., Any])
_DEFAULTS = Configuration().as_table()


def _option(key: str, text: str, default: object = None, **attributes: Any) -> Callable[[_F], _F]:
    """The option for one key; its default is told, and left to `config.load` to fill in."""
    default = _DEFAULTS[key] if default is None else default
    return click.option(f"--{key}", help=f"{text}  [default: {default}]", **attributes)


def _choice(key: str, text: str, choices: tuple[str, ...], **more: Any) -> Callable[[_F], _F]:
    listed = f"{text}: {', '.join(choices)}."
    return _option(key, listed, type=click.Choice(choices), metavar="NAME", **more)


def _switch(key: str, text: str) -> Callable[[_F], _F]:
    """Make the two options that turn a key on and off."""
    default = f"--{key}" if _DEFAULTS[key] else f"--no-{key}"
    return click.option(f"--{key}/--no-{key}", default=None, help=f"{text}  [default: {default}]")


_ENGINE_OPTIONS = (
    _choice("mapping", "When sessions share a masquerade port (RFC 4787)", BEHAVIOURS),
    _choice("filtering", "Who outside may answer (RFC 4787)", BEHAVIOURS),
    _choice("port-selection", "How a masquerade port is chosen", tuple(PORT_SELECTIONS)),
    _choice(
        "other-protocols",
        "What is done with other protocols than TCP, UDP and ICMP; by-address takes nfmasq-rules "
        "up --other-protocols",
        OTHER_PROTOCOLS,
    ),
    _choice(
        "timeouts",
        "Timeout profile, in place of what the file says about timeouts",
        tuple(PROFILES),
        default="rfc",
    ),
    _option("max-entries", "Entries at most.", type=int, metavar="N"),
    _option(
        "max-entries-per-host",
        "Entries of one inside host at most; 0: no limit.",
        type=int,
        metavar="N",
    ),
    _option(
        "max-ports-per-host",
        "Masquerade ports of one inside host at most; 0: no limit.",
        type=int,
        metavar="N",
    ),
    _option(
        "max-new-per-host",
        "New entries of one inside host in a second at most; 0: no limit.",
        type=int,
        metavar="N",
    ),
    _option(
        "forward",
        "Ports on which the outside reaches servers inside: tcp:8080=10.0.0.2:80 and the like; "
        "may be repeated.",
        default="none",
        multiple=True,
        metavar="LISTEN=SERVER[,SERVER]...",
    ),
    _switch("inbound-refresh", "Packets from the outside, too, keep an entry from expiring."),
    _choice(
        "unsolicited",
        "TCP connections from the outside for nobody inside (accept: the gateway may take them)",
        UNSOLICITED,
    ),
    click.option(
        "--app",
        "apps",
        multiple=True,
        metavar="NAME[=PORT,...]",
        help=f"Application helpers that are on, in place of what the file says: "
        f"{', '.join(apps.names())}. NAME=off turns one off, off all of them.  [default: ftp]",
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
    help="TOML, with the long options as keys; the command line wins over it.  "
    f"[default: {config.DEFAULT_FILE} where there is one]",
)
@_option("queue", "NFQUEUE number; the same as in the rules.", type=int, metavar="N")
@_option(
    "ports",
    "Masquerade ports, both ends included; the same as in the rules.",
    metavar="LO-HI[,LO-HI]...",
)
@_option(
    "masquerade-address",
    "What the outside sees as the source; several make a pool.",
    default="the source address of the kernel's route, followed when it changes",
    multiple=True,
    metavar="A",
)
@engine_options
@_switch(
    "reset-on-address-change",
    "When the masquerade address is gone, reset the inside ends of its TCP connections.",
)
@_option("metrics", 'Where Prometheus scrapes /metrics, or "off".', metavar="ADDRESS:PORT")
@_option("control", "The control socket that list, stats and the like use.", metavar="PATH")
@_choice("log-level", "What is logged", config.LOG_LEVELS)
@_choice("log-format", "How it is logged, on stderr", config.LOG_FORMATS)
@_option("queue-length", "Packets that wait in the kernel at most.", type=int, metavar="N")
@_option("socket-buffer", "Bytes that wait in the kernel at most.", type=int, metavar="N")
@_switch("gso", "Take superpackets of up to 64 KiB as they are.")
def run(path: Path | None, **options: Any) -> None:
    """Masquerade until told to stop.

    Takes packets from the queue, rewrites them, and gives them back. Needs the rules that send
    packets to the queue (iptables/nfmasq-rules), and root, or CAP_NET_ADMIN and CAP_NET_RAW.
    Stops on Ctrl-C and SIGTERM; SIGHUP has it read its configuration again (nfmasq reload).

    \b
    Examples:
      sudo nfmasq run
      sudo nfmasq run --queue 1 --ports 50000-59999 --masquerade-address 198.51.100.2
      sudo nfmasq run --forward tcp:8080=10.0.0.2:80 --forward udp:5000-5009=10.0.0.3:5000-5009
      sudo nfmasq run --forward tcp:198.51.100.2:80=10.0.0.2:80,10.0.0.3:80
    """
    command_line = {name.replace("_", "-"): value for name, value in options.items()}

    def read() -> Configuration:
        return config.load(path or config.default_file(), command_line)

    configuration = read()
    # Only now: help and error messages need no netfilter on the machine.
    from nfmasq.daemon import service

    service.run(configuration, read)
