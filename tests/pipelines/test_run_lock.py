"""Two drivers of one run folder: the second waits a little, then is refused; a lock goes with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stored_examples import QUICKSTART, a_config

from pipelines import cli, replay, run_lock
from pipelines.run_lock import RunInUseError

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from pipelines.run_lock import run_lock

with run_lock(Path(sys.argv[1]), print):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    forked = os.fork()
    if forked:
        print("holds", started.pid, forked, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float = 60.0) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that holds a folder, with the children that it started and forked."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(Path(QUICKSTART).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()[1:]]


def end(process: subprocess.Popen[str], children: list[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def test_another_driver_is_refused_with_who_holds_the_folder_until_that_one_dies(tmp_path: Path) -> None:
    process, children = holder(tmp_path / "run")
    said = list[str]()
    try:
        who = f"run is in use by process {process.pid} on {socket.gethostname()}; "
        with pytest.raises(RunInUseError, match=who), run_lock.run_lock(tmp_path / "run", said.append, wait_s=0.6):
            pytest.fail("two hold it")
        assert len(said) == 1 and who + "waiting up to 0.6 s" in said[0]
        process.kill()  # its children live on
        process.wait()
        with run_lock.run_lock(tmp_path / "run", said.append, wait_s=0.0):
            assert (tmp_path / "run" / "logs" / "lock").read_text().startswith(f"process {os.getpid()} on ")
        assert len(said) == 1
    finally:
        end(process, children)


def test_who_comes_while_a_stopped_driver_still_writes_gets_the_folder_when_it_is_done(tmp_path: Path) -> None:
    process, children = holder(tmp_path, seconds=1.0)
    began = time.monotonic()
    try:
        with run_lock.run_lock(tmp_path, lambda _: None):
            assert time.monotonic() - began < 20
    finally:
        end(process, children[:1])


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = list[str]()
    with run_lock.run_lock(tmp_path, said.append):
        assert len(said) == 1 and "No locks available" in said[0]


def test_a_stage_leaves_a_run_folder_in_use_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_config(tmp_path).folder
    with run_lock.run_lock(folder, print):
        monkeypatch.setattr(run_lock, "run_lock", partial(run_lock.run_lock, wait_s=0.0))
        for stage in ("run", "grpo", "cohort"):
            assert cli.main([stage, "-c", QUICKSTART, f"run.root={tmp_path}"]) == 1
            assert f"medtvt-rl: {folder} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["logs"] and not (folder / "config.yaml").exists()


def test_runs_of_one_name_do_not_share_a_folder_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(stage: str, *overrides: str) -> int:
        return cli.main([stage, "-c", QUICKSTART, f"run.root={tmp_path / 'other'}", "run.name=r", *overrides])

    config = a_config(tmp_path / "one", "run.name=r", f"grpo.checkpoint_root={tmp_path / 'kept'}")
    kept = run_lock.checkpoint_folder(config)
    assert kept == tmp_path / "kept" / "r"
    assert run_lock.checkpoint_folder(a_config(tmp_path)) is None, "the lock of the run folder holds it"
    config.grpo.checkpoint_root = "memory://kept"
    assert run_lock.checkpoint_folder(config) is None
    begun = list[str]()
    monkeypatch.setattr(cli, "_run_here", lambda stage, config: begun.append(stage) or 0)
    with run_lock.run_lock(kept, print, name=run_lock.CHECKPOINTS_LOCK):
        monkeypatch.setattr(run_lock, "run_lock", partial(run_lock.run_lock, wait_s=0.0))
        for stage in ("run", "grpo"):
            assert command(stage, f"grpo.checkpoint_root={tmp_path / 'kept'}") == 1
            assert f"{kept} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert command("sft", f"grpo.checkpoint_root={tmp_path / 'kept'}") == 0
    assert command("grpo", f"grpo.checkpoint_root={tmp_path / 'kept'}") == 0
    assert begun == ["sft", "grpo"] and capsys.readouterr().err == ""
    (tmp_path / "file").touch()
    assert command("grpo", f"grpo.checkpoint_root={tmp_path / 'file'}") == 0
    assert "cannot be locked" in capsys.readouterr().err


def test_a_replay_leaves_a_run_that_is_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_config(tmp_path).folder
    monkeypatch.setattr(replay, "check", lambda run, first, last: (a_config(tmp_path), []))
    with run_lock.run_lock(folder, print):
        monkeypatch.setattr(run_lock, "run_lock", partial(run_lock.run_lock, wait_s=0.0))
        assert cli.main(["replay", str(folder)]) == 1
    assert f"{folder} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in (folder / "logs").iterdir()] == ["lock"]
