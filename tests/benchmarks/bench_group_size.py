"""What the size of a group costs in memory, and how seldom the placement of a completion changes its text.

    python tests/benchmarks/bench_group_size.py --run runs/quickstart [--sizes 8 64] [--steps 2]

GRPO from the model that SFT left in a finished run. Memory: the same number of groups of each size; the peak of all
processes (`peak_rss_bytes`). Placement: one on-policy step with one engine and with two; seeds depend on the run's
seed, the group and the place in it alone, so that a text can differ through rounding between batch shapes alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from medtvt_rl.learner.step_record import STEPS_FOLDER, read_step, step_file
from medtvt_rl.types import Completion


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_group_size_") as name:
        folder, peaks = Path(name), []
        for size in args.sizes:
            train(args.run, folder, f"size{size}", f"grpo.group_size={size}", f"grpo.steps={args.steps}")
            peaks.append(json.loads((folder / f"size{size}" / "summary.json").read_text())["peak_rss_bytes"])
            ratio = peaks[-1] / peaks[0]
            print(f"group_size {size:4}: {peaks[-1] / 2**30:5.2f} GiB, {ratio:.2f} of the first", flush=True)
        steps = []
        for engines in (1, 2):
            settings = ("grpo.steps=1", "grpo.max_staleness=0", f"rollout.num_generators={engines}")
            train(args.run, folder, f"engines{engines}", *settings)
            steps.append(completions(folder / f"engines{engines}"))
        pairs = list(zip(*steps, strict=True))
        same = [(one, other) for one, other in pairs if np.array_equal(one.token_ids, other.token_ids)]
        gap = max(float(np.abs(one.behaviour_logprobs - other.behaviour_logprobs).max()) for one, other in same)
        print(f"one engine against two: {len(same)} of {len(pairs)} completions have the same text")
        print(f"largest difference of the log-probs of those: {gap:.2g}")


def train(run: Path, folder: Path, name: str, *settings: str) -> None:
    """A GRPO stage of its own."""
    common = [
        *(f"run.root={folder}", f"run.name={name}", "run.stages=[grpo]", "grpo.held_out.every_steps=0"),
        f"model.init={run.resolve() / 'stages' / 'sft' / 'model'}",
        # Spare processes import for a minute: the longer run would be measured with them, the shorter one without.
        "learner.spares=0",
        "rollout.spares=0",
    ]
    command = [sys.executable, "-m", "pipelines.grpo", "-c", str(run / "config.yaml"), *common, *settings]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {found.returncode}:\n{found.stdout}{found.stderr}")


def completions(run: Path) -> list[Completion]:
    """Those of the first step, by group and place in it, as the learner got them."""
    record = read_step(step_file(run / "journal" / STEPS_FOLDER, 0, 0))
    return [sequence.completion for sequence in record.sequences]


if __name__ == "__main__":
    main()
