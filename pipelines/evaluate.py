"""The evaluation stage: held-out answers of the policy before and after GRPO, by the rollout generators.

Both policies answer the same prompts with the same seeds, so that their difference is paired over patients.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.deadline import within
from actors.placement import place, plan
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.dotted import resolve
from medtvt_rl.evaluation.diagnosis import DiagnosisEvaluator, DiagnosisResult, StudyAnswers
from medtvt_rl.model.policy import load_policy, named_weights
from medtvt_rl.types import MODALITIES, Prompt, RolloutGroup
from medtvt_rl.weights import pack_weights
from pipelines.diagnose import PERCENTILES_FILE
from pipelines.grpo import load_prompts
from pipelines.reporter import Reporter
from pipelines.stages import start_model

FIRST_GROUP_ID = 1 << 40


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Evaluates what SFT and GRPO left; copies the final policy to RUN/model."""
    return asyncio.run(_evaluate(config, reporter))


async def _evaluate(config: Config, reporter: Reporter) -> dict[str, Any]:
    before_folder = start_model(config)
    after_folder = config.stage_folder("grpo") / "model"
    tokenizer = AutoTokenizer.from_pretrained(before_folder)
    prompts = load_prompts(config, tokenizer, config.evaluation.split)
    prompts = prompts[: config.evaluation.max_studies or len(prompts)]
    evaluator = resolve(config.task.evaluate or "", "task.evaluate")(config, config.evaluation.split)
    reporter.line("evaluate: starting the engines")
    placement = place(plan(config, {"rollout": config.rollout.num_generators}), config.placement.timeout_s)
    try:
        pool = await RolloutPool.start(config, placement, before_folder)
        asker = Asker(config, pool, tokenizer, reporter)
        before = evaluator.evaluate(await asker.answers("before GRPO", prompts))
        await load_into(pool, after_folder)
        after = evaluator.evaluate(await asker.answers("after GRPO", prompts))
        ablations = await _ablations(asker, evaluator, prompts, after) if config.evaluation.ablations else {}
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


def summarise(result: DiagnosisResult) -> dict[str, Any]:
    """The metrics by name, those of single diseases below `per_disease`."""
    found = result.to_dict()
    metrics = found.pop("metrics")
    per_disease = {name.removeprefix("f1/"): value for name, value in metrics.items() if name.startswith("f1/")}
    rest = {name: value for name, value in metrics.items() if not name.startswith("f1/")}
    return {**rest, "per_disease": per_disease, **found}


class Asker:
    """Collects the answers of the engines' present policy."""

    def __init__(
        self, config: Config, pool: RolloutPool, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
    ) -> None:
        self._num_samples = config.evaluation.num_samples
        self._fetch_timeout_s = config.rollout.generate_timeout_s
        self._pool = pool
        self._tokenizer = tokenizer
        self._reporter = reporter

    async def answers(self, label: str, prompts: Sequence[Prompt], sample: bool = True) -> dict[str, StudyAnswers]:
        """Sampled and greedy answers by prompt id; none is sampled with `sample=False`."""
        self._reporter.start(label, len(prompts), "study")
        answered = 0

        async def ask(index: int, prompt: Prompt) -> tuple[str, StudyAnswers]:
            nonlocal answered
            greedy = await self._texts(prompt, FIRST_GROUP_ID + index, 1, greedy=True)
            sampled = (
                await self._texts(prompt, FIRST_GROUP_ID + index, self._num_samples, greedy=False) if sample else ()
            )
            answered += 1
            self._reporter.update(answered)
            return prompt.prompt_id, StudyAnswers(sampled=sampled, greedy=greedy[0])

        return dict(await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts))))

    async def _texts(self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool) -> tuple[str, ...]:
        _, payload = await self._pool.generate(prompt, group_id, num_completions, greedy)
        group: RolloutGroup = await within(
            payload, self._fetch_timeout_s, f"the answers of group {group_id}", "rollout.generate_timeout_s"
        )
        return tuple(str(self._tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in group.completions)


async def _ablations(
    asker: Asker, evaluator: DiagnosisEvaluator, prompts: Sequence[Prompt], full: DiagnosisResult
) -> dict[str, Any]:
    """Change of the greedy Jaccard when a modality is withheld, paired over patients."""
    changes = {}
    for modality in MODALITIES:
        withheld = [replace(prompt, item_id=f"{prompt.item_id}|without={modality}") for prompt in prompts]
        result = evaluator.evaluate(await asker.answers(f"without {modality}", withheld, sample=False))
        changes[modality] = evaluator.paired_gain(full, result, metric="jaccard_greedy").to_dict()
    return changes


async def load_into(pool: RolloutPool, folder: Path) -> None:
    """Loads another policy into running engines."""
    policy = load_policy(folder, torch.float32)
    weights = pack_weights(1, named_weights(policy))
    await pool.update_weights(ray.put(weights), weights.version, weights.checksum)


def publish_model(config: Config, source: Path) -> None:
    """Copies the policy, with what `diagnose` needs to read raw blood values, to RUN/model, complete or not at all."""
    target = config.folder / "model"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    if config.task.items is not None:
        store = StudyStore.open(store_folder(config.data))
        store.percentile_table.save(temporary / PERCENTILES_FILE)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
