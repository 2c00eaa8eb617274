"""What pretrain and sft share: a Ray Train job over DeepSpeed.

    driver: TorchTrainer.fit  ->  N workers: StageRank.run (medtvt_rl/learner/supervised_stage.py)

Owns: resources of the workers, the error that names a worker and its log, how a stop ends the stage. Does not own: the
training, its progress on the driver (stage_progress.py), or whether a stage goes on (stage_resume.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster_view import nodes_now, offers
from actors.placement import Bundle, place, plan
from actors.run_folder import check_run_folder
from medtvt_rl.config import Config
from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.logs import last_lines, redirect_output
from medtvt_rl.privacy import open_for
from pipelines.stage_progress import BoardObserver, ProgressBoard, Relay, Reporter
from pipelines.stages import StageError
from pipelines.stopping import stopped_at_once

if TYPE_CHECKING:
    from medtvt_rl.learner.supervised_stage import StageTask

PLACE_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
QUIET_RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


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
        train_loop_config={"task": task, "board": board, "folder": os.getcwd(), "gpus": chosen.gpus},
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
    placement = place(plan(config, {"learner": num_workers}), config.placement, reporter.line)
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
    process_group.check_gpu("learner", arguments["gpus"])
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
