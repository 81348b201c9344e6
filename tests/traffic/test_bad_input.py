"""Bad input, on a machine where nfmasq could run: one clear line, exit status 1, nothing changed.

Wrong values on the command line or in a file need no gateway: see `tests/cli/test_cli.py` and
`tests/config/test_config.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import AF_INET, SOCK_STREAM

import dpkt
import pytest

from nfmasq.daemon.queue_table import QUEUE_TABLE
from nfmasq.lab import Daemon, Lab

ROOT = Path(__file__).parents[2]
NFMASQ = [sys.executable, "-m", "nfmasq"]
PORT = 9400

# Without this capability an ordinary user may not even read the sources, where they belong to root.
AS_NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
]

REPLAY = ["replay", "--inside", "10.77.0.0/24", "--masquerade-address", "198.51.100.2"]


@pytest.fixture(scope="module")
def data_path() -> tuple[str, ...]:
    # No nfmasq gets a packet here, so superpackets make no difference.
    return ()


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a command wrote before it failed."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("nfmasq: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def complaint_of_run(
    lab: Lab, folder: Path, *options: str | Path, by: list[str] | None = None
) -> str:
    """Return what `nfmasq run` complains of on the gateway, where it must leave nothing behind."""
    usual = ["--config", "/dev/null", "--control", str(folder / "control"), "--metrics", "off"]
    command: list[str | Path] = [*(by or []), *NFMASQ, "run", *usual, *options]
    told = complaint(lab.gateway.run(command, cwd=ROOT, check=False))
    assert not (folder / "control").exists()
    assert queues_in_use(lab) == ""
    return told


def queues_in_use(lab: Lab) -> str:
    return lab.gateway.call(QUEUE_TABLE.read_text)


# ---- run ----------------------------------------------------------------------------------------


def test_not_root(lab: Lab, tmp_path: Path) -> None:
    told = complaint_of_run(lab, tmp_path, by=AS_NOBODY)
    assert "not allowed to use NFQUEUE: run as root" in told


def test_a_configuration_that_cannot_be_read(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.symlink_to(file)
    told = complaint_of_run(lab, tmp_path, "--config", file)
    assert told == f"nfmasq: {file}: cannot be read: Too many levels of symbolic links"


def test_a_configuration_that_is_wrong(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "nfmasq.toml"
    file.write_text('log-level = "info"\n\n[timeouts]\nudp = -1\n')
    assert f"{file}:4: timeouts.udp must be seconds" in complaint_of_run(
        lab, tmp_path, "--config", file
    )


def test_a_metrics_port_that_is_taken(lab: Lab, tmp_path: Path) -> None:
    with lab.gateway.socket(AF_INET, SOCK_STREAM) as other:
        other.bind(("127.0.0.1", PORT))
        other.listen()
        told = complaint_of_run(lab, tmp_path, "--metrics", f"127.0.0.1:{PORT}")
    assert f"cannot serve metrics on 127.0.0.1:{PORT}: another program has this port" in told


def test_a_metrics_address_of_another_machine(lab: Lab, tmp_path: Path) -> None:
    told = complaint_of_run(lab, tmp_path, "--metrics", f"203.0.113.11:{PORT}")
    assert f"203.0.113.11:{PORT}" in told


def test_a_control_socket_in_no_folder(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "control"
    told = complaint_of_run(lab, tmp_path, "--control", path)
    assert told == f"nfmasq: cannot make the control socket {path}: No such file or directory"


def test_a_control_socket_that_is_a_file(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("important")
    assert str(path) in complaint_of_run(lab, tmp_path, "--control", path)
    assert path.read_text() == "important"


def test_a_control_socket_of_another_nfmasq(
    lab: Lab, tmp_path: Path, masquerade: Callable[..., Daemon]
) -> None:
    """The other nfmasq is not disturbed, and keeps its socket."""
    daemon = masquerade()
    usual = ["--config", "/dev/null", "--metrics", "off"]
    second: list[str | Path] = [*NFMASQ, "run", *usual, "--queue", "1", "--control", daemon.control]
    told = complaint(lab.gateway.run(second, cwd=ROOT, check=False))
    assert str(daemon.control) in told
    assert daemon.ask("list", "--json").strip() == "[]"
    assert [line.split()[0] for line in queues_in_use(lab).splitlines()] == ["0"]


def test_demo_takes_root() -> None:
    done = subprocess.run(
        [*AS_NOBODY, *NFMASQ, "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "root" in complaint(done)


# ---- replay -------------------------------------------------------------------------------------


def capture(link_type: int = 101) -> bytes:
    header = dpkt.pcap.FileHdr(snaplen=65535, linktype=link_type)
    packet = bytes(range(40))
    record = dpkt.pcap.PktHdr(tv_sec=0, caplen=len(packet), len=len(packet))
    return bytes(header) + bytes(record) + packet


def replay(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [*NFMASQ, *REPLAY, source, target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "what_it_is"),
    [
        (b"", "not a capture"),
        (b"GET / HTTP/1.1\r\n\r\n" * 10, "not a capture"),
        (capture()[:20], "not a capture"),
        (capture()[:30], "the capture is damaged"),
        (capture()[:-10], "the capture is damaged"),
        (capture(link_type=147), "link type 147 is not one that nfmasq can read"),
    ],
    ids=["empty", "text", "cut header", "cut record header", "cut record", "link type"],
)
def test_a_file_that_is_not_a_capture(tmp_path: Path, content: bytes, what_it_is: str) -> None:
    """The file in the place of the result stays as it was."""
    source, target = tmp_path / "in.pcap", tmp_path / "out.pcap"
    source.write_bytes(content)
    target.write_text("of yesterday")
    told = complaint(replay(source, target))
    assert str(source) in told
    assert what_it_is in told
    assert target.read_text() == "of yesterday"
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_a_capture_that_is_not_there(tmp_path: Path) -> None:
    told = complaint(replay(tmp_path / "in.pcap", tmp_path / "out.pcap"))
    assert told == f"nfmasq: {tmp_path / 'in.pcap'}: No such file or directory"
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    source, target = tmp_path / "in.pcap", tmp_path / "nowhere" / "out.pcap"
    source.write_bytes(capture())
    told = complaint(replay(source, target))
    assert "nowhere" in told
    assert "No such file or directory" in told
