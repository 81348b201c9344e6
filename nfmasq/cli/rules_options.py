"""`nfmasq rules-options`: what the configuration file says to nfmasq-rules, which reads no TOML."""

from __future__ import annotations

from pathlib import Path

import click

from nfmasq import config, rules_script


@click.command()
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),
    help=f"The configuration file.  [default: {config.DEFAULT_FILE} where there is one]",
)
def rules_options(path: Path | None) -> None:
    """Print the options of nfmasq-rules that the configuration file asks for.

    Each option and each value stands on a line of its own. nfmasq-rules without --inside and
    --outside takes its options from here.
    """
    configuration = config.load(path or config.default_file(), {})
    click.echo("\n".join(rules_script.arguments(configuration.as_table())))
