"""A proxy before an S3 store that answers wrongly on purpose: throttles, fails, breaks off, resets, dawdles."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("throttled", "failed", "reset", "truncated", "slow")
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>"


class FaultProxy:
    """Forwards to an endpoint; a share of the answers is spoiled.

    Args:
        endpoint: of the store.

    Attributes:
        share: of the requests that are spoiled, 0 to 1.
        kinds: how, among `KINDS`.
        only: those whose path has this in it.
        done: how many of each kind there were.
    """

    def __init__(self, endpoint: str, seed: int) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.random = random.Random(seed)
        self.lock = threading.Lock()

        self.share = 0.0
        self.kinds: tuple[str, ...] = KINDS
        self.only = ""
        self.done: Counter[str] = Counter()

        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spoil(self, share: float, *kinds: str, only: str = "") -> None:
        self.share = share
        self.kinds = kinds or KINDS
        self.only = only

    def next_fault(self, path: str = "") -> str:
        """What happens to the next request; "" for nothing."""
        with self.lock:
            if self.only not in path or self.random.random() >= self.share:
                return ""
            kind = self.random.choice(self.kinds)
            self.done[kind] += 1
            return kind

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed has hung up; that is what the campaign is about."""


class _Handler(BaseHTTPRequestHandler):
    """One request: forwarded as it is, so that its signature holds, or spoiled."""

    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keeps quiet."""

    def _forward(self) -> None:
        fault = self.proxy.next_fault(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "throttled":
            return self._send(503, _ERROR.format(code="SlowDown").encode())
        if fault == "failed":
            return self._send(500, _ERROR.format(code="InternalError").encode())
        if fault == "reset" and self.proxy.random.random() < 0.5:
            return self._reset()
        if fault == "slow":
            time.sleep(self.proxy.random.uniform(0.1, 0.8))
        try:
            upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
            upstream.request(self.command, self.path, body=body or None, headers=dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        except OSError:
            return self._reset()  # the store is away
        if fault == "reset":  # the store has done it, and nobody is told
            return self._reset()
        self._send(answer.status, content, answer.getheaders(), truncated=fault == "truncated")

    def _send(self, status: int, content: bytes, headers: list | None = None, truncated: bool = False) -> None:
        kept = [
            (name, value) for name, value in headers or [] if name.lower() not in ("transfer-encoding", "connection")
        ]
        self.send_response_only(status)
        for name, value in kept:
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in kept} and status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if truncated else content)
        if truncated:
            self._reset()

    def _reset(self) -> None:
        """Closes the connection with a reset instead of a farewell."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815
