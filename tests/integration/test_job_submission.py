"""A run as a submitted job: a local head with token authentication, and the same run folder as `make quickstart`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import PROJECT, SMALL

from pipelines.checkpoints import CheckpointStore

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh local head."""
    token = tmp_path / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # Short, since the paths of Ray's sockets lie below it.
    session = Path(tempfile.mkdtemp(prefix="rj"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(session),
        "OMP_NUM_THREADS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=5", "--object-store-memory=500000000"]
    ports = [
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
    ]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen([*command, *ports], env=environment, stdout=log, stderr=log, start_new_session=True)
    environment["RAY_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for_head(environment, process, tmp_path / "head.log")
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def _wait_for_head(environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    """The server that lists jobs is there before the agent that starts them is, so a job is asked for."""
    command = [BIN / "ray", "job", "submit", "--no-wait", "--", "true"]
    for _ in range(60):
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(1)
    raise AssertionError(f"the head took no job: {asked.stderr[-2000:]} {log.read_text()[-2000:]}")


@pytest.mark.cluster
def test_a_submitted_job_leaves_the_same_run_folder(head: dict[str, str], tmp_path: Path) -> None:
    entry = ["python", "-m", "pipelines.run", "-c", "configs/quickstart.yaml", f"run.root={tmp_path / 'runs'}", *SMALL]
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *entry],
        cwd=PROJECT,
        env=head,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["stages"]) == {"cohort", "pretrain", "sft", "grpo", "evaluate"}
    assert summary["grpo"]["steps"] == 3
    assert (run / "report.html").is_file()
    assert (run / "model" / "config.json").is_file()
    _stop_a_job(head, tmp_path / "runs")


def _stop_a_job(head: dict[str, str], root: Path) -> None:
    """`ray job stop` in the middle of GRPO leaves the checkpoint of its last step."""
    entry = ["python", "-m", "pipelines.grpo", "-c", "configs/quickstart.yaml", f"run.root={root}", *SMALL]
    entry += ["run.name=stopped", "run.stages=[grpo]", f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}"]
    entry += ["grpo.steps=500", "grpo.checkpoint_every=1000", "grpo.held_out.every_steps=0"]
    submit = ("submit", "--no-wait", "--submission-id", "stopped", "--working-dir", ".")
    _ray_job(head, *submit, "--", *entry)
    run, deadline = root / "stopped", time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count('"grpo"') < 2:
        assert time.monotonic() < deadline, _ray_job(head, "logs", "stopped")[-3000:]
        time.sleep(0.1)
    _ray_job(head, "stop", "stopped")
    steps = len((run / "journal" / "steps.jsonl").read_text().splitlines())
    assert f"SIGTERM: the newest checkpoint is that of step {steps}." in _ray_job(head, "logs", "stopped")
    found = CheckpointStore(str(run / "checkpoints")).newest(print)
    assert found is not None and found.version == steps


def _ray_job(head: dict[str, str], *arguments: str) -> str:
    """Output of a `ray job` command."""
    command = [str(BIN / "ray"), "job", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=head, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
