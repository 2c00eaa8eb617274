"""timeline.json while the run goes, and over its lives."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actors.timeline import Timeline
from pipelines.timeline_file import FILE, TimelineFile


def test_it_is_written_while_the_run_goes(tmp_path: Path) -> None:
    timeline = Timeline()
    file = TimelineFile(timeline, tmp_path, print)

    async def run() -> None:
        with timeline.span("rollout 0", "generate group 1"):
            pass
        task = asyncio.create_task(file.keep(every_s=0.01))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if (tmp_path / FILE).is_file():
                break
        task.cancel()

    asyncio.run(run())
    names = [event["name"] for event in json.loads((tmp_path / FILE).read_text())["traceEvents"]]
    assert "generate group 1" in names


def test_writers_that_meet_leave_a_whole_file(tmp_path: Path) -> None:
    timeline, told = Timeline(), list[str]()
    for number in range(500):
        with timeline.span("rollout 0", f"generate group {number}"):
            pass
    with ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            pool.submit(TimelineFile(timeline, tmp_path, told.append).write)
    assert told == [] and len(json.loads((tmp_path / FILE).read_text())["traceEvents"]) == 502


def test_a_run_that_goes_on_keeps_that_of_its_earlier_life(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("earlier")
    TimelineFile(Timeline(), tmp_path, print).begin(7)
    assert (tmp_path / "timeline_to_7.json").read_text() == "earlier" and not (tmp_path / FILE).exists()
    (tmp_path / FILE).write_text("of another run")
    TimelineFile(Timeline(), tmp_path, print).begin(0)
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_takes_no_file_is_told_once_and_hides_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    TimelineFile(Timeline(), tmp_path / "gone", told.append).write()
    assert len(told) == 1 and told[0].startswith("no timeline: ")
