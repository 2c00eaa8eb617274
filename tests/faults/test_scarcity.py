"""Full disks, a full object store, a clock that jumps: the run goes on, or ends with one line and goes on later."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import FINE, FaultTable, Row
from harness import PROJECT, FaultyRun
from long_run import conclude, go_on, settings
from strikes import Strikes, count_repeated

from pipelines.checkpoints import CheckpointStore

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(3000)]
DISK_BYTES, STORE_BYTES = 160 << 20, 80 << 20
HERE = Path(__file__).parent


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_of_the_checkpoints_is_full(root: Path, tmp_path: Path, table: FaultTable, disk: Path) -> None:
    arguments = settings(root, "grpo.checkpoint_every=2", f"grpo.checkpoint_root={disk}")
    store = CheckpointStore(str(disk / "full"))
    with FaultyRun(tmp_path / "full", arguments, timeout_s=1200) as run:
        run.wait_for(lambda: len(store.versions()) >= 2)
        strikes = Strikes(run, table)

        def fill_up() -> None:
            fill(disk)
            run.wait_for(lambda: "No space left on device" in run.said, within_s=300)
            assert "could not be written" in run.said
            told: list[str] = []
            assert store.newest(told.append) is not None and not told, "the one before is whole"
            (disk / "filler").unlink()
            newest = max(store.versions())
            run.wait_for(lambda: max(store.versions()) > newest, within_s=300)

        strikes.measured("full disk", "checkpoint", fill_up, None)
        assert not run.rows("events")
        conclude(run, arguments)
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_the_disk_of_the_whole_run_is_full(root: Path, tmp_path: Path, table: FaultTable, disk: Path) -> None:
    """Without a journal nothing can be promised of a step: the run ends, and goes on from its newest checkpoint."""
    arguments = settings(root, "grpo.checkpoint_every=2")
    log = tmp_path / "full.log"
    with FaultyRun(disk / "full", arguments, timeout_s=1200, log=log) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 5)
        fill(disk)
        run.wait()
        assert run.leftovers() == []
    (disk / "filler").unlink()
    last = go_on(disk / "full", arguments, log=tmp_path / "again.log")
    told = [line for line in run.said.splitlines() if "a disk is full" in line]
    verdict = FINE if told and "Traceback" not in run.said else f"it said {run.said[-300:]!r}"
    lost, repeated = len(last.rows("discarded")), count_repeated(last)
    row = Row(
        fault="full disk of the whole run", phase="any", seconds=None, lost=lost, repeated=repeated, verdict=verdict
    )
    assert table.add(row).is_fine, table.text()


def test_the_object_store_is_full(root: Path, tmp_path: Path, table: FaultTable) -> None:
    flag = tmp_path / "hoard"
    hoarder = "rewards.hoarder.function=tests.faults.hoarding_reward:hoarding_reward"
    arguments = settings(root, f"cluster.object_store_bytes={STORE_BYTES}", hoarder, "weights.send=full")
    environment = {"HOARD_FILE": str(flag)}
    with FaultyRun(tmp_path / "store", arguments, timeout_s=1200, environment=environment) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table)

        def hoard() -> None:
            flag.touch()
            run.wait_for(flag.with_suffix(".full").exists, within_s=300)
            steps = len(run.rows("steps"))
            run.wait_for(lambda: len(run.rows("steps")) >= steps + 6, within_s=300)
            flag.unlink()

        strikes.measured("full object store", "six steps", hoard, None)
        conclude(run, arguments, environment=environment)
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_the_clock_jumps(root: Path, tmp_path: Path, table: FaultTable) -> None:
    """The wall clock of every Python process, not that of Ray's own ones; actors are lost while it is wrong."""
    arguments, skew = settings(root, "grpo.checkpoint_every=2"), tmp_path / "skew"
    environment = {"SKEW_FILE": str(skew), "PYTHONPATH": f"{HERE / 'skewed_clock'}:{PROJECT}"}
    with FaultyRun(tmp_path / "clock", arguments, timeout_s=1200, environment=environment) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table)
        for hours, role in ((25, "rollout"), (-48, "learner"), (0, "reward")):

            def jump(hours: int = hours, role: str = role) -> None:
                skew.write_text(f"{hours * 3600}")
                os.kill(strikes.serving(role), signal.SIGKILL)

            strikes.measured(f"the clock is set to {hours:+d} h, SIGKILL {role}", "any", jump, role)
        times = [row["time"] for row in run.metrics()]
        assert max(times) - min(times) > 24 * 3600, "the clock did jump"
        conclude(run, arguments, environment=environment)
    assert all(row.is_fine for row in strikes.rows), table.text()


def fill(disk: Path) -> None:
    """Leaves no byte."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while free := shutil.disk_usage(disk).free:
                file.write(b"0" * min(1 << 20, free))
        except OSError:
            return
