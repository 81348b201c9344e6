"""Downloads and uploads by HTTP arrive as they were sent, and seem to come from the gateway."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.traffic.conftest import taking
from tests.traffic.observed import entries, eventually
from tests.traffic.servers import WebServer, web_server

data_path = taking("queue", "no-gso", "routed", "direct")

LARGE = 20_000_000  # bytes
SHARE = 5_000_000  # bytes, for each of several hosts
SOURCE_PORTS = count(40_000)  # a port that was used stays in use for a while
MASQUERADE_PORTS = range(61000, 65096)


@pytest.fixture(scope="module")
def lab(data_path: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(inside=4, outside=1, options=data_path) as lab:
        yield lab


@pytest.fixture(scope="module", autouse=True)
def daemon(lab: Lab) -> Iterator[Daemon]:
    with lab.masquerading() as daemon:
        yield daemon


@pytest.fixture
def web(lab: Lab) -> Iterator[WebServer]:
    with web_server(lab.outside[0]) as web:
        yield web


def curl(*arguments: str | Path) -> list[str | Path]:
    return ["curl", "-sSf", "--max-time", "100", *arguments]


def download(url: str, target: Path) -> list[str | Path]:
    return curl(url, "-o", target)


def upload(source: Path, url: str) -> list[str | Path]:
    return curl(url, "-T", source)


def test_a_large_download_arrives_as_it_was_sent(lab: Lab, web: WebServer, tmp_path: Path) -> None:
    web.files["/large"] = os.urandom(LARGE)
    lab.inside[0].run(download(f"{web.url}/large", tmp_path / "large"), timeout=110)
    received = (tmp_path / "large").read_bytes()
    assert len(received) == LARGE
    assert sha256(received).hexdigest() == sha256(web.files["/large"]).hexdigest()


def test_a_large_upload_arrives_as_it_was_sent(lab: Lab, web: WebServer, tmp_path: Path) -> None:
    sent = os.urandom(LARGE)
    (tmp_path / "large").write_bytes(sent)
    lab.inside[0].run(upload(tmp_path / "large", f"{web.url}/uploaded"), timeout=110)
    assert len(web.files["/uploaded"]) == LARGE
    assert sha256(web.files["/uploaded"]).hexdigest() == sha256(sent).hexdigest()


def test_the_server_sees_the_gateway_and_a_masquerade_port(
    lab: Lab, web: WebServer, tmp_path: Path
) -> None:
    web.files["/page"] = b"hello"
    for host in lab.inside:
        host.run(download(f"{web.url}/page", tmp_path / host.name))
    assert len(web.visitors) == len(lab.inside)
    assert {address for address, _ in web.visitors} == {"198.51.100.2"}
    assert {port for _, port in web.visitors} < set(MASQUERADE_PORTS)


def test_several_hosts_at_once_from_the_same_source_port(
    lab: Lab, daemon: Daemon, web: WebServer, tmp_path: Path
) -> None:
    """Half of the hosts download, half upload; each has its own masquerade port meanwhile.

    The server answers nobody until all hosts are connected, however late the last one is.
    """
    source_port = next(SOURCE_PORTS)
    web.answering.clear()

    def from_the_port(host: Host, command: list[str | Path]) -> subprocess.Popen[str]:
        # Slowed down so that all transfers run at the same time.
        slowly = ["--limit-rate", "2M", "--local-port", str(source_port)]
        return host.popen([*command, *slowly])

    downloading, uploading = lab.inside[:2], lab.inside[2:]
    transfers = []
    for host in downloading:
        web.files[f"/{host.name}"] = os.urandom(SHARE)
        command = download(f"{web.url}/{host.name}", tmp_path / host.name)
        transfers.append(from_the_port(host, command))
    for host in uploading:
        (tmp_path / host.name).write_bytes(os.urandom(SHARE))
        command = upload(tmp_path / host.name, f"{web.url}/{host.name}")
        transfers.append(from_the_port(host, command))

    def all_at_it() -> bool:
        listed = entries(daemon, protocol="tcp", sport=source_port)
        return [entry["state"] for entry in listed] == ["ESTABLISHED"] * len(lab.inside)

    assert eventually(all_at_it)
    assert [transfer.poll() for transfer in transfers] == [None] * len(transfers)

    web.answering.set()
    assert [transfer.wait(110) for transfer in transfers] == [0] * len(transfers)
    for host in lab.inside:
        here, there = (tmp_path / host.name).read_bytes(), web.files[f"/{host.name}"]
        assert len(here) == SHARE
        assert sha256(here).hexdigest() == sha256(there).hexdigest()
    assert {address for address, _ in web.visitors} == {"198.51.100.2"}
    assert len({port for _, port in web.visitors}) == len(lab.inside)
    assert {port for _, port in web.visitors} < set(MASQUERADE_PORTS)
