"""How well the roles of GRPO overlap: asynchronous training against `max_staleness: 0`, on the quickstart's model.

    python tests/benchmarks/bench_async.py --run runs/quickstart [--steps 16] [--updates 1]

Takes the model that SFT left in a finished run, and runs GRPO from it without a KL term, so that there are two roles,
one generator and one learner, each with a core of its own. Every variant is run twice, in turn, and the medians over
all steps but the first three are printed:

    overlap      seconds of a step over the busy seconds of the busiest role; 1 is perfect
    in sum       the same of all these steps together: their seconds over the busy seconds of the role that had most
    speed-up     seconds of a step at max_staleness 0 over those at 1 and 2
    balance      busy seconds of the generator over those of the learner; a speed-up near 2 needs 1
    bookkeeping  CPU seconds of the loop over the seconds of a step
    driver       the same of the whole driver: with Ray's threads, files, and reading the memory of all processes
    sync         what an adapter or weight update adds to the load itself, milliseconds per update of an engine
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

WARM_UP_STEPS = 3
VARIANTS = {"staleness 0": 0, "staleness 1": 1, "staleness 2": 2}


def main() -> None:
    """Runs the variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--updates", type=int, default=1, help="grpo.updates_per_batch: to balance the two roles")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="bench_async_") as folder:
        for round_number in range(args.rounds):
            for name, staleness in VARIANTS.items():
                print(f"{name}, round {round_number + 1} of {args.rounds} ...", flush=True)
                rows[name] += run_variant(args, Path(folder), f"s{staleness}_{round_number}", staleness)
    print_table(rows)


def run_variant(args: argparse.Namespace, folder: Path, name: str, staleness: int) -> list[dict[str, float]]:
    """The metrics of each step after the warm-up."""
    settings = [
        f"run.root={folder}",
        f"run.name={name}",
        "run.stages=[grpo]",
        f"model.init={args.run.resolve() / 'stages' / 'sft' / 'model'}",
        f"grpo.max_staleness={staleness}",
        f"grpo.steps={args.steps}",
        f"grpo.updates_per_batch={args.updates}",
        "grpo.loss.kl.coefficient=0",
        "grpo.held_out.every_steps=0",
        # Spare processes import for a minute; a run of hours does not see it, one of sixteen steps does.
        "learner.spares=0",
        "rollout.spares=0",
    ]
    command = [sys.executable, "-m", "pipelines.grpo", "-c", str(args.run / "config.yaml"), *settings]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {found.returncode}:\n{found.stdout}{found.stderr}")
    return rows_of(folder / name)[WARM_UP_STEPS:]


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "grpo"]


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """One line a variant."""
    baseline = _median(rows["staleness 0"], "seconds/step")
    for number, (name, steps) in enumerate(rows.items()):
        step_s, generator_s = _median(steps, "seconds/step"), _median(steps, "seconds/rollout_busy")
        learner_s = _median(steps, "seconds/train")
        busiest_s = max(_sum(steps, "seconds/rollout_busy"), _sum(steps, "seconds/train"))
        cells = {
            "variant    ": name,
            "step s": f"{step_s:.2f}",
            "generator s": f"{generator_s:.2f}",
            "learner s": f"{learner_s:.2f}",
            "overlap": f"{step_s / max(generator_s, learner_s):.2f}",
            "in sum": f"{_sum(steps, 'seconds/step') / busiest_s:.2f}",
            "speed-up": f"{baseline / step_s:.2f}",
            "balance": f"{generator_s / learner_s:.2f}",
            "bookkeeping": f"{_median(steps, 'seconds/loop_cpu') / step_s:.1%}",
            "driver": f"{_median(steps, 'seconds/driver_cpu') / step_s:.1%}",
            "sync ms": f"{1000 * _median(steps, 'seconds/sync_blocked'):.1f}",
            "tokens/s": f"{_median(steps, 'num_tokens') / step_s:.0f}",
        }
        if number == 0:
            print("  ".join(cells))
        print("  ".join(cell.rjust(len(title)) for title, cell in cells.items()))


def _sum(steps: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps)


def _median(steps: list[dict[str, float]], name: str) -> float:
    return median(step[name] for step in steps)


if __name__ == "__main__":
    main()
