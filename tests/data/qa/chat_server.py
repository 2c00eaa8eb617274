"""A small HTTP server that speaks the chat-completions protocol and answers from the labels in the prompt.

Faults are taken from a list, one a call, before it answers; every prompt that it got is kept.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 50}


def answer_from(prompt: str) -> str:
    """A right answer to a prompt of build-qa, from the labels that it quotes."""
    parts = []
    for heading in ("ECG", "CXR", "LAB"):
        block = re.search(rf"^{heading}, as labelled:\n((?:- .*\n)+)", prompt, re.MULTILINE)
        if block:
            parts.append(f"{heading}: {', '.join(_clauses(heading, block[1]))}.")
        elif f"{heading}: not available" in prompt:
            parts.append(f"{heading}: not available.")
    diagnoses = re.search(r"^Diagnoses: (.*)$", prompt, re.MULTILINE)
    if diagnoses is None:
        return parts[0].split(": ", 1)[1]
    return f"<think> {' '.join(parts)} </think>\n<answer> {diagnoses[1]} </answer>"


def _clauses(heading: str, block: str) -> Iterator[str]:
    for line in block.splitlines():
        text = line.removeprefix("- ")
        if heading == "ECG":
            yield text
        elif heading == "CXR":
            value, names = text.split(": ", 1)
            word = {"present": "", "absent": "no ", "uncertain": "possible "}[value]
            yield from (word + name for name in names.split(", "))
        elif not text.startswith("within"):
            yield text.replace(":", " is")


class ChatServer:
    """The server's script and its memory."""

    def __init__(self, faults: list[Any]) -> None:
        self.faults, self.prompts, self.bodies = faults, [], []  # type: ignore[var-annotated]
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()
        self.url = ""


def _handler(chat: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with chat.lock:
                chat.prompts.append(prompt)
                chat.bodies.append(body)
                chat.headers.append(dict(self.headers))
                fault = chat.faults.pop(0) if chat.faults else None
                chat.under_way += 1
                chat.most_under_way = max(chat.most_under_way, chat.under_way)
            time.sleep(chat.delay_s)
            with chat.lock:
                chat.under_way -= 1
            self.misbehave(fault) if fault is not None else self.send(200, completion(answer_from(prompt)))

        def misbehave(self, fault: Any) -> None:
            match fault:
                case int():
                    self.send(fault, {"error": {"code": "from_script", "message": "quotes the prompt"}})
                case ("wait", seconds):
                    self.send(429, {}, {"Retry-After": str(seconds)})
                case ("redirect", address):
                    self.send(307, {}, {"Location": address})
                case ("error", status, code):
                    self.send(status, {"error": {"code": code}})
                case "hang":
                    time.sleep(3)
                    self.close_connection = True
                case "cut":
                    self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"choices": [')
                    self.close_connection = True
                case "reset":
                    self.close_connection = True
                case bytes():
                    self.send(200, fault)
                case ("say", text):
                    self.send(200, completion(text))
                case ("cut off", text):
                    self.send(200, completion(text, "length"))

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler


def completion(text: str, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": USAGE}


@contextmanager
def chat_server(*faults: Any) -> Iterator[ChatServer]:
    """A server on a free port of this machine, until the block ends."""
    chat = ChatServer(list(faults))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(chat))
    server.daemon_threads = True
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
