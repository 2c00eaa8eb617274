"""The engine's loop over a fake vLLM: a request that vLLM refuses is the fault of its group alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medtvt_rl.rollout import vllm_engine
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.vllm_core import SampledTokens
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Prompt


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
