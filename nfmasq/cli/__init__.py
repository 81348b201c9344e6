"""The command `nfmasq`. The module of a subcommand is imported only when the subcommand is used.

Whatever goes wrong is told here, in one line on stderr. The exit status is 1 where a command fails,
and 2 where the command line is wrong.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from nfmasq import __version__
from nfmasq.config import UsageError
from nfmasq.errors import NfmasqError

_COMMANDS = {
    "run": "run:run",
    "list": "entries:list_entries",
    "stats": "stats:stats",
    "top": "top:top",
    "flush": "entries:flush",
    "delete": "entries:delete",
    "servers": "servers:servers",
    "reload": "reload:reload",
    "doctor": "doctor.command:doctor",
    "rules-options": "rules_options:rules_options",
    "replay": "replay:replay",
    "demo": "demo:demo",
}
"""Module and function of each subcommand by its name, in the order of the help."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, function = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(f"nfmasq.cli.{module}"), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        result = super().invoke(ctx)
        # A reader of the output that has gone away causes an error message at exit, but not here.
        sys.stdout.flush()
        return result

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        try:
            status = super().main(args, *rest, **extra | {"standalone_mode": False})
        except UsageError as error:
            _complain(str(error), 2)
        except NfmasqError as error:
            _complain(str(error), 1)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "nfmasq"
            _complain(f"{error.format_message()} ({command} --help says more)", error.exit_code)
        except click.ClickException as error:
            _complain(error.format_message(), error.exit_code)
        except click.Abort:
            sys.exit(130)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # What is still buffered would fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _complain(f"cannot write: {error.strerror}", 1)
        sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str, status: int) -> NoReturn:
    click.echo(f"nfmasq: {message}", err=True)
    sys.exit(status)


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nfmasq")
def main() -> None:
    """IP masquerade as a netfilter-queue plugin.

    An inside network reaches the outside through this machine, and to the outside all of it
    seems to come from this machine.

    \b
    sudo nfmasq run --inside eth1 --outside eth0 --forwarding on
    """
