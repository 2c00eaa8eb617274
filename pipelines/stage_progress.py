"""How a supervised stage on workers tells the driver what it does.

    rank observers -> ProgressBoard (actor) <- polls Relay (thread of the driver) -> Reporter

Owns: what is told, in its order and once. Does not own: the stage's job (supervised.py), how it is shown (reporter.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError

from pipelines.stages import StageError

POLL_S, SEND_S, SHOWN_TIMEOUT_S = 0.5, 0.5, 60.0
Event = tuple[str, dict[str, Any]]


class Reporter(Protocol):
    """What the driver shows and stores of a stage."""

    def start(self, stage: str, total: int | None = None, unit: str = "step") -> None: ...
    def update(self, done: int, *, total: int | None = None, **metrics: float) -> None: ...
    def line(self, text: str) -> None: ...
    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None: ...
    def forget(self, stage: str, from_step: int) -> None: ...


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds what the workers tell until the driver fetches it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._num_fetched = self._num_shown = 0

    def put(self, events: list[Event]) -> int:
        """Adds events, in their order; returns how many there were so far."""
        self._events += events
        return self._num_fetched + len(self._events)

    def drain(self) -> list[Event]:
        """Every event since the last call."""
        events, self._events = self._events, []
        self._num_fetched += len(events)
        return events

    def show(self, num: int) -> None:
        """The driver has shown and stored so many more."""
        self._num_shown += num

    def num_shown(self) -> int:
        """How many the driver has shown and stored."""
        return self._num_shown


class BoardObserver:
    """A StageObserver that sends what it is told to the board, at most twice a second."""

    def __init__(self, board: Any) -> None:
        self._board, self._waiting, self._sent_s = board, list[Event](), 0.0
        self._is_heard = True

    def encoder_step(self, modality: str, step: int, total_steps: int) -> None:
        """Sends now and then, and the last step."""
        self._add("encoder_step", modality=modality, step=step, now=step == total_steps)

    def encoders(self, aucs: dict[str, float]) -> None:
        """Sends at once."""
        self._add("encoders", aucs=aucs, now=True)

    def step(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """Keeps every step, so that curves are whole, and sends now and then."""
        self._add("step", step=step, total=total_steps, metrics=metrics)

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Sends at once, and returns when the driver has stored it: a run that goes on after this epoch does not make
        its rows again. A driver that shows nothing any more holds the training up for SHOWN_TIMEOUT_S, once."""
        self._waiting.append(("epoch", {"epoch": epoch, "metrics": metrics}))
        put, self._waiting, self._sent_s = self._board.put.remote(self._waiting), [], time.monotonic()
        self._is_heard = self._is_heard and self._is_shown(put)

    def line(self, text: str) -> None:
        """Sends at once."""
        self._add("line", text=text, now=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Sends the rest, and returns when it has arrived."""
        self._waiting.append(("result", result))
        ray.get(self._board.put.remote(self._waiting), timeout=60)

    def _is_shown(self, put: Any) -> bool:
        """Waits until all of what was put is."""
        try:
            number = ray.get(put, timeout=SHOWN_TIMEOUT_S)
            while ray.get(self._board.num_shown.remote(), timeout=SHOWN_TIMEOUT_S) < number:
                if time.monotonic() > self._sent_s + SHOWN_TIMEOUT_S:
                    return False
                time.sleep(POLL_S / 10)
        except GetTimeoutError:
            return False
        return True

    def _add(self, kind: str, now: bool = False, **what: Any) -> None:
        self._waiting.append((kind, what))
        if now or time.monotonic() - self._sent_s > SEND_S:
            self._board.put.remote(self._waiting)
            self._waiting, self._sent_s = [], time.monotonic()


class Relay:
    """A thread on the driver that turns the board's events into progress, while Ray Train has the main thread."""

    def __init__(self, board: Any, reporter: Reporter, stage: str, encoder_steps: int) -> None:
        self._board, self._reporter, self._stage = board, reporter, stage
        self._encoder_steps, self._encoder_done = encoder_steps, dict[str, int]()
        self._step, self._started = 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{stage} progress", daemon=True)
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None

    def __enter__(self) -> Relay:
        if self._encoder_steps:
            self._reporter.start("encoders", self._encoder_steps, "step")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(timeout=60)

    def fetch_result(self) -> dict[str, Any]:
        """What rank 0 said at its end, from the board itself where showing progress failed before it came by.

        Raises:
            StageError: it never said anything.
        """
        if self.result is None:
            for kind, what in ray.get(self._board.drain.remote(), timeout=30):
                if kind == "result":
                    self.result = what
        if self.result is None:
            raise StageError(f"{self._stage}: the workers ended without a result; progress said {self.error!r}")
        return self.result

    def _run(self) -> None:
        """Shows until the end, and then once more, so that nothing is left on the board."""
        handlers: dict[str, Callable[..., None]] = {
            "encoder_step": self._on_encoder_step,
            "encoders": self._on_encoders,
            "step": self._on_step,
            "epoch": self._on_epoch,
            "line": self._on_line,
        }
        try:
            last = False
            while not last:
                last = self._end.wait(POLL_S)
                events: list[Event] = ray.get(self._board.drain.remote(), timeout=30)
                self.result = next((what for kind, what in events if kind == "result"), self.result)
                self._show([(handlers[kind], what) for kind, what in events if kind in handlers])
                self._board.show.remote(len(events))
        except Exception as error:  # of the board: the driver says so at its end
            self.error = error

    def _show(self, calls: list[tuple[Callable[..., None], dict[str, Any]]]) -> None:
        try:
            for handler, what in calls:
                handler(**what)
        except Exception as error:  # a full disk, say: the training goes on without its progress
            if self.error is None:
                self.error = error
                with suppress(OSError):  # what the lines go to may be full, too
                    self._reporter.line(f"{self._stage}: progress is not stored any more ({error}); training goes on")

    def _on_encoder_step(self, modality: str, step: int) -> None:
        self._encoder_done[modality] = step
        self._reporter.update(sum(self._encoder_done.values()))

    def _on_encoders(self, aucs: dict[str, float]) -> None:
        self._reporter.scalars("encoders", self._encoder_steps, aucs)
        worst = min(aucs, key=aucs.__getitem__, default=None)
        if worst:
            self._reporter.line(f"encoders: lowest validation AUC {aucs[worst]:.3f} ({worst.removeprefix('auc/')})")

    def _on_step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if not self._started:
            self._reporter.start(self._stage, total, "step")
            self._started = True
        self._step = step
        self._reporter.scalars(self._stage, step, metrics)
        self._reporter.update(step, loss=metrics["loss"], epoch=metrics["epoch"])

    def _on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self._reporter.scalars(self._stage, self._step, {f"epoch/{name}": value for name, value in metrics.items()})
        shown = "  ".join(
            f"{name} {metrics[name]:.4g}" for name in ("train_loss", "validation_loss", "total") if name in metrics
        )
        self._reporter.line(f"{self._stage}: epoch {epoch + 1}  {shown}")

    def _on_line(self, text: str) -> None:
        self._reporter.line(f"{self._stage}: {text}")
