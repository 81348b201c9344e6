"""The Debian package, installed and removed on a copy of this machine.

The copy is an overlay over the file system, in a mount namespace of its own: what is written there
is gone with it. No systemd runs in it; where the package would talk to one, a stand-in notes what
it was told. The labs of the demo are the only network that is touched.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfmasq import __version__
from tests.programs import program

ROOT = Path(__file__).parents[2]

COPY = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir changes work machine
mount -t overlay overlay -o lowerdir=/,upperdir=changes,workdir=work machine
mount -t tmpfs tmpfs machine/run
for folder in dev proc sys; do mount --rbind "/$folder" "machine/$folder"; done
echo ready
exec cat
"""

SYSTEMCTL = """\
#!/bin/sh
echo "$@" >>/run/told
"""

KEPT_BY_OTHERS = re.compile("/(var/(lib/dpkg|lib/apt|log|cache)|etc/ld.so.cache)(/|$)")
"""What dpkg and those whom it tells of every installation keep."""


class Machine:
    """A copy of this machine, in the folder `place`."""

    def __init__(self, pid: int, place: Path) -> None:
        self._enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]
        self._place = place

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run a command on the copy as a user of root's finds it; returns what it prints."""
        usual = ["env", "-i", "HOME=/root", f"PATH={os.defpath}:/usr/sbin:/sbin", "TERM=dumb"]
        line = [*self._enter, "chroot", self._place / "machine", *usual, *command]
        done = subprocess.run(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def changes(self) -> list[str]:
        """Return the files that were written or removed, but for those of dpkg itself."""
        find: list[str | Path] = [
            "find",
            self._place / "changes",
            "-not",
            "-type",
            "d",
            "-printf",
            "/%P\n",
        ]
        listed = subprocess.check_output([*self._enter, *find], text=True, timeout=60)
        return [path for path in listed.splitlines() if not KEPT_BY_OTHERS.match(path)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program("dpkg-deb", "dpkg")
    folder = tmp_path_factory.mktemp("package")
    done = subprocess.run(
        [ROOT / "script/build-deb", folder],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    [built] = folder.iterdir()
    assert done.stdout == f"{built}\n"
    return built


@pytest.fixture
def machine(tmp_path: Path, package: Path) -> Iterator[Machine]:
    unshare: list[str | Path] = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        COPY,
        "sh",
        tmp_path,
    ]
    with subprocess.Popen(
        unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        # At the end of its input it ends, and with it all that is mounted: so also after a kill.
        assert holder.stdin
        assert holder.stdout
        assert holder.stderr
        if holder.stdout.readline() != "ready\n":
            missing = f"takes an overlay file system: {holder.stderr.read().strip()}"
            pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
        yield Machine(holder.pid, tmp_path)
        holder.stdin.close()


def test_it_masquerades_once_installed_and_nothing_is_left_of_it(
    machine: Machine, package: Path
) -> None:
    machine.run("dpkg", "-i", package)
    installed = machine.changes()

    assert machine.run("dpkg", "--verify", "nfmasq") == ""
    assert machine.run("nfmasq", "--version") == f"nfmasq, version {__version__}\n"
    assert "passed, in" in machine.run("nfmasq", "demo")
    assert "/usr/sbin/nfmasq-rules" in machine.run("which", "nfmasq-rules")
    assert "Linux" in machine.run("sh", "-c", "nfmasq doctor || test $? = 1")
    assert machine.run("man", "-w", "nfmasq-run", "nfmasq-rules").count(".gz") == 2
    # Nothing is written where it is installed, as compiled Python would be.
    assert [path for path in machine.changes() if path not in installed] == []

    machine.run("dpkg", "-r", "nfmasq")
    assert machine.changes() == []
    machine.run("dpkg", "-P", "nfmasq")
    assert "not installed" in machine.run("dpkg", "-s", "nfmasq", status=1)
    assert machine.changes() == []


def test_systemd_is_told_what_changes_and_starts_nothing(machine: Machine, package: Path) -> None:
    machine.run("mkdir", "-p", "/run/systemd/system")
    machine.run("sh", "-c", 'printf %s "$1" >/usr/bin/systemctl', "sh", SYSTEMCTL)
    machine.run("chmod", "755", "/usr/bin/systemctl")

    def told(*command: str | Path) -> list[str]:
        machine.run("rm", "-f", "/run/told")
        machine.run(*command)
        return machine.run("sh", "-c", "cat /run/told || true").splitlines()

    assert told("dpkg", "-i", package) == ["daemon-reload"]
    assert told("dpkg", "-i", package) == ["daemon-reload", "try-restart nfmasq.service"]
    assert told("dpkg", "-r", "nfmasq") == [
        "disable --now nfmasq.service nfmasq-rules.service",
        "daemon-reload",
    ]


def test_what_the_units_start_is_there(machine: Machine, package: Path) -> None:
    machine.run("dpkg", "-i", package)
    units = machine.run("dpkg", "-L", "nfmasq").splitlines()
    units = [path for path in units if path.endswith(".service")]
    text = machine.run("cat", *units)

    assert len(units) == 2
    assert "/opt" not in text
    for path in set(re.findall(r"^Exec\w+=\+?(\S+)", text, re.MULTILINE)):
        machine.run("test", "-x", path)


def test_it_does_not_say_where_it_was_built(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-R", package, tmp_path / "content"], check=True, timeout=60)

    places: list[str | Path] = ["grep", "-rlE", f"nfmasq build|{ROOT}", tmp_path / "content"]
    found = subprocess.run(places, capture_output=True, text=True, timeout=60, check=False)

    assert found.stdout == ""
