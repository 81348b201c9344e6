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

from nfmasq.config.configuration import IPTABLES
from nfmasq.engine.wire.by_address import BY_ADDRESS
from nfmasq.errors import NfmasqError
from nfmasq.rules import Rule, parse_rules, ports_of

# A checkout has a script of its own; an installation puts it with the Python that it is made for.
_FOLDERS = (Path(__file__).parents[1] / "iptables", Path(sys.executable).parent)

_PLACES = " nor ".join(f"{folder}/nfmasq-rules" for folder in _FOLDERS)

_PATIENCE = 60  # seconds; the script waits for another iptables up to 10 at a time

NO_IPV6 = "--no-ipv6-forward"
"""The option by which the script loads rules of ip6tables, too."""

NOT_FOUND = f"the script nfmasq-rules is neither {_PLACES} nor on PATH"


def find() -> str | None:
    """Return the path of the script, or None where it is not found."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which("nfmasq-rules", path=os.pathsep.join((*map(str, _FOLDERS), path)))


def run(verb: str, configuration: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run the script with the interfaces and options of a configuration (plain data), to its end.

    Raises NfmasqError where it is not found, or does not end.
    """
    script = find()
    if script is None:
        raise NfmasqError(f"{NOT_FOUND}: install nfmasq again")
    try:
        return subprocess.run(
            [script, verb, *arguments(configuration)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            # Ctrl-C is for nfmasq, and must not leave half of the rules.
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NfmasqError(f"nfmasq-rules {verb} takes longer than {_PATIENCE} seconds") from None


def arguments(configuration: Mapping[str, Any]) -> list[str]:
    """Return all that the script is told by a configuration (plain data) with interfaces."""
    sides = [f"--{side}={name}" for side in ("inside", "outside") for name in configuration[side]]
    addresses = [f"--masquerade-address={each}" for each in configuration["masquerade-address"]]
    return [*sides, *options_for(configuration), *addresses]


def options_for(configuration: Mapping[str, Any]) -> list[str]:
    """Return the script's options that a configuration asks for.

    All but the interfaces, and the masquerade addresses: whoever loads the rules by hand can leave
    out an address that is on an interface. The configuration is plain data
    (`Configuration.as_table`).
    """
    options = ["--queue", str(configuration["queue"]), "--ports", configuration["ports"]]
    if configuration["other-protocols"] == BY_ADDRESS or configuration["apps"].get("pptp"):
        options.append("--other-protocols")
    chosen = ("clamp-mss", "reserve", "only-inside", "only-answers")
    options += [f"--{key}" for key in chosen if configuration[key]]
    options += [
        f"--no-{key}" for key in ("checksum-fill", "ipv6-forward") if not configuration[key]
    ]
    if configuration["flow-cache"] == "off":
        options.append("--no-flow-cache")
    if configuration["iptables"] != IPTABLES[0]:
        options += ["--iptables", configuration["iptables"]]
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
    """Return the rules of iptables that the script would load, less what only spares nfmasq work.

    Raises NfmasqError, with what the script says, where the script fails.
    """
    sides = [f"--inside={name}" for name in inside] + [f"--outside={name}" for name in outside]
    asked = [option for option in options if option != NO_IPV6]
    command = [script, "print", "--no-checksum-fill", *sides, *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NfmasqError(" ".join(done.stderr.split()))
    # The script puts a jump at the top of its chain (-I); iptables-save shows every rule with -A.
    printed = parse_rules(re.sub(r"^-I (\S+) 1 ", r"-A \1 ", done.stdout, flags=re.MULTILINE))
    return [rule for rule in printed if rule.table != "mangle" or "--clamp-mss" in asked]
