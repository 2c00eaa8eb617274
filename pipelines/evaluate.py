"""The evaluation stage: held-out answers of the policy before and after GRPO, by the rollout generators.

Both policies answer the same prompts with the same seeds, so that their difference is paired.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoTokenizer

from actors.placement import evaluation_generators, place, plan
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.dotted import resolve
from medtvt_rl.evaluation.diagnosis import StudyAnswers
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.types import Prompt
from medtvt_rl.weights import pack_weights
from pipelines.answers import Ablating, Asker, Evaluator, make_evaluator, one_per_item
from pipelines.grpo import load_prompts
from pipelines.reporter import Reporter
from pipelines.stages import start_model, trained_model

Ask = Callable[..., Awaitable[dict[str, StudyAnswers]]]


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Evaluates what SFT and GRPO left; copies the final policy to RUN/model."""
    return asyncio.run(_evaluate(config, reporter))


async def _evaluate(config: Config, reporter: Reporter) -> dict[str, Any]:
    before_folder = start_model(config)
    after_folder = trained_model("grpo", config)
    tokenizer = AutoTokenizer.from_pretrained(before_folder)
    prompts = held_out_prompts(config, load_prompts(config, tokenizer, config.evaluation.split), reporter)
    evaluator = make_evaluator(config, prompts, config.evaluation.split)
    reporter.line("evaluate: starting the engines")
    placement = place(plan(config, {"rollout": evaluation_generators(config)}), config.placement.timeout_s)
    try:
        pool = await RolloutPool.start(config, placement, before_folder)
        asker = Asker(config, pool, tokenizer, config.evaluation.num_samples)

        async def ask(label: str, some: Sequence[Prompt], sample: bool = True) -> dict[str, StudyAnswers]:
            reporter.start(label, len(some), "prompt")
            return await asker.answers(some, sample, reporter.update)

        before = evaluator.evaluate(await ask("before GRPO", prompts))
        await load_into(pool, after_folder)
        after = evaluator.evaluate(await ask("after GRPO", prompts))
        ablations = await _ablations(config, ask, evaluator, prompts, after)
        pool.stop()
    finally:
        placement.release()
    publish_model(config, after_folder)
    gain = evaluator.paired_gain(before, after)
    return {
        "summary": {
            "evaluation": {
                "sft": summarise(before),
                "grpo": summarise(after),
                "gain": gain.to_dict(),
                "ablations": ablations,
            }
        }
    }


def held_out_prompts(config: Config, prompts: Sequence[Prompt], reporter: Reporter) -> list[Prompt]:
    """One prompt of each item, at most `evaluation.max_studies`; says how many were left out."""
    kept = one_per_item(prompts)
    if len(kept) < len(prompts):
        reporter.line(
            f"evaluate: {len(prompts) - len(kept)} further questions about the same items are left out; "
            "the first of each item counts"
        )
    return kept[: config.evaluation.max_studies or len(kept)]


def summarise(result: Any) -> dict[str, Any]:
    """The metrics by name, those of single diseases, where there are any, below `per_disease`."""
    found = result.to_dict()
    metrics = found.pop("metrics")
    per_disease = {name.removeprefix("f1/"): value for name, value in metrics.items() if name.startswith("f1/")}
    rest = {name: value for name, value in metrics.items() if not name.startswith("f1/")}
    return {**rest, **({"per_disease": per_disease} if per_disease else {}), **found}


async def _ablations(
    config: Config, ask: Ask, evaluator: Evaluator, prompts: Sequence[Prompt], full: Any
) -> dict[str, Any]:
    """Paired change of the evaluator's metric when each part of the items is withheld; none where it names no parts."""
    if not config.evaluation.ablations or not isinstance(evaluator, Ablating):
        return {}
    changes = {}
    for part, withheld in evaluator.ablations(prompts).items():
        result = evaluator.evaluate(await ask(f"without {part}", withheld, sample=False))
        changes[part] = evaluator.paired_gain(full, result, metric=evaluator.ablation_metric).to_dict()
    return changes


async def load_into(pool: RolloutPool, folder: Path) -> None:
    """Loads another policy into running engines."""
    policy = load_policy(folder, torch.float32)
    weights = pack_weights(1, named_weights(policy))
    await pool.update_weights(ray.put(weights), weights.version, weights.checksum)


def publish_model(config: Config, source: Path) -> None:
    """Copies the policy to RUN/model, with what the task's items add to it, complete or not at all."""
    target = config.folder / "model"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    items: Any = resolve(config.task.items, "task.items")(config) if config.task.items else None
    if hasattr(items, "publish"):
        items.publish(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
