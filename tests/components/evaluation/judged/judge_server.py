"""A judge for tests: an OpenAI-compatible server on a local port, which can turn requests away, talk nonsense and die."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-of-the-test"
Verdict = Callable[[dict[str, Any]], Any]  # request body -> text, or {token: log-probability}, or (status, headers)


class JudgeServer:
    """`asked` are the requests that were answered (and so paid for), probes of `check` left out."""

    def __init__(self, verdict: Verdict, key: str | None = KEY, dies_after: int | None = None) -> None:
        self.verdict, self.key, self.dies_after = verdict, key, dies_after
        self.asked: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]] | None:
        """Status, headers and body; None closes the connection."""
        probe = body["messages"][0]["content"] == "Reply with m."
        with self.lock:
            self.seen.append(body)
            if self.dies_after is not None and len(self.asked) >= self.dies_after and not probe:
                return None
            verdict = self.verdict(body)
            if isinstance(verdict, tuple):
                return *verdict, {"error": {"message": "turned away", "type": "test", "code": None, "param": None}}
            if not probe:
                self.asked.append(body)
        return 200, {}, completion(body, verdict)


def completion(body: dict[str, Any], verdict: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    text = verdict if isinstance(verdict, str) else max(verdict, key=verdict.get, default="")
    if body.get("logprobs") and isinstance(verdict, dict):
        tokens = [{"token": token, "bytes": list(token.encode()), "logprob": p} for token, p in verdict.items()]
        first = {"token": text, "bytes": [], "logprob": -0.1, "top_logprobs": tokens[: body["top_logprobs"]]}
        choice["logprobs"] = {"content": [first], "refusal": None}
    choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    words = sum(len(message["content"].split()) for message in body["messages"])
    usage = {"prompt_tokens": words, "completion_tokens": len(text.split()), "total_tokens": words + len(text.split())}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{body['model']}-0613",
        "choices": [choice],
        "usage": usage,
    }


@contextmanager
def serving(judge: JudgeServer) -> Iterator[JudgeServer]:
    """Serves on a free port of this machine; `judge.url` is the base address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if judge.key and self.headers["Authorization"] != f"Bearer {judge.key}":
                error = {"message": f"Incorrect API key: {self.headers['Authorization']}", "code": "invalid_api_key"}
                return self.send(401, {}, {"error": error})
            if self.path.startswith("/page/"):
                return self.send(200, {}, None)
            if self.path != "/v1/chat/completions":
                return self.send(404, {}, {"error": {"message": f"no {self.path}"}})
            answer = judge.reply(body)
            if answer is None:
                self.close_connection = True
                return None
            return self.send(*answer)

        def send(self, status: int, headers: dict[str, str], body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
