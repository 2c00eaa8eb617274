"""What pretrain and sft share: a Ray Train job over DeepSpeed, and its progress on the driver while it runs.

    driver: TorchTrainer.fit  ->  N workers: StageRank.run (medtvt_rl/learner/supervised_stage.py)
       ^ reporter  <- relay thread polls <-  ProgressBoard (actor)  <- rank observers

Owns: resources of the workers, live progress, the error that names a worker and its log, how a stop ends the stage.
Does not own: the training, or whether a stage goes on (stage_resume.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster_view import nodes_now, offers
from actors.placement import Bundle, place, plan
from actors.run_folder import check_run_folder
from medtvt_rl.config import Config
from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.logs import last_lines, redirect_output
from medtvt_rl.privacy import open_for
from pipelines.stages import StageError
from pipelines.stopping import stopped_at_once

if TYPE_CHECKING:
    from medtvt_rl.learner.supervised_stage import StageTask

POLL_S, SEND_S, SHOWN_TIMEOUT_S = 0.5, 0.5, 60.0
PLACE_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
QUIET_RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

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
        its rows again. A driver that shows nothing any more holds the training up for SHOWN_TIMEOUT_S."""
        self._waiting.append(("epoch", {"epoch": epoch, "metrics": metrics}))
        number = ray.get(self._board.put.remote(self._waiting), timeout=SHOWN_TIMEOUT_S)
        self._waiting, self._sent_s = [], time.monotonic()
        while time.monotonic() < self._sent_s + SHOWN_TIMEOUT_S:
            if ray.get(self._board.num_shown.remote(), timeout=SHOWN_TIMEOUT_S) >= number:
                return
            time.sleep(POLL_S / 10)

    def line(self, text: str) -> None:
        """Sends at once."""
        self._add("line", text=text, now=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Sends the rest, and returns when it has arrived."""
        self._waiting.append(("result", result))
        ray.get(self._board.put.remote(self._waiting), timeout=60)

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


def train(config: Config, stage: Any, start_folder: Path, warm_encoders: bool, reporter: Reporter) -> dict[str, Any]:
    """Runs a stage on its Ray Train workers, from its checkpoint if there is one; returns what rank 0 said at its end.

    Raises:
        StageError: a worker failed; the message holds its cause and the end of its log.
        PlacementError: no node can take a worker within `placement.timeout_s`.
        ResumeError: there is a checkpoint that this run must not go on from.
        Stopped: a signal asked for the end; the message says where the same command goes on.
    """
    from medtvt_rl.learner.supervised_stage import StageTask
    from pipelines.stage_resume import facts_of, find_epoch, where_it_goes_on

    facts = facts_of(config, start_folder)
    found = find_epoch(
        config, stage, facts["identity"], lambda: _examples_checksum(config, stage, start_folder), reporter.line
    )
    task = StageTask(
        stage=stage,
        config=config,
        start_folder=Path(start_folder).resolve(),
        folder=config.stage_folder(stage).resolve(),
        warm_encoders=warm_encoders,
        facts=facts,
        found=found,
    )
    chosen = _placeable(config, task.settings.num_workers, reporter)
    encoders = config.encoders
    encoder_steps = encoders.ecg_steps + encoders.cxr_steps + encoders.lab_steps if task.warms_encoders else 0
    reporter.forget(stage, 0 if found is None else found.progress.steps + 1)
    if encoder_steps:
        reporter.forget("encoders", 0)
    try:
        return _fit(task, chosen, encoder_steps, reporter)
    except KeyboardInterrupt:
        raise stopped_at_once(where_it_goes_on(config, stage)) from None


def _fit(task: StageTask, chosen: Bundle, encoder_steps: int, reporter: Reporter) -> dict[str, Any]:
    """The Ray Train job."""
    assert ray.is_initialized()
    config, stage = task.config, task.stage
    for name, value in QUIET_RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    # It reserves for itself what was found to have a place.
    os.environ[PLACE_TIMEOUT] = str(config.placement.timeout_s)
    from ray.train import FailureConfig, RunConfig

    from pipelines.train_meeting import MeetingConfig, Trainer

    board: Any = ProgressBoard
    # Beside the driver, whose node stays when others are taken away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = board.options(scheduling_strategy=here).remote()
    trainer = Trainer(
        _worker,
        train_loop_config={"task": task, "board": board, "folder": os.getcwd()},
        torch_config=MeetingConfig(),
        scaling_config=_scaling(chosen, task.settings),
        run_config=RunConfig(
            name=stage,
            storage_path=str((config.folder / "ray_train").resolve()),
            # Else it would ask for a place again and again.
            failure_config=FailureConfig(controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )
    try:
        with Relay(board, reporter, stage, encoder_steps) as relay:
            try:
                trainer.fit()
            except Exception as error:
                raise StageError(_failure(config, stage, chosen, task.settings.num_workers, error)) from error
        return relay.fetch_result()
    finally:
        ray.kill(board)


def _examples_checksum(config: Config, stage: str, start_folder: Path) -> str:
    from transformers import AutoTokenizer

    from medtvt_rl.learner.examples import checksum_of, stage_examples

    tokenizer = AutoTokenizer.from_pretrained(start_folder, trust_remote_code=False)
    return checksum_of(stage_examples(config, tokenizer, stage, "train"))


def _placeable(config: Config, num_workers: int, reporter: Reporter) -> Bundle:
    """What a worker is given: of the first kind of node that has room for all, since Ray Train knows one kind. What is
    reserved to find it is given back: Ray Train takes no reservation of others.

    Raises:
        PlacementError: no kind of node has room.
    """
    settings = config.placement
    bundles = plan(config, {"learner": num_workers})
    placement = place(bundles, settings.timeout_s, settings.fallback_after_s, reporter.line)
    try:
        return placement.bundle("learner", 0)
    finally:
        placement.release()


def _scaling(chosen: Bundle, settings: SupervisedConfig) -> Any:
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=settings.num_workers,
        use_gpu=chosen.gpus > 0,
        resources_per_worker=chosen.resources,
        label_selector=chosen.labels or None,  # type: ignore[call-arg]
    )


def _worker(arguments: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train

    from medtvt_rl.learner import process_group
    from pipelines.train_meeting import meeting

    task, context = arguments["task"], ray.train.get_context()
    rank = context.get_world_rank()
    if os.path.isdir(arguments["folder"]):
        # Ray Train moves workers to a folder of its own; relative paths of the configuration count from the driver's.
        os.chdir(arguments["folder"])
    check_run_folder(task.config.folder)
    redirect_output(task.config.folder / "logs" / f"{task.stage}_{rank}.log")
    open_for(task.config.privacy, task.config.folder)
    process_group.prepare_environment(task.settings.num_threads)
    device = ray.train.torch.get_device()
    address, port = meeting()
    process_group.join(
        process_group.Rendezvous(
            rank=rank,
            world_size=context.get_world_size(),
            address=address,
            port=port,
            timeout_s=task.settings.timeout_s,
            local_rank=device.index or 0,
        )
    )
    from medtvt_rl.learner.supervised_stage import StageRank

    observer = BoardObserver(arguments["board"])
    result = StageRank(task, device, observer).run()
    if rank == 0:
        observer.finish(result)
    process_group.leave()


def _failure(config: Config, stage: str, chosen: Bundle, num_workers: int, error: Exception) -> str:
    """The first worker's own error, not Ray Train's report of it, and the end of that worker's log."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from pipelines.stage_resume import checkpoints_of, where_it_goes_on

    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return (
            f"{stage}: the place of its {num_workers} workers ({chosen.needs} each) was lost before they started, and "
            f"not found again in {config.placement.timeout_s:g} s (placement.timeout_s). {offers(nodes_now())}"
        )
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    rank = min(failures, default=0)
    cause = str(failures.get(rank, error)).strip().splitlines() or [repr(error)]
    log = config.folder / "logs" / f"{stage}_{rank}.log"
    tail = "".join(f"\n  {line}" for line in last_lines(log, 5))
    goes_on = f"; {where_it_goes_on(config, stage)}" if checkpoints_of(config, stage).epochs else ""
    words = f"{stage}: worker {rank} of {num_workers} failed: {cause[-1]}{goes_on}"
    return words + (f"\nend of {log}:{tail}" if tail else "")
