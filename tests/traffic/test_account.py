"""What was created has ended or is in the table: at each scrape, while real traffic goes on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, socket
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from nfmasq.lab import Daemon, Host, Lab
from tests.threads import in_the_background
from tests.traffic.observed import eventually
from tests.traffic.servers import ECHO_PORT, Visitor, web_server

Masquerade = Callable[..., Daemon]

SHORT_TIMEOUTS = """
[timeouts]
udp = 1
icmp = 1
tcp-time-wait = 1
tcp-close = 1
"""
SCRAPES = 200


class Account:
    """The entries by protocol, as one scrape of /metrics shows them."""

    def __init__(self, text: str) -> None:
        self.live: dict[str, float] = {}
        self.created: dict[str, float] = {}
        self.expired: dict[str, float] = {}
        self.ended: dict[str, dict[str, float]] = defaultdict(dict)
        by_name = {
            "nfmasq_entries": self.live,
            "nfmasq_entries_created_total": self.created,
            "nfmasq_entries_expired_total": self.expired,
        }
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                protocol = sample.labels.get("protocol", "")
                if sample.name in by_name:
                    by_name[sample.name][protocol] = sample.value
                elif sample.name == "nfmasq_entries_ended_total":
                    self.ended[protocol][sample.labels["reason"]] = sample.value

    def adds_up(self) -> bool:
        """Say whether what was created has ended or lives, in each protocol."""
        return set(self.live) == {"tcp", "udp", "icmp", "other"} and all(
            self.created[protocol] == sum(self.ended[protocol].values()) + live
            and self.expired[protocol]
            == self.ended[protocol]["expired"] + self.ended[protocol]["closed"]
            for protocol, live in self.live.items()
        )


def scraped(daemon: Daemon, gateway: Host) -> Account:
    """Scrape a running nfmasq, as Prometheus does."""

    def scrape() -> str:
        with urlopen(f"http://{daemon.metrics}/metrics", timeout=30) as answer:
            text: bytes = answer.read()
            return text.decode()

    # A socket belongs to the network namespace in which it is made: its thread's.
    return Account(gateway.call(scrape))


def ask(host: Host, server: Host) -> None:
    """Send datagrams from new ports of a host, and one to a port at which nobody answers."""
    for port in (ECHO_PORT, ECHO_PORT, ECHO_PORT + 1):
        with socket_of(host) as client:
            client.sendto(b"hello", (server.address, port))
    time.sleep(0.01)


def socket_of(host: Host) -> socket:
    return host.socket(AF_INET, SOCK_DGRAM)


def test_created_is_ended_and_live_at_each_scrape_of_a_busy_gateway(
    lab: Lab, masquerade: Masquerade, visitors: list[Visitor], tmp_path: Path
) -> None:
    """TCP, UDP and ICMP of two hosts, more than the table holds; and a person flushes it."""
    file = tmp_path / "nfmasq.toml"
    file.write_text(SHORT_TIMEOUTS)
    daemon = masquerade("--config", str(file), "--max-entries", "60")
    first, second = lab.inside
    outside = lab.outside[0]

    # While the table is full of answered entries, a new session is refused.
    def ping() -> None:
        second.run(["ping", "-c", "3", "-i", "0.1", outside.address], check=False)

    with web_server(outside) as server:
        # Where a flush ends the entry while the answer is under way, nothing tells the client.
        def fetch() -> None:
            first.run(["curl", "-sS", "--max-time", "5", server.url], check=False)

        with (
            in_the_background(fetch),
            in_the_background(ping),
            in_the_background(lambda: ask(second, outside)),
        ):
            for scrape in range(SCRAPES):
                assert scraped(daemon, lab.gateway).adds_up()
                if scrape % 20 == 9:
                    daemon.ask("delete", "--protocol", "udp", "--saddr", second.address)
                if scrape % 50 == 49:
                    daemon.ask("flush")
                time.sleep(0.02)
    # While others needed its place, perhaps none came to its end.
    ask(second, outside)
    assert eventually(lambda: scraped(daemon, lab.gateway).ended["udp"]["expired"] > 0)
    account = scraped(daemon, lab.gateway)
    assert account.adds_up()
    assert visitors
    assert all(account.created[protocol] for protocol in ("tcp", "udp", "icmp"))
    for reason in ("expired", "deleted", "flushed", "evicted"):
        assert account.ended["udp"][reason], reason
    assert account.ended["tcp"]["closed"]
