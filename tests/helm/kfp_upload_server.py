"""A small Kubeflow Pipelines API server: the v2beta1 calls about pipelines and their versions, with its rules and errors.

It follows the server of KFP 2.17: names are unique in a namespace, an upload is a multipart form, lists come in pages, and a
multi-user installation wants a token. A test reads what it holds with KFP's own client.
"""

import email
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API = "/apis/v2beta1"


class RefusedError(Exception):
    """Ends a request with this HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class KfpServer:
    """State of the server, and what a test may set.

    Args:
        token: bearer token that every call must carry; empty for none. With one, only `namespace` may be used.
        failures: statuses with which the next calls are answered, one each.
        page_size: the most entries that a list holds.
        lost_answers: of so many POSTs the work is done and the answer is 503, as when a gateway gives up.
    """

    token: str = ""
    namespace: str = ""
    failures: list[int] = field(default_factory=list)
    page_size: int = 100
    lost_answers: int = 0
    url: str = ""
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def writes(self) -> list[str]:
        return [request for request in self.requests if request.startswith("POST")]

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> dict[str, Any]:
        """The JSON that a call returns. Raises RefusedError."""
        self.requests.append(f"{method} {path}")
        if self.failures:
            raise RefusedError(self.failures.pop(0), "upstream connect error")
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            raise RefusedError(401, "Request header error: there is no user identity")
        match method, path.removeprefix(API).strip("/").split("/"):
            case "GET", ["healthz"]:
                return {"multi_user": bool(self.token)}
            case "GET", ["pipelines"]:
                return self._page("pipelines", self.pipelines, query)
            case "GET", ["pipelines", "names", name]:
                return self._by_name(urllib.parse.unquote(name), self._owner(query.get("namespace", "")))
            case "POST", ["pipelines"]:
                return self._create(json.loads(body))
            case "POST", ["pipelines", "upload_version"]:
                return self._upload(query, _uploaded_file(headers, body))
            case "GET", ["pipelines", pipeline_id, "versions"]:
                found = [version for version in self.versions if version["pipeline_id"] == pipeline_id]
                return self._page("pipeline_versions", found[::-1], query)
        raise RefusedError(404, f"no such call: {method} {path}")

    def _owner(self, namespace: str) -> str:
        if self.token and namespace != self.namespace:
            raise RefusedError(403, f"User is not authorized to use pipelines in namespace {namespace!r}")
        return namespace if self.token else ""

    def _by_name(self, name: str, namespace: str) -> dict[str, Any]:
        for pipeline in self.pipelines:
            if (pipeline["name"], pipeline["namespace"]) == (name, namespace):
                return pipeline
        raise RefusedError(404, f"Pipeline {name} not found")

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        namespace = self._owner(request.get("namespace", ""))
        if not request.get("name"):
            raise RefusedError(400, "name is required")
        if any((old["name"], old["namespace"]) == (request["name"], namespace) for old in self.pipelines):
            raise RefusedError(409, f"The name {request['name']} already exists")
        made = {**request, "namespace": namespace, "pipeline_id": f"pipeline-{len(self.pipelines)}", **_STAMP}
        self.pipelines.append(made)
        return made

    def _upload(self, query: dict[str, str], package: bytes) -> dict[str, Any]:
        name, owner = query["name"], query["pipelineid"]
        if owner not in [pipeline["pipeline_id"] for pipeline in self.pipelines]:
            raise RefusedError(400, "Failed to create a pipeline version")
        if any((old["pipeline_id"], old["name"]) == (owner, name) for old in self.versions):
            raise RefusedError(409, "Failed to create a pipeline version")
        made = {"pipeline_id": owner, "pipeline_version_id": f"version-{len(self.versions)}", "name": name, **_STAMP}
        made |= {"display_name": query.get("display_name", name), "description": query.get("description", "")}
        self.versions.append(made)
        self.packages[name] = package
        return made

    def _page(self, key: str, entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        start = int(query.get("page_token") or 0)
        end = start + min(self.page_size, int(query.get("page_size") or 10))
        page: dict[str, Any] = {key: entries[start:end], "total_size": len(entries)}
        return page | ({"next_page_token": str(end)} if end < len(entries) else {})


_STAMP = {"created_at": "2026-01-01T00:00:00Z"}


def _uploaded_file(headers: Any, body: bytes) -> bytes:
    """The file of a multipart form. Raises RefusedError when there is none that KFP would take."""
    form = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    for part in form.walk():
        if part.get_param("name", header="content-disposition") == "uploadfile" and part.get_filename():
            if not str(part.get_filename()).endswith((".yaml", ".yml", ".json")):
                raise RefusedError(400, "Failed to read a pipeline spec file")
            return bytes(part.get_payload(decode=True))
    raise RefusedError(400, "Failed to read pipeline from file")


@contextmanager
def serve(state: KfpServer | None = None) -> Iterator[KfpServer]:
    """Runs a server on the loopback while the block lasts; `url` is where."""
    state = state or KfpServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _handle(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = dict(urllib.parse.parse_qsl(url.query))
            try:
                status, answer = 200, state.answer(self.command, url.path, query, self.headers, body)
            except RefusedError as refusal:
                status, answer = refusal.status, {"error": str(refusal), "code": 2, "message": str(refusal)}
            if status == 200 and self.command == "POST" and state.lost_answers:
                state.lost_answers -= 1
                status, answer = 503, {"message": "upstream connect error"}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _handle  # noqa: N815 - the names that http.server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
