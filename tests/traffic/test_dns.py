"""DNS: `dig` inside asks dnsmasq outside, by UDP and by TCP."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from nfmasq.lab import Lab

LONG = [letter * 250 for letter in "abcdefghij"]
"""The strings of a TXT record, too long for one frame, let alone for 512 bytes."""

DNSMASQ = [
    *("dnsmasq", "--keep-in-foreground", "--user=root", "--pid-file=", "--conf-file=/dev/null"),
    *("--no-resolv", "--no-hosts", "--edns-packet-max=4096", "--log-queries", "--log-facility=-"),
    "--host-record=www.example.net,203.0.113.80",
    f"--txt-record=long.example.net,{','.join(LONG)}",
]


@pytest.fixture(autouse=True)
def _masquerading(lab: Lab) -> Iterator[None]:
    with lab.masquerading():
        yield


@pytest.fixture
def dnsmasq(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Run dnsmasq outside; it tells of each query on stderr."""
    server = lab.outside[0]
    with server.popen(DNSMASQ, stderr=subprocess.PIPE) as process:
        server.wait_until_bound(53, "udp")
        server.wait_until_bound(53, "tcp")
        yield process
        process.terminate()


def dig(lab: Lab, *question: str) -> str:
    once = ["dig", f"@{lab.outside[0].address}", "+tries=1", "+time=20"]
    return lab.inside[0].run([*once, *question]).stdout


def askers(dnsmasq: subprocess.Popen[str]) -> set[str]:
    """End dnsmasq; returns the addresses that have asked it, as it has seen them."""
    dnsmasq.terminate()
    assert dnsmasq.stderr
    queries = [line.split() for line in dnsmasq.stderr if ": query[" in line]
    return {words[words.index("from") + 1] for words in queries}


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_a_name_is_resolved(lab: Lab, dnsmasq: subprocess.Popen[str], transport: str) -> None:
    assert dig(lab, "www.example.net", "A", transport, "+short") == "203.0.113.80\n"
    assert askers(dnsmasq) == {"198.51.100.2"}


@pytest.mark.usefixtures("dnsmasq")
def test_an_answer_in_fragments_arrives(lab: Lab) -> None:
    told = dig(lab, "long.example.net", "TXT", "+notcp", "+ignore", "+bufsize=4096")
    assert " tc" not in told
    assert all(f'"{string}"' in told for string in LONG)
    assert "(UDP)" in told


@pytest.mark.usefixtures("dnsmasq")
def test_an_answer_that_was_cut_is_fetched_over_tcp(lab: Lab) -> None:
    told = dig(lab, "long.example.net", "TXT", "+bufsize=512")
    assert "Truncated, retrying in TCP mode" in told
    assert all(f'"{string}"' in told for string in LONG)
    assert "(TCP)" in told
