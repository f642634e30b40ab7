"""An OpenAI-compatible server for tests, in a thread: it answers, fails, stalls, throttles and talks nonsense as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "preferences": ["The user likes pens of many colours.", "The user wants cheap paper."],
    "user_intention": "My desk is a mess and I would like to tidy it.",
    "item_intention": "It should hold a hundred sheets and be small.",
}


def good(call: int, body: dict) -> Any:
    """A well-formed answer to every question."""
    return json.dumps(GOOD)


class ChatServer:
    """Answers POST /v1/chat/completions with what `answer(call, body)` gives.

    That is a text, raw bytes, or a tuple of status, headers and possibly a message. `calls` holds every body, `headers`
    every request's headers by lower-case name, `busiest` the most requests that were open at once.
    """

    def __init__(self, answer: Callable[[int, dict], Any] = good) -> None:
        self.answer, self.calls, self.headers = answer, [], []
        self.open = self.busiest = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    call = len(outer.calls)
                    outer.calls.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.open += 1
                    outer.busiest = max(outer.busiest, outer.open)
                try:
                    self.reply(outer.answer(call, body))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # a client that has waited long enough
                finally:
                    with lock:
                        outer.open -= 1

            def reply(self, answer: Any) -> None:
                status, headers, content = 200, {}, answer
                if isinstance(answer, tuple):
                    status, headers, *message = answer
                    error = {"message": message[0] if message else f"status {status}", "type": "x"}
                    content = json.dumps({"error": error}).encode()
                elif isinstance(answer, str):
                    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
                    message = {"role": "assistant", "content": answer}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                    content = json.dumps(reply | {"usage": usage}).encode()
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def prompts(self) -> list[str]:
        """The users' part of every question."""
        return [call["messages"][-1]["content"] for call in self.calls]


def stall(seconds: float) -> None:
    """Keep a client waiting."""
    time.sleep(seconds)
