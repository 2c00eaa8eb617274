"""The evaluation stage: held-out answers of the policy before and after GRPO, by the rollout generators.

Both policies answer the same prompts with the same seeds, so that their difference is paired. In a run without GRPO
there is one policy, the model that it would start from.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from actors.bundles import for_evaluation, plan
from actors.placement import Placement, place
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from medtvt_rl.config import Config
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.model.config import UNTRAINED_STAND_INS
from medtvt_rl.model.seal import seal
from medtvt_rl.types import Prompt
from medtvt_rl.user_code import task_items
from pipelines.answers import Ablating, Asker, Evaluator, make_evaluator, one_per_item
from pipelines.generators import drained, elastic
from pipelines.grpo import load_prompts
from pipelines.judging import judged, same_prompts, save_answers, saved_answers
from pipelines.reporter import Reporter
from pipelines.stages import StageError, evaluated_policies, start_model, trained_model

Ask = Callable[..., Awaitable[dict[str, StudyAnswers]]]


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Evaluates what SFT and GRPO left, or the one model that there is; copies the final policy to RUN/model."""
    return asyncio.run(_evaluate(config, reporter))


def judge_again(config: Config, reporter: Reporter, done: dict[str, Any]) -> dict[str, Any]:
    """What a finished evaluation leaves, its answers judged by the present settings; no model is asked.

    Raises:
        StageError: the answers were not kept.
    """
    answers = saved_answers(config)
    if not same_prompts(answers, evaluated_policies(config)):
        raise StageError(
            f"evaluate is finished, and its answers are not in {config.stage_folder('evaluate')}; "
            "delete that folder to ask the model again"
        )
    tokenizer = AutoTokenizer.from_pretrained(start_model(config), trust_remote_code=False)
    prompts = load_prompts(config, tokenizer, config.evaluation.split)
    evaluator = make_evaluator(config, prompts, config.evaluation.split)
    summary, _ = judged(config, evaluator, answers, reporter.start, reporter.update)
    before = done["summary"]["evaluation"]
    kept = {key: before[key] for key in ("ablations", "remarks") if key in before}
    return {**done, "summary": {"evaluation": {**summary, **kept}}}


async def _evaluate(config: Config, reporter: Reporter) -> dict[str, Any]:
    names, before_folder = evaluated_policies(config), start_model(config)
    after_folder = trained_model("grpo", config) if "grpo" in names else before_folder
    first, last = next(iter(names)), list(names)[-1]
    tokenizer = AutoTokenizer.from_pretrained(before_folder, trust_remote_code=False)
    prompts = held_out_prompts(config, load_prompts(config, tokenizer, config.evaluation.split), reporter)
    evaluator = make_evaluator(config, prompts, config.evaluation.split)
    folders = {first: before_folder, last: after_folder}
    answers, ablated = {}, {}
    with _placed(config, reporter) as placement:
        for policy, folder in folders.items():
            async with _generators(config, placement, folder, reporter) as pool:
                ask = _asking(Asker(config, pool, tokenizer, config.evaluation.num_samples), reporter)
                answers[policy] = await ask(names[policy], prompts)
                if policy == last:
                    save_answers(config, answers)
                    ablated = await _ablated_answers(config, ask, evaluator, prompts)
    publish_model(config, after_folder)
    summary, results = judged(config, evaluator, answers, reporter.start, reporter.update)
    summary["ablations"] = _ablations(evaluator, ablated, results[last])
    if json.loads((after_folder / "config.json").read_text(encoding="utf-8")).get("untrained_stand_ins"):
        summary["remarks"] = [UNTRAINED_STAND_INS]
    return {"summary": {"evaluation": summary}}


def _asking(asker: Asker, reporter: Reporter) -> Ask:
    """Asks, and shows how far it is."""

    async def ask(label: str, prompts: Sequence[Prompt], sample: bool = True) -> dict[str, StudyAnswers]:
        reporter.start(label, len(prompts), "prompt")
        return await asker.answers(prompts, sample, reporter.update)

    return ask


@contextmanager
def _placed(config: Config, reporter: Reporter) -> Iterator[Placement]:
    """Within it the generators have their bundles, `rollout.min` of them."""
    bundles = plan(config, {"rollout": for_evaluation(config).rollout.least})
    placement = place(bundles, config.placement, lambda text: reporter.line(f"evaluate: {text}"))
    try:
        yield placement
    finally:
        placement.release()


@asynccontextmanager
async def _generators(
    config: Config, placement: Placement, folder: Path, reporter: Reporter
) -> AsyncIterator[RolloutPool]:
    """Within it generators answer with the policy of a folder, which they load themselves: the driver may be too small
    for it. Those beyond `rollout.min` join when they have their nodes; those whose node is lost by now are left out.
    """

    def tell(text: str) -> None:
        reporter.line(f"evaluate: {text}")

    for index in placement.indices("rollout"):
        if placement.count("rollout") > 1 and not placement.has_node("rollout", index):
            tell(f"without rollout {index}: {placement.wanting('rollout', index)}")
            placement.remove("rollout", index)
    tell(f"starting the engines with {folder}")
    pool = await RolloutPool.start(config, placement, folder, Incidents(tell))
    try:
        async with (
            elastic(for_evaluation(config), pool, placement, None, tell),
            drained(config, {"rollout": pool}, placement, lambda: False, tell),
        ):
            yield pool
    finally:
        pool.stop()


def held_out_prompts(config: Config, prompts: Sequence[Prompt], reporter: Reporter) -> list[Prompt]:
    """One prompt of each item, at most `evaluation.max_studies`; says how many were left out."""
    kept = one_per_item(prompts)
    if len(kept) < len(prompts):
        reporter.line(
            f"evaluate: {len(prompts) - len(kept)} further questions about the same items are left out; "
            "the first of each item counts"
        )
    return kept[: config.evaluation.max_studies or len(kept)]


async def _ablated_answers(
    config: Config, ask: Ask, evaluator: Evaluator, prompts: Sequence[Prompt]
) -> dict[str, dict[str, StudyAnswers]]:
    """Part -> greedy answers where each item lacks it; none where the evaluator names no parts."""
    if not config.evaluation.ablations or not isinstance(evaluator, Ablating):
        return {}
    parts = evaluator.ablations(prompts)
    return {part: await ask(f"without {part}", withheld, sample=False) for part, withheld in parts.items()}


def _ablations(evaluator: Evaluator, answers: Mapping[str, Mapping[str, StudyAnswers]], full: Any) -> dict[str, Any]:
    """Paired change of the evaluator's metric when each part of the items is withheld."""
    if not isinstance(evaluator, Ablating):
        return {}
    metric = evaluator.ablation_metric
    return {
        part: evaluator.paired_gain(full, evaluator.evaluate(given), metric=metric).to_dict()
        for part, given in answers.items()
    }


def publish_model(config: Config, source: Path) -> None:
    """Copies the policy to RUN/model, with what the task's items add to it, complete or not at all."""
    target = config.folder / "model"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    items = task_items(config)
    if hasattr(items, "publish"):
        items.publish(temporary)
    seal(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
