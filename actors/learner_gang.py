"""All learner ranks as one: the driver calls it, it calls every rank, and a failure of one ends them all.

Owns: start, sharding of a batch over ranks, deadlines that name the rank missing, and the end of the gang. Does not
own: the training step (medtvt_rl/learner), or when a failed gang is started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError

from actors.deadline import within
from actors.failure import ActorError, cause_of, with_log
from actors.learner_worker import LearnerShard, LearnerWorker, WeightHeader
from actors.placement import Placement
from actors.process import Whereabouts
from actors.spares import Spares
from actors.timeline import Timeline
from actors.weight_transfer import BroadcastWeights, LearnerSender
from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.algorithm.packing import balanced_shards
from medtvt_rl.config import Config
from medtvt_rl.faults import TooFewCompletionsError
from medtvt_rl.roles import GANG
from medtvt_rl.storage import Digest
from medtvt_rl.types import GroupHeader, LearnerStep

LAST_WORDS_S = 1.0
"""How long the other ranks may still report a failure of their own after the first one failed."""
PEER_WORDS = ("timed out", "timeout", "connection", "peer", "socket", "gloo", "nccl")


class LearnerError(RuntimeError):
    """The gang is gone; the message names the rank, the call, the cause and the end of its log.

    Attributes:
        rank: that failed.
        node: that it ran on, "" where that is not known.
        cause: in one line.
    """

    def __init__(self, message: str, rank: int = 0, node: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.rank, self.node, self.cause = rank, node, cause or message


class BufferedGroup(Protocol):
    """A finished group, as the driver holds it: a header, and references to what is large."""

    @property
    def header(self) -> GroupHeader: ...
    @property
    def payload(self) -> Any: ...
    @property
    def reference(self) -> Any: ...


class GroupWithAdvantages(Protocol):
    """A group to train on; advantages [G]."""

    @property
    def group(self) -> BufferedGroup: ...
    @property
    def advantages(self) -> NDArray[np.float32]: ...


class LearnerGang:
    """Every method raises LearnerError, with all ranks killed, if one of them fails or is late."""

    def __init__(self, config: Config, workers: list[Any], timeline: Timeline | None = None) -> None:
        self._config, self._workers, self._timeline = config, workers, timeline or Timeline()
        self._sender = LearnerSender(workers[0], config.rollout)
        self._silence_s = 0.0
        self.where: list[Whereabouts] = []

    @classmethod
    async def start(
        cls,
        config: Config,
        placement: Placement,
        model_folder: Path,
        timeline: Timeline | None = None,
        spares: Spares | None = None,
    ) -> LearnerGang:
        """Starts one worker in each learner bundle, from a spare where there is one; returns when all have loaded
        `model_folder`."""
        count = config.learner.num_workers
        taken = [spares.take(rank) if spares is not None else None for rank in range(count)]
        workers = [taken[rank] or make_worker(config, placement, rank) for rank in range(count)]
        gang = cls(config, workers, timeline)
        timeout_s, setting = config.learner.start_timeout_s, "learner.start_timeout_s"
        gang.where = await gang._all("whereabouts", lambda worker, _: worker.whereabouts.remote(), timeout_s, setting)
        addresses = await gang._all("address", lambda worker, _: worker.address.remote(), timeout_s, setting)
        one_node = len({address for address, _ in addresses}) == 1
        address = "127.0.0.1" if one_node else addresses[0][0]
        port = addresses[0][1]
        await gang._all(
            "setup", lambda worker, _: worker.setup.remote(str(model_folder), address, port), timeout_s, setting
        )
        gang._silence_s = config.supervision.silence_s
        return gang

    async def train_step(
        self, groups: Sequence[GroupWithAdvantages], learning_rate: float, version: int
    ) -> LearnerStep:
        """One step on whole groups, spread over the ranks with nearly equal tokens; its answer is over all ranks."""
        lengths = [length for g in groups for length in g.group.header.lengths]
        denominators = Denominators(
            num_sequences=len(lengths),
            num_tokens=sum(lengths),
            max_new_tokens=self._config.rollout.sampling.max_new_tokens,
        )
        shards = shard_groups(groups, len(self._workers))
        steps: list[LearnerStep] = await self._all(
            "train_step",
            lambda worker, rank: worker.train_step.remote(shards[rank], denominators, learning_rate, version),
            self._config.learner.step_timeout_s,
            "learner.step_timeout_s",
        )
        return steps[0]

    async def export(self, version: int) -> tuple[ray.ObjectRef | BroadcastWeights, int]:
        """The weights of `version` and their checksum: a reference to a WeightBuffer in the object store, and with
        `weights.transport: nccl` what their broadcast needs besides.
        """
        calls = [worker.export.remote(version) for worker in self._workers]
        headers: list[WeightHeader | None] = await self._all(
            "export", lambda _, rank: calls[rank][0], self._config.learner.step_timeout_s, "learner.step_timeout_s"
        )
        if headers[0] is None:
            raise LearnerError(f"learner rank 0 exported nothing for version {version}")
        header, buffer = headers[0], calls[0][1]
        if header.contents is None:
            return buffer, header.checksum
        return BroadcastWeights(buffer=buffer, header=header.contents, sender=self._sender), header.checksum

    async def score(self, group: ray.ObjectRef, index: int) -> NDArray[np.float32]:
        """Log-probs [T] of one completion of a group at temperature 1, under the weights of now."""
        scored = await self._all(
            "score",
            lambda worker, _: worker.score.remote(group, index),
            self._config.learner.step_timeout_s,
            "learner.step_timeout_s",
        )
        return np.asarray(scored[0])

    async def save_model(self, folder: Path) -> None:
        """Writes the policy and its tokenizer as a Hugging Face folder, complete or not at all."""
        await self._everywhere("save_model", str(Path(folder).resolve()))

    async def replay_step(self, step: int) -> None:
        """Repeats a recorded step of the run on every rank."""
        await self._all(
            "replay_step",
            lambda worker, _: worker.replay_step.remote(step),
            self._config.learner.step_timeout_s,
            "learner.step_timeout_s",
        )

    async def snapshot(self) -> bool:
        """Every rank keeps its present state for `write_snapshot`; False: nothing may train before that is done."""
        return all(await self._everywhere("snapshot"))

    async def write_snapshot(self, folder: str) -> dict[str, Digest]:
        """Writes what `snapshot` kept into a folder or URL that every rank reaches; returns checksums by file.

        Training may go on meanwhile. A failure here ends no rank. Raises DeadlineError or ActorError.
        """
        timeout_s, setting = self._config.grpo.checkpoint_timeout_s, "grpo.checkpoint_timeout_s"
        answers = [worker.write_snapshot.remote(folder) for worker in self._workers]
        what = f"learner ranks to write a checkpoint to {folder}"
        try:
            with self._timeline.span("checkpoint", "write"):
                return dict(await within(asyncio.gather(*map(_wait, answers)), timeout_s, what, setting))
        except RayError as error:
            raise ActorError(f"writing a checkpoint to {folder}: {cause_of(error)}") from error

    async def load_checkpoint(self, folder: str) -> None:
        """Restores what the ranks of any gang wrote into a folder or URL."""
        await self._everywhere("load_checkpoint", folder)

    def stop(self) -> None:
        """Ends every rank."""
        for worker in self._workers:
            ray.kill(worker, no_restart=True)

    async def _everywhere(self, call: str, *arguments: str) -> list[Any]:
        return await self._all(
            call,
            lambda worker, _: getattr(worker, call).remote(*arguments),
            self._config.learner.step_timeout_s,
            "learner.step_timeout_s",
        )

    async def _all(
        self, call: str, start: Callable[[Any, int], Awaitable[Any]], timeout_s: float, setting: str
    ) -> list[Any]:
        """Results of a call on every rank, in rank order."""
        calls = [start(worker, rank) for rank, worker in enumerate(self._workers)]
        tasks = [asyncio.ensure_future(self._heard(rank, call, answer)) for rank, answer in enumerate(calls)]
        try:
            done, missing = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if missing and any(task.exception() is not None for task in done):
                # What failed first may be a rank that lost its peer; the peer may be about to say why.
                done, missing = await asyncio.wait(tasks, timeout=min(timeout_s, LAST_WORDS_S))
        except asyncio.CancelledError:
            self.stop()
            raise
        failed = [task for task in done if task.exception() is not None]
        if not failed and not missing:
            return [task.result() for task in tasks]
        self.stop()
        for task in missing:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if failed:
            causes = {rank: e for rank, task in enumerate(tasks) if task in done and (e := task.exception())}
            rank = min(causes, key=lambda rank: (remoteness(causes[rank]), rank))
            raise self._error(call, rank, str(causes[rank]).strip(), cause_of(causes[rank])) from causes[rank]
        ranks = [rank for rank, task in enumerate(tasks) if task in missing]
        raise self._error(call, ranks[0], f"no answer of ranks {ranks} in {timeout_s:g} s ({setting})")

    async def _heard(self, rank: int, call: str, answer: Awaitable[Any]) -> Any:
        """The answer of a rank, which has to say meanwhile that it lives. Raises DeadlineError where it does not."""
        task = asyncio.ensure_future(_wait(answer))
        try:
            with self._timeline.span(f"learner {rank}", call):
                while not (await asyncio.wait({task}, timeout=self._silence_s / 2 or None))[0]:
                    alive, who = self._workers[rank].health.remote(), f"learner rank {rank} to say that it lives"
                    with suppress(RayError):  # what is wrong with it the call under way will say
                        await within(alive, self._silence_s, who, "supervision.silence_s")
                return task.result()
        finally:
            task.cancel()

    def _error(self, call: str, rank: int, text: str, cause: str = "") -> LearnerError:
        log = self._config.folder / "logs" / f"learner_{rank}.log"
        node = self.where[rank].node if rank < len(self.where) else ""
        message = f"learner rank {rank} of {len(self._workers)}, {call}: {text}"
        return LearnerError(with_log(message, log), rank, node, f"{call}: {cause or text}")


def make_worker(config: Config, placement: Placement, rank: int, spare: bool = False) -> Any:
    """A new actor in the bundle of a rank."""
    actor: Any = LearnerWorker
    environment = {"env_vars": {"OMP_NUM_THREADS": str(config.learner.num_threads)}}
    options = {**placement.options("learner", rank, spare), "runtime_env": environment}
    return actor.options(**options).remote(rank, config.learner.num_workers, placement.seen_from(config, GANG, rank))


def remoteness(error: BaseException) -> int:
    """How far a rank's error is from the fault: 0 says what went wrong, 1 that its process died, 2 that a peer is gone
    or late.
    """
    if isinstance(error, RayActorError):
        return 1
    cause = cause_of(error).lower()
    return 2 if any(word in cause for word in PEER_WORDS) else 0


async def _wait(reference: Awaitable[Any]) -> Any:
    return await reference


def shard_groups(groups: Sequence[GroupWithAdvantages], num_ranks: int) -> list[list[LearnerShard]]:
    """The completions of a batch as one list of shards a rank, see balanced_shards.

    Raises:
        TooFewCompletionsError: fewer completions than ranks.
    """
    lengths = [[max(1, length) for length in group.group.header.lengths] for group in groups]
    num_completions = sum(map(len, lengths))
    if num_completions < num_ranks:
        raise TooFewCompletionsError(
            f"learner.num_workers: {num_ranks} ranks for {num_completions} completions; "
            "raise grpo.groups_per_step or grpo.group_size, or lower learner.num_workers"
        )
    shards = []
    for places in balanced_shards(lengths, num_ranks):
        by_group: dict[int, list[int]] = {}
        for g, index in places:
            by_group.setdefault(g, []).append(index)
        shards.append([_shard(groups[g], indices) for g, indices in by_group.items()])
    return shards


def _shard(group: GroupWithAdvantages, indices: Sequence[int]) -> LearnerShard:
    return LearnerShard(
        payload=group.group.payload,
        reference=group.group.reference,
        indices=tuple(indices),
        advantages=tuple(float(group.advantages[index]) for index in indices),
    )
