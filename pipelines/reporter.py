"""What a person sees of a run while it goes, and what the report draws afterwards.

Owns: the progress of each stage on the terminal (bars) or in a log (few plain lines), `metrics.jsonl` and the
TensorBoard files of the run folder. Does not own: what is measured, nor the words of libraries (medtvt_rl/logs.py).
One Reporter belongs to the driver of a run; actors return numbers and never print.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pipelines.json_lines import keep_rows, read_rows

METRICS_FILE = "metrics.jsonl"


@dataclass(slots=True, kw_only=True)
class _Stage:
    """What is under way. `said_s` and `said_done` are of the last plain line about it."""

    name: str
    total: int | None
    unit: str
    started_s: float
    task: TaskID | None = None
    done: int = 0
    said_s: float = 0.0
    said_done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Reporter:
    """Progress, scalars and lines of one run. One thing is under way at a time: starting the next ends the one before.

    Args:
        folder: the run folder; metrics.jsonl is appended to, so that a resumed run continues its curves.
        stream: where a person reads, stdout by default; bars are drawn only if it is a terminal.
        interval_s: plain lines about one stage are this far apart, or a fifth of it where a tenth of the work was
            done meanwhile.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        stream: IO[str] | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._interval_s = interval_s
        self._clock = clock
        self._stage: _Stage | None = None
        self._progress: Progress | None = None
        self._metrics = _open_for_append(self.folder / METRICS_FILE)
        self._events = EventFileWriter(str(self.folder / "tensorboard"), flush_secs=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, stage: str, total: int | None = None, unit: str = "step") -> None:
        """Opens `stage` with `total` units of work (None or 0: unknown); `update` then speaks of it until `finish`."""
        self._end_stage()
        total = total or None
        opened = _Stage(name=stage, total=total, unit=unit, started_s=self._clock(), said_s=self._clock())
        if self._console.is_terminal:
            opened.task = self._bars().add_task(stage, total=total, count="0", words="")
        elif total:
            self.line(f"{stage}: {total} {_plural(unit, total)}")
        else:
            self.line(f"{stage}: started")
        self._stage = opened

    def update(self, done: int, *, total: int | None = None, **metrics: float) -> None:
        """`done` units of what is under way are finished; `metrics` are shown beside it, and not stored.

        Args:
            total: the units of work, where they were not known at the start.

        Raises:
            ValueError: nothing is under way.
        """
        stage = self._stage
        if stage is None:
            raise ValueError("update: nothing is under way; call start(stage, total, unit) first")
        stage.done, stage.total = done, total or stage.total
        stage.metrics.update(metrics)
        if stage.task is not None and self._progress is not None:
            words = _words(stage.metrics)
            self._progress.update(stage.task, completed=done, total=stage.total, count=_count(stage), words=words)
        elif self._due(stage):
            stage.said_s, stage.said_done = self._clock(), done
            self.line(self._plain(stage))

    def line(self, text: str) -> None:
        """Prints one line, above the bars if there are any; `text` is taken as it is, without markup."""
        self._console.print(text, markup=False)

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Appends `values` at `step` to metrics.jsonl, and to TensorBoard as `stage`/name; shows nothing.

        NaN becomes null in metrics.jsonl, an infinite value "inf" or "-inf"; curves have a gap there.
        """
        now = time.time()
        row: dict[str, object] = {"stage": stage, "step": step, "time": round(now, 3)}
        row.update((name, _stored(value)) for name, value in values.items())
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        summary = Summary(value=[Summary.Value(tag=f"{stage}/{k}", simple_value=float(v)) for k, v in values.items()])
        self._events.add_event(Event(wall_time=now, step=step, summary=summary))

    def forget(self, stage: str, from_step: int) -> None:
        """Drops the stage's rows of `from_step` and later from metrics.jsonl: they are made again."""
        self._metrics.close()
        path = self.folder / METRICS_FILE
        keep_rows(path, lambda row: row.get("stage") != stage or int(row.get("step", -1)) < from_step)
        self._metrics = _open_for_append(path)

    def finish(self, stage: str, seconds: float | None = None) -> float:
        """Ends what is under way and says how long `stage` took.

        Args:
            stage: what is under way, or a longer stage of which that was the last part.
            seconds: what it took; by default measured since what is under way started.

        Returns:
            The seconds said.
        """
        ended = self._stage
        if ended is not None and ended.name != stage:
            self._end_stage()
        if seconds is None:
            seconds = self._clock() - ended.started_s if ended is not None else 0.0
        parts = [f"{stage}: done in {seconds:.1f} s"]
        if ended is not None and ended.name == stage:
            self._drop_bar(ended)
            parts += [_count(ended)] if ended.done else []
            parts += [_words(ended.metrics)] if ended.metrics else []
        self._stage = None
        self.line(", ".join(parts))
        return seconds

    def close(self) -> None:
        """Takes the bars away and flushes the files; the reporter cannot be used afterwards."""
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()
        self._events.close()

    def _bars(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._console,
                refresh_per_second=4,
                transient=True,
                # Errors reach stderr as they are; only the reporter draws.
                redirect_stderr=False,
                redirect_stdout=False,
            )
            self._progress.start()
        return self._progress

    def _drop_bar(self, stage: _Stage) -> None:
        if stage.task is not None and self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _end_stage(self) -> None:
        """Ends what is under way, without the words of a finished stage."""
        if self._stage is not None:
            self._drop_bar(self._stage)
            self.line(f"{self._stage.name}: {_count(self._stage)} in {self._clock() - self._stage.started_s:.1f} s")
            self._stage = None

    def _due(self, stage: _Stage) -> bool:
        """Whether a plain line about `stage` is due; its end has a line of its own."""
        waited_s = self._clock() - stage.said_s
        if not stage.total:
            return waited_s >= self._interval_s
        if stage.done >= stage.total:
            return False
        tenth_done = (stage.done - stage.said_done) * 10 >= stage.total
        return waited_s >= (self._interval_s / 5 if tenth_done else self._interval_s)

    def _plain(self, stage: _Stage) -> str:
        elapsed_s = self._clock() - stage.started_s
        left = ""
        if stage.total and stage.done:
            left = f", {elapsed_s * (stage.total - stage.done) / stage.done:.0f} s left"
        words = f", {_words(stage.metrics)}" if stage.metrics else ""
        return f"{stage.name}: {_count(stage)}{words} ({elapsed_s:.0f} s{left})"


def _count(stage: _Stage) -> str:
    of = f"/{stage.total}" if stage.total and stage.done != stage.total else ""
    return f"{stage.done}{of} {_plural(stage.unit, stage.total or stage.done)}"


def _words(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _plural(unit: str, count: int) -> str:
    if count == 1 or unit.endswith("s"):
        return unit
    return unit[:-1] + "ies" if unit.endswith("y") else unit + "s"


def _stored(value: float) -> float | str | None:
    """As JSON has it, which knows finite numbers alone."""
    if math.isnan(value):
        return None
    return str(float(value)) if math.isinf(value) else float(value)


def _open_for_append(path: Path) -> IO[str]:
    """Opens for appending; a last line that a crash cut short is ended, so that the next row has its own."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
    return open(path, "a", encoding="utf-8")


def read_metrics(path: str | Path) -> list[dict[str, object]]:
    """The rows of a metrics.jsonl, infinite values as such; a row that a crash cut short is skipped, a missing file is
    no rows."""
    rows = (row for row in read_rows(Path(path)) if "stage" in row and "step" in row)
    return [{name: float(value) if value in ("inf", "-inf") else value for name, value in row.items()} for row in rows]
