"""FTP with real programs: vsftpd is the server, curl and lftp are clients.

The server is outside and the clients are inside, passive and active; or the server is inside,
behind a forwarded port, and curl is outside, passive.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfmasq.lab import Daemon, Host, Lab
from tests.programs import program
from tests.traffic.servers import open_folder

MASQUERADE_ADDRESS = b"198,51,100,2"
GATEWAY = "198.51.100.2"
DATA = {name: os.urandom(size) for name, size in (("a", 1), ("b", 300_000), ("c", 1_000_000))}

CONFIGURATION = """
listen=YES
listen_port={port}
background=NO
anonymous_enable=YES
no_anon_password=YES
anon_root={folder}/public
write_enable=YES
anon_upload_enable=YES
anon_umask=022
connect_from_port_20=YES
secure_chroot_dir={folder}/empty
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
xferlog_enable=NO
"""

WAYS = {
    "EPSV": [],
    "PASV": ["--disable-epsv"],
    "EPRT": ["--ftp-port", "-"],
    "PORT": ["--ftp-port", "-", "--disable-eprt"],
}
"""How curl gets a data connection, and the options that make it do so."""


@pytest.fixture(scope="module")
def public(lab: Lab) -> Iterator[Path]:
    """Run a server outside; yields the folder that it serves."""
    with vsftpd(lab.outside[0]) as public:
        yield public


@contextmanager
def vsftpd(host: Host, port: int = 21) -> Iterator[Path]:
    """Run a server on a host; yields the folder that it serves. Uploads go into `incoming`."""
    line = [program("vsftpd", "vsftpd")]
    with open_folder() as folder, host.popen([*line, furnished(folder, port)]) as process:
        host.wait_until_bound(port)
        yield folder / "public"
        process.terminate()


def furnished(folder: Path, port: int) -> Path:
    """Put into a folder what vsftpd serves; returns its configuration file."""
    public = folder / "public"
    for name in ("empty", "public", "public/incoming"):
        (folder / name).mkdir()
    (public / "incoming").chmod(0o777)
    for name, content in DATA.items():
        (public / name).write_bytes(content)
        (public / name).chmod(0o644)
    configuration = folder / "vsftpd.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port))
    return configuration


@pytest.fixture
def masquerading(masquerade: Callable[..., Daemon]) -> Daemon:
    return masquerade()


def server(lab: Lab) -> str:
    return f"ftp://{lab.outside[0].address}"


def curl(host: Host, *arguments: str | Path, check: bool = True) -> str:
    line = [program("curl", "curl"), "-sS", "-v", "--max-time", "50", *arguments]
    return host.run(line, check=check).stderr


@pytest.mark.usefixtures("masquerading", "public")
@pytest.mark.parametrize("way", WAYS)
def test_files_come_one_after_the_other_over_one_control_connection(
    lab: Lab, tmp_path: Path, way: str
) -> None:
    urls = [word for name in DATA for word in ("-o", tmp_path / name, f"{server(lab)}/{name}")]
    with lab.capture(lab.outside[0], "eth0", "tcp port 21") as control:
        told = curl(lab.inside[0], *WAYS[way], *urls)
    assert {name: (tmp_path / name).read_bytes() for name in DATA} == DATA
    assert told.count(f"> {way}") == len(DATA)
    assert "Re-using existing connection" in told or "Reusing existing" in told
    payload = b"".join(packet.data for packet in control)
    assert way.encode() in payload
    assert b"10,77,0," not in payload
    assert b"10.77.0." not in payload


@pytest.mark.usefixtures("masquerading")
@pytest.mark.parametrize("way", WAYS)
def test_a_file_goes_up(lab: Lab, public: Path, tmp_path: Path, way: str) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(DATA["c"])
    received = public / "incoming" / way
    received.unlink(missing_ok=True)
    curl(lab.inside[0], *WAYS[way], "-T", sent, f"{server(lab)}/incoming/{way}")
    assert received.read_bytes() == DATA["c"]
    received.unlink()


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("passive", ["on", "off"])
def test_lftp_fetches_several_at_a_time(
    lab: Lab, masquerading: Daemon, tmp_path: Path, passive: str
) -> None:
    script = f"set ftp:passive-mode {passive}; mirror --parallel=3 / '{tmp_path}/mirror'"
    lftp = [program("lftp", "lftp"), "-c", f"open {server(lab)}; {script}"]
    lab.inside[0].run(lftp, env=os.environ | {"HOME": str(tmp_path)})
    assert {n: (tmp_path / "mirror" / n).read_bytes() for n in DATA} == DATA
    entries = json.loads(masquerading.ask("list", "--json"))
    helped = [entry for entry in entries if entry["app"] == "ftp"]
    assert helped
    assert all(entry["dport"] == 21 for entry in helped)
    controlled = [entry for entry in entries if entry["control"]]
    assert bool(controlled) is (passive == "off")


@pytest.mark.usefixtures("masquerading", "public")
def test_a_listing_that_is_long_comes_whole(lab: Lab) -> None:
    told = lab.inside[0].run(["curl", "-sS", "--ftp-port", "-", f"{server(lab)}/"]).stdout
    assert {line.split()[-1] for line in told.splitlines()} == {*DATA, "incoming"}


@pytest.mark.usefixtures("public")
def test_with_the_helper_off_the_command_passes_unchanged(
    lab: Lab, masquerade: Callable[..., Daemon], tmp_path: Path
) -> None:
    masquerade("--app", "off")
    with lab.capture(lab.outside[0], "eth0", "tcp port 21") as control:
        told = curl(
            lab.inside[0], *WAYS["PORT"], "-o", tmp_path / "a", f"{server(lab)}/a", check=False
        )
    assert "500 Illegal PORT command" in told
    said = re.findall(rb"PORT [0-9,]+\r\n", b"".join(packet.data for packet in control))
    assert any(line.startswith(b"PORT 10,77,0,11,") for line in said)
    curl(lab.inside[0], *WAYS["EPSV"], "-o", tmp_path / "a", f"{server(lab)}/a")
    assert (tmp_path / "a").read_bytes() == DATA["a"]


@pytest.mark.usefixtures("public")
def test_a_helper_is_for_the_ports_it_is_told(
    lab: Lab, masquerade: Callable[..., Daemon], tmp_path: Path
) -> None:
    masquerade("--app", "ftp=2121")
    told = curl(lab.inside[0], *WAYS["PORT"], "-o", tmp_path / "a", f"{server(lab)}/a", check=False)
    assert "500 Illegal PORT command" in told
    assert MASQUERADE_ADDRESS.decode() not in told


# -- a server inside ----------------------------------------------------------------------

# With the last option, curl goes to the address that it is told, not to the server's known address.
PASSIVE_WAYS = {"EPSV": [], "PASV": ["--disable-epsv", "--no-ftp-skip-pasv-ip"]}

FORWARDED = [
    pytest.param(2121, 21, [], id="another port outside"),
    pytest.param(21, 21, [], id="the usual port"),
    pytest.param(21, 2121, ["--app", "ftp=2121"], id="another port inside"),
]
"""The port that clients use, the server's own port, by which the helper goes, and options."""


@pytest.mark.parametrize("way", PASSIVE_WAYS)
@pytest.mark.parametrize(("port", "own_port", "options"), FORWARDED)
def test_an_outside_client_of_a_server_on_a_forwarded_port(
    lab: Lab,
    masquerade: Callable[..., Daemon],
    tmp_path: Path,
    way: str,
    port: int,
    own_port: int,
    options: list[str],
) -> None:
    forward = f"tcp:{port}={lab.inside[0].address}:{own_port}"
    masquerade("--forward", forward, *options, rules=["--forward", f"tcp:{port}"])
    url = f"ftp://{GATEWAY}:{port}"
    urls = [word for name in DATA for word in ("-o", tmp_path / name, f"{url}/{name}")]
    with (
        vsftpd(lab.inside[0], own_port) as public,
        lab.capture(lab.outside[0], "eth0", f"tcp port {port}") as control,
        lab.capture(lab.outside[0], "eth0", "net 10.77.0.0/24") as leaked,
    ):
        told = curl(lab.outside[0], *PASSIVE_WAYS[way], *urls)
        curl(
            lab.outside[0],
            *PASSIVE_WAYS[way],
            "-T",
            tmp_path / "c",
            f"{url}/incoming/{own_port}{way}",
        )
        uploaded = (public / "incoming" / f"{own_port}{way}").read_bytes()
    assert {name: (tmp_path / name).read_bytes() for name in DATA} == DATA
    assert uploaded == DATA["c"]
    assert told.count(f"> {way}") == len(DATA)
    payload = b"".join(packet.data for packet in control)
    assert (MASQUERADE_ADDRESS in payload) is (way == "PASV")
    assert b"10,77,0," not in payload
    assert leaked == []


def test_with_the_helper_off_a_server_inside_cannot_be_reached_for_data(
    lab: Lab, masquerade: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The server's reply passes unchanged."""
    forward = f"tcp:21={lab.inside[0].address}:21"
    masquerade("--forward", forward, "--app", "off", rules=["--forward", "tcp:21"])
    with vsftpd(lab.inside[0]), lab.capture(lab.outside[0], "eth0", "tcp port 21") as control:
        url = f"ftp://{GATEWAY}/a"
        curl(lab.outside[0], "--disable-epsv", "-m", "10", "-o", tmp_path / "a", url, check=False)
    assert not (tmp_path / "a").exists()
    assert b"227 Entering Passive Mode (10,77,0,11," in b"".join(p.data for p in control)
