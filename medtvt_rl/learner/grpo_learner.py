"""One rank of the GRPO learner: completions with advantages in, an optimizer step and its metrics out.

Owns: the order of a training step, the agreement of all ranks on it, what is measured, and what is exported to the
engines.
Does not own: the loss (algorithm/losses.py), the optimizer and its sharding (engine.py), transport (actors/).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtvt_rl.algorithm.config import LossConfig
from medtvt_rl.algorithm.losses import METRIC_SUMS, Denominators, LossInputs, finalise_metrics, policy_loss
from medtvt_rl.algorithm.packing import Extent, micro_batches
from medtvt_rl.config import Config
from medtvt_rl.learner.engine import StepOutcome, TrainingEngine
from medtvt_rl.learner.export import export_weights
from medtvt_rl.learner.scoring import ItemSource, ScoredSequence, TokenBatch, build_batch
from medtvt_rl.types import Completion, Prompt, TrainingSequence
from medtvt_rl.weights import WeightBuffer

logger = logging.getLogger(__name__)

EXTRA_SUMS = ("exact_entropy", "fresh_gap_sum", "fresh_tokens", "fresh_not_finite", "micro_batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What every micro-batch of a learner is scored with."""

    engine: TrainingEngine
    items: ItemSource | None
    temperature: float
    loss: LossConfig


class GrpoLearner:
    """Trains the engine's policy on shards of a batch; every method is called on all ranks alike.

    The policy stays in evaluation mode: no dropout and frozen BatchNorm, so that it scores exactly what the engine
    sampled.
    """

    def __init__(self, engine: TrainingEngine, items: ItemSource | None, config: Config) -> None:
        self.engine = engine
        self._context = _Context(
            engine=engine, items=items, temperature=config.rollout.sampling.temperature, loss=config.grpo.loss
        )
        self._token_budget = config.learner.token_budget
        self._num_updates = config.grpo.updates_per_batch
        engine.policy.eval()

    def train_step(
        self, sequences: Sequence[TrainingSequence], denominators: Denominators, learning_rate: float, version: int
    ) -> dict[str, float]:
        """Takes `updates_per_batch` optimizer steps on this rank's share of a batch.

        Args:
            sequences: of this rank, one or more.
            denominators: over all ranks.
            version: completed steps of the learner; tokens sampled by it are "fresh", and their log-probs must agree.

        Returns:
            Metrics over all ranks, equal on each. `skipped` is 1 where a loss or gradient that was not finite stopped
            the step; no weight has changed then. `fresh_gap_max` is infinite where a fresh log-prob was not finite.

        Raises:
            ValueError: no sequences, or one longer than the token budget.
        """
        started = time.perf_counter()
        if not sequences:
            raise ValueError("sequences: got none on this rank, expected at least one a rank; train on a larger batch")
        plan = self._plan([_scored(s.prompt, s.completion).extent for s in sequences])
        batches = [_MicroBatch(self._context, [sequences[i] for i in members], counted) for members, counted in plan]
        if self._num_updates > 1:
            for batch in batches:
                batch.remember_proximal()
        fresh: dict[str, float] = {}
        for update in range(self._num_updates):
            outcome, metrics = self._update(batches, denominators, learning_rate, version)
            if update == 0:
                fresh = {name: value for name, value in metrics.items() if name.startswith("fresh_")}
            if outcome.skipped is not None:
                logger.warning("step from version %d skipped: %s", version, outcome.skipped)
                break
        return {
            **metrics,
            **fresh,
            "gradient_norm": outcome.grad_norm,
            "learning_rate": outcome.learning_rate,
            "skipped": float(outcome.skipped is not None),
            "seconds": time.perf_counter() - started,
        }

    def _plan(self, extents: list[Extent]) -> list[tuple[list[int], bool]]:
        """Micro-batches of this rank, each with whether it counts; padded with the shortest sequence to the same
        number on all.

        A rank that ran fewer would leave the others waiting in a collective.
        """
        members = micro_batches(extents, self._token_budget)
        count = int(self.engine.all_reduce(torch.tensor([len(members)], dtype=torch.int64), "max").item())
        padding = [min(range(len(extents)), key=lambda i: extents[i].prompt_tokens + extents[i].completion_tokens)]
        return [(m, True) for m in members] + [(padding, False)] * (count - len(members))

    def _update(
        self, batches: Sequence[_MicroBatch], denominators: Denominators, learning_rate: float, version: int
    ) -> tuple[StepOutcome, dict[str, float]]:
        sums, largest = torch.zeros(len(METRIC_SUMS) + len(EXTRA_SUMS), dtype=torch.float64), 0.0
        for index, batch in enumerate(batches):
            loss, metrics, gap_max = batch.loss(denominators, version)
            self.engine.backward(loss, last=index == len(batches) - 1)
            sums += torch.tensor([float(metrics[name]) for name in (*METRIC_SUMS, *EXTRA_SUMS)], dtype=torch.float64)
            largest = max(largest, gap_max)
        outcome = self.engine.step(learning_rate)
        sums = self.engine.all_reduce(sums, "sum").cpu()
        largest = float(self.engine.all_reduce(torch.tensor([largest], dtype=torch.float64), "max").item())
        return outcome, _report(dict(zip((*METRIC_SUMS, *EXTRA_SUMS), sums.tolist())), largest)

    def score(self, prompt: Prompt, completion: Completion) -> NDArray[np.float32]:
        """Log-probs [T] of a completion at temperature 1, under the weights of now; the same on every rank."""
        scored = _scored(prompt, completion)
        batch = build_batch([scored], self._context.items, self.engine.dtype, self.engine.device)
        with torch.no_grad():
            logprobs, _ = self.engine.forward(batch, temperature=1.0)
        return logprobs.float().cpu().numpy()

    def export(self, version: int) -> WeightBuffer | None:
        """What trains, packed for the engines under their names; None on every rank but 0."""
        return export_weights(self.engine, version)

    def save(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, from rank 0."""
        policy: Any = self.engine.policy
        with self.engine.gathered(policy.parameters()):
            if self.engine.rank == 0:
                policy.save(folder)
        self.engine.all_reduce(torch.zeros(1), "sum")

    def save_checkpoint(self, folder: Path) -> None:
        """Writes weights, optimizer and random state of every rank."""
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save(folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Restores what `save_checkpoint` wrote; training then continues bitwise as it would have."""
        self.engine.load(folder)
        self.engine.policy.eval()


class _MicroBatch:
    """Sequences that pass through the policy together; padding (`counted` False) carries no weight anywhere."""

    def __init__(self, context: _Context, sequences: Sequence[TrainingSequence], counted: bool) -> None:
        self._context, self._counted = context, counted
        self._sequences = sequences
        self._proximal: Tensor | None = None

    def _tokens(self) -> TokenBatch:
        scored = [_scored(s.prompt, s.completion) for s in self._sequences]
        engine = self._context.engine
        return build_batch(scored, self._context.items, engine.dtype, engine.device)

    @torch.no_grad()
    def remember_proximal(self) -> None:
        """Scores the sequences before the first update, for the ratios of the later ones."""
        batch = self._tokens()
        logprobs, _ = self._context.engine.forward(batch, self._context.temperature)
        self._proximal = batch.spread(logprobs)

    def loss(self, denominators: Denominators, version: int) -> tuple[Tensor, dict[str, Any], float]:
        """The differentiable loss, the sums of METRIC_SUMS and EXTRA_SUMS, and the largest gap to the engine."""
        context, batch = self._context, self._tokens()
        logprobs, entropy = context.engine.forward(batch, context.temperature)
        policy, mask = batch.spread(logprobs), batch.mask() & self._counted
        proximal = policy.detach() if self._proximal is None else self._proximal
        behaviour = self._spread(batch, [s.completion.behaviour_logprobs for s in self._sequences])
        inputs = LossInputs(
            policy_logprobs=policy,
            proximal_logprobs=proximal,
            behaviour_logprobs=behaviour,
            reference_logprobs=self._reference(batch),
            advantages=torch.tensor([s.advantage for s in self._sequences], dtype=torch.float32, device=policy.device),
            mask=mask,
        )
        loss, metrics = policy_loss(inputs, context.loss, denominators)
        fresh = self._spread(batch, [s.completion.policy_versions == version for s in self._sequences]).bool() & mask
        gap = (policy.detach() - behaviour).abs()[fresh]
        finite = torch.isfinite(gap)
        extra = {
            "exact_entropy": float(entropy.double().sum()) if self._counted else 0.0,
            "fresh_gap_sum": float(gap[finite].double().sum()),
            "fresh_tokens": float(fresh.sum()),
            "fresh_not_finite": float((~finite).sum()),
            "micro_batches": 1.0,
        }
        largest = math.inf if not bool(finite.all()) else float(gap.max()) if len(gap) else 0.0
        return loss, {**metrics, **extra}, largest

    def _reference(self, batch: TokenBatch) -> Tensor | None:
        """[B, T] reference log-probs; None where no sequence has them.

        Raises:
            ValueError: some sequences of the micro-batch have them and others have none.
        """
        given = [s.reference_logprobs for s in self._sequences if s.reference_logprobs is not None]
        if not given:
            return None
        if len(given) != len(self._sequences):
            raise ValueError(
                f"reference_logprobs: {len(given)} of {len(self._sequences)} sequences have them; score all or none"
            )
        return self._spread(batch, given)

    @staticmethod
    def _spread(batch: TokenBatch, values: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        flat = torch.from_numpy(np.concatenate(values).astype(np.float32))
        return batch.spread(flat.to(batch.targets.device))


def _scored(prompt: Prompt, completion: Completion) -> ScoredSequence:
    return ScoredSequence(prompt_ids=prompt.token_ids, completion_ids=completion.token_ids, item_id=prompt.item_id)


def _report(sums: dict[str, float], fresh_gap_max: float) -> dict[str, float]:
    """Readable metrics from sums over all ranks. Fresh tokens compare the learner with the engine at equal weights."""
    compared = sums["fresh_tokens"] - sums["fresh_not_finite"]
    return {
        **finalise_metrics(sums),
        "entropy": sums["exact_entropy"] / max(sums["num_tokens"], 1.0),
        "fresh_gap_mean": sums["fresh_gap_sum"] / compared if compared else 0.0,
        "fresh_gap_max": fresh_gap_max,
        "fresh_tokens": sums["fresh_tokens"],
        "fresh_not_finite": sums["fresh_not_finite"],
        "micro_batches": sums["micro_batches"],
    }
