"""A role that is gone ends the run: with a checkpoint of the last step, every group kept for a resume, and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_grpo_loop import FakeCluster, FakeEngines, FakeScorers, Told, run_loop

from medtvt_rl.config import Config, RunConfig
from medtvt_rl.faults import Incident, RoleLostError
from pipelines.failure import forget_failure, write_failure

LOST = RoleLostError("no reward actor is left; reward 0 is lost: ActorDiedError", ())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_scorers_that_are_gone_end_the_run_with_a_checkpoint_and_no_group_is_given_up(
    monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    cluster, told, later = FakeCluster(), Told(), FakeCluster(1)
    score = FakeScorers.score

    async def score_until(scorers: FakeScorers, group: int) -> object:
        if len(told.metrics) >= 3:
            raise LOST
        return await score(scorers, group)

    monkeypatch.setattr(FakeScorers, "score", score_until)
    with pytest.raises(RoleLostError, match="no reward actor is left"):
        run_loop(cluster, told, max_staleness=max_staleness)
    steps = len(told.metrics)
    assert cluster.checkpoints == [steps] == [cluster.version] and 3 <= steps < 6 and not told.given_up
    monkeypatch.setattr(FakeScorers, "score", score)
    later.version = steps
    run_loop(later, Told(first_step=steps), state=cluster.states[steps], max_staleness=max_staleness)
    trained = [group for step in [*cluster.trained, *later.trained] for group in step]
    assert sorted(trained) == list(range(24))


@pytest.mark.parametrize("call", ["update_weights", "stats", "score"])
def test_generators_that_are_gone_let_the_step_in_hand_end_first(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    cluster, told = FakeCluster(), Told()
    original = getattr(FakeEngines, call)

    async def call_until(engines: FakeEngines, *arguments: object) -> object:
        if len(cluster.trained) >= 3:
            cluster.version = len(cluster.trained)  # of the learner, whose weights nobody took
            raise LOST
        return await original(engines, *arguments)

    monkeypatch.setattr(FakeEngines, call, call_until)
    with pytest.raises(RoleLostError):
        run_loop(cluster, told, max_staleness=1)
    assert cluster.checkpoints == [len(cluster.trained)] == [len(told.metrics)]
    assert not told.given_up


def test_the_report_names_role_node_cause_log_and_where_the_run_goes_on(tmp_path: Path) -> None:
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))
    newest = f"{config.checkpoint_root}/step_000020"
    incident = Incident(
        role="reward",
        index=0,
        node="10.0.0.7",
        cause="ActorDiedError: killed",
        log="reward_0.log",
        log_tail=("out of memory",),
        outcome="given up",
        seconds=1.0,
        groups=1,
    )
    told = write_failure(config, newest, RoleLostError("no reward actor is left", (incident,)))
    assert str(told) == (
        f"no reward actor is left; the same command goes on from {newest}; report: {config.folder / 'failure.json'}"
    )
    report = json.loads((config.folder / "failure.json").read_text())
    assert report["checkpoint"] == newest and report["reason"] == "no reward actor is left"
    assert report["incidents"][0] == {**report["incidents"][0], "node": "10.0.0.7", "log_tail": ["out of memory"]}
    forget_failure(config)
    assert not (config.folder / "failure.json").exists()
