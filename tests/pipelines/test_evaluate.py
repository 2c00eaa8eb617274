"""Which held-out prompts are asked, how many at a time, and by whom they are judged. No engine is started."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.bundles import Bundle
from actors.supervision import Incidents
from medtvt_rl.config import Config, load_config
from medtvt_rl.evaluation.diagnosis import DiagnosisEvaluator
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from medtvt_rl.types import Prompt
from pipelines import evaluate
from pipelines.answers import Ablating, Asker, make_evaluator, prompts_at_once
from pipelines.evaluate import (
    _ablated_answers,
    _ablations,
    _evaluate,
    _generators,
    _placed,
    held_out_prompts,
    publish_model,
)
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
        assert "2 further questions about the same items are left out" in said.getvalue()
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


def test_more_studies_are_under_way_once_more_engines_serve(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.rollout.engine.max_num_seqs = 5
    pool: Any = CountingPool()
    pool.num_left = 1

    async def texts(self: Asker, prompt: Prompt, group_id: int, num_completions: int, greedy: bool) -> tuple[str, ...]:
        await pool.generate(prompt, group_id, num_completions, greedy)
        return (prompt.prompt_id,) * num_completions

    def joins(answered: int) -> None:
        if answered == 7:
            assert pool.most == 2
            pool.num_left = 3

    monkeypatch.setattr(Asker, "_texts", texts)
    nobody: Any = None
    asker = Asker(config, pool, nobody, num_samples=4)
    answers = asyncio.run(asker.answers([prompt(str(i), None) for i in range(40)], on_answer=joins))
    assert len(answers) == 40 and pool.most == 6


class Generators(CountingPool):
    """A pool whose generators serve at once."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.serving, self.on_their_way, self.ended = list(range(num)), set[int](), False

    async def add(self, index: int) -> bool:
        self.serving.append(index)
        return True

    def stop(self) -> None:
        self.ended = True


class Seats:
    """Bundles, all of them on nodes."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self.taken, self.released, self.without_node = [bundle.index for bundle in bundles], False, set[int]()

    def count(self, role: str) -> int:
        return len(self.taken)

    def wanting(self, role: str, index: int) -> str:
        return "a GPU"

    def remove(self, role: str, index: int) -> None:
        self.taken.remove(index)

    def add(self, bundle: Bundle, room_first: bool = False) -> None:
        self.taken.append(bundle.index)

    def indices(self, role: str) -> list[int]:
        return list(self.taken)

    def has_node(self, role: str, index: int) -> bool:
        return index not in self.without_node

    def has_room(self, bundle: Bundle) -> bool:
        return True

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize(
    ("settings", "first", "later"),
    [
        (["evaluation.num_generators=0", "rollout.num_generators=3", "rollout.min=1", "rollout.scaling=need"], 1, 3),
        (["evaluation.num_generators=4", "rollout.num_generators=3", "rollout.min=2"], 2, 4),
        (["evaluation.num_generators=1", "rollout.num_generators=3", "rollout.min=2"], 1, 1),
        (["evaluation.num_generators=0", "rollout.num_generators=3", "rollout.max=5"], 3, 3),
    ],
)
def test_rollout_min_generators_are_enough_to_begin_and_the_others_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], first: int, later: int
) -> None:
    config = load_config(QUICKSTART, [f"run.root={tmp_path}", "rollout.scaling_interval_s=0.01", *settings])
    placed: list[Seats] = []

    def place(bundles: Sequence[Bundle], *_: Any) -> Seats:
        placed.append(Seats(bundles))
        return placed[0]

    async def start(config: Config, seats: Seats, folder: Path, incidents: Incidents) -> Generators:
        return Generators(len(seats.taken))

    @asynccontextmanager
    async def nothing_leaves(*_: Any) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(evaluate, "place", place)
    monkeypatch.setattr(evaluate, "drained", nothing_leaves)
    monkeypatch.setattr(evaluate.RolloutPool, "start", start)

    async def run() -> None:
        with Reporter(tmp_path, stream=io.StringIO()) as reporter:
            with _placed(config, reporter) as placement:
                async with _generators(config, placement, tmp_path, reporter) as pool:
                    assert len(pool.serving) == first
                    for _ in range(200):
                        await asyncio.sleep(0.01)
                        if len(pool.serving) == later:
                            break
                    await asyncio.sleep(0.05)
                    assert pool.serving == list(range(later)) == placed[0].taken
                ended: Any = pool
                assert ended.ended and not placed[0].released
                placed[0].without_node.add(0)
                async with _generators(config, placement, tmp_path, reporter):
                    left = list(range(later))[1 if later > 1 else 0 :]
                    assert placed[0].taken == left, "who lost its node is left out, but for the only one"
            assert placed[0].released

    asyncio.run(run())


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
    assert asyncio.run(_ablated_answers(config, nobody, evaluator, [])) == {}
    assert _ablations(evaluator, {}, None) == {}


class Lengths:
    """An evaluator of one's own: the mean length of the greedy answers."""

    ablation_metric = "length"

    def ablations(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        return {"tail": [replace(prompt, item_id=f"{prompt.item_id} without tail") for prompt in prompts]}

    def evaluate(self, answers: dict[str, StudyAnswers]) -> float:
        return float(np.mean([len(answer.greedy) for answer in answers.values()]))

    def paired_gain(self, before: float, after: float, metric: str = "length") -> Any:
        return SimpleNamespace(to_dict=lambda: {"metric": metric, "value": after - before})


def test_what_the_parts_of_an_item_are_worth_is_the_evaluator_s_to_say(config: Config) -> None:
    async def ask(label: str, prompts: Sequence[Prompt], sample: bool = True) -> dict[str, StudyAnswers]:
        assert label == "without tail" and not sample
        return {each.prompt_id: StudyAnswers(sampled=(), greedy=str(each.item_id)) for each in prompts}

    prompts = [prompt("x", "one"), prompt("y", "two")]
    answers = asyncio.run(_ablated_answers(config, ask, Lengths(), prompts))
    found = _ablations(Lengths(), answers, 3.0)
    assert found == {"tail": {"metric": "length", "value": float(len(" without tail"))}}
    config.evaluation.ablations = False
    assert asyncio.run(_ablated_answers(config, ask, Lengths(), prompts)) == {}


def test_of_studies_each_modality_is_withheld_once(config: Config) -> None:
    store: Any = SimpleNamespace(study_ids=lambda split: ["s"])
    evaluator = DiagnosisEvaluator(config, "test", store)
    assert isinstance(evaluator, Ablating)
    withheld = evaluator.ablations([prompt("s", "s")])
    assert {name: [each.item_id for each in some] for name, some in withheld.items()} == {
        name: [f"s|without={name}"] for name in ("ecg", "cxr", "lab")
    }
    assert withheld["ecg"][0].prompt_id == "s"


class Source:
    """An item source that adds a file to the model folder."""

    def __init__(self, config: Config) -> None:
        self._name = config.run.name

    def publish(self, folder: Path) -> None:
        (folder / "table.json").write_text(self._name)


def test_the_items_add_to_the_final_model_what_it_needs_besides(config: Config, tmp_path: Path) -> None:
    source = tmp_path / "trained"
    source.mkdir()
    (source / "config.json").write_text("{}")
    config.task.items = f"{__name__}:Source"
    publish_model(config, source)
    assert (config.folder / "model" / "table.json").read_text() == "quickstart"
    for items in (None, f"{__name__}:plain_source"):
        config.task.items = items
        publish_model(config, source)
        assert sorted(path.name for path in (config.folder / "model").iterdir()) == ["checksums.json", "config.json"]


def plain_source(config: Config) -> SimpleNamespace:
    return SimpleNamespace(get=lambda item_id: {})
