"""A hundred kills at random moments of one run, before the last one is mended, too; and of the run as a whole."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
from fault_table import FINE, FaultTable, Row
from harness import CLASSES, FaultyRun
from long_run import conclude, go_on, settings
from strikes import RECOVERED_WITHIN_S, Strikes, being_written, count_repeated, how_long_writing_takes

from pipelines.checkpoints import CheckpointStore

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(7200)]
NUM_KILLS, SEED, LONGEST_PAUSE_S = 100, 7, 5.0
NUM_ENDS = 10


def test_a_hundred_random_kills_lose_and_repeat_nothing(root: Path, tmp_path: Path, table: FaultTable) -> None:
    arguments, chance = settings(root), random.Random(SEED)
    with FaultyRun(tmp_path / "killed", arguments, timeout_s=7000) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes, killed = Strikes(run, table), Counter[str]()
        for _ in range(NUM_KILLS):
            role = chance.choice(list(CLASSES))
            strikes.at_once(role)
            killed[role] += 1
            time.sleep(chance.random() * LONGEST_PAUSE_S)
        steps = len(run.rows("steps"))
        run.wait_for(lambda: len(run.rows("steps")) >= steps + 5, within_s=RECOVERED_WITHIN_S)
        events = run.rows("events")
        lost, repeated = len(run.rows("discarded")), count_repeated(run)
        conclude(run, arguments)
    outcomes = {event["outcome"] for event in events}
    row = Row(
        fault=f"{NUM_KILLS} kills: " + ", ".join(f"{count} {role}" for role, count in sorted(killed.items())),
        phase=f"random moments, up to {LONGEST_PAUSE_S:g} s apart",
        seconds=median(event["seconds"] for event in events),
        lost=lost,
        repeated=repeated,
        verdict=FINE if outcomes == {"replaced"} else f"outcomes {outcomes}",
    )
    assert table.add(row).is_fine, table.text()


def test_the_run_is_killed_while_it_writes_checkpoints(root: Path, tmp_path: Path, table: FaultTable) -> None:
    """SIGKILL to the driver, each time followed by the same command; the newest checkpoint is whole each time, and the
    run, an on-policy one, goes on to the weights of one that was left alone, bit for bit."""
    arguments = settings(
        root, "grpo.checkpoint_every=2", "grpo.max_staleness=0", "learner.spares=0", "rollout.spares=0"
    )
    folder, struck_at, rows, chance = tmp_path / "ended", 0.0, list[Row](), random.Random(SEED)
    usual_s, in_the_midst = 0.0, 0
    for ending in range(NUM_ENDS + 1):
        with FaultyRun(folder, arguments, timeout_s=900) as run:
            steps = run.wait_for(lambda: len(run.rows("steps")))
            run.wait_for(lambda steps=steps: len(run.rows("steps")) > steps)
            if ending > 0:
                seconds = time.time() - struck_at
                phase, lost, repeated = "checkpoint", lost_by(run), count_repeated(run)
                row = Row(fault="SIGKILL driver", phase=phase, seconds=seconds, lost=lost, repeated=repeated)
                rows.append(table.add(row))
            if ending < NUM_ENDS:
                usual_s = usual_s or how_long_writing_takes(run)
                run.wait_for(lambda: being_written(folder), pause_s=0.001)
                time.sleep(chance.random() * usual_s)
                struck_at = time.time()
                run.kill()
                in_the_midst += bool(being_written(folder))
                assert run.leftovers(120) == []
                assert newest_is_whole(folder)
            else:
                weights = [line["checksum"] for line in run.rows("steps")]
                conclude(run, arguments, max_staleness=0)
    assert all(row.is_fine for row in rows), table.text()
    assert in_the_midst >= NUM_ENDS // 2, (
        f"only {in_the_midst} of {NUM_ENDS} kills met a checkpoint that was being written"
    )
    with FaultyRun(tmp_path / "plain", arguments, timeout_s=900) as plain:
        plain.wait_for(lambda: len(plain.rows("steps")) >= len(weights))
        plain.stop()
    assert [line["checksum"] for line in plain.rows("steps")][: len(weights)] == weights


@pytest.mark.parametrize("grace_s", [0.5, 3.0])
def test_a_stopped_job_leaves_a_whole_checkpoint(root: Path, tmp_path: Path, table: FaultTable, grace_s: float) -> None:
    """As `ray job stop` does it: SIGTERM, and SIGKILL after 3 seconds; a shorter grace is harder."""
    arguments, folder = settings(root, "grpo.checkpoint_every=2"), tmp_path / "stopped"
    with FaultyRun(folder, arguments, timeout_s=900) as run:
        run.wait_for(lambda: being_written(folder) and len(run.rows("steps")) >= 4, pause_s=0.001)
        began = time.time()
        code = run.stop(grace_s)
        seconds = time.time() - began
        assert run.leftovers(120) == []
    whole = newest_is_whole(folder)
    last = go_on(folder, arguments)
    verdict = FINE if whole and code in (143, -signal.SIGKILL) else f"exit code {code}, checkpoint whole: {whole}"
    phase, lost, repeated = f"checkpoint, killed after {grace_s:g} s", lost_by(last), count_repeated(last)
    row = Row(fault="SIGTERM driver", phase=phase, seconds=seconds, lost=lost, repeated=repeated, verdict=verdict)
    assert table.add(row).is_fine, table.text()


def newest_is_whole(folder: Path) -> bool:
    """Whether there is a checkpoint, and the newest is what its manifest says."""
    told: list[str] = []
    found = CheckpointStore(str(folder / "checkpoints")).newest(told.append)
    return found is not None and not told


def lost_by(run: FaultyRun) -> int:
    """Groups that were given up."""
    return len(run.rows("discarded"))
