"""How well the roles of GRPO overlap: asynchronous training against `max_staleness: 0`, on the quickstart's model.

    python tests/benchmarks/bench_async.py [KEY=VALUE ...] --run runs/quickstart [--steps 32] [--staleness 0 1 2]

Takes the model that SFT left in a finished run, and runs GRPO from it without a KL term, so that there are two roles,
one generator and one learner, each with a core of its own. Every variant is run twice, in turn, and the medians over
all steps but the first three are printed; further settings say what else is to differ, e.g. model.lora.rank=8 and
model.lora.train_embeddings=false for adapters, or grpo.updates_per_batch=2 to balance the two roles:

    overlap      seconds of all these steps over the busy seconds of the role that had most; 1 is perfect, the goal 1.15
    learner s    what the learner itself takes for a step, without the way there and back
    typical      median step over the busiest role's median; of two medians, so that it may lie below 1
    speed-up     seconds of a step at max_staleness 0 over those at 1 and 2
    balance      busy seconds of the generator over those of the learner; a speed-up near 2 needs 1
    loop         CPU seconds of the loop's thread over the seconds of a step; the goal is 3 %
    driver       the same of the whole driver: with Ray's threads, files, and reading the memory of all processes; of
                 all steps together
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
OVERLAP_GOAL = 1.15


def main() -> None:
    """Runs the variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2], help="the first is what others speed up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of all runs")
    args = parser.parse_args()
    rows: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in args.staleness}
    with tempfile.TemporaryDirectory(prefix="bench_async_") as folder:
        for round_number in range(args.rounds):
            for staleness in args.staleness:
                print(f"staleness {staleness}, round {round_number + 1} of {args.rounds} ...", flush=True)
                rows[staleness] += run_variant(args, Path(folder), f"s{staleness}_{round_number}", staleness)
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
        "grpo.loss.kl.coefficient=0",
        "grpo.held_out.every_steps=0",
        # Spare processes import for a minute; a run of hours does not see it, one of sixteen steps does.
        "learner.spares=0",
        "rollout.spares=0",
        *args.settings,
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


def print_table(rows: dict[int, list[dict[str, float]]]) -> None:
    """One line a variant."""
    baseline = _median(next(iter(rows.values())), "seconds/step")
    for number, (staleness, steps) in enumerate(rows.items()):
        step_s, generator_s = _median(steps, "seconds/step"), _median(steps, "seconds/rollout_busy")
        learner_s = _median(steps, "seconds")
        cells = {
            "staleness": f"{staleness}",
            "overlap": f"{overlap(steps):.2f}",
            "step s": f"{step_s:.2f}",
            "generator s": f"{generator_s:.2f}",
            "learner s": f"{learner_s:.2f}",
            "typical": f"{step_s / max(generator_s, learner_s):.2f}",
            "speed-up": f"{baseline / step_s:.2f}",
            "balance": f"{generator_s / learner_s:.2f}",
            "loop": f"{_median(steps, 'seconds/loop_cpu') / step_s:.1%}",
            "driver": f"{_sum(steps, 'seconds/driver_cpu') / _sum(steps, 'seconds/step'):.1%}",
            "sync ms": f"{1000 * _median(steps, 'seconds/sync_blocked'):.1f}",
            "tokens/s": f"{_median(steps, 'num_tokens') / step_s:.0f}",
        }
        if number == 0:
            print("  ".join(cells))
        print("  ".join(cell.rjust(len(title)) for title, cell in cells.items()))
    print(verdict({staleness: overlap(steps) for staleness, steps in rows.items()}))


def overlap(steps: list[dict[str, float]]) -> float:
    """Wall over busy seconds of the busiest role, of all steps together."""
    return _sum(steps, "seconds/step") / max(_sum(steps, "seconds/rollout_busy"), _sum(steps, "seconds"))


def verdict(overlaps: dict[int, float]) -> str:
    """Which of the asynchronous variants reach the goal."""
    each = [
        f"{'reached' if ratio <= OVERLAP_GOAL else 'not reached'} with max_staleness {staleness} ({ratio:.2f})"
        for staleness, ratio in overlaps.items()
        if staleness
    ]
    return f"goal, at most {OVERLAP_GOAL} of the busiest role's time: {', '.join(each) or 'not measured'}"


def _sum(steps: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps)


def _median(steps: list[dict[str, float]], name: str) -> float:
    return median(step[name] for step in steps)


if __name__ == "__main__":
    main()
