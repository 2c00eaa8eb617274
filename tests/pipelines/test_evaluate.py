"""Which held-out prompts are asked, how many at a time, and by whom they are judged. No engine is started."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medtvt_rl.config import Config, load_config
from medtvt_rl.evaluation.diagnosis import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from medtvt_rl.types import Prompt
from pipelines.answers import Asker, make_evaluator, prompts_at_once
from pipelines.evaluate import _ablated_answers, _evaluate, held_out_prompts
from pipelines.reporter import Reporter
from pipelines.stages import StageError, write_json

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(QUICKSTART, [f"run.root={tmp_path}"])


def prompt(prompt_id: str, item_id: str | None) -> Prompt:
    return Prompt(
        prompt_id=prompt_id, token_ids=np.ones(3, dtype=np.int32), item_id=item_id, ground_truth=f"truth of {prompt_id}"
    )


def test_each_study_is_asked_about_once(config: Config, tmp_path: Path) -> None:
    said = io.StringIO()
    prompts = [prompt("a", "a"), prompt("a#1", "a"), prompt("b", "b"), prompt("a#2", "a"), prompt("c", "c")]
    with Reporter(tmp_path, stream=said) as reporter:
        assert [p.prompt_id for p in held_out_prompts(config, prompts, reporter)] == ["a", "b", "c"]
        assert "2 further questions about the same studies are left out" in said.getvalue()
        config.evaluation.max_studies = 2
        assert [p.prompt_id for p in held_out_prompts(config, prompts, reporter)] == ["a", "b"]
        text = [prompt("x", None), prompt("y", None)]
        assert held_out_prompts(config, text, reporter) == text


class CountingPool:
    """Engines that never answer with anything but count what they are asked at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.num_left = 2

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        return None, None


def test_no_more_studies_are_under_way_than_keep_the_engines_full(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prompts_at_once(config, num_samples=4, num_generators=1) == 2 * 128 // 5
    config.rollout.engine.max_num_seqs = 5
    assert prompts_at_once(config, num_samples=4, num_generators=2) == 4
    pool: Any = CountingPool()
    tokenizer: Any = None

    async def texts(self: Asker, prompt: Prompt, group_id: int, num_completions: int, greedy: bool) -> tuple[str, ...]:
        await pool.generate(prompt, group_id, num_completions, greedy)
        return (prompt.prompt_id,) * num_completions

    monkeypatch.setattr(Asker, "_texts", texts)
    counted: list[int] = []
    asker = Asker(config, pool, tokenizer, num_samples=4)
    answers = asyncio.run(asker.answers([prompt(str(i), None) for i in range(20)], on_answer=counted.append))
    assert counted == list(range(1, 21))
    assert pool.most == 4
    assert answers["7"] == StudyAnswers(sampled=("7",) * 4, greedy="7") and len(answers) == 20


def test_evaluation_without_grpo_names_the_command_before_anything_starts(config: Config) -> None:
    (config.stage_folder("sft") / "model").mkdir(parents=True)
    write_json(config.stage_folder("sft") / "finished.json", {})
    (config.stage_folder("grpo") / "model").mkdir(parents=True)
    nobody: Any = None
    with pytest.raises(StageError, match=r"run `medtvt-rl grpo`.* or take grpo out of run.stages"):
        asyncio.run(_evaluate(config, nobody))


def test_plain_text_has_no_ablations_and_a_task_may_leave_its_evaluator_out(config: Config) -> None:
    config.task.evaluate = config.task.items = None
    evaluator = make_evaluator(config, [prompt("x", None)], "test")
    assert isinstance(evaluator, RewardEvaluator)
    nobody: Any = None
    assert asyncio.run(_ablated_answers(config, nobody, [])) == {}
