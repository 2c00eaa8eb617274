"""A run as a submitted job, by `ray job submit` and by `medtvt-rl submit`: a local head with token authentication, a
stop that leaves a checkpoint, a job that goes on from it, and a job of all stages."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
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
    }
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=5", "--object-store-memory=500000000"]
    ports = [
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        # Another Ray on this machine may have the usual one, and a head whose agent lacks its port takes no job.
        f"--dashboard-agent-listen-port={free_port()}",
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
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
        if asked.returncode == 0:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(1)
    raise AssertionError(f"the head took no job: {asked.stderr[-2000:]} {log.read_text()[-2000:]}")


@pytest.mark.long
@pytest.mark.cluster
def test_a_submitted_job_gives_what_the_same_run_gives_on_its_own(
    head: dict[str, str], root: Path, tmp_path: Path
) -> None:
    entry = ["python", "-m", "pipelines.run", "-c", "configs/quickstart.yaml", f"run.root={tmp_path}", *SMALL]
    said = _ray_job(head, "submit", "--working-dir", ".", "--", *entry, timeout_s=540)
    assert " succeeded" in said, said[-3000:]
    submitted, own = tmp_path / "small", root / "small"
    assert {path.name for path in submitted.iterdir()} == {path.name for path in own.iterdir()}
    summaries = [json.loads((run / "summary.json").read_text()) for run in (submitted, own)]
    assert summaries[0].keys() == summaries[1].keys() and summaries[0]["grpo"]["steps"] == 3
    weights = Path("stages") / "sft" / "model" / "model.safetensors"
    assert (submitted / weights).read_bytes() == (own / weights).read_bytes(), "all before GRPO is equal bit for bit"


@pytest.mark.long
@pytest.mark.cluster
def test_a_job_is_stopped_with_a_checkpoint_and_goes_on_when_it_is_submitted_again(
    head: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """Ctrl-C leaves the job alone and says how to stop it; `ray job stop` in the middle of GRPO leaves a checkpoint of
    its last step, and the same job, submitted by Ray's own command, goes on from it and ends well."""
    _refused_at_once(head, tmp_path)
    settings = ["run.name=job", f"run.root={root}", *SMALL[1:], "run.stages=[grpo]", "grpo.steps=500"]
    settings += [f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}"]
    settings += ["grpo.checkpoint_every=1000", "grpo.held_out.every_steps=0"]
    follower = _submit(head, settings)
    run, deadline = root / "job", time.monotonic() + 400
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count('"grpo"') < 2:
        assert time.monotonic() < deadline and follower.poll() is None, follower.communicate(timeout=60)[0][-3000:]
        time.sleep(0.1)
    follower.send_signal(signal.SIGINT)
    said = follower.communicate(timeout=60)[0]
    job = re.search(r"goes on; to stop it: ray job stop --address \S+ (\S+)", said)
    assert job is not None and follower.returncode == 130, said
    _ray_job(head, "stop", job[1])
    steps = len((run / "journal" / "steps.jsonl").read_text().splitlines())
    assert f"SIGTERM: the newest checkpoint is that of step {steps}." in _ray_job(head, "logs", job[1])
    found = CheckpointStore(str(run / "checkpoints")).newest(print)
    assert found is not None and found.version == steps
    entry = ["python", "-m", "pipelines.run", "-c", "configs/quickstart.yaml", *settings, f"grpo.steps={steps + 2}"]
    said = _ray_job(head, "submit", "--working-dir", ".", "--", *entry, timeout_s=400)
    assert " succeeded" in said, said[-3000:]
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["stages"]) == {"grpo"} and summary["grpo"]["steps"] == steps + 2
    assert (run / "report.html").is_file()


def _refused_at_once(head: dict[str, str], folder: Path) -> None:
    """A token that is not the cluster's, and a job that cannot run: one line each, and the exit code says it."""
    wrong = folder / "wrong_token"
    wrong.write_text(secrets.token_hex(32))
    done = _submit(head, ["--token-file", str(wrong), "run.name=never"]).communicate(timeout=120)[0]
    assert "the token is not the cluster's" in done, done
    no_model = ["run.name=none", f"run.root={folder / 'elsewhere'}", "run.stages=[grpo]", "model.init=no/such/model"]
    process = _submit(head, no_model)
    said = process.communicate(timeout=240)[0]
    assert process.returncode in (1, 2) and f"ended with exit code {process.returncode}" in said, said


def _submit(head: dict[str, str], arguments: list[str]) -> subprocess.Popen[str]:
    """`medtvt-rl submit`, following."""
    command = [sys.executable, "-m", "pipelines.cli", "submit", "-c", "configs/quickstart.yaml", *arguments]
    environment = {**head, "RAY_API_SERVER_ADDRESS": head["RAY_ADDRESS"]}
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _ray_job(head: dict[str, str], *arguments: str, timeout_s: float = 120) -> str:
    """Output of a `ray job` command."""
    command = [str(BIN / "ray"), "job", *arguments]
    done = subprocess.run(
        command, cwd=PROJECT, env=head, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
