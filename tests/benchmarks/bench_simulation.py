"""How well `medtvt-rl simulate` predicts this machine: seconds of a step, simulated over real, at staleness 0, 1, 2.

    python tests/benchmarks/bench_simulation.py --run runs/quickstart [--steps 16] [--rounds 2] [key=value ...]

Each round measures the timings (`medtvt-rl bench`), then runs GRPO from the SFT model of a finished run at each
staleness, so that a machine that becomes slower slows both sides; then the same setting is simulated with the timings
of that round. Printed for every variant: the mean real step over all steps but those of warm-up and end (asynchronous
ones come in turns of a short and a long one, so that a median says nothing), the simulated one, their ratio, and the
busy time of generator and learner. The last line says whether the goal is reached: within 15 % at each staleness.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).parent))
from bench_async import WARM_UP_STEPS, rows_of

from medtvt_rl.config import load_config
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import setting_of
from pipelines.simulation import Outcome, simulate

STALENESS = (0, 1, 2)
GOAL = 0.15


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run whose sft stage is finished")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. grpo.loss.kl.coefficient=0")
    args = parser.parse_args()
    print(
        "staleness  round  real step s  simulated s  ratio  generator busy s (real, simulated)  learner busy s",
        flush=True,
    )
    ratios: dict[int, list[float]] = {staleness: [] for staleness in STALENESS}
    with tempfile.TemporaryDirectory(prefix="bench_simulation_") as folder:
        for number in range(args.rounds):
            timings = measure(args, Path(folder), number)
            for staleness in STALENESS:
                real = run(args, Path(folder), f"s{staleness}_{number}", staleness)
                simulated = predict(args, Path(folder), timings, staleness)
                ratios[staleness].append(report(staleness, number, real, simulated))
    for staleness, found in ratios.items():
        middle = median(found)
        verdict = "within" if abs(middle - 1) <= GOAL else "not within"
        print(f"max_staleness {staleness}: simulated over real {middle:.3f}, {verdict} {GOAL:.0%}")
    print(conclude({staleness: median(found) for staleness, found in ratios.items()}))


def conclude(ratios: Mapping[int, float]) -> str:
    """Whether the goal is reached: the worst of the ratios decides."""
    staleness, ratio = max(ratios.items(), key=lambda item: abs(item[1] - 1))
    verdict, off = "reached" if abs(ratio - 1) <= GOAL else "not reached", abs(ratio - 1)
    return f"goal of within {GOAL:.0%} of a real run: {verdict}, at most {off:.1%} off (max_staleness {staleness})"


def settings(args: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that all variants share."""
    return [
        f"run.root={folder}",
        "run.stages=[grpo]",
        f"model.init={args.run.resolve() / 'stages' / 'sft' / 'model'}",
        f"grpo.steps={args.steps}",
        "grpo.held_out.every_steps=0",
        "grpo.checkpoint_every=0",
        # Spare processes import for a minute; a run of hours does not see it, one of sixteen steps does.
        "learner.spares=0",
        "rollout.spares=0",
        *args.overrides,
    ]


def measure(args: argparse.Namespace, folder: Path, number: int) -> Timings:
    """The timings of now."""
    out = folder / f"timings_{number}.json"
    command = ["-c", str(args.run / "config.yaml"), "--run", str(args.run), "--out", str(out)]
    call("pipelines.cli", "bench", *command, *settings(args, folder), "run.name=timings")
    return Timings.read(out)


def run(args: argparse.Namespace, folder: Path, name: str, staleness: int) -> list[dict[str, float]]:
    """The metrics of each step between warm-up and end, after which no group is begun."""
    given = [*settings(args, folder), f"run.name={name}", f"grpo.max_staleness={staleness}"]
    call("pipelines.grpo", "-c", str(args.run / "config.yaml"), *given)
    return rows_of(folder / name)[WARM_UP_STEPS : -1 - staleness]


def predict(args: argparse.Namespace, folder: Path, timings: Timings, staleness: int) -> Outcome:
    """The same setting, on as many cores as were measured."""
    given = [*settings(args, folder), f"grpo.max_staleness={staleness}"]
    config = load_config(args.run / "config.yaml", given)
    return simulate(config, setting_of(config, cores=float(timings.cores)), timings, args.steps * 2)


def call(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {found.returncode}:\n{found.stdout}{found.stderr}")


def report(staleness: int, number: int, real: list[dict[str, float]], simulated: Outcome) -> float:
    """Prints a line; the ratio."""
    names = ("seconds/step", "seconds/rollout_busy", "seconds/train")
    step_s, generator_s, learner_s = (fmean(row[name] for row in real) for name in names)
    ratio = simulated.step_s / step_s
    busy_s = [simulated.step_s * (1 - idle) for idle in (simulated.generator_idle, simulated.learner_idle)]
    print(
        f"{staleness:9d}  {number:5d}  {step_s:11.2f}  {simulated.step_s:11.2f}  {ratio:5.3f}  "
        f"{generator_s:16.2f} {busy_s[0]:10.2f}  {learner_s:22.2f} {busy_s[1]:6.2f}",
        flush=True,
    )
    return ratio


if __name__ == "__main__":
    main()
