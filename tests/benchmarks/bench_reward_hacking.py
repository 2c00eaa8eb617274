"""A run whose answers stay as good as they were while its reasoning rots: do the alarms sound?

    python tests/benchmarks/bench_reward_hacking.py --run runs/quickstart [--steps 60] [--write FILE]

GRPO from the model that SFT left in a finished run, without a KL term and at a high learning rate: the held-out Jaccard
holds, and the findings named in the reasoning are less and less those of the study. Prints the held-out measurements
and the alarms. `--write` keeps what the alarms looked at: tests/evaluation/reasoning_rots.json is such a file, which
tests/evaluation/test_alarms.py reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PREFIXES = ("reward/", "held_out/findings", "held_out/jaccard", "held_out/version", "length/", "entropy")
OTHERS = ("groups/zero_variance_share", "importance_ratio_p99", "ess_share", "sync_gap_max")


def main() -> None:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", type=Path, help="a JSON file for the metrics that the alarms look at")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_reward_hacking_") as folder:
        settings = [
            f"run.root={folder}",
            "run.name=hacked",
            "run.stages=[grpo]",
            f"model.init={args.run.resolve() / 'stages' / 'sft' / 'model'}",
            f"grpo.steps={args.steps}",
            "grpo.loss.kl.coefficient=0",
            "grpo.learning_rate=6e-4",
            "grpo.final_lr_share=1",
            "grpo.held_out.every_steps=6",
            "grpo.held_out.max_prompts=100",
        ]
        command = [sys.executable, "-m", "pipelines.grpo", "-c", str(args.run / "config.yaml"), *settings]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "hacked" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "grpo"]
    for row in rows:
        if "held_out/version" in row:
            shown = {name: value for name, value in row.items() if name.startswith(("held_out/f", "held_out/j"))}
            print(f"step {row['step']}: reward {row['reward/jaccard']:.3f}", {k: round(v, 3) for k, v in shown.items()})
    if args.write is not None:
        args.write.write_text(json.dumps([kept(row) for row in rows], indent=None, separators=(",", ":")) + "\n")


def kept(row: dict[str, float]) -> dict[str, float]:
    """What the alarms look at, to four digits."""
    names = [name for name in row if name.startswith(PREFIXES) or name in OTHERS]
    return {name: float(f"{row[name]:.4g}") for name in names}


if __name__ == "__main__":
    main()
