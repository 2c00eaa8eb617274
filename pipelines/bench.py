"""`medtvt-rl bench -c configs/X.yaml`: measures on this machine what `medtvt-rl simulate` needs, in a few minutes.

Starts one actor of each role, as the configuration says, with the model that SFT left, else the one that training
starts from. Owns: the command, the start of the actors, timings.json. Does not own: what is measured (bench_roles.py).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from pipelines.command import EXIT_USAGE, check_engine, check_named, fail, in_session, load

if TYPE_CHECKING:
    from medtvt_rl.simulation.timings import Timings
    from pipelines.bench_roles import Measured
    from pipelines.reporter import Reporter

FILE = "timings.json"
MODELS = ("sft/model", "pretrain/model", "pretrain/start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `bench`."""
    parser.add_argument("-c", "--config", required=True, help="YAML file with deviations from the defaults")
    parser.add_argument("--run", type=Path, help="folder of a run whose model is taken; by default the configuration's")
    parser.add_argument("--out", type=Path, help=f"file to write; by default {FILE} in the folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl bench`; returns the exit code."""
    try:
        config = load(args.config, args.overrides)
        model = find_model(config, args.run)
        check_named(config)
        check_engine(config)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    out = args.out or (args.run or config.folder) / FILE
    # One actor of each role, in a folder of its own: what is measured leaves no trace in the run.
    config = replace(
        config,
        run=replace(config.run, root=str(config.folder), name="bench"),
        rollout=replace(config.rollout, num_generators=1, min=None, max=None, spares=0),
        num_scorers=1,
        num_references=1,
        grpo=replace(config.grpo, record_steps=True),
    )
    return in_session(config, lambda reporter: run(config, model, out, reporter), with_ray=True)


def find_model(config: Config, run: Path | None) -> Path:
    """The model to measure with. Raises ConfigError where there is none."""
    stages = (run or config.folder) / "stages"
    found = [stages / name for name in MODELS if (stages / name / "config.json").is_file()]
    if found:
        return found[0]
    if run is None and config.model.init and _starts_grpo(config, Path(config.model.init)):
        return Path(config.model.init)
    learning = config.run.stages[: config.run.stages.index("sft") + 1] if "sft" in config.run.stages else []
    made = f"make one: medtvt-rl run -c CONFIG run.stages=[{','.join(learning)}]"
    raise ConfigError(
        f"bench: there is no model in {stages}; name a run with --run, or "
        + (made if learning else "set model.init to the model that GRPO starts from")
    )


def _starts_grpo(config: Config, folder: Path) -> bool:
    """Whether GRPO can begin with `model.init`: about studies it needs more than a language model. What
    `model.init_from` writes is one, and is written before anything starts."""
    from medtvt_rl.data.check.start_model import kind_of

    if config.task.items is not None:
        return kind_of(folder) == "medtvt"
    return config.model.init_from is not None or (folder / "config.json").is_file()


def run(config: Config, model: Path, out: Path, reporter: Reporter) -> None:
    """Measures, writes the file and says what is in it."""
    reporter.line(f"bench: {model}")
    timings = asyncio.run(_measure(config, model, reporter))
    timings.write(out)
    for line in describe(timings):
        reporter.line(line)
    reporter.line(f"bench: written to {out}")


async def _measure(config: Config, model: Path, reporter: Reporter) -> Timings:
    from transformers import AutoTokenizer

    from actors.learner_gang import LearnerGang
    from actors.placement import grpo_roles, place, plan
    from actors.rollout_pool import RolloutPool
    from actors.scoring_pools import ReferencePool, ScorerPool
    from actors.supervision import Incidents
    from actors.timeline import Timeline
    from pipelines.bench_roles import PHASES, RoleBench
    from pipelines.grpo import load_prompts

    prompts = load_prompts(config, AutoTokenizer.from_pretrained(model, trust_remote_code=False), "train")
    placement = place(plan(config, grpo_roles(config)), config.placement, reporter.line)
    where, told = (config, placement, model), (Incidents(reporter.line), Timeline())
    roles = []
    try:
        reporter.line("bench: starting the actors")
        rollouts, start_s = await _clocked(RolloutPool.start(*where, *told))
        roles.append(rollouts)
        scoring = await ScorerPool.start(*where, *told)
        needs_reference = grpo_roles(config)["reference"] > 0
        reference = await ReferencePool.start(*where, *told) if needs_reference else None
        learner = await LearnerGang.start(*where, told[1])
        roles += [role for role in (scoring, reference, learner) if role is not None]
        reporter.start("measuring", len(PHASES), "phase")
        bench = RoleBench(config, rollouts, scoring, reference, learner, prompts, reporter.update)
        found = await bench.measure()
        reporter.finish("measuring")
    finally:
        for role in roles:
            role.stop()
        placement.release()
    tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    return timings_of(config, found, start_s, tokens)


async def _clocked(starting):  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    return await starting, time.perf_counter() - began


def timings_of(config: Config, found: Measured, start_s: float, prompt_tokens: float) -> Timings:
    """What was measured, as the simulation computes with it."""
    from medtvt_rl.data.parallel import usable_cores
    from medtvt_rl.simulation.fit import fit_engine, fit_line
    from medtvt_rl.simulation.timings import Timings

    driver_call_s = found.driver_cpu_s / found.driver_calls
    answer_s = max(0.0, median(found.answers) - driver_call_s)
    call_s = driver_call_s + answer_s

    def alone(seconds: list[float]) -> float:
        return max(median(seconds) - call_s, 1e-5)

    engine = fit_engine(found.generated, config.rollout.engine.max_num_seqs)
    updates = config.grpo.updates_per_batch
    step_s, token_s, _ = fit_line([tokens * updates for tokens, _ in found.trained], [s for _, s in found.trained])
    group_s, reference_token_s = 0.0, 0.0
    if found.referenced:
        group_s, reference_token_s, _ = fit_line(*zip(*found.referenced))
    cores = usable_cores()
    own = min(1.0, cores / 2)
    beside = median(alone_s / both_s for alone_s, both_s in found.asides) / own
    size = config.grpo.group_size
    return Timings(
        cores=cores,
        beside=min(1.0, max(0.3, beside)),
        decode_s=engine.decode_s,
        context_s=engine.context_s,
        prefill_group_s=engine.prefill_group_s,
        prefill_completion_s=engine.prefill_completion_s,
        prefill_token_s=engine.prefill_token_s,
        recompute_token_s=engine.recompute_token_s,
        start_s=start_s,
        reward_s=alone(found.scored),
        reference_group_s=max(0.0, group_s - call_s),
        reference_token_s=reference_token_s,
        learner_step_s=max(0.0, step_s - call_s),
        learner_token_s=token_s,
        score_s=alone(found.probes),
        export_s=alone(found.exports),
        load_s=alone(found.loads),
        weight_bytes=float(found.weight_bytes),
        driver_call_s=driver_call_s,
        answer_s=answer_s,
        prompt_tokens=prompt_tokens,
        lengths=tuple(row for each in found.generated for row in each.lengths if len(row) == size),
        equal_share=sum(found.equal) / max(1, len(found.equal)),
        learner_ranks=config.learner.num_workers,
        made_by=f"medtvt-rl bench, {config.run.root}, fit of the engine within {engine.error:.1%} (median)",
    )


def describe(timings: Timings) -> list[str]:
    """The most telling figures, a line each."""
    from medtvt_rl.simulation.formulas import generator_group_s, learner_group_s

    steps = ", ".join(f"{1e3 * seconds:.1f} at {number:g}" for number, seconds in timings.decode_s)
    size = max(map(len, timings.lengths))
    return [
        f"engine: ms a token of so many completions: {steps}; a group begins in "
        f"{1e3 * timings.prefill_s(size, timings.prompt_tokens):.1f} ms",
        f"one generator, full: {generator_group_s(timings, size, timings.decode_s[-1][0]):.3f} s a group; one learner "
        f"rank: {learner_group_s(timings, size, 1):.3f} s a group and {timings.learner_step_s:.3f} s a step",
        f"reward {1e3 * timings.reward_s:.1f} ms, reference "
        f"{1e3 * timings.reference_s(timings.prompt_tokens + size * timings.mean_length):.1f} ms a group; export "
        f"{1e3 * timings.export_s:.1f} ms, load {1e3 * timings.load_s:.1f} ms, {timings.weight_bytes / 1e6:.2f} MB",
        f"driver: {1e3 * timings.driver_call_s:.2f} ms CPU a call, {1e3 * timings.answer_s:.2f} ms on the way; two "
        f"roles at once run at {timings.beside:.0%} of their speed",
    ]


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
