"""How long a run takes to get back to its full rate after SIGKILL of a generator and of a learner rank.

    python tests/benchmarks/bench_recovery.py --run runs/quickstart [--steps 30] [--spares 1]

Takes the model that SFT left in a finished run and runs GRPO from it twice, as the configuration of that run says. In
the first run the generator is killed after a third of the steps, in the second the learner rank. Printed for each:

    serves again  seconds from the signal until the actor's successor serves
    full rate     seconds from the signal to the end of the first step that began after the successor served and takes
                  at most a quarter longer than the median of the steps before the signal
    groups lost   groups that were discarded
    checkpoint    the longest that a checkpoint let training wait, seconds, of those that the run wrote
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from harness import FaultyRun

SLOWER = 1.25
BLOCKED = "checkpoint/blocked_s"


def main() -> None:
    """Runs both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--spares", type=int, choices=(0, 1), default=1, help="processes with their imports done")
    parser.add_argument("overrides", nargs="*", help="further key=value settings")
    args = parser.parse_args()
    print("role      serves again, s  full rate, s  median step before, s  groups lost  checkpoint, s")
    with tempfile.TemporaryDirectory(prefix="bench_recovery_") as folder:
        for role in ("rollout", "learner"):
            print(measure(args, Path(folder) / role, role), flush=True)


def measure(args: argparse.Namespace, folder: Path, role: str) -> str:
    """One line of the table."""
    settings = [
        "run.stages=[grpo]",
        f"model.init={args.run.resolve() / 'stages' / 'sft' / 'model'}",
        f"data.root={args.run.resolve().parent / 'cohort'}",
        f"grpo.steps={args.steps}",
        "grpo.held_out.every_steps=0",
        f"learner.spares={args.spares}",
        f"rollout.spares={args.spares}",
        *args.overrides,
    ]
    with FaultyRun(folder, settings, timeout_s=1800) as run:
        run.wait_for(lambda: len(run.metrics()) >= args.steps // 3)
        killed_at = time.time()
        run.signal(role, signal.SIGKILL, during="train_step" if role == "learner" else "generate")
        run.wait_for(lambda: run.rows("events"))
        run.finish()
    rows, (event, *_) = run.metrics(), run.rows("events")
    before = median(row["seconds/step"] for row in rows if row["time"] < killed_at)
    done = [(row["time"], row["seconds/step"]) for row in rows]
    full = [at for at, seconds in done if at - seconds > event["time"] and seconds <= SLOWER * before]
    full_s = f"{full[0] - killed_at:12.1f}" if full else "       never"
    lost = len(run.rows("discarded"))
    blocked = max((row[BLOCKED] for row in rows if BLOCKED in row), default=float("nan"))
    return f"{role:8}  {event['time'] - killed_at:15.1f}  {full_s}  {before:21.2f}  {lost:11}  {blocked:13.2f}"


if __name__ == "__main__":
    main()
