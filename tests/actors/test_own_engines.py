"""A rollout engine and a trainer of one's own, named by dotted paths, behind the real actors; no Ray is started."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors import learner_worker, rollout_generator
from actors.learner_worker import _build_learner
from actors.rollout_generator import RolloutGenerator
from medtvt_rl.config import Config
from medtvt_rl.learner.engine import EngineSettings
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.types import Completion, Prompt, RolloutGroup
from tests.learner.tiny_policy import PlainEngine
from tests.tiny_llama import tiny_llama

PROMPT = Prompt(prompt_id="p", token_ids=np.array([1, 2], np.int32), item_id="i", ground_truth="t")


class Echo:
    """An engine whose completions are the prompt."""

    broken = None

    def __init__(self, model_folder: str, config: Config, version: int) -> None:
        self.model_folder, self.version, self.items = model_folder, version, list[Any]()

    def submit(
        self, prompt: Prompt, item: Any, group_id: int, num_completions: int, run_seed: int,
        sampling: SamplingConfig, greedy: bool = False, first_index: int = 0, wave: Any = None,
    ) -> Future[RolloutGroup]:  # fmt: skip
        self.items.append(item)
        ids = prompt.token_ids
        completions = tuple(
            Completion(
                completion_id=f"{group_id}/{first_index + index}",
                token_ids=ids,
                behaviour_logprobs=np.zeros(len(ids), np.float32),
                policy_versions=np.full(len(ids), self.version, np.int32),
                finish_reason="stop",
            )
            for index in range(num_completions)
        )
        future: Future[RolloutGroup] = Future()
        future.set_result(RolloutGroup(group_id=group_id, prompt=prompt, completions=completions))
        return future

    def stats(self) -> dict[str, float]:
        return {"tokens_generated": 4.0}


class Items:
    def __init__(self, config: Config) -> None: ...

    def get(self, item_id: str) -> dict[str, Any]:
        return {"x": item_id}


def own_trainer(policy: Any, settings: EngineSettings, device: torch.device) -> PlainEngine:
    return PlainEngine(policy, clipping=settings.gradient_clipping, weight_decay=settings.weight_decay)


def test_a_generator_runs_on_the_engine_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_generator, "redirect_output", lambda path: path)
    config = Config()
    config.rollout.make_engine, config.task.items = f"{__name__}:Echo", f"{__name__}:Items"
    kind: Any = RolloutGenerator
    generator = kind.__ray_metadata__.modified_class("folder", config, 0, version=7)
    generator._start()
    header, group = asyncio.run(generator.generate(PROMPT, 5, 2))
    assert (header.lengths, header.oldest_version, header.newest_version) == ((2, 2), 7, 7)
    assert [completion.completion_id for completion in group.completions] == ["5/0", "5/1"]
    assert generator._engine.items == [{"x": "i"}] and generator._engine.model_folder == "folder"
    assert asyncio.run(generator.stats()) == {"tokens_generated": 4.0}
    assert asyncio.run(generator.health())["ok"]


def test_a_learner_trains_on_the_trainer_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_worker, "redirect_output", lambda path: path)
    tiny_llama(20).save_pretrained(tmp_path)
    config = Config()
    config.learner.make_engine, config.task.items = f"{__name__}:own_trainer", None
    config.learner.gradient_clipping = 0.25
    learner = _build_learner(config, str(tmp_path), torch.device("cpu"), lambda phase: None)
    engine: Any = learner.engine
    assert isinstance(engine, PlainEngine) and engine._clipping == 0.25
    completion = SimpleNamespace(token_ids=np.array([3, 4], np.int32))
    text: Any = Prompt(prompt_id="p", token_ids=np.array([1, 2], np.int32), item_id=None, ground_truth="")
    logprobs = learner.score(text, completion)  # type: ignore[arg-type]
    assert logprobs.shape == (2,) and (logprobs < 0).all()


class Prepared:
    """Makes engines, and notes what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prepare(self, config: Config) -> None:
        self.asked.append("prepare")

    def __call__(self, model_folder: str, config: Config, version: int) -> Echo:
        self.asked.append("make")
        return Echo(model_folder, config, version)


prepared = Prepared()


def test_a_spare_does_ahead_what_the_maker_of_engines_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_generator, "redirect_output", lambda path: path)
    monkeypatch.setattr(rollout_generator, "has_room", lambda *_: False)
    config = Config()
    config.rollout.make_engine, config.task.items = f"{__name__}:prepared", None
    kind: Any = RolloutGenerator
    generator = kind.__ray_metadata__.modified_class("folder", config, 0)
    assert not asyncio.run(generator.warm(None, False)) and prepared.asked == []
    assert asyncio.run(generator.warm(None, True)) and prepared.asked == ["prepare"]
    generator._start()
    assert prepared.asked == ["prepare", "prepare", "make"]
    assert asyncio.run(generator.health())["ok"]


@pytest.mark.parametrize("own", [False, True])
def test_a_spare_learner_imports_the_trainer_that_is_named_alone(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(learner_worker, "redirect_output", lambda path: path)
    monkeypatch.setattr(learner_worker, "import_ahead", lambda names, devices, prepare: imported.extend(names))
    config = Config()
    if own:
        config.learner.make_engine = f"{__name__}:own_trainer"
    kind: Any = learner_worker.LearnerWorker
    assert kind.__ray_metadata__.modified_class(0, 1, config).warm(None, True)
    assert (imported[0] == "deepspeed") != own
    assert (__name__ in imported) == own and ("medtvt_rl.learner.deepspeed_engine" in imported) != own
