"""A container engine for tests: it speaks the Docker API that the SDK uses, and a container is a process of this machine."""

import json
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

Answer = tuple[int, Any]


class FakeEngine:
    """What the engine has and did.

    Attributes:
        images: names of the images that are there; None stands for any.
        registry: names of those that can be pulled.
        created: body of each request for a container.
        events: what happened, such as "pull data:1", "kill 1 SIGTERM", "remove 1".
        loses_containers: waiting for a container ends with a broken connection, as when the engine dies.
    """

    def __init__(self) -> None:
        self.images: set[str] | None = None
        self.registry: set[str] = set()
        self.info: dict[str, Any] = {"SecurityOptions": [], "Runtimes": {"runc": {}}}
        self.created: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.loses_containers = False
        self.url = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def answer(self, method: str, path: list[str], query: dict[str, str], body: Any) -> Answer | None:
        """Status and content of an answer; None for no answer at all, and bytes are sent as a stream of frames."""
        match method, *path:
            case "GET", "version":
                return 200, {"ApiVersion": "1.43", "Version": "fake"}
            case "GET", "info":
                return 200, self.info
            case "GET", "images", *name, "json":
                there = self.images is None or "/".join(name) in self.images
                return (200, {"Id": "sha256:1", "RepoTags": []}) if there else (404, {"message": "no such image"})
            case "POST", "images", "create":
                return self._pull(f"{query['fromImage']}:{query['tag']}")
            case "POST", "containers", "create":
                self.created.append(body)
                return 201, {"Id": str(len(self.created))}
            case "GET", "containers", identity, "json":
                return 200, {
                    "Id": identity,
                    "Config": {"Tty": False},
                    "HostConfig": {"LogConfig": {"Type": "json-file"}},
                }
            case "POST", "containers", identity, "start":
                return self._start(identity)
            case "GET", "containers", identity, "logs":
                return 200, self._processes[identity].stdout
            case "POST", "containers", identity, "wait":
                code = self._processes[identity].wait()
                return None if self.loses_containers else (200, {"StatusCode": code if code >= 0 else 128 - code})
            case "POST", "containers", identity, "kill":
                return self._kill(identity, query["signal"])
            case "DELETE", "containers", identity:
                self.events.append(f"remove {identity}")
                return 204, None
        return 404, {"message": f"the fake engine has no {method} {path}"}

    def _pull(self, image: str) -> Answer:
        self.events.append(f"pull {image}")
        if image not in self.registry:
            return 200, {"error": "manifest unknown"}
        assert self.images is not None
        self.images.add(image)
        return 200, {"status": "done"}

    def _start(self, identity: str) -> Answer:
        body = self.created[int(identity) - 1]
        environment = os.environ | dict(entry.split("=", 1) for entry in body["Env"])
        command = [*body["Entrypoint"], *body["Cmd"]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        try:
            self._processes[identity] = subprocess.Popen(command, env=environment, **pipes)
        except FileNotFoundError:
            return 400, {"message": f'exec: "{command[0]}": executable file not found'}
        return 204, None

    def _kill(self, identity: str, name: str) -> Answer:
        process = self._processes[identity]
        if process.poll() is not None:
            return 409, {"message": "is not running"}
        self.events.append(f"kill {identity} {name}")
        os.killpg(process.pid, signal.Signals[name])
        return 204, None


def _handler(engine: FakeEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            address = urlparse(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = [part for part in address.path.split("/") if part and not part.startswith("v1.")]
            query = {key: values[0] for key, values in parse_qs(address.query).items()}
            answer = engine.answer(self.command, path, query, json.loads(body) if body else None)
            if answer is not None:
                self._send(*answer)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

        def _send(self, code: int, content: Any) -> None:
            self.send_response(code)
            self.end_headers()
            if hasattr(content, "read"):
                for frame in _frames(content):
                    self.wfile.write(frame)
                    self.wfile.flush()
            elif content is not None:
                self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    return Handler


def _frames(pipe: Any) -> Iterator[bytes]:
    """Docker's framing of the standard output: a header with the length; here in pieces that cut lines and letters."""
    while piece := pipe.read(7):
        yield struct.pack(">BxxxL", 1, len(piece)) + piece


@contextmanager
def running_engine() -> Iterator[FakeEngine]:
    """An engine that answers at `engine.url`."""
    engine = FakeEngine()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(engine))
    engine.url = f"tcp://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
