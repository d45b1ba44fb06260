"""An OpenAI-compatible endpoint on loopback that answers what a test tells it to, faults included."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """
    One answer of the endpoint.

    `text` is what the assistant says (`None` is the JSON null). `finish_reason` is `"length"` for an answer that was
    cut off by its limit of tokens. With a `status` of 400 or more, the body is an error in OpenAI's form. `body` is
    sent as it is in place of all that. `delay`: seconds before the answer. `trickle`: seconds between two bytes.
    `drip`: seconds between two bytes of the headers, which never end.
    `cut`: the connection breaks halfway in the body. `drop`: it breaks before any answer. Without token counts, one
    word counts as one token; `usage=False` leaves the counts out, as some servers do.
    """

    text: str | None = "Yes."
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: str | bytes | None = None
    content_type: str = "application/json"
    cut: bool = False
    drop: bool = False
    trickle: float = 0.0
    drip: float = 0.0
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage: bool = True

    def payload(self, request: dict[str, Any]) -> bytes:
        if self.body is not None:
            return self.body if isinstance(self.body, bytes) else self.body.encode()
        if self.status >= 400:
            return json.dumps({"error": {"message": f"scripted fault {self.status}", "type": "scripted"}}).encode()
        answer: dict[str, Any] = {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model"),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": self.text},
                    "finish_reason": self.finish_reason,
                }
            ],
        }
        if self.usage:
            words_in = sum(len(str(message["content"]).split()) for message in request.get("messages", []))
            prompt = words_in if self.prompt_tokens is None else self.prompt_tokens
            completion = len((self.text or "").split()) if self.completion_tokens is None else self.completion_tokens
            answer["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        return json.dumps(answer).encode()


HTML_PAGE = Reply(body="<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", content_type="text/html")
YES = Reply()
Respond = Callable[[dict[str, Any]], "Reply | str"]


class ScriptedEndpoint(ThreadingHTTPServer):
    """
    A real HTTP server for tests: `with ScriptedEndpoint(...) as endpoint: ... endpoint.base_url`.

    Args:
        respond: What answers a request's JSON body (`{"model", "messages", ...}`): a function, called in many threads;
            or a list of replies, given in the order of arrival, whose last one is repeated forever. Text stands for
            `Reply(text)`.
        key: With one, requests without `Authorization: Bearer KEY` get status 401.

    Attributes:
        base_url: With the `/v1` that clients expect.
        requests: JSON bodies, in the order of arrival. `headers` and `times` (`time.monotonic()`) go along with it.
        most_at_once: The most requests that were in flight at the same time.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, respond: "Respond | Sequence[Reply | str]" = (YES,), key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.respond, self.key = respond, key
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self.in_flight = 0
        self.lock = threading.RLock()
        self.stopping = threading.Event()

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is part of the tests."""

    def reply_to(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_at_once = max(self.most_at_once, self.in_flight)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return Reply(status=401)
        reply = self.respond(body) if callable(self.respond) else self.respond[min(number, len(self.respond) - 1)]
        return Reply(reply) if isinstance(reply, str) else reply


def user_text(body: dict[str, Any]) -> str:
    """The text of a request's last user message."""
    return next(message["content"] for message in reversed(body["messages"]) if message["role"] == "user")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedEndpoint

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if self.path != "/v1/chat/completions":
            return self._send(Reply(status=404), Reply(status=404).payload(body))
        try:
            reply = self.server.reply_to(body, {name.lower(): value for name, value in self.headers.items()})
            if reply.delay:
                self.server.stopping.wait(reply.delay)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1
        return self._send(reply, reply.payload(body))

    def _send(self, reply: Reply, payload: bytes) -> None:
        if reply.drop:
            self.close_connection = True
            self.connection.close()
            return
        if reply.drip:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.server.stopping.wait(reply.drip):
                self.wfile.write(b"x")
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.cut:
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        if reply.trickle:
            for byte in payload:
                if self.server.stopping.wait(reply.trickle):
                    return
                self.wfile.write(bytes([byte]))
            return
        self.wfile.write(payload)
