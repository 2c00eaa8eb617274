"""The engine's loop over a fake vLLM: whose fault it is when vLLM refuses a request."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from medtvt_rl.rollout import vllm_engine
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.pending import EngineBrokenError, Wave
from medtvt_rl.rollout.vllm_core import SampledTokens
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Prompt
from medtvt_rl.weights import WeightBuffer, pack_weights


class FakeCore:
    """Finishes every request in its first step; refuses the third request of a prompt named "bad"."""

    def __init__(self, *arguments: object) -> None:
        self.added: dict[str, str] = {}
        self.aborted: list[str] = []

    def render(self, prompt: Prompt, item: object) -> str:
        return prompt.prompt_id

    def add(self, request_id: str, rendered: str, *arguments: object, **options: object) -> str:
        if rendered == "bad" and list(self.added.values()).count("bad") == 2:
            raise ValueError("vLLM refuses this request")
        self.added[request_id] = rendered
        return request_id

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for name in request_ids:
            del self.added[name]

    def step(self) -> list[SampledTokens]:
        finished, self.added = list(self.added), {}
        ones = np.ones(1)
        return [
            SampledTokens(
                request_id=name,
                token_ids=ones.astype(np.int32),
                logprobs=ones.astype(np.float32),
                finish_reason="stop",
            )
            for name in finished
        ]

    def verify(self, buffer: WeightBuffer) -> int:
        return buffer.verify()

    def drop_caches(self) -> None: ...

    def close(self) -> None: ...


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")


def test_a_refused_request_fails_its_group_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "VllmCore", FakeCore)
    with VllmEngine("folder", EngineConfig()) as engine:
        futures = [
            engine.submit(prompt(name), None, group_id, 4, 0, SamplingConfig())
            for group_id, name in enumerate(("good", "bad", "good"))
        ]
        with pytest.raises(ValueError, match="vLLM refuses this request"):
            futures[1].result(10)
        assert all(len(futures[i].result(10).completions) == 4 for i in (0, 2))
        core: Any = engine._core
        assert len(core.aborted) == 2
        assert engine.broken is None and engine.stats()["num_running"] == 0
        assert engine.submit(prompt("good"), None, 9, 2, 0, SamplingConfig()).result(10).group_id == 9


class RefusingCore(FakeCore):
    """Requests stay in flight until an update; from then on none is taken."""

    refuses = False
    stepped: threading.Event

    def add(self, *arguments: Any, **options: object) -> str:
        if self.refuses:
            raise RuntimeError("vLLM takes no request")
        return super().add(*arguments, **options)

    def step(self) -> list[SampledTokens]:
        self.stepped.set()
        return []

    def load(self, buffer: object) -> None: ...

    def drop_caches(self) -> None:
        self.refuses = True


def test_requests_that_cannot_be_restarted_after_an_update_break_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    RefusingCore.stepped = threading.Event()
    monkeypatch.setattr(vllm_engine, "VllmCore", RefusingCore)
    with VllmEngine("folder", EngineConfig()) as engine:
        future = engine.submit(prompt("good"), None, 0, 4, 0, SamplingConfig())
        assert RefusingCore.stepped.wait(10)
        with pytest.raises(EngineBrokenError, match="version 1 failed half-way"):
            engine.update_weights(pack_weights(1, [("w", torch.zeros(1))]), "restart")
        with pytest.raises(EngineBrokenError, match="vLLM takes no request"):
            future.result(10)
        with pytest.raises(EngineBrokenError):
            engine.submit(prompt("good"), None, 1, 4, 0, SamplingConfig())


def test_a_later_part_of_a_group_has_the_ids_and_seeds_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "VllmCore", FakeCore)
    with VllmEngine("folder", EngineConfig()) as engine:
        group = engine.submit(prompt("good"), None, 7, 3, 0, SamplingConfig(), first_index=5).result(10)
        assert [completion.completion_id for completion in group.completions] == ["7/5", "7/6", "7/7"]
        with pytest.raises(ValueError, match="from index -1 on"):
            engine.submit(prompt("good"), None, 7, 3, 0, SamplingConfig(), first_index=-1)


def test_a_wave_starts_when_it_is_complete_and_in_id_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "VllmCore", NotingCore)
    NotingCore.rendered = []
    wave, other = Wave(number=1, size=4), Wave(number=2, size=1)
    with VllmEngine("folder", EngineConfig()) as engine:

        def submit(group_id: int, wave: Wave | None) -> Any:
            return engine.submit(prompt(str(group_id)), None, group_id, 2, 0, SamplingConfig(), wave=wave)

        members = [submit(group_id, wave) for group_id in (7, 5)]
        submit(9, None).result(10)
        submit(8, other).result(10)
        assert not any(member.done() for member in members), "two of four are missing"
        members.append(submit(6, wave))
        engine.excuse(wave)
        for member in members:
            member.result(10)
        assert NotingCore.rendered == ["9", "no caches", "8", "no caches", "5", "6", "7"]
        assert not engine._excused


class NotingCore(FakeCore):
    """Notes the prompts in the order in which they start."""

    rendered: list[str]

    def render(self, prompt: Prompt, item: object) -> str:
        self.rendered.append(prompt.prompt_id)
        return prompt.prompt_id

    def drop_caches(self) -> None:
        self.rendered.append("no caches")
