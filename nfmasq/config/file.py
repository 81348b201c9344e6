"""The configuration file: TOML, and on which of its lines a key stands.

What is wrong in a file is a `ConfigurationError`: one line that names the file and the line.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfmasq.errors import NfmasqError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigurationError(NfmasqError):
    """What was configured is wrong. The message names the file and, where known, the line.

    Where options contradict each other it names the options, wherever they were given.
    """


@dataclass(frozen=True)
class File:
    """A file that was read; `table` is what its text says."""

    path: Path
    text: str
    table: dict[str, Any]

    @classmethod
    def read(cls, where: Path) -> File:
        """Read and parse a file; raises ConfigurationError where either fails."""
        try:
            # Decoded by hand: TOML wants UTF-8 whatever the locale.
            text = where.read_bytes().decode().replace("\r\n", "\n")
            return cls(where, text, tomllib.loads(text))
        except FileNotFoundError:
            raise ConfigurationError(f"{where}: there is no such configuration file") from None
        except OSError as error:
            raise ConfigurationError(f"{where}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigurationError(f"{where}:{line}: not UTF-8 text") from None
        except RecursionError:
            raise ConfigurationError(f"{where}: nested too deeply") from None
        except ValueError as error:
            raise ConfigurationError(_syntax_error(where, text, str(error))) from None

    def error(self, keys: tuple[str | int, ...], message: str) -> ConfigurationError:
        """Make the error for a value; `keys` lead to the value, a number is a place in a list."""
        line = _line_of(self.text, keys)
        return ConfigurationError(f"{self.path}:{line}: {'.'.join(names(keys))} {message}")


def _syntax_error(path: Path, text: str, message: str) -> str:
    """Return the parser's message, with "(at line 3, column 5)" moved to the front as path:3."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message)
    if not match:
        return f"{path}: {message}"
    line = match[2] or len(text.splitlines())
    return f"{path}:{line}: not TOML: {match[1]}"


def _line_of(text: str, keys: tuple[str | int, ...]) -> int:
    """Return the line, from 1, on which the statement begins that first gives the key.

    A TOML text that is cut after a whole statement is TOML, too. So the text is parsed with more
    and more of its lines, and the first result that has the key ends with the statement that gives
    it. This needs no second parser, and is right for dotted and quoted keys, tables and values over
    many lines.
    """
    lines = text.split("\n")
    begins = 1
    for count in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("\n".join(lines[:count]))
        except ValueError:
            continue  # within a statement
        for key in keys:
            if isinstance(value, list):
                value = dict(enumerate(value))
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return begins
        begins = count + 1
    return begins


def names(keys: tuple[str | int, ...]) -> list[str]:
    """Return the keys, without the numbers, which are places in a list."""
    return [key for key in keys if isinstance(key, str)]
