"""A recording proxy: counts requests, strips a path prefix, and can lose a response on request.

Controlled over HTTP itself, because the clients under test run in other processes:
`GET /_log`, `POST /_drop?VERB /path&times`, `GET /_within?SECONDS`: how long a promise of so many seconds is now.
"""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.promises import within

PREFIX = "/some/prefix"
HOP = {"connection", "keep-alive", "transfer-encoding", "host"}
CHUNK = 1 << 18


class Proxy(ThreadingHTTPServer):
    """Forwards to one server and remembers what passed."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(target).netloc
        self.log: list[dict[str, Any]] = []
        self.drops: dict[str, int] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def loses(self, line: str) -> bool:
        """True when the response to this request is to be lost."""
        with self.lock:
            left = self.drops.get(line, 0)
            self.drops[line] = max(0, left - 1)
        return left > 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def control(self) -> bytes | None:
        if self.path == "/_log":
            return json.dumps(self.server.log).encode()
        if self.path == "/_drop":
            wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.server.drops[wanted["line"]] = wanted["times"]
            return b"{}"
        if self.path.startswith("/_within?"):
            return json.dumps(within(float(urlsplit(self.path).query))).encode()
        return None

    def forward(self) -> None:
        answer = self.control()
        if answer is not None:
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        path = self.path.removeprefix(PREFIX)
        line = f"{self.command} {urlsplit(path).path}"
        with self.server.lock:
            retries = self.headers.get("x-stainless-retry-count")
            self.server.log.append({"line": line, "path": self.path, "retry": retries})
        upstream = http.client.HTTPConnection(self.server.target, timeout=120)
        try:
            self.relay(upstream, path, line)
        finally:
            upstream.close()

    do_GET = do_POST = do_DELETE = do_HEAD = do_PUT = forward  # noqa: N815

    def relay(self, upstream: http.client.HTTPConnection, path: str, line: str) -> None:
        upstream.putrequest(self.command, path, skip_host=False, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        left = int(self.headers.get("content-length", 0))
        while left and (chunk := self.rfile.read(min(CHUNK, left))):
            upstream.send(chunk)
            left -= len(chunk)
        reply = upstream.getresponse()
        if self.server.loses(line):
            reply.read()
            self.close_connection = True
            return
        self.send_response_only(reply.status, reply.reason)
        length = reply.getheader("content-length")
        for name, value in reply.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        if length is None:
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        while chunk := reply.read1(CHUNK):  # a stream is passed on as it comes
            self.wfile.write(chunk)


@contextmanager
def recording(target: str) -> Iterator[Proxy]:
    """A proxy in front of `target`."""
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
