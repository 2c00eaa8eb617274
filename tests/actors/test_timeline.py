"""The timeline: spans of every actor in the Trace Event Format, and none over another."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from actors.timeline import Span, Timeline, in_lanes


def span(start_s: float, end_s: float) -> Span:
    return Span(row="r", name=f"{start_s}", start_s=start_s, end_s=end_s, failed=False)


def test_spans_that_overlap_lie_in_lanes_of_their_own() -> None:
    lanes = {each.name: lane for each, lane in in_lanes([span(0, 3), span(1, 2), span(2, 4), span(3, 5), span(3.5, 6)])}
    assert lanes == {"0": 1, "1": 2, "2": 2, "3": 1, "3.5": 3}


def test_a_timeline_has_a_row_per_actor_and_marks_what_failed(tmp_path: Path) -> None:
    timeline = Timeline()

    async def call(row: str, name: str, fails: bool = False) -> None:
        with timeline.span(row, name):
            await asyncio.sleep(0.01)
            if fails:
                raise RuntimeError("no")

    async def calls() -> None:
        same_time = (
            call("rollout 0", "generate group 1"),
            call("rollout 0", "generate group 2"),
            call("reward 0", "x"),
        )
        await asyncio.gather(*same_time)
        with pytest.raises(RuntimeError):
            await call("learner", "train_step", fails=True)

    asyncio.run(calls())
    timeline.write(tmp_path / "timeline.json")
    events: list[dict[str, Any]] = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    calls_made = [event for event in events if event["ph"] == "X"]
    assert sorted(names.values()) == ["learner", "reward 0", "rollout 0"]
    assert {names[e["pid"]]: e["cat"] for e in calls_made}["learner"] == "failed"
    lanes = {e["name"]: e["tid"] for e in calls_made if names[e["pid"]] == "rollout 0"}
    assert sorted(lanes.values()) == [1, 2]
    assert all(e["dur"] >= 9e3 for e in calls_made), "microseconds"
