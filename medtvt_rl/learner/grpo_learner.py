"""One rank of the GRPO learner: completions with advantages in, an optimizer step and its metrics out.

Owns: the order of a training step, the agreement of all ranks on it, and what is exported to the engines.
Does not own: the loss (algorithm/losses.py), the optimizer and its sharding (engine.py), what is measured
(measures.py), which groups are at fault where a step is not finite (culprits.py), transport (actors/).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtvt_rl.algorithm.config import LossConfig
from medtvt_rl.algorithm.losses import Denominators, LossInputs, policy_loss
from medtvt_rl.algorithm.packing import Extent, micro_batches
from medtvt_rl.config import Config
from medtvt_rl.learner.culprits import Fault, agree, describe, groups_of, has_finite_gradient, row_faults
from medtvt_rl.learner.engine import StepOutcome, TrainingEngine
from medtvt_rl.learner.export import export_weights
from medtvt_rl.learner.measures import Measures, measure, report
from medtvt_rl.learner.scoring import ItemSource, ScoredSequence, ScoringModule, TokenBatch, build_batch
from medtvt_rl.learner.training_state import TrainingState
from medtvt_rl.rollout.config import Sent
from medtvt_rl.types import Completion, LearnerStep, Prompt, TrainingSequence
from medtvt_rl.weights import WeightBuffer

logger = logging.getLogger(__name__)


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

    Args:
        enter: told the phase of a step that begins: forward, backward, optimizer step.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        items: ItemSource | None,
        config: Config,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.engine, self._enter = engine, enter
        self._context = _Context(
            engine=engine, items=items, temperature=config.rollout.sampling.temperature, loss=config.grpo.loss
        )
        self._token_budget = config.learner.token_budget
        self._num_updates = config.grpo.updates_per_batch
        engine.policy.eval()

    def train_step(
        self, sequences: Sequence[TrainingSequence], denominators: Denominators, learning_rate: float, version: int
    ) -> LearnerStep:
        """Takes `updates_per_batch` optimizer steps on this rank's share of a batch.

        Args:
            sequences: of this rank, one or more.
            denominators: over all ranks.
            version: completed steps of the learner; tokens sampled by it are "fresh", and their log-probs must agree.

        Returns:
            Equal on every rank. Where something was not finite the step stops before its weights change, and the groups
            at fault are named. Of several updates those before it have been taken, as the metric `updates` says.
            `fresh_gap_max` is infinite where a fresh log-prob was not finite; `tokens` are those of prompts and
            completions, `num_tokens` those of completions, of one update each.

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
        skipped: str | None = None
        culprits: tuple[int, ...] = ()
        taken = 0
        for update in range(self._num_updates):
            outcome, metrics, faults = self._update(batches, denominators, learning_rate, version)
            if update == 0:
                fresh = {name: value for name, value in metrics.items() if name.startswith("fresh_")}
            if outcome.skipped is not None:
                skipped, culprits = self._blame(batches, denominators, faults, outcome.skipped)
                logger.warning("step from version %d, update %d skipped: %s", version, update, skipped)
                break
            taken += 1
        metrics = {
            **metrics,
            **fresh,
            "gradient_norm": outcome.grad_norm,
            "learning_rate": outcome.learning_rate,
            "updates": float(taken),
            "skipped": float(taken == 0),
            "seconds": time.perf_counter() - started,
        }
        return LearnerStep(metrics=metrics, skipped=skipped, culprits=culprits)

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
    ) -> tuple[StepOutcome, dict[str, float], set[Fault]]:
        total, faults = Measures.none(), set[Fault]()
        for index, batch in enumerate(batches):
            self._enter("forward")
            loss, measured, found = batch.loss(denominators, version)
            self._enter("backward")
            # A fault need not reach the loss (a capped ratio hides an infinite log-prob), so it is made to: a loss
            # of NaN stops the step on every rank, without a collective of its own.
            self.engine.backward(loss * math.nan if found else loss, last=index == len(batches) - 1)
            total, faults = total + measured, faults | found
        self._enter("optimizer step")
        outcome = self.engine.step(learning_rate)
        return outcome, report(total.reduced(self.engine)), faults

    def _blame(
        self, batches: Sequence[_MicroBatch], denominators: Denominators, faults: set[Fault], reason: str
    ) -> tuple[str, tuple[int, ...]]:
        """Why a step was skipped, and the groups it came from, at least one (all ranks).

        Where every value was finite and the gradient was not, each group's gradient is computed alone.
        """
        agreed = agree(self.engine, faults)
        if not agreed and not self.engine.shards_parameters:
            agreed = agree(self.engine, self._gradient_faults(batches, denominators))
        if agreed:
            return describe(agreed), groups_of(agreed)
        everyone = {("gradient", group_id) for batch in batches for group_id in batch.group_ids}
        why = "parameters are sharded" if self.engine.shards_parameters else "that of each group alone is finite"
        return f"{reason}; {why}, so every group is named", groups_of(agree(self.engine, everyone))

    def _gradient_faults(self, batches: Sequence[_MicroBatch], denominators: Denominators) -> set[Fault]:
        """The groups of this rank whose gradient alone is not finite. No collective: ranks hold unequally many."""
        module, faults = ScoringModule(self.engine.policy), set()
        for batch in batches:
            for group_id in batch.group_ids:
                loss = batch.of_group(group_id).loss_through(module, denominators)
                if not has_finite_gradient(loss, module.parameters()):
                    faults.add(("gradient", group_id))
        return faults

    def score(self, prompt: Prompt, completion: Completion) -> NDArray[np.float32]:
        """Log-probs [T] of a completion at temperature 1, under the weights of now; the same on every rank."""
        scored = _scored(prompt, completion)
        batch = build_batch([scored], self._context.items, self.engine.dtype, self.engine.device)
        with torch.no_grad():
            logprobs, _ = self.engine.forward(batch, temperature=1.0)
        return logprobs.float().cpu().numpy()

    def export(self, version: int, send: Sent = "merged") -> WeightBuffer | None:
        """What is to be sent, packed for the engines under their names; None on every rank but 0."""
        return export_weights(self.engine, version, send)

    def save(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, from rank 0."""
        policy: Any = self.engine.policy
        with self.engine.gathered(policy.parameters()):
            if self.engine.rank == 0:
                policy.save(folder)
        self.engine.all_reduce(torch.zeros(1), "sum")

    def state(self, copy: bool) -> TrainingState:
        """What this rank keeps of the present moment, see TrainingEngine."""
        return self.engine.state(copy)

    def load_checkpoint(self, folder: Path) -> None:
        """Restores the states that a gang wrote; training then continues bitwise as it would have."""
        self.engine.load(folder)
        self.engine.policy.eval()


class _MicroBatch:
    """Sequences that pass through the policy together; padding (`counted` False) carries no weight anywhere."""

    def __init__(self, context: _Context, sequences: Sequence[TrainingSequence], counted: bool) -> None:
        self._context, self._counted = context, counted
        self._sequences = sequences
        self._proximal: Tensor | None = None

    @property
    def group_ids(self) -> list[int]:
        """Groups that are counted here, each once, in order."""
        return sorted({s.group_id for s in self._sequences}) if self._counted else []

    def of_group(self, group_id: int) -> _MicroBatch:
        """The sequences of one group alone."""
        rows = [row for row, sequence in enumerate(self._sequences) if sequence.group_id == group_id]
        part = _MicroBatch(self._context, [self._sequences[row] for row in rows], self._counted)
        part._proximal = None if self._proximal is None else self._proximal[rows]
        return part

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

    def loss(self, denominators: Denominators, version: int) -> tuple[Tensor, Measures, set[Fault]]:
        """The differentiable loss through the engine, what was measured, and what was not finite."""
        context, batch = self._context, self._tokens()
        logprobs, entropy = context.engine.forward(batch, context.temperature)
        inputs = self._inputs(batch, logprobs)
        loss, sums = policy_loss(inputs, context.loss, denominators)
        measured = measure(
            inputs,
            sums,
            entropy=entropy if self._counted else entropy[:0],
            fresh=self._spread(batch, [s.completion.policy_versions == version for s in self._sequences]).bool(),
            level=context.loss.importance.level,
            num_tokens=self._num_tokens(),
        )
        faults = row_faults(inputs, loss, context.loss, denominators, [s.group_id for s in self._sequences])
        return loss, measured, faults

    def loss_through(self, module: ScoringModule, denominators: Denominators) -> Tensor:
        """The loss through the bare policy, past the engine."""
        batch = self._tokens()
        logprobs, _ = module(batch, self._context.temperature)
        return policy_loss(self._inputs(batch, logprobs), self._context.loss, denominators)[0]

    def _inputs(self, batch: TokenBatch, logprobs: Tensor) -> LossInputs:
        policy = batch.spread(logprobs)
        # A group alone may be narrower than the micro-batch that it was first scored in.
        proximal = policy.detach() if self._proximal is None else self._proximal[:, : policy.shape[1]]
        advantages = [s.advantage for s in self._sequences]
        return LossInputs(
            policy_logprobs=policy,
            proximal_logprobs=proximal,
            behaviour_logprobs=self._spread(batch, [s.completion.behaviour_logprobs for s in self._sequences]),
            reference_logprobs=self._reference(batch),
            advantages=torch.tensor(advantages, dtype=torch.float32, device=policy.device),
            mask=batch.mask() & self._counted,
        )

    def _num_tokens(self) -> int:
        """Tokens of prompts and completions; a prompt without a completion trains nothing and does not count."""
        trained = [s for s in self._sequences if self._counted and len(s.completion.token_ids)]
        return sum(len(s.prompt.token_ids) + len(s.completion.token_ids) for s in trained)

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
