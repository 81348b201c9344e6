"""`nfmasq replay` as a person meets it: kinds of captures, kinds of places for the result."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import dpkt
import pytest
from click.testing import CliRunner, Result

from nfmasq.cli import main

ROOT = Path(__file__).parents[2]
REPLAY = ["replay", "--inside", "10.0.0.0/24", "--masquerade-address", "198.51.100.2"]
ETHERNET, RAW_IP = 1, 101
SECONDS = 1_700_000_000


def datagram() -> bytes:
    udp = dpkt.udp.UDP(sport=40000, dport=53, data=b"who?", ulen=12)
    src, dst = socket.inet_aton("10.0.0.5"), socket.inet_aton("203.0.113.7")
    return bytes(dpkt.ip.IP(src=src, dst=dst, p=17, data=udp, len=32))


def pcap(*nanoseconds: int, magic: int = 0xA1B23C4D) -> bytes:
    """Return a capture of the datagram at these times after `SECONDS`."""
    capture = struct.pack("<IHHiIII", magic, 2, 4, 0, 0, 65535, RAW_IP)
    for when in nanoseconds:
        packet = datagram()
        capture += struct.pack("<IIII", SECONDS, when, len(packet), len(packet)) + packet
    return capture


def block(kind: int, body: bytes, order: str) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + length + body + length


def pcapng(*interfaces: tuple[int, int], order: str = "<") -> bytes:
    """Return a capture of the datagram on each interface, a link type and decimals of its times."""
    capture = block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    for number, (link, decimals) in enumerate(interfaces):
        options = struct.pack(f"{order}HHB3xHH", 9, 1, decimals, 0, 0)
        capture += block(1, struct.pack(f"{order}HHI", link, 0, 65535) + options, order)
        when, packet = SECONDS * 10**decimals, datagram()
        head = (number, when >> 32, when & 0xFFFFFFFF, len(packet), len(packet))
        capture += block(6, struct.pack(f"{order}5I", *head) + packet, order)
    return capture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.pcap"
    path.write_bytes(pcap(0, magic=0xA1B2C3D4))
    return path


def replay(source: Path, target: Path) -> Result:
    return CliRunner().invoke(main, [*REPLAY, str(source), str(target)])


def read(capture: bytes, tmp_path: Path) -> list[tuple[float, bytes]]:
    path = tmp_path / "read.pcap"
    path.write_bytes(capture)
    with path.open("rb") as file:
        return [(float(when), packet) for when, packet in dpkt.pcap.Reader(file)]


def sources(capture: bytes, tmp_path: Path) -> set[str]:
    return {socket.inet_ntoa(packet[12:16]) for _, packet in read(capture, tmp_path)}


# ---- captures -----------------------------------------------------------------------------------


def test_times_in_nanoseconds(source: Path, tmp_path: Path) -> None:
    source.write_bytes(pcap(0, 123_456_789, 999_999_600))
    done = replay(source, tmp_path / "out.pcap")
    assert done.exit_code == 0, done.output
    sent = read((tmp_path / "out.pcap").read_bytes(), tmp_path)
    assert [when - SECONDS for when, _ in sent] == pytest.approx([0, 0.123457, 1], abs=2e-6)
    whole_second = struct.pack("<II", SECONDS + 1, 0)
    assert whole_second in (tmp_path / "out.pcap").read_bytes()


@pytest.mark.parametrize("order", ["<", ">"])
def test_interfaces_of_one_kind(source: Path, tmp_path: Path, order: str) -> None:
    source.write_bytes(pcapng((RAW_IP, 6), (RAW_IP, 6), order=order))
    done = replay(source, tmp_path / "out.pcap")
    assert done.exit_code == 0, done.output
    sent = read((tmp_path / "out.pcap").read_bytes(), tmp_path)
    assert [when for when, _ in sent] == [SECONDS, SECONDS]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("other", [(ETHERNET, 6), (RAW_IP, 9)], ids=["link type", "decimals"])
def test_interfaces_of_two_kinds(
    source: Path, tmp_path: Path, other: tuple[int, int], order: str
) -> None:
    source.write_bytes(pcapng((RAW_IP, 6), other, order=order))
    done = replay(source, tmp_path / "out.pcap")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"nfmasq: {source}: its interfaces differ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("cut", [1, 20, 70, 150])
def test_a_pcapng_that_breaks_off(source: Path, tmp_path: Path, cut: int) -> None:
    source.write_bytes(pcapng((RAW_IP, 6), (RAW_IP, 6))[:-cut])
    done = replay(source, tmp_path / "out.pcap")
    assert (done.exit_code, done.stderr) == (1, f"nfmasq: {source}: the capture is damaged\n")


# ---- the place of the result --------------------------------------------------------------------


def test_a_link_stays_and_its_file_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.pcap", tmp_path / "there" / "out.pcap"
    link.symlink_to(target)
    for _ in "new", "replaced":
        assert replay(source, link).exit_code == 0
        assert link.is_symlink()
        assert sources(target.read_bytes(), tmp_path) == {"198.51.100.2"}
    assert list((tmp_path / "there").iterdir()) == [target]


def test_a_pipe_is_written_to(source: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert replay(source, pipe).exit_code == 0
    reader.join(timeout=60)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sources(received[0], tmp_path) == {"198.51.100.2"}


def test_stdout_has_the_capture_and_nothing_else(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nfmasq", *REPLAY, str(source), "/dev/stdout"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sources(done.stdout, tmp_path) == {"198.51.100.2"}
    assert b"1 written" in done.stderr


def device(path: Path, number: int) -> Path:
    """Make a device of the memory driver, as in /dev; a device outside /dev may be lost."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, number))
        path.open("wb").close()
    except PermissionError:
        pytest.skip("takes root, and a file system with devices")
    return path


def test_a_device_stays_a_device(source: Path, tmp_path: Path) -> None:
    null = device(tmp_path / "null", 3)
    assert replay(source, null).exit_code == 0
    assert stat.S_ISCHR(null.stat().st_mode)
    full = device(tmp_path / "full", 7)
    done = replay(source, full)
    assert (done.exit_code, done.stderr) == (1, f"nfmasq: {full}: No space left on device\n")
    assert stat.S_ISCHR(full.stat().st_mode)


# ---- what is wrong ------------------------------------------------------------------------------


def test_the_path_that_was_given_is_named(source: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "out.pcap"
    absent = tmp_path / "absent.pcap"
    for one, other, wrong in (
        (source, nowhere, f"{nowhere}: No such file or directory"),
        (source, tmp_path, f"{tmp_path}: Is a directory"),
        (absent, nowhere, f"{absent}: No such file or directory"),
        (tmp_path, nowhere, f"{tmp_path}: Is a directory"),
    ):
        done = replay(one, other)
        assert (done.exit_code, done.stderr) == (1, f"nfmasq: {wrong}\n")


def test_what_may_not_be_read_is_no_wrong_usage(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read all files, but the exit status shows that nobody asks for access beforehand."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    source.write_text("no capture")
    assert replay(source, tmp_path / "out.pcap").exit_code == 1


def test_the_help_speaks_of_a_replay() -> None:
    told = " ".join(CliRunner().invoke(main, ["replay", "--help"]).output.split())
    assert "several make a pool. [required, here or in FILE]" in told
    assert "Masquerade ports, both ends included. [default: 61000-65095]" in told
    assert "kernel's route" not in told
