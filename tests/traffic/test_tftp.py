"""TFTP with real programs: tftpd-hpa outside, and its client inside.

The client asks port 69 only, and the server answers from another port.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfmasq.lab import Daemon, Lab
from tests.programs import program
from tests.traffic.servers import open_folder

DATA = os.urandom(100_000)
STRICT = ("--filtering", "address-and-port-dependent")


@pytest.fixture(scope="module")
def folder(lab: Lab) -> Iterator[Path]:
    """Run in.tftpd outside; yields the folder that it serves, and takes uploads into."""
    tftpd = program("in.tftpd", "tftpd-hpa")
    with open_folder() as folder:
        folder.chmod(0o777)
        (folder / "file").write_bytes(DATA)
        (folder / "file").chmod(0o644)
        line = [tftpd, "--foreground", "--ipv4", "--secure", "--create", str(folder)]
        with lab.outside[0].popen(line) as process:
            lab.outside[0].wait_until_bound(69, "udp")
            yield folder
            process.terminate()


def tftp(lab: Lab, *command: str | Path, seconds: int = 50) -> None:
    client = [program("tftp", "tftp-hpa"), "-m", "binary", lab.outside[0].address, "-c"]
    # When the client gives up it says so on stdout, and exits with 0 all the same.
    lab.inside[0].run(["timeout", str(seconds), *client, *command], check=False)


def test_a_file_comes_and_goes(
    lab: Lab, masquerade: Callable[..., Daemon], folder: Path, tmp_path: Path
) -> None:
    masquerade(*STRICT, "--app", "tftp")
    tftp(lab, "get", "file", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == DATA
    tftp(lab, "put", tmp_path / "got", "sent")
    assert (folder / "sent").read_bytes() == DATA
    (folder / "sent").unlink()


@pytest.mark.usefixtures("folder")
def test_with_the_helper_off_the_answer_does_not_come_in(
    lab: Lab, masquerade: Callable[..., Daemon], tmp_path: Path
) -> None:
    masquerade(*STRICT)
    tftp(lab, "get", "file", tmp_path / "got", seconds=4)
    assert not (tmp_path / "got").exists() or (tmp_path / "got").read_bytes() == b""
