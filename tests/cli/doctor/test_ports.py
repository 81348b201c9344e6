"""What `nfmasq doctor` says of the masquerade ports."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfmasq.cli.doctor import machine, ports
from nfmasq.cli.doctor.finding import Finding
from tests.cli.doctor.machine import WANTED, levels

RESERVING = "nfmasq-rules up --reserve"


def check(masquerade: str, reserve: bool = False) -> list[str]:
    wanted = WANTED | {"ports": masquerade, "reserve": reserve}
    return levels(ports.local_ports(wanted, RESERVING))


class TestLocalPorts:
    @pytest.fixture(autouse=True)
    def _machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "SYSCTLS", tmp_path)
        self.root = tmp_path

    def set(self, name: str, value: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")

    @pytest.mark.parametrize(
        ("local", "reserved", "level"),
        [
            ("32768\t60999", "", "ok"),
            ("32768\t61000", "", "problem"),
            ("1024\t65535", "", "problem"),
            ("1024\t65535", "61000-65095", "ok"),
            ("1024\t65535", "8080,61000-65094", "problem"),
            ("1024\t65535", "61000-65094,65095", "ok"),
        ],
    )
    def test_local_ports(self, local: str, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", local)
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert check("61000-65095") == [level]

    @pytest.mark.parametrize(
        ("reserved", "level"), [("", "problem"), ("61001-65095", "problem"), ("7-65535", "ok")]
    )
    def test_ports_that_are_to_be_reserved(self, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", "32768\t60999")
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert check("61000-65095", reserve=True) == [level]

    @pytest.mark.parametrize(
        ("local", "reserved", "level"),
        [
            ("32768\t60999", "", "ok"),
            ("1023\t60999", "", "problem"),
            ("1023\t65535", "61000-65095", "problem"),
            ("1023\t65535", "1023,61000-65095", "ok"),
        ],
    )
    def test_local_ports_and_several_ranges(self, local: str, reserved: str, level: str) -> None:
        self.set("ipv4/ip_local_port_range", local)
        self.set("ipv4/ip_local_reserved_ports", reserved)

        assert check("600-1023,61000-65095") == [level]


class TestSockets:
    """Sockets of this process, beside what else is on this machine."""

    @pytest.fixture
    def opened(self) -> Iterator[dict[str, socket.socket]]:
        with (
            socket.create_server(("0.0.0.0", 0)) as listener,
            socket.create_server(("127.0.0.1", 0)) as private,
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams,
        ):
            datagrams.bind(("::", 0))
            yield {"tcp": listener, "udp": datagrams, "private": private}

    def told(self, masquerade: str, forwards: tuple[str, ...] = ()) -> list[str]:
        wanted: dict[str, Any] = {"ports": masquerade, "forward": [{"listen": f} for f in forwards]}
        found: list[Finding] = list(ports.sockets(wanted, RESERVING))
        ours = f"(process {os.getpid()})"
        return [f"{each.level}: {each.what}" for each in found if ours in each.what]

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_a_server_on_a_masquerade_port(
        self, opened: dict[str, socket.socket], protocol: str
    ) -> None:
        port = opened[protocol].getsockname()[1]

        [told] = self.told(f"{port}-{port}")

        assert told.startswith("warning: ")
        assert f"serves {protocol.upper()} port {port}, a masquerade port" in told

    def test_a_server_on_a_forwarded_port(self, opened: dict[str, socket.socket]) -> None:
        port = opened["tcp"].getsockname()[1]

        [told] = self.told("1-1", (f"tcp:{port}",))

        assert f"serves TCP port {port}, but what comes from the outside there goes inside" in told
        assert self.told("1-1", (f"udp:{port}",)) == []

    def test_what_no_other_host_can_reach_is_no_matter(
        self, opened: dict[str, socket.socket]
    ) -> None:
        port = opened["private"].getsockname()[1]
        assert self.told(f"{port}-{port}") == []
