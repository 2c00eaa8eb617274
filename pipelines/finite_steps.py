"""A learner step whose loss or gradient is not finite: what is tried again without, and when it has been enough.

Of several updates on a batch those before one that is not finite stand: such a step was trained on all its groups.

Owns: the groups that steps go on without, the steps in a row that changed nothing, the limits of both. Does not own:
which groups are at fault (medtvt_rl/learner/culprits.py), or what else belongs to a step (grpo_loop.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.faults import TooFewCompletionsError
from medtvt_rl.types import LearnerStep
from pipelines.group_ledger import GroupLedger
from pipelines.grpo_roles import Learner, LoopError, Observer, TrainingGroup

MAX_SKIPPED_IN_A_ROW = 5


class FiniteSteps:
    """Asks the learner for steps, and takes those that are finite.

    Args:
        ledger: whose result counts the groups left out.
    """

    def __init__(self, learner: Learner, config: GrpoConfig, ledger: GroupLedger, observer: Observer) -> None:
        self._learner, self._limit = learner, config.max_nonfinite_groups
        self._ledger, self._observer = ledger, observer
        self._skipped_in_a_row = 0
        self._last: Sequence[TrainingGroup] = ()

    async def take(
        self, groups: list[TrainingGroup], rate: float, step: int
    ) -> tuple[list[TrainingGroup], LearnerStep]:
        """One step, and the groups it was taken with: one that is not finite is tried again without the groups that
        caused it, as long as no weight has changed and the ranks of the learner have a completion each.

        Raises:
            LoopError: the run has lost too many groups in this way.
        """
        outcome: LearnerStep | None = None
        while True:
            try:
                outcome = await self._learner.train_step(groups, rate, step)
            except TooFewCompletionsError:
                if outcome is None:
                    raise
                return groups, outcome
            culprits = [group for group in groups if group.group_id in outcome.culprits]
            if not culprits:
                return groups, outcome
            self._count_culprits(step, culprits, outcome)
            left = [group for group in groups if group.group_id not in outcome.culprits]
            if not left or outcome.updates:
                return groups, outcome
            groups = left

    def count(self, groups: Sequence[TrainingGroup], outcome: LearnerStep) -> None:
        """A step was taken, or not. `check` says whether it was too much."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if outcome.changed_nothing else 0
        self._last = groups

    def check(self) -> None:
        """Raises LoopError where too many steps in a row changed no weight; asked when the last one is told."""
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise LoopError(
                f"{MAX_SKIPPED_IN_A_ROW} learner steps in a row were skipped because a loss or gradient was not "
                f"finite, the last on groups {_ids(self._last)}; lower grpo.learning_rate"
            )

    def _count_culprits(self, step: int, culprits: Sequence[TrainingGroup], outcome: LearnerStep) -> None:
        result = self._ledger.result
        result.nonfinite += len(culprits)
        self._observer.nonfinite(step, culprits, str(outcome.skipped), outcome.updates)
        if result.nonfinite > self._limit:
            raise LoopError(
                f"{result.nonfinite} groups so far were not finite (grpo.max_nonfinite_groups = {self._limit}), the "
                f"last in step {step}: groups {_ids(culprits)}, {outcome.skipped}; lower grpo.learning_rate, or look "
                "at the saved groups"
            )


def _ids(groups: Sequence[TrainingGroup]) -> str:
    return ", ".join(str(group.group_id) for group in groups)
