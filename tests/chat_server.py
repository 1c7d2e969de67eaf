"""A small HTTP server of OpenAI's form that answers, or fails, as a test tells it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`reply(request)` gives a status and what is sent: a text is an answer, bytes and dicts are sent as they are."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, Any]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.requests, self.keys = reply, [], []
        self.models = ["org/tiny"]
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        self._send(*((200, listed) if self.path == "/v1/models" else (404, {})))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        self._send(*self.server.reply(request) if self.path == "/v1/chat/completions" else (404, {}))

    def _send(self, status: int, body: Any):
        if isinstance(body, str):
            body = completion(body)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")  # no test waits for its turn
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextlib.contextmanager
def chat_server(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[ChatServer]:
    """The server, running."""
    with ChatServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
