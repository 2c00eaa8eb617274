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
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import PROJECT, SMALL

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
    for _ in range(30):
        listed = subprocess.run(
            [BIN / "ray", "job", "list"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if listed.returncode == 0:
            return
        assert process.poll() is None, log.read_text()
    raise AssertionError(f"the head did not answer: {listed.stderr[-2000:]} {log.read_text()[-2000:]}")


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


def _submit(head: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "submit", "-c", "configs/quickstart.yaml", *arguments]
    return subprocess.run(command, cwd=PROJECT, env=head, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.cluster
def test_submit_follows_a_job_to_its_exit_code(head: dict[str, str], tmp_path: Path) -> None:
    """One head for all of it, as its start costs more than the jobs."""
    small = [*SMALL, f"run.root={tmp_path / 'runs'}"]
    wrong = tmp_path / "wrong_token"
    wrong.write_text(secrets.token_hex(32))
    refused = _submit(head, "--token-file", str(wrong), *small)
    assert refused.returncode == 2 and "the token is not the cluster's" in refused.stderr, refused.stderr
    # The cohort alone needs no actors; a second submission finds it finished.
    for _ in range(2):
        done = _submit(head, *small, "run.stages=[cohort]")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "succeeded" in done.stdout and "cohort" in done.stdout
    # GRPO without the stages before it.
    failed = _submit(head, *small, "run.stages=[grpo]")
    assert failed.returncode == 1 and "ended with exit code 1" in failed.stdout, failed.stdout[-3000:]
    assert "the same command goes on from there" in failed.stderr
