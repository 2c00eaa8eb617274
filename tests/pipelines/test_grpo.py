"""What the GRPO stage checks before it starts, and what it says while it runs."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stored_examples import a_config, prompt_of
from test_journal import trained_step, training_group

from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config, TaskConfig
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.evaluation.config import AlarmConfig
from medtvt_rl.faults import Incident, RoleLostError
from medtvt_rl.rollout.config import EngineConfig, RolloutConfig, SamplingConfig
from medtvt_rl.types import Prompt, ReferenceHeader
from pipelines import grpo
from pipelines.checkpoints import CheckpointStore
from pipelines.grpo import Layout, load_prompts
from pipelines.grpo_roles import LoopResult
from pipelines.reporter import METRICS_FILE, Reporter, read_metrics
from pipelines.step_report import StepReport
from pipelines.timeline_file import TimelineFile


def prompts_of_ten_tokens(config: Config, tokenizer: object, split: str) -> Sequence[Prompt]:
    return [Prompt(prompt_id="p", token_ids=np.arange(10, dtype=np.int32), item_id=None, ground_truth="")]


def test_a_prompt_needs_room_for_its_completion_and_the_token_that_scoring_samples() -> None:
    rollout = RolloutConfig(sampling=SamplingConfig(max_new_tokens=20), engine=EngineConfig(max_model_len=31))
    config = Config(task=TaskConfig(prompts=f"{__name__}:prompts_of_ten_tokens"), rollout=rollout)
    tokenizer: Any = None
    assert len(load_prompts(config, tokenizer, "train")) == 1
    config.rollout.engine = replace(rollout.engine, max_model_len=30)
    with pytest.raises(ValueError, match=r"prompt study-[0-9a-f]{12} has 10 tokens, .* leaves 9"):
        load_prompts(config, tokenizer, "train")


class Notes:
    """Reporter and journal that keep the lines, the steps of the rows, and the ids."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.given_up: list[int] = []
        self.rows: list[int] = []
        self.told: set[str] = set()

    def line(self, text: str) -> None:
        self.lines.append(text)

    def scalars(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(step)
        self.told |= set(metrics)

    def update(self, *what: object, **metrics: float) -> None:
        self.told |= set(metrics)

    def write(self, *what: object) -> None: ...

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        self.given_up.append(group_id)


def test_failed_completions_skipped_steps_and_discarded_groups_are_named() -> None:
    notes = Notes()
    report = StepReport(notes, notes, Alarms(AlarmConfig()), Incidents(notes.line))  # type: ignore[arg-type]
    metrics = {"reward/total": 0.0, "staleness/max": 0.0, "kl": 0.0, "entropy": 0.0}
    report.step(trained_step(0, training_group(3), **metrics))
    assert not notes.lines
    sick = training_group(5, (None, "jaccard: boom", None))
    report.step(trained_step(1, training_group(4), sick, **metrics, skipped=1.0))
    assert "e.g. 5/1: jaccard: boom" in notes.lines[0]
    assert "step 1 changed nothing" in notes.lines[1] and notes.lines[1].endswith("groups 4, 5")
    report.discarded(17, "p", "ActorError: it died\nend of log")
    assert notes.lines[2] == "grpo: group 17 discarded: ActorError: it died" and notes.given_up == [17]
    report.replaced(training_group(18).group)
    assert len(notes.lines) == 3 and notes.given_up == [17, 18]
    report.nonfinite(2, [training_group(19), training_group(20)], "the loss of group 19 is not finite", 0)
    assert notes.lines[3].startswith("grpo: step 2 goes on without groups 19, 20: the loss of group 19")
    assert notes.given_up == [17, 18, 19, 20]
    report.nonfinite(2, [training_group(21)], "a gradient", 3)
    assert notes.lines[4].startswith("grpo: step 2 stopped after update 3 because of groups 21: a gradient")
    assert notes.given_up == [17, 18, 19, 20]
    report.step(trained_step(2, training_group(21), **metrics, skipped=0.0, sync_gap_max=0.5))
    assert notes.lines[5].startswith("grpo: ALARM: step 2: engines and learner disagree")
    assert report.sounded == [notes.lines[5].removeprefix("grpo: ALARM: ")]


def test_held_out_answers_that_come_late_have_a_row_and_sound_the_alarms() -> None:
    notes = Notes()
    report = StepReport(notes, notes, Alarms(AlarmConfig()), Incidents(notes.line))  # type: ignore[arg-type]
    for version, value in ((0, 0.9), (4, 0.5)):
        report.measured({"held_out/version": float(version), "held_out/findings_f1_lab": value})
    assert notes.rows == [0, 3]
    (line,) = notes.lines
    assert line.startswith("grpo: ALARM: step 3: the reasoning rots: held_out/findings_f1_lab fell from 0.9 to 0.5")


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_drift_that_nobody_measured_is_not_told(with_reference: bool) -> None:
    notes, trained = Notes(), training_group(3)
    if with_reference:
        header = ReferenceHeader(kl=np.zeros(3, np.float32), seconds=0.1)
        trained = replace(trained, group=replace(trained.group, reference_header=header))
    report = StepReport(notes, notes, Alarms(AlarmConfig()), Incidents(notes.line))  # type: ignore[arg-type]
    report.step(trained_step(0, trained, **{"reward/total": 0.0, "staleness/max": 0.0, "kl": 0.0, "entropy": 0.0}))
    assert "entropy" in notes.told and ("kl" in notes.told) == with_reference


def test_an_alarm_that_began_with_an_infinite_value_is_not_new_after_a_resume(tmp_path: Path) -> None:
    notes, ill = Notes(), {"sync_gap_max": float("inf")}
    with Reporter(tmp_path, stream=io.StringIO()) as reporter:
        reporter.scalars("grpo", 0, ill)
    report = StepReport(notes, notes, Alarms(AlarmConfig()), Incidents(notes.line))  # type: ignore[arg-type]
    report.show_again(read_metrics(tmp_path / METRICS_FILE))
    assert len(report.sounded) == 1
    report.measured({"held_out/version": 1.0, **ill})
    assert len(report.sounded) == 1 and not notes.lines


INCIDENT = Incident(
    role="learner",
    index=0,
    node="10.0.0.7",
    cause="ActorDiedError: killed",
    log="learner_0.log",
    log_tail=(),
    outcome="replaced",
    seconds=1.0,
    groups=0,
)


class EndedLoop:
    """A loop that has done its steps."""

    def __init__(self, *_: object) -> None: ...

    async def run(self) -> LoopResult:
        return LoopResult(rewards=[0.5])

    def keep_soon(self) -> bool:
        return False


class LastGang:
    """Learners that are lost, and replaced, while they write the policy."""

    def __init__(self, incidents: Incidents) -> None:
        self.incidents, self.saved = incidents, list[Path]()

    async def save_model(self, folder: Path) -> None:
        self.incidents.add(INCIDENT)
        self.saved.append(folder)


def a_layout(tmp_path: Path) -> Any:
    """One that has no model and no actors."""
    layout: Any = Layout.__new__(Layout)
    config = a_config(tmp_path, "grpo.held_out.every_steps=0")
    layout._config, layout._tokenizer, layout._prompts, layout._stop = config, None, [prompt_of(1)], grpo.Stop()
    layout._folder = tmp_path
    layout._reporter, layout._incidents = Reporter(config.folder, stream=io.StringIO()), Incidents(print)
    layout._timeline_file = TimelineFile(Timeline(), config.folder, print)
    return layout


async def nothing() -> None: ...


def test_a_rank_that_is_lost_while_the_policy_is_written_is_journalled_and_one_later_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = a_layout(tmp_path)
    config = layout._config
    monkeypatch.setattr(grpo, "GrpoLoop", EndedLoop)
    keeper, rollouts = SimpleNamespace(newest=None, close=nothing), SimpleNamespace(shares=list)
    placement, learner = SimpleNamespace(kinds=lambda role: {}), LastGang(layout._incidents)
    with layout._reporter:
        summary = asyncio.run(layout._loop(None, placement, rollouts, None, None, learner, keeper))
    assert learner.saved == [config.stage_folder("grpo") / "model"] and summary["restarts/learner"] == 1.0
    layout._incidents.add(INCIDENT)
    (event,) = (config.folder / "journal" / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["outcome"] == "replaced"


class MuteStore(CheckpointStore):
    """A store that was taken away once the run had begun."""

    def versions(self) -> list[int]:
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("kept", [20, None])
def test_a_store_out_of_reach_does_not_hide_why_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int | None
) -> None:
    layout = a_layout(tmp_path)
    config, store = layout._config, MuteStore(str(tmp_path / "checkpoints"))
    layout._store = store
    found = None if kept is None else SimpleNamespace(version=kept)

    async def placed(*_: object) -> Any:
        return SimpleNamespace(release=lambda: None, drawing=lambda: "")

    async def lost(*_: object) -> None:
        raise RoleLostError("the learner is lost: killed", (INCIDENT,))

    for name, answer in (("identity_of", None), ("find_resume", found)):
        monkeypatch.setattr(grpo, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(grpo, "placed", placed)
    monkeypatch.setattr(layout, "_start", lost)
    with layout._reporter, pytest.raises(RoleLostError, match="the learner is lost: killed; ") as ended:
        asyncio.run(layout.run())
    place = None if kept is None else f"{tmp_path}/checkpoints/step_000020"
    assert ("there is no checkpoint yet" if place is None else f"goes on from {place}; report") in str(ended.value)
    assert json.loads((config.folder / "failure.json").read_text())["checkpoint"] == place
