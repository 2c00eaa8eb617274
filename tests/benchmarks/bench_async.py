"""How well the roles of GRPO overlap: asynchronous training against `max_staleness: 0`, on the quickstart's model.

    python tests/benchmarks/bench_async.py [KEY=VALUE ...] --run runs/quickstart [--steps 32] [--staleness 0 1 2]

Takes the model that SFT left in a finished run, and runs GRPO from it without a KL term, so that there are two roles,
one generator and one learner, each with a core of its own. Every variant is run twice, in turn, and the means over all
steps but the first three are printed (asynchronous steps come in turns of a short and a long one, so that a median
says nothing); further settings say what else is to differ, e.g. model.lora.rank=8 and model.lora.train_embeddings=false
for adapters, or grpo.updates_per_batch=2 to balance the two roles:

    overlap      seconds of a step over the busy seconds of the role that had most; 1 is perfect, the goal 1.15
    learner s    what the learner itself takes for a step, without the way there and back
    speed-up     seconds of a step at max_staleness 0 over those at 1 and 2; the goal is 1.5 for balanced roles
    balance      busy seconds of the generator over those of the learner; a speed-up near 2 needs 1
    loop         CPU seconds of the loop's thread over the seconds of a step; the goal is 3 %
    driver       the same of the whole driver: with Ray's threads, files, and reading the memory of all processes
    sync         what an adapter or weight update adds to the load itself, milliseconds per update of an engine; the
                 goal is 50
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

WARM_UP_STEPS = 3
GOALS = {"overlap": 1.15, "speed-up": 1.5, "loop": 0.03, "sync ms": 50.0}
AT_LEAST = ("speed-up",)
FORMS = {"overlap": ".2f", "speed-up": ".2f", "loop": ".1%", "driver": ".1%", "sync ms": ".1f", "tokens/s": ".0f"}


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
    """One line a variant, and the verdict."""
    found = {staleness: figures(steps, next(iter(rows.values()))) for staleness, steps in rows.items()}
    for number, (staleness, cells) in enumerate(found.items()):
        if number == 0:
            print("  ".join(["staleness", *cells]))
        shown = [format(value, FORMS.get(title, ".2f")).rjust(len(title)) for title, value in cells.items()]
        print("  ".join([str(staleness).rjust(len("staleness")), *shown]))
    print(verdict(found))


def figures(steps: list[dict[str, float]], baseline: list[dict[str, float]]) -> dict[str, float]:
    """The columns of a variant, by title; `baseline` are the steps that it is held against."""
    step_s, generator_s, learner_s = (
        _mean(steps, name) for name in ("seconds/step", "seconds/rollout_busy", "seconds")
    )
    return {
        "overlap": step_s / max(generator_s, learner_s),
        "step s": step_s,
        "generator s": generator_s,
        "learner s": learner_s,
        "speed-up": _mean(baseline, "seconds/step") / step_s,
        "balance": generator_s / learner_s,
        "loop": _mean(steps, "seconds/loop_cpu") / step_s,
        "driver": _mean(steps, "seconds/driver_cpu") / step_s,
        "sync ms": 1000 * _mean(steps, "seconds/sync_blocked"),
        "tokens/s": _mean(steps, "num_tokens") / step_s,
    }


def verdict(found: Mapping[int, Mapping[str, float]]) -> str:
    """A line for each goal: which of the asynchronous variants reach it."""
    return "\n".join(_judged(title, goal, found) for title, goal in GOALS.items())


def _judged(title: str, goal: float, found: Mapping[int, Mapping[str, float]]) -> str:
    form, at_least = FORMS[title], title in AT_LEAST
    each = [
        f"{'reached' if (cells[title] >= goal if at_least else cells[title] <= goal) else 'not reached'} with "
        f"max_staleness {staleness} ({cells[title]:{form}})"
        for staleness, cells in found.items()
        if staleness
    ]
    return f"{title}, at {'least' if at_least else 'most'} {goal:{form}}: {', '.join(each) or 'not measured'}"


def _mean(steps: list[dict[str, float]], name: str) -> float:
    return fmean(step[name] for step in steps)


if __name__ == "__main__":
    main()
