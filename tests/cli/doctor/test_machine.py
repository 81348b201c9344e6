"""What `nfmasq doctor` reads from the kernel's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfmasq.cli.doctor import machine
from tests.cli.doctor.machine import levels


class TestSysctls:
    @pytest.fixture(autouse=True)
    def _machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "SYSCTLS", tmp_path)
        self.root = tmp_path

    def set(self, name: str, value: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")

    def test_forwarding(self) -> None:
        self.set("ipv4/ip_forward", "0")
        assert levels(list(machine.forwarding())) == ["problem"]
        self.set("ipv4/ip_forward", "1")
        assert levels(list(machine.forwarding())) == ["ok"]

    def test_a_small_socket_buffer_is_a_note(self) -> None:
        self.set("core/rmem_max", "212992")
        assert levels(list(machine.socket_buffer(32 << 20))) == ["note"]
        assert levels(list(machine.socket_buffer(1 << 16))) == []
