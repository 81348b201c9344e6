"""The script nfmasq-rules, which alone knows the rules that lead packets to nfmasq."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nfmasq.engine.wire.by_address import BY_ADDRESS
from nfmasq.errors import NfmasqError
from nfmasq.rules import Rule, parse_rules, ports_of

# A checkout has a script of its own; an installation puts it with the Python that it is made for.
_FOLDERS = (Path(__file__).parents[1] / "iptables", Path(sys.executable).parent)

_PLACES = " nor ".join(f"{folder}/nfmasq-rules" for folder in _FOLDERS)

NOT_FOUND = f"the script nfmasq-rules is neither {_PLACES} nor on PATH"


def find() -> str | None:
    """Return the path of the script, or None where it is not found."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which("nfmasq-rules", path=os.pathsep.join((*map(str, _FOLDERS), path)))


def options_for(configuration: Mapping[str, Any]) -> list[str]:
    """Return the script's options that a configuration asks for, all but the interfaces.

    The configuration is plain data (`Configuration.as_table`).
    """
    options = ["--queue", str(configuration["queue"]), "--ports", configuration["ports"]]
    if configuration["other-protocols"] == BY_ADDRESS or configuration["apps"].get("pptp"):
        options.append("--other-protocols")
    led_inside = [forward["listen"] for forward in configuration["forward"]]
    led_inside += [trigger["opens"] for trigger in configuration["trigger"]]
    # The script takes no address, which may stand in the middle.
    for forward in dict.fromkeys(re.sub(":.*:", ":", text) for text in led_inside):
        # Masquerade ports lead to nfmasq without this option.
        if not ports_of(forward.split(":")[1]) <= ports_of(configuration["ports"]):
            options += ["--forward", forward]
    return options


def print_rules(
    script: str, inside: Iterable[str], outside: Iterable[str], options: Iterable[str]
) -> list[Rule]:
    """Return the rules that the script would load, without rules that only spare nfmasq work.

    Raises NfmasqError, with what the script says, where the script fails.
    """
    sides = [f"--inside={name}" for name in inside] + [f"--outside={name}" for name in outside]
    command = [script, "print", "--no-checksum-fill", *sides, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NfmasqError(" ".join(done.stderr.split()))
    # The script puts a jump at the top of its chain (-I); iptables-save shows every rule with -A.
    return [*parse_rules(re.sub(r"^-I (\S+) 1 ", r"-A \1 ", done.stdout, flags=re.MULTILINE))]
