"""The notice of a cloud, as its metadata service gives it, drains a real Ray node; the actor on it starts elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from scorer_nodes import NODE, cluster, ended, join_two_nodes, start_scorers
from waiting import until

from actors import spot_notice
from actors.cluster_view import draining, nodes_now
from actors.drain import Drain

__all__ = ["cluster"]
TOKEN = "a token of the service"


class Metadata(BaseHTTPRequestHandler):
    """As the services of both clouds answer; `seconds` is the notice, None: none."""

    seconds: float | None = None

    def do_PUT(self) -> None:
        is_right = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200 if is_right else 400, TOKEN)

    def do_GET(self) -> None:
        if self.path == "/computeMetadata/v1/instance/preempted":
            is_right = self.headers["Metadata-Flavor"] == "Google"
            self._answer(200 if is_right else 403, "FALSE" if self.seconds is None else "TRUE")
        elif self.headers["X-aws-ec2-metadata-token"] != TOKEN:
            self._answer(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.seconds is not None:
            at = datetime.now(UTC) + timedelta(seconds=self.seconds)
            self._answer(200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        else:
            self._answer(404, "not found")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "seconds", None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_notices_of_both_clouds(metadata: str) -> None:
    assert spot_notice.aws(metadata) is None and spot_notice.gcp(metadata) is None
    Metadata.seconds = 120.0
    left = spot_notice.aws(metadata)
    assert left is not None and 115 < left <= 120
    assert spot_notice.gcp(metadata) == spot_notice.GCP_NOTICE_S


def test_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert spot_notice.main(["aws", "--metadata", "http://127.0.0.1:9", "--every", "0.01"]) == 2
    assert "spot_notice: no answer at http://127.0.0.1:9: " in capsys.readouterr().err


@pytest.mark.cluster
def test_a_notice_moves_an_actor_before_its_node_goes(cluster: Cluster, tmp_path: Path, metadata: str) -> None:
    config, nodes = join_two_nodes(cluster, tmp_path)
    leaving = nodes[1].node_id
    notice = ["aws", "--metadata", metadata, "--node-id", leaving, "--address", cluster.address, "--every", "0.2"]

    async def run() -> None:
        with ended(await start_scorers(config, nodes)) as scorers:
            told, pools = scorers.told, {"reward": scorers.pool}
            watch = asyncio.create_task(Drain(pools, scorers.placement, lambda: False, 30.0, told.append).run())
            notified = asyncio.create_task(asyncio.to_thread(spot_notice.main, notice))
            # What fails before the notice would else wait for the watcher for ever.
            asyncio.get_running_loop().call_later(60, lambda: setattr(Metadata, "seconds", Metadata.seconds or 1.0))
            await scorers.score(2)
            assert not draining() and not notified.done()
            Metadata.seconds = 120.0
            assert await notified == 0
            await until(lambda: told, "who leaves")
            left = re.match(r"(reward \d) leaves its node: it will be taken away in (\d+) s; 1 serve", told[0])
            assert left and 60 < int(left[2]) <= 120, told
            assert set(await scorers.score(20)) == {nodes[0].node_id}, "it is asked nothing new, and no group is lost"
            new = cluster.add_node(**NODE)
            await until(lambda: len(scorers.roster.serving) == 2, told)
            assert new.node_id in await scorers.score(2)
            # Empty as it is, the node may have ended by itself already.
            await until(
                lambda: leaving not in {node.node_id for node in nodes_now()} or not draining(), "the end of the node"
            )
            assert set(await scorers.score(20)) <= {nodes[0].node_id, new.node_id}
            words = [line for line in told if "no node has room" not in line]
            assert words == [told[0], f"{left[1]} serves again"], told
            watch.cancel()

    asyncio.run(run())
