"""The evaluation stage: held-out answers of the policy before and after GRPO, by the rollout generators.

Both policies answer the same prompts with the same seeds, so that their difference is paired over patients.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.deadline import within
from actors.placement import evaluation_generators, place, plan
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.task import without
from medtvt_rl.dotted import resolve
from medtvt_rl.evaluation.bootstrap import Interval
from medtvt_rl.evaluation.diagnosis import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.types import MODALITIES, Prompt, RolloutGroup
from medtvt_rl.weights import pack_weights
from pipelines.diagnose import PERCENTILES_FILE
from pipelines.grpo import load_prompts
from pipelines.reporter import Reporter
from pipelines.stages import start_model, trained_model

FIRST_GROUP_ID = 1 << 40


class Evaluator(Protocol):
    """What `task.evaluate` makes: answers in, a result with `to_dict() -> {"metrics": {name: interval}, ...}` out."""

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> Any:
        """The result of one policy; answers by prompt id."""

    def paired_gain(self, before: Any, after: Any, metric: str = ...) -> Interval:
        """The change of a metric between two results over the same prompts; of the main one if none is named."""


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Evaluates what SFT and GRPO left; copies the final policy to RUN/model."""
    return asyncio.run(_evaluate(config, reporter))


async def _evaluate(config: Config, reporter: Reporter) -> dict[str, Any]:
    before_folder = start_model(config)
    after_folder = trained_model("grpo", config)
    tokenizer = AutoTokenizer.from_pretrained(before_folder)
    prompts = held_out_prompts(config, load_prompts(config, tokenizer, config.evaluation.split), reporter)
    evaluator = make_evaluator(config, prompts)
    reporter.line("evaluate: starting the engines")
    placement = place(plan(config, {"rollout": evaluation_generators(config)}), config.placement.timeout_s)
    try:
        pool = await RolloutPool.start(config, placement, before_folder)
        asker = Asker(config, pool, tokenizer, reporter)
        before = evaluator.evaluate(await asker.answers("before GRPO", prompts))
        await load_into(pool, after_folder)
        after = evaluator.evaluate(await asker.answers("after GRPO", prompts))
        ablations = await _ablations(config, asker, evaluator, prompts, after)
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
    """The first prompt of each item, at most `evaluation.max_studies`: a study counts once, however often it is asked
    about. Prompts of plain text are all kept."""
    first = {prompt.prompt_id if prompt.item_id is None else prompt.item_id: prompt for prompt in reversed(prompts)}
    kept = [prompt for prompt in prompts if first[prompt.item_id or prompt.prompt_id] is prompt]
    if len(kept) < len(prompts):
        reporter.line(
            f"evaluate: {len(prompts) - len(kept)} further questions about the same studies are left out; "
            "the first of each study counts"
        )
    return kept[: config.evaluation.max_studies or len(kept)]


def make_evaluator(config: Config, prompts: Sequence[Prompt]) -> Evaluator:
    """The task's evaluator, or the mean reward where it names none."""
    if config.task.evaluate is None:
        return RewardEvaluator(config, prompts)
    evaluator: Evaluator = resolve(config.task.evaluate, "task.evaluate")(config, config.evaluation.split)
    return evaluator


def studies_at_once(config: Config) -> int:
    """How many studies are asked about at a time: twice what fills the engines. The deadline of an answer runs while
    it waits for its engine, so that more would only queue towards it."""
    completions = config.evaluation.num_samples + 1
    return max(1, 2 * config.rollout.engine.max_num_seqs // completions) * evaluation_generators(config)


def summarise(result: Any) -> dict[str, Any]:
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
        self._at_once = asyncio.Semaphore(studies_at_once(config))
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
            group_id, sampled = FIRST_GROUP_ID + index, tuple[str, ...]()
            async with self._at_once:
                greedy = await self._texts(prompt, group_id, 1, greedy=True)
                if sample:
                    sampled = await self._texts(prompt, group_id, self._num_samples, greedy=False)
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
    config: Config, asker: Asker, evaluator: Evaluator, prompts: Sequence[Prompt], full: Any
) -> dict[str, Any]:
    """Change of the greedy Jaccard (or reward) when a modality is withheld, paired over patients; none for plain
    text."""
    if not config.evaluation.ablations or config.task.items is None:
        return {}
    metric = "jaccard_greedy" if config.task.evaluate is not None else "reward_greedy"
    changes = {}
    for modality in MODALITIES:
        withheld = [replace(prompt, item_id=without(str(prompt.item_id), modality)) for prompt in prompts]
        result = evaluator.evaluate(await asker.answers(f"without {modality}", withheld, sample=False))
        changes[modality] = evaluator.paired_gain(full, result, metric=metric).to_dict()
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
        store.percentile_table.smoothed().save(temporary / PERCENTILES_FILE)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
