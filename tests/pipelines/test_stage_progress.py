"""What a supervised stage tells the driver: in order, once, stored before an epoch's checkpoint is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipelines import stage_progress
from pipelines.stage_progress import BoardObserver, Relay


class Method:
    """A method of an actor that answers at once."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Board:
    """A ProgressBoard in this process."""

    def __init__(self) -> None:
        board, lock = stage_progress.ProgressBoard.__ray_actor_class__(), threading.Lock()  # type: ignore[attr-defined]

        def locked(name: str) -> Method:
            def call(*args: Any) -> Any:
                with lock:
                    return getattr(board, name)(*args)

            return Method(call)

        self.put, self.drain, self.show, self.num_shown = map(locked, ("put", "drain", "show", "num_shown"))


class Reporter:
    """Remembers; storing the rows of some steps fails."""

    def __init__(self, full_from: int = 99) -> None:
        self.rows, self.lines, self.full_from = list[int](), list[str](), full_from

    def start(self, stage: str, total: int | None = None, unit: str = "step") -> None: ...
    def update(self, done: int, *, total: int | None = None, **metrics: float) -> None: ...

    def line(self, text: str) -> None:
        self.lines.append(text)

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        if step >= self.full_from:
            raise OSError("No space left on device")
        self.rows.append(step)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(stage_progress.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(stage_progress, "POLL_S", 0.02)
    return Board()


def tell(board: Board, epochs: int) -> None:
    """Two steps an epoch; what an epoch's end found stored is the caller's to look at."""
    observer = BoardObserver(board)
    for epoch in range(epochs):
        for step in (1, 2):
            observer.step(2 * epoch + step, 2 * epochs, {"loss": 1.0, "epoch": epoch + 1})
        observer.epoch(epoch, {"train_loss": 1.0})


def test_an_epoch_ends_when_its_rows_are_stored(board: Board) -> None:
    reporter = Reporter()
    with Relay(board, reporter, "sft", 0) as relay:  # type: ignore[arg-type]
        for epochs in (1, 2):
            before = len(reporter.rows)
            tell(board, epochs)
            expected = [row for epoch in range(epochs) for row in (2 * epoch + 1, 2 * epoch + 2, 2 * epoch + 2)]
            assert reporter.rows[before:] == expected, "two steps and the epoch's own row"
    assert relay.error is None


def test_a_driver_that_can_store_nothing_says_so_once_and_holds_nobody_up(board: Board) -> None:
    reporter = Reporter(full_from=2)
    with Relay(board, reporter, "sft", 0) as relay:  # type: ignore[arg-type]
        tell(board, 3)
    assert reporter.rows == [1] and isinstance(relay.error, OSError)
    said = "sft: progress is not stored any more (No space left on device); training goes on"
    assert [line for line in reporter.lines if "epoch" not in line] == [said]


def test_a_driver_that_does_not_listen_costs_the_deadline(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_progress, "SHOWN_TIMEOUT_S", 0.2)
    tell(board, 2)
    assert len(board.drain.remote()) == 6
