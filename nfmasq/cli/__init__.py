"""The command `nfmasq`. The module of a subcommand is imported only when the subcommand is used.

Whatever goes wrong is told here, in one line on stderr. The exit status is 1 where a command fails,
and 2 where the command line is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import click

from nfmasq import __version__
from nfmasq.cli import output
from nfmasq.config import UsageError
from nfmasq.errors import NfmasqError, shortage

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

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        context = super().make_context(*args, **extra)
        if output.is_plain():
            context.color = False
        return context

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        output.prepare_streams()
        sys.exit(output.end(partial(self._status, args, *rest, **extra), _complain))

    def _status(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> int:
        """Run a command, tell what is wrong, and return the exit status."""
        try:
            status = super().main(args, *rest, **extra | {"standalone_mode": False})
        except UsageError as error:
            _complain(str(error))
            return 2
        except NfmasqError as error:
            _complain(shortage(error) or str(error))
            return 1
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "nfmasq"
            _complain(f"{error.format_message()} ({command} --help says more)")
            return error.exit_code
        except click.ClickException as error:
            _complain(error.format_message())
            return error.exit_code
        except click.Abort:
            return 130
        except Exception as error:
            missing = shortage(error)
            if missing is None:
                raise
            _complain(missing)
            return 1
        return status if isinstance(status, int) else 0


def _complain(message: str) -> None:
    # Where not even this can be told, the exit status says it.
    with suppress(OSError):
        if output.is_taken():
            click.echo(f"nfmasq: {message}", err=True)


_COMPLETION = """\b
Completion of commands and options, for a line in ~/.bashrc or ~/.zshrc, or for fish:
  eval "$(_NFMASQ_COMPLETE=bash_source nfmasq)"
  eval "$(_NFMASQ_COMPLETE=zsh_source nfmasq)"
  _NFMASQ_COMPLETE=fish_source nfmasq | source
"""


@click.group(
    cls=_Commands,
    epilog=_COMPLETION,
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
