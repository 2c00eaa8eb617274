"""The actor of one learner rank: sets up its process, fetches payloads, and hands over to `GrpoLearner`.

Owns: the process (environment, threads, log, process group) and the references it is sent. Does not own: the training
step (medtvt_rl/learner), or the gang as a whole (actors/learner_gang.py). DeepSpeed is imported in `setup`, after its
environment.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray

from actors.process import Whereabouts, entitle, has_room, import_ahead, whereabouts
from actors.run_folder import check_run_folder
from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.config import Config
from medtvt_rl.dotted import resolve
from medtvt_rl.learner.config import LearnerConfig
from medtvt_rl.logs import redirect_output
from medtvt_rl.model.seal import seal
from medtvt_rl.privacy import open_for
from medtvt_rl.storage import Digest, Storage, digest_of
from medtvt_rl.types import LearnerStep, RolloutGroup, TrainingSequence
from medtvt_rl.user_code import task_items
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer

if TYPE_CHECKING:
    from medtvt_rl.learner.grpo_learner import GrpoLearner
    from medtvt_rl.learner.nccl_sender import WeightSender
    from medtvt_rl.learner.training_state import TrainingState

# What setting up a rank imports beside its training engine, the larger part of a start.
IMPORTS = (
    "medtvt_rl.learner.grpo_learner",
    "medtvt_rl.learner.step_record",
    "medtvt_rl.model.policy",
    "medtvt_rl.model.medtvt",
)
TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "chat_template", "added_tokens", "vocab", "merges")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerShard:
    """Completions of one group that one rank trains on.

    Attributes:
        payload: reference to the RolloutGroup.
        reference: reference to its log-probs under the frozen policy, one array a completion; None without a KL term.
        indices: which completions of the group.
        advantages: one for each index.
    """

    payload: ray.ObjectRef
    reference: ray.ObjectRef | None
    indices: tuple[int, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightHeader:
    """What the driver sees of exported weights.

    Attributes:
        contents: the buffer without its data, where that is to be broadcast; None where all travels in one piece.
    """

    version: int
    checksum: int
    num_bytes: int
    seconds: float
    contents: WeightBuffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHealth:
    """A rank that answers; `busy_with` is the call under way with its phase, `step_s` how long it has lasted, 0 where
    there is none."""

    rank: int
    pid: int
    node: str
    busy_with: str | None
    step_s: float


@ray.remote(concurrency_groups={"health": 1, "checkpoint": 1})  # type: ignore[call-overload]
class LearnerWorker:
    """Rank `rank` of `world_size`. Apart from `warm`, `whereabouts`, `address`, `health` and the methods of rank 0
    alone, every method is called on all ranks at once.
    """

    def __init__(self, rank: int, world_size: int, config: Config) -> None:
        redirect_output(config.folder / "logs" / f"learner_{rank}.log")
        open_for(config.privacy, config.folder)
        self._rank, self._world_size, self._config = rank, world_size, config
        self._learner: GrpoLearner | None = None
        self._sender: WeightSender | None = None
        self._device: Any = None
        self._model_folder = ""
        self._busy: tuple[str, float] | None = None
        self._snapshot: TrainingState | None = None

    def warm(self, devices: str | None, anyway: bool) -> bool:
        """Imports what `setup` needs, and waits to become its rank; False, with nothing done, where the node is short
        of memory and it is not wanted `anyway`."""
        if not anyway and not has_room():
            return False

        def prepare() -> None:
            from medtvt_rl.learner import process_group

            process_group.prepare_environment(self._config.learner.num_threads)

        make_engine = self._config.learner.make_engine
        usual = ("deepspeed",) if make_engine == LearnerConfig.make_engine else ()
        import_ahead((*usual, make_engine.partition(":")[0], *IMPORTS), devices, prepare)
        return True

    def whereabouts(self) -> Whereabouts:
        """Where it runs."""
        return whereabouts()

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def setup(self, model_folder: str, address: str, port: int) -> int:
        """Joins the gang and loads the policy; returns the number of parameters that train."""
        check_run_folder(self._config.folder)
        from medtvt_rl.learner import process_group

        config = self._config.learner
        process_group.prepare_environment(config.num_threads)
        process_group.check_gpu("learner", self._config.placement.learner.gpus)
        meeting = process_group.Rendezvous(
            rank=self._rank,
            world_size=self._world_size,
            address=address,
            port=port,
            timeout_s=config.step_timeout_s,
        )
        self._device = process_group.join(meeting)
        self._model_folder = model_folder
        self._learner = _build_learner(self._config, model_folder, self._device, self._enter)
        return sum(p.numel() for p in self._learner.engine.policy.parameters() if p.requires_grad)

    def train_step(
        self, shards: list[LearnerShard], denominators: Denominators, learning_rate: float, version: int
    ) -> LearnerStep:
        """One training step on this rank's shards; the same answer on all ranks but for `seconds/fetch`."""
        with self._working("train_step") as learner:
            started = time.perf_counter()
            self._enter("fetch")
            sequences = fetch_sequences(shards, self._config.learner.step_timeout_s)
            fetched = time.perf_counter() - started
            step = learner.train_step(sequences, denominators, learning_rate, version)
            self._enter("record")
            self._record(step, sequences, denominators, learning_rate, version)
            return replace(step, metrics={**step.metrics, "seconds/fetch": fetched})

    def _record(
        self,
        step: LearnerStep,
        sequences: list[TrainingSequence],
        denominators: Denominators,
        learning_rate: float,
        version: int,
    ) -> None:
        """Keeps what a step was made of: for a replay, or, where it was not finite, the groups that caused it."""
        from medtvt_rl.learner.step_record import NONFINITE_FOLDER, STEPS_FOLDER, StepRecord, step_file, write_step

        folders = {}
        if self._config.grpo.record_steps and step.metrics["updates"] > 0:
            folders[STEPS_FOLDER] = sequences
        if step.skipped is not None:
            folders[NONFINITE_FOLDER] = [s for s in sequences if s.group_id in step.culprits]
        for folder, kept in folders.items():
            record = StepRecord(
                version=version, learning_rate=learning_rate, denominators=denominators, sequences=tuple(kept)
            )
            write_step(step_file(self._config.folder / "journal" / folder, version, self._rank), record)

    def replay_step(self, step: int) -> None:
        """Repeats a recorded step. Raises ValueError if its record is missing or damaged."""
        from medtvt_rl.learner.step_record import STEPS_FOLDER, read_step, step_file

        with self._working("replay_step") as learner:
            record = read_step(step_file(self._config.folder / "journal" / STEPS_FOLDER, step, self._rank))
            learner.train_step(record.sequences, record.denominators, record.learning_rate, record.version)

    @ray.method(num_returns=2)
    def export(self, version: int) -> tuple[WeightHeader | None, WeightBuffer | None]:
        """What `weights.send` names, as rank 0's return value, so that it lies in the object store; None, None on
        other ranks.
        """
        started = time.perf_counter()
        with self._working("export") as learner:
            send = self._config.weights.resolved(self._config.model.lora)
            weights = learner.export(version, send)
        if weights is None:
            return None, None
        header = WeightHeader(
            version=version,
            checksum=weights.checksum,
            num_bytes=weights.data.nbytes,
            seconds=time.perf_counter() - started,
            contents=weights.header() if self._config.weights.transport == "nccl" else None,
        )
        return header, weights

    def open_weight_group(self, group: WeightGroup) -> None:
        """Rank 0 alone: builds a group with the engines; raises what WeightSender.open raises."""
        with self._working("open_weight_group"):
            if self._sender is None:
                from medtvt_rl.learner.nccl_sender import WeightSender

                self._sender = WeightSender(self._device, self._config.rollout)
            self._sender.open(group)

    def broadcast_weights(self, weights: WeightBuffer) -> None:
        """Rank 0 alone: sends the data of a buffer to the group; raises what WeightSender.send raises."""
        with self._working("broadcast_weights"):
            if self._sender is None:
                raise RuntimeError("learner rank 0: broadcast_weights before open_weight_group")
            self._sender.send(weights)

    def close_weight_group(self) -> None:
        """Rank 0 alone: leaves the group, if there is one."""
        if self._sender is not None:
            self._sender.close()

    def score(self, group: RolloutGroup, index: int) -> NDArray[np.float32]:
        """Log-probs [T] of one completion of a group at temperature 1, under the weights of now."""
        with self._working("score") as learner:
            return learner.score(group.prompt, group.completions[index])

    def save_model(self, folder: str) -> None:
        """Writes a Hugging Face folder with model and tokenizer that appears complete or not at all."""
        target = Path(folder)
        temporary = target.with_name(target.name + ".writing")
        if self._rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        with self._working("save_model") as learner:
            learner.save(temporary)
        if self._rank == 0:
            copy_tokenizer(Path(self._model_folder), temporary)
            seal(temporary)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)

    def snapshot(self) -> bool:
        """Keeps the present state for `write_snapshot`; returns whether training may go on meanwhile."""
        with self._working("snapshot") as learner:
            grpo = self._config.grpo
            live = learner.state(copy=False)
            copy = has_memory_for(live, grpo.checkpoint_in_background, self._world_size)
            self._snapshot = learner.state(copy=True) if copy else live
            return copy

    @ray.method(concurrency_group="checkpoint")
    def write_snapshot(self, folder: str) -> tuple[str, Digest]:
        """Writes the state kept last into a folder or URL, beside training; returns the file and its checksum."""
        from medtvt_rl.learner.training_state import rank_file

        state, self._snapshot = self._snapshot, None
        if state is None:
            raise RuntimeError(f"learner rank {self._rank}: write_snapshot before snapshot")
        name = rank_file(Path(), self._rank).name
        with Storage(folder).writing(name) as path:
            state.write(path)
            return name, digest_of(path)

    def load_checkpoint(self, folder: str) -> None:
        """Restores what the ranks of a gang wrote into a folder or URL."""
        storage = Storage(folder)
        with self._working("load_checkpoint") as learner, storage.local_copy(storage.names()) as local:
            learner.load_checkpoint(local)

    @ray.method(concurrency_group="health")
    def health(self) -> RankHealth:
        """Answers also while a step is under way."""
        busy = self._busy
        return RankHealth(
            rank=self._rank,
            pid=os.getpid(),
            node=ray.util.get_node_ip_address(),
            busy_with=busy[0] if busy else None,
            step_s=time.monotonic() - busy[1] if busy else 0.0,
        )

    def _enter(self, phase: str) -> None:
        """The call under way is at this phase: for `health`, and for whoever looks at the process."""
        if self._busy is not None:
            call, began = self._busy
            work = f"{call.split(' ')[0]} {phase}"
            self._busy = (work, began)
            entitle("LearnerWorker", work)

    @contextmanager
    def _working(self, call: str) -> Iterator[GrpoLearner]:
        """The learner, while `health` says what it is busy with."""
        if self._learner is None:
            raise RuntimeError(f"learner rank {self._rank}: {call} before setup")
        self._busy = (call, time.monotonic())
        try:
            yield self._learner
        finally:
            self._busy = None


def has_memory_for(state: TrainingState, in_background: str, num_ranks: int) -> bool:
    """Whether a state is copied, so that it can be written beside training; all ranks may be on one node."""
    if in_background != "auto":
        return in_background == "always"
    return psutil.virtual_memory().available >= 2 * state.num_bytes * num_ranks


def _build_learner(config: Config, model_folder: str, device: Any, enter: Callable[[str], None]) -> GrpoLearner:
    import torch

    from medtvt_rl.learner.engine import EngineSettings
    from medtvt_rl.learner.grpo_learner import GrpoLearner
    from medtvt_rl.model.policy import load_policy

    torch.manual_seed(config.run.seed)
    settings = EngineSettings(
        zero_stage=config.learner.zero_stage,
        dtype=getattr(torch, config.learner.dtype),
        gradient_clipping=config.learner.gradient_clipping,
        weight_decay=config.learner.weight_decay,
        adam_betas=(config.learner.adam_betas[0], config.learner.adam_betas[1]),
    )
    # First, since importing the task may make its model known to transformers.
    items = task_items(config)
    policy = load_policy(model_folder, dtype=settings.dtype, lora=config.model.lora)
    make_engine = resolve(config.learner.make_engine, "learner.make_engine")
    return GrpoLearner(make_engine(policy, settings, device), items, config, enter)


def fetch_sequences(shards: list[LearnerShard], timeout_s: float) -> list[TrainingSequence]:
    """The completions that the shards name, in order.

    Raises:
        ray.exceptions.GetTimeoutError: a payload did not arrive; its node may be gone.
    """
    references = [shard.reference for shard in shards if shard.reference is not None]
    fetched = iter(ray.get([shard.payload for shard in shards] + references, timeout=timeout_s))
    groups: list[RolloutGroup] = [next(fetched) for _ in shards]
    sequences = []
    for shard, group in zip(shards, groups):
        logprobs = next(fetched) if shard.reference is not None else None
        for index, advantage in zip(shard.indices, shard.advantages, strict=True):
            sequences.append(
                TrainingSequence(
                    group_id=group.group_id,
                    prompt=group.prompt,
                    completion=group.completions[index],
                    advantage=advantage,
                    reference_logprobs=None if logprobs is None else logprobs[index],
                )
            )
    return sequences


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files of a Hugging Face folder, byte for byte."""
    for path in source.iterdir():
        if path.is_file() and path.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(path, target / path.name)
