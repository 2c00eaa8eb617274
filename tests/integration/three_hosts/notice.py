"""The notice that the cloud will take this host away in two minutes, from a service of its own, and the watcher that
cluster.yaml starts, which has to find its Ray node by itself; ends with the watcher's exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class Notice(BaseHTTPRequestHandler):
    """As the service of EC2 answers."""

    def do_PUT(self) -> None:
        self._answer("a token")

    def do_GET(self) -> None:
        at = datetime.now(UTC) + timedelta(seconds=120)
        self._answer(json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None: ...


def main() -> int:
    """The watcher's exit code."""
    server = HTTPServer(("127.0.0.1", 0), Notice)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    return subprocess.run([sys.executable, "-m", "actors.spot_notice", "aws", "--metadata", address]).returncode


if __name__ == "__main__":
    sys.exit(main())
