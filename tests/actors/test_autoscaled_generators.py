"""The learner waits: the policy asks for a generator more, and the autoscaler starts a node for it; the generators are
idle: one less, and its node goes. Ray's own autoscaler, made-up nodes, stand-in generators in the real pool."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from waiting import until

from actors.bundles import plan
from actors.cluster_view import nodes_now
from actors.elastic import Elastic
from actors.member import Member
from actors.placement import place
from actors.process import Whereabouts, whereabouts
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.roles import ACCELERATOR, RoleResources
from medtvt_rl.rollout.config import ElasticConfig

pytestmark = [pytest.mark.cluster, pytest.mark.hosts]
HEAD_ID = "f" * 51 + "00000"
CLUSTER: dict[str, Any] = {
    "cluster_name": "made-up",
    "max_workers": 2,
    "head_node_type": "ray.head.default",
    "idle_timeout_minutes": 0.05,
    "upscaling_speed": 1.0,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "rollout": {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100 << 20},
            "labels": {ACCELERATOR: "L4"},
            "node_config": {},
            "min_workers": 1,
            "max_workers": 2,
        },
    },
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")},
    **{name: [] for name in ("rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class Generator:
    """Stands in for an engine: it is there, and takes weights."""

    def start(self) -> Whereabouts:
        return whereabouts()

    @ray.method(concurrency_group="health")
    def health(self) -> dict[str, Any]:
        return {"ok": True, "broken": None}

    def update_weights(self, weights: Any, version: int) -> int:
        return 11

    def stats(self) -> dict[str, float]:
        return {"version": 3.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a head with an autoscaler; nothing else on the machine is touched."""
    session = Path(tempfile.mkdtemp(prefix="ra"))
    host, port = ray.util.get_node_ip_address(), free_port()
    # By its type, Ray would look for defaults that its wheel does not hold.
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider: dict[str, Any] = {"type": "external", "module": module}
    provider |= {"gcs_address": f"{host}:{port}", "head_node_id": HEAD_ID}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({**CLUSTER, "provider": {**provider, "launch_multiple": True}}))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_TMPDIR": str(session),
    }
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    command += [f"--autoscaling-config={file}", "--include-dashboard=false", "--object-store-memory=100000000"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"{host}:{port}"
    finally:
        ray.shutdown()
        head.terminate()
        head.wait(timeout=60)
        # The made-up nodes are children of the autoscaler, which has ended.
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


def join(address: str) -> None:
    """Joins once the head is there."""
    deadline = time.monotonic() + 120
    while True:
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except (ConnectionError, RuntimeError, ValueError):
            assert time.monotonic() < deadline
            time.sleep(1)


def test_nodes_come_and_go_with_their_generators(address: str, tmp_path: Path) -> None:
    join(address)
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))
    config.rollout.max, config.rollout.scaling, config.rollout.scaling_interval_s = 2, "need", 0.2
    config.rollout.elastic = ElasticConfig(window_s=3.0, min_steps=2, cooldown_s=0.5)
    config.placement.rollout = RoleResources(gpus=1, accelerator=["L4"])
    config.placement.timeout_s = 180.0

    def nodes() -> int:
        return sum(node.total["GPU"] > 0 for node in nodes_now())

    async def run() -> None:
        told: list[str] = []
        placement = place(plan(config, {"rollout": 1}), config.placement, print)

        def make(index: int) -> Any:
            return Generator.options(**placement.options("rollout", index)).remote()  # type: ignore[attr-defined]

        first = make(0)
        members = [Member(index=0, handle=first, where=await first.start.remote())]
        pool = RolloutPool(config, members, Incidents(told.append), make, bundles=placement)
        await pool.update_weights(ray.put(b"weights"), 3, 11)
        keeper = Elastic(config, pool, placement, told.append)
        task = asyncio.create_task(keeper.run())
        assert nodes() == 1

        async def steps_until(condition: Callable[[], bool], **seconds: float) -> None:
            """Steps of a second, in which learner or generators wait, until something is so."""

            async def steps() -> None:
                while True:
                    keeper.observe(
                        {"seconds/step": 1.0, **{f"seconds/{name}": value for name, value in seconds.items()}}
                    )
                    await asyncio.sleep(0.1)

            stepping = asyncio.create_task(steps())
            await until(condition, lambda: told)
            stepping.cancel()

        await steps_until(lambda: pool.serving == [0, 1], wait_groups=0.9, rollout_idle=0.0)
        assert nodes() == 2 and "rollout 1 joins, from version 3 on; 2 serve" in told
        assert len(await pool.stats()) == 2
        gone = lambda: len(pool.serving) == 1 and len(placement.indices("rollout")) == 1  # noqa: E731
        await steps_until(gone, wait_groups=0.0, rollout_idle=0.9)
        await until(lambda: nodes() == 1, "the node that nobody needs goes")
        assert len(await pool.stats()) == 1 and not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pool.stop()
        placement.release()

    asyncio.run(run())
