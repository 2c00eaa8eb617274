"""What `medtvt-rl bench` starts from and waits for. Nothing here starts an actor."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actors.bundles import Bundle
from actors.placement import PlacementError
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.roles import PlacementConfig
from pipelines import bench, replay
from pipelines.reporter import Reporter


@pytest.mark.parametrize("command", ["bench", "replay"])
def test_a_wait_for_a_place_is_told_and_follows_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))
    config.placement.fallback_after_s = 30.0
    given: list[PlacementConfig] = []

    def place(bundles: Sequence[Bundle], settings: PlacementConfig, report: Callable[[str], None]) -> None:
        given.append(settings)
        report("placement waits")
        raise PlacementError("no node")

    monkeypatch.setattr("actors.placement.place", place)
    monkeypatch.setattr("pipelines.replay.place", place)
    monkeypatch.setattr("pipelines.grpo.load_prompts", lambda *_: [])
    byte_tokenizer().save_pretrained(tmp_path)
    shown = io.StringIO()
    with Reporter(tmp_path, stream=shown) as reporter, pytest.raises(PlacementError):
        if command == "bench":
            bench.run(config, tmp_path, tmp_path / "timings.json", reporter)
        else:
            replay.run(config, [{"step": 0}], reporter)
    assert given == [config.placement] and "placement waits" in shown.getvalue()
