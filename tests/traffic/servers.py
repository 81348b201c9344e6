"""Servers on hosts of a lab: a Web server that takes uploads, and UDP echo. Both note visitors.

The servers run in threads of the test's own process, on sockets of the host. Servers that are
programs of their own get a folder to serve.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nfmasq.lab import Host
from tests.programs import program

WEB_PORT = 80
ECHO_PORT = 7
TCP_PORT = 4000
"""The port on which `tcp_listener` listens."""

Visitor = tuple[str, int]
"""The endpoint that a request came from, as the server sees it: address and port."""


class WebServer(ThreadingHTTPServer):
    """A Web server: GET reads from `files` (content by path), and PUT writes into them.

    `visitors` has the visitor of each request. While `answering` is cleared, the server takes
    connections and keeps silent.
    """

    def __init__(self, host: Host, address: str) -> None:
        self.url = f"http://{address}:{WEB_PORT}"
        self.files: dict[str, bytes] = {}
        self.visitors: list[Visitor] = []
        self.answering = threading.Event()
        self.answering.set()
        super().__init__((address, WEB_PORT), _WebHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = host.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.server_bind()
        self.server_activate()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that goes away in the middle of a request."""


class _WebHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        self.server.answering.wait()
        self.server.visitors.append(self.client_address)
        content = self.server.files.get(self.path)
        self._answer(404 if content is None else 200, content or b"")

    def do_PUT(self) -> None:
        self.server.answering.wait()
        self.server.visitors.append(self.client_address)
        self.server.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(201, b"")

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: `visitors` has what is of interest."""


@contextmanager
def web_server(host: Host, address: str | None = None) -> Iterator[WebServer]:
    """Run a Web server on a host within the block, at the host's usual address or another one."""
    with WebServer(host, address or host.address) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.answering.set()
        server.shutdown()
        thread.join()


@contextmanager
def udp_echo(host: Host, port: int = ECHO_PORT) -> Iterator[list[Visitor]]:
    """Run a UDP echo server on a host within the block; yields the list of its visitors."""
    visitors: list[Visitor] = []
    closing = threading.Event()

    def serve() -> None:
        while not closing.is_set():
            try:
                data, visitor = echo.recvfrom(65535)
            except TimeoutError:
                continue
            visitors.append(visitor)
            echo.sendto(data, visitor)

    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
        echo.bind(("", port))
        echo.settimeout(0.1)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield visitors
        closing.set()
        thread.join()


def tcp_listener(host: Host) -> socket.socket:
    """Return a TCP socket of a host that listens."""
    listener = host.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host.address, TCP_PORT))
    listener.listen()
    return listener


NGINX = """
daemon off;
master_process off;
error_log "{folder}/error.log";
pid "{folder}/pid";
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path "{folder}";
    proxy_temp_path "{folder}";
    fastcgi_temp_path "{folder}";
    uwsgi_temp_path "{folder}";
    scgi_temp_path "{folder}";
    server {{
        listen {address}:80 backlog=4096;
        location / {{ return 200 "{address}:80"; }}
    }}
}}
"""


@contextmanager
def nginx(host: Host, folder: Path) -> Iterator[str]:
    """Run nginx on a host within the block; yields its address. `folder` is for its files."""
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, address=host.address))
    command = [program("nginx", "nginx"), "-e", str(folder / "error.log")]
    with host.popen([*command, "-c", str(configuration)]) as process:
        host.wait_until_bound(WEB_PORT)
        yield host.address
        process.kill()


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user of the machine may enter: servers give up being root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
