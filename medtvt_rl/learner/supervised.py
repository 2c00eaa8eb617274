"""Supervised training (PT and SFT): next-token loss on the answers, over any training engine.

Owns: the order of examples, batches and their shards, the schedule, early stopping on a validation score, that the best
weights are kept, and what it must know to go on after an epoch. Does not own: examples (examples.py), how the score is
computed (validation.py), checkpoints (epoch_checkpoints.py), processes (pipelines/).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medtvt_rl.algorithm.packing import micro_batches
from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.learner.examples import ExampleSource
from medtvt_rl.learner.schedule import warmup_cosine
from medtvt_rl.learner.scoring import ItemSource, ScoredSequence, build_batch, whole_rows

BUCKET_BATCHES = 8
"""Batches that are cut from one length-sorted stretch of the shuffled examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What is measured after an epoch; `score` decides, higher is better, the rest is reported."""

    score: float
    metrics: dict[str, float]


class Observer(Protocol):
    """Who is told how training goes; only rank 0's is."""

    def step(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """An optimizer step is done (1-based)."""

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch (0-based) and its validation are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a stage stands between two epochs; with the engine's state, all that it needs to go on.

    Attributes:
        epochs, steps: done so far.
        best, best_epoch: the highest score and its epoch (0-based, -1 where nothing was measured yet).
        validation: metrics after that epoch.
        to_beat, risen_epoch: the score that counts as a rise, and the epoch (0-based) of the last one.
        skipped_in_a_row: the last so many steps were not finite.
        seconds: spent so far.
    """

    epochs: int = 0
    steps: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    validation: dict[str, float] = field(default_factory=dict)
    to_beat: float = -math.inf
    risen_epoch: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedResult:
    """What a stage did.

    Attributes:
        best_epoch: 0-based, the epoch whose weights were kept.
        validation: metrics after that epoch.
    """

    epochs: int
    steps: int
    best_epoch: int
    validation: dict[str, float]
    seconds: float


class NonFiniteLossError(RuntimeError):
    """Steps whose loss or gradient was not finite, too many in a row."""


MAX_SKIPPED_IN_A_ROW = 5


class SupervisedTrainer:
    """Trains the engine's policy. Every rank makes one with equal arguments and calls `run`.

    Args:
        token_budget: padded tokens of one micro-batch of one rank.
        keep_best: told the epoch (0-based) after each that scored higher than all before, to write the policy somewhere
            (all ranks).
        keep: told where training stands after each epoch, to write it with the engine's state (all ranks).
    """

    def __init__(
        self,
        engine: TrainingEngine,
        items: ItemSource | None,
        source: ExampleSource,
        config: SupervisedConfig,
        seed: int,
        token_budget: int,
        validate: Callable[[], Validation],
        keep_best: Callable[[int], None],
        keep: Callable[[Progress], None],
        observer: Observer,
    ) -> None:
        self._engine, self._items, self._source = engine, items, source
        self._config, self._seed, self._token_budget = config, seed, token_budget
        self._validate, self._keep_best, self._keep, self._observer = validate, keep_best, keep, observer
        self._skipped_in_a_row = 0
        self._steps_per_epoch = 0

    def run(self, progress: Progress | None = None) -> SupervisedResult:
        """Trains until the last epoch, or until the score has not risen for `patience` epochs and the rate has decayed.

        Args:
            progress: where training goes on; the engine holds the state that was written with it.

        Raises:
            NonFiniteLossError: several steps in a row were not finite; no weight was changed by them.
        """
        progress = progress or Progress()
        self._skipped_in_a_row = progress.skipped_in_a_row
        self._steps_per_epoch = len(self._plan(self._source.epoch(0), 0))
        while not self._is_over(progress):
            progress = self._one_epoch(progress)
            self._keep(progress)
        if progress.best_epoch < 0:
            raise NonFiniteLossError(
                f"validation score was not a number in any of {progress.epochs} epochs; lower the rate"
            )
        return SupervisedResult(
            epochs=progress.epochs,
            steps=progress.steps,
            best_epoch=progress.best_epoch,
            validation=progress.validation,
            seconds=progress.seconds,
        )

    def _is_over(self, progress: Progress) -> bool:
        done, config = progress.epochs, self._config
        if done >= config.epochs or config.patience == 0 or done < max(config.validate_from, config.decay_epochs):
            return done >= config.epochs
        return done - 1 - progress.risen_epoch >= config.patience

    def _one_epoch(self, before: Progress) -> Progress:
        """Trains for an epoch and measures it, where it is one to be measured."""
        started, epoch = time.perf_counter(), before.epochs
        steps, train_loss = self._train_epoch(epoch, before.steps)
        progress, metrics = replace(before, epochs=epoch + 1, steps=steps), {"train_loss": train_loss}
        if epoch + 1 >= min(self._config.validate_from, self._config.epochs):
            validation = self._validate()
            metrics |= validation.metrics
            if validation.score > progress.best:
                progress = replace(
                    progress, best=validation.score, best_epoch=epoch, validation=dict(validation.metrics)
                )
                self._keep_best(epoch)
            if validation.score > progress.to_beat:
                to_beat = validation.score + self._config.min_rise
                progress = replace(progress, to_beat=to_beat, risen_epoch=epoch)
        self._tell(epoch, metrics)
        seconds = before.seconds + time.perf_counter() - started
        return replace(progress, skipped_in_a_row=self._skipped_in_a_row, seconds=seconds)

    def _tell(self, epoch: int, metrics: dict[str, float]) -> None:
        if self._engine.rank == 0:
            self._observer.epoch(epoch, metrics)

    def _train_epoch(self, epoch: int, step: int) -> tuple[int, float]:
        """Returns the steps done so far and the mean loss per answer token of the epoch."""
        examples = self._source.epoch(epoch)
        self._engine.policy.train()
        losses = []
        for batch in self._plan(examples, epoch):
            rate = self._rate(step)
            metrics = self._train_batch([examples[i] for i in batch], rate)
            losses.append(metrics["loss"])
            step += 1
            if self._engine.rank == 0:
                total_steps = self._config.epochs * self._steps_per_epoch
                self._observer.step(step, total_steps, {**metrics, "epoch": epoch + 1})
        if self._config.train_encoders:
            self._average_statistics()
        self._engine.policy.eval()
        return step, float(np.mean(losses))

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Each rank's BatchNorm has seen other examples; from here on all ranks hold the mean of what they saw."""
        for buffer in self._engine.policy.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._engine.all_reduce(buffer.clone(), "sum") / self._engine.world_size)

    def _rate(self, step: int) -> float:
        config = self._config
        decay_steps = (config.decay_epochs or config.epochs) * self._steps_per_epoch
        warmup_steps = math.ceil(config.warmup_share * decay_steps)
        return warmup_cosine(step, decay_steps, config.learning_rate, warmup_steps, config.final_lr_share)

    def _plan(self, examples: Sequence[ScoredSequence], epoch: int) -> list[list[int]]:
        lengths = [example.length for example in examples]
        return epoch_plan(lengths, self._config.batch_size, self._engine.world_size, (self._seed, epoch))

    def _train_batch(self, batch: Sequence[ScoredSequence], rate: float) -> dict[str, float]:
        """One optimizer step: each rank takes every world_size-th example, so that their lengths are alike."""
        num_tokens = sum(len(example.completion_ids) for example in batch)
        ranks = [batch[rank :: self._engine.world_size] for rank in range(self._engine.world_size)]
        plans = [micro_batches(whole_rows(own), self._token_budget) for own in ranks]
        count, own, plan = max(map(len, plans)), ranks[self._engine.rank], plans[self._engine.rank]
        total = torch.zeros(1, dtype=torch.float64)
        for index in range(count):
            padding = index >= len(plan)
            loss = self._loss([own[i] for i in plan[0 if padding else index]]) * (0.0 if padding else 1 / num_tokens)
            self._engine.backward(loss, last=index == count - 1)
            total += loss.detach().double().cpu()
        outcome = self._engine.step(rate)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if outcome.skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped: {outcome.skipped}")
        return {
            "loss": float(self._engine.all_reduce(total, "sum").item()),
            "gradient_norm": outcome.grad_norm,
            "learning_rate": rate,
            "skipped": float(outcome.skipped is not None),
        }

    def _loss(self, examples: Sequence[ScoredSequence]) -> Tensor:
        """Summed negative log-prob of the answer tokens."""
        batch = build_batch(examples, self._items, self._engine.dtype, self._engine.device, share_prompts=False)
        return -self._engine.forward(batch, 1.0)[0].sum()


def epoch_plan(lengths: Sequence[int], batch_size: int, world_size: int, seed: Any) -> list[list[int]]:
    """Batches of an epoch as indices: shuffled, then length-sorted within stretches so that batches hold like lengths.

    Every batch has `batch_size` examples, and so equally many for each rank; what is left over waits for another
    epoch's shuffle. Fewer examples than a batch make one smaller batch.

    Raises:
        ValueError: the batch size is no multiple of the ranks, or there are fewer examples than ranks.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size: got {batch_size}, expected a multiple of the {world_size} ranks")
    if len(lengths) < world_size:
        raise ValueError(f"examples: got {len(lengths)}, expected at least one for each of the {world_size} ranks")
    size = min(batch_size, len(lengths) - len(lengths) % world_size)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    order = order[: len(order) - len(order) % size]
    stretch = size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch].tolist(), key=lambda i: lengths[i])
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def save_policy(engine: TrainingEngine, folder: Path) -> None:
    """Writes the policy as a Hugging Face folder from rank 0; all ranks return when it is there."""
    policy: Any = engine.policy
    with engine.gathered(policy.parameters()):
        if engine.rank == 0:
            policy.save(folder)
    engine.all_reduce(torch.zeros(1), "sum")
