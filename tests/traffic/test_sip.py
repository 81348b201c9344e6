"""SIP with a real program, SIPp: calls from inside and from outside, with media both ways."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, SO_REUSEADDR, SOCK_DGRAM, SOL_SOCKET

from nfmasq.lab import Daemon, Host, Lab, Packet
from tests.programs import program
from tests.traffic.observed import entries, eventually

Masquerade = Callable[..., Daemon]

SIP = 5060
RTP, RTCP = 9000, 9001  # ports of the phone inside; the phone outside has others
OUTSIDE_RTP = 8000
DISCARD = 9
WHILE_IT_LASTS = "5000"  # milliseconds, of which the test takes a few hundred


@contextmanager
def sipp(host: Host, folder: Path, scenario: str, media: int, *options: str) -> Iterator[None]:
    """Run a phone that makes or takes one call and sends back its media; the call must succeed."""
    own = ["-i", host.address, "-p", str(SIP), "-mp", str(media), "-rtp_echo"]
    bounds = ["-m", "1", "-timeout", "60", "-timeout_error", "-nostdin"]
    line = [program("sipp", "sip-tester"), "-sn", scenario, *own, *bounds, *options]
    output = folder / f"{scenario}.txt"
    with output.open("w") as file:
        process = host.popen(line, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        host.wait_until_bound(SIP, "udp")
        yield
        assert process.wait(90) == 0, output.read_text()[-2000:]


def media_entries(daemon: Daemon, lab: Lab) -> dict[int, int]:
    """Return the masquerade ports for the inside phone's media, by the phone's own ports."""
    every = entries(daemon, saddr=lab.inside[0].address)
    return {entry["sport"]: entry["mport"] for entry in every if entry["control"]}


def payloads(packets: list[Packet]) -> list[str]:
    return [packet.data[28:].decode() for packet in packets]


def assert_media_goes_both_ways(lab: Lab, mports: dict[int, int]) -> None:
    """Send RTP from outside to the phone and back, and RTCP from the phone and back."""
    maddr = lab.gateway.address
    with lab.outside[0].socket(AF_INET, SOCK_DGRAM) as outside:
        outside.bind((lab.outside[0].address, 0))
        outside.sendto(b"RTP", (maddr, mports[RTP]))
        assert outside.recvfrom(100) == (b"RTP", (maddr, mports[RTP]))
        with lab.inside[0].socket(AF_INET, SOCK_DGRAM) as inside:
            inside.bind((lab.inside[0].address, RTCP))
            inside.sendto(b"RTCP", outside.getsockname())
            assert outside.recvfrom(100) == (b"RTCP", (maddr, mports[RTCP]))
            outside.sendto(b"RTCP too", (maddr, mports[RTCP]))
            assert inside.recvfrom(100) == (b"RTCP too", outside.getsockname())


def assert_announced(lab: Lab, messages: list[str], mports: dict[int, int]) -> None:
    """Verify that the phone's masquerade ports are announced, and its address only in Call-IDs."""
    assert mports[RTP] % 2 == 0
    assert mports[RTCP] == mports[RTP] + 1
    assert any(f"c=IN IP4 {lab.gateway.address}\r\n" in message for message in messages)
    assert any(f"m=audio {mports[RTP]} RTP/AVP 0\r\n" in message for message in messages)
    for message in messages:
        _, _, body = message.partition("\r\n\r\n")
        assert f"Content-Length: {len(body)}\r\n" in re.sub(r"Length: +", "Length: ", message)
        assert lab.inside[0].address not in re.sub("Call-ID:.*", "", message)


def registered(phone: Host, registrar: Host, seconds: int = 60) -> tuple[str, int]:
    """Register a phone for some seconds, which the registrar grants.

    Returns the endpoint at which the registrar will look for the phone.
    """
    with (
        phone.socket(AF_INET, SOCK_DGRAM) as ours,
        registrar.socket(AF_INET, SOCK_DGRAM) as theirs,
    ):
        for host, bound in ((phone, ours), (registrar, theirs)):
            bound.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            bound.bind((host.address, SIP))
        register = (
            f"REGISTER sip:{registrar.address} SIP/2.0\r\n"
            f"Via: SIP/2.0/UDP {phone.address}:{SIP};rport;branch=z9hG4bK1\r\n"
            f"From: <sip:me@example.net>;tag=1\r\nTo: <sip:me@example.net>\r\n"
            f"Call-ID: 1\r\nCSeq: 1 REGISTER\r\n"
            f"Contact: <sip:me@{phone.address}:{SIP}>;expires={seconds}\r\n\r\n"
        ).encode()
        ours.sendto(register, (registrar.address, SIP))
        arrived, source = theirs.recvfrom(2000)
        theirs.sendto(arrived.replace(register.partition(b"\r\n")[0], b"SIP/2.0 200 OK"), source)
        answer = ours.recv(2000)
    assert answer.partition(b"\r\n")[2] == register.partition(b"\r\n")[2]
    contact = re.search(rb"Contact: <sip:me@([\d.]+):(\d+)>", arrived)
    assert contact is not None
    assert source == (contact[1].decode(), int(contact[2]))
    return contact[1].decode(), int(contact[2])


def test_a_call_from_inside_has_media_in_both_directions(
    lab: Lab, masquerade: Masquerade, data_path: tuple[str, ...], tmp_path: Path
) -> None:
    daemon = masquerade(*data_path, "--app", "sip")
    callee = lab.outside[0]
    with (
        lab.capture(callee, "eth0", f"udp port {SIP}") as seen,
        sipp(callee, tmp_path, "uas", OUTSIDE_RTP),
        sipp(lab.inside[0], tmp_path, "uac", RTP, callee.address, "-d", WHILE_IT_LASTS),
    ):
        assert eventually(lambda: len(media_entries(daemon, lab)) == 2)
        mports = media_entries(daemon, lab)
        assert_media_goes_both_ways(lab, mports)
    (control,) = entries(daemon, dport=SIP)
    assert control["app"] == "sip"
    assert_announced(lab, payloads(seen), mports)


def test_a_registered_phone_is_called_from_outside_at_what_it_has_registered(
    lab: Lab, masquerade: Masquerade, data_path: tuple[str, ...], tmp_path: Path
) -> None:
    daemon = masquerade(*data_path, "--app", "sip")
    phone, caller = lab.inside[0], lab.outside[0]
    address, port = registered(phone, caller)
    assert address == lab.gateway.address
    with (
        lab.capture(caller, "eth0", f"udp port {SIP}") as seen,
        sipp(phone, tmp_path, "uas", RTP),
        sipp(caller, tmp_path, "uac", OUTSIDE_RTP, f"{address}:{port}", "-d", WHILE_IT_LASTS),
    ):
        assert eventually(lambda: len(media_entries(daemon, lab)) == 2)
        mports = media_entries(daemon, lab)
        assert_media_goes_both_ways(lab, mports)
    assert_announced(lab, payloads(seen), mports)


def test_a_silent_phone_is_called_for_as_long_as_it_is_registered(
    lab: Lab, masquerade: Masquerade, data_path: tuple[str, ...], tmp_path: Path
) -> None:
    """Longer than another session over UDP lives; and no longer where it is not registered."""
    file = tmp_path / "nfmasq.toml"
    file.write_text("[timeouts]\nudp = 2\n")
    daemon = masquerade(*data_path, "--app", "sip", "--config", str(file))
    phone, caller = lab.inside[0], lab.outside[0]
    address, port = registered(phone, caller, seconds=30)
    (entry,) = entries(daemon, dport=SIP)
    assert 20 < entry["expires"] <= 30
    with phone.socket(AF_INET, SOCK_DGRAM) as another:
        another.sendto(b"hello", (caller.address, DISCARD))
    assert eventually(lambda: bool(entries(daemon, dport=DISCARD)))
    assert eventually(lambda: not entries(daemon, dport=DISCARD))  # it began later
    with (
        sipp(phone, tmp_path, "uas", RTP),
        sipp(caller, tmp_path, "uac", OUTSIDE_RTP, f"{address}:{port}"),
    ):
        pass
    registered(phone, caller, seconds=0)
    (entry,) = entries(daemon, dport=SIP)
    assert entry["expires"] <= 2
    assert eventually(lambda: not entries(daemon, dport=SIP))


def test_with_the_helper_off_the_payload_passes_unchanged(
    lab: Lab, masquerade: Masquerade, tmp_path: Path
) -> None:
    daemon = masquerade()
    caller, callee = lab.inside[0], lab.outside[0]
    with (
        lab.capture(caller, "eth0", f"udp port {SIP}") as said,
        lab.capture(callee, "eth0", f"udp port {SIP}") as heard,
        sipp(callee, tmp_path, "uas", OUTSIDE_RTP),
        sipp(caller, tmp_path, "uac", RTP, callee.address),
    ):
        pass
    # In any order: a phone sends again what is answered late, and this may cross the answer.
    assert sorted(payloads(said)) == sorted(payloads(heard))
    assert f"c=IN IP4 {caller.address}" in payloads(heard)[0]
    assert media_entries(daemon, lab) == {}
