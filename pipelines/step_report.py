"""What the GRPO loop says of itself: to the reader, in metrics and journal, and as alarms.

Owns: the words. Does not own: when something is told (grpo_loop.py), what an alarm is (medtvt_rl/evaluation/alarms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.supervision import Incidents
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.privacy import shows_samples
from medtvt_rl.rollout.balance import Share
from pipelines.group_ledger import EQUAL_REWARDS
from pipelines.grpo_roles import FinishedGroup, TrainedStep, TrainingGroup
from pipelines.journal import Journal, failures
from pipelines.reporter import Reporter
from pipelines.step_metrics import generator_metrics


class StepReport:
    """Tells reporter and journal what the loop does, and sounds the alarms."""

    def __init__(
        self,
        reporter: Reporter,
        journal: Journal,
        alarms: Alarms,
        incidents: Incidents,
        shares: Callable[[], Sequence[Share]] = list,
    ) -> None:
        self._reporter, self._journal, self._alarms = reporter, journal, alarms
        self._incidents, self._shares = incidents, shares
        self.sounded: list[str] = []
        self.listener: Callable[[Mapping[str, float]], None] = lambda metrics: None

    def show_again(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The steps before a resume: the alarms go on from there."""
        for row in rows:
            if row["stage"] == "grpo":
                metrics = {name: value for name, value in row.items() if isinstance(value, float)}
                self.sounded.extend(self._alarms.check(int(row["step"]), metrics))

    def step(self, trained: TrainedStep) -> None:
        """The step's metrics, its groups, and what was wrong with it."""
        metrics, step = trained.metrics, trained.step
        if all(group.group.reference_header is None for group in trained.groups):
            # Without a reference nothing was measured; the learner's sum over no tokens is 0.
            metrics = {name: value for name, value in metrics.items() if name != "kl"}
        of_generators = generator_metrics(self._shares())
        self._reporter.scalars("grpo", step, {**metrics, **of_generators, **self._incidents.metrics()})
        self.listener(metrics)
        failed = {name: reason for group in trained.groups for name, reason in failures(group).items()}
        if failed:
            name, reason = next(iter(failed.items()))
            self._reporter.line(
                f"grpo: step {step}: {len(failed)} completions could not be scored, e.g. {name}: {_shown(reason)}"
            )
        if metrics.get("skipped", 0.0) > 0:
            self._reporter.line(
                f"grpo: step {step} changed nothing, loss or gradient not finite, on groups {_ids(trained.groups)}"
            )
        self._sound(step, metrics)
        words = {"reward": "reward/total", "staleness": "staleness/max", "kl": "kl", "entropy": "entropy"}
        shown = {word: metrics[name] for word, name in words.items() if name in metrics}
        self._reporter.update(step + 1, total=None, **shown)
        self._journal.write(trained)

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """A line for the reader, the whole reason for the journal."""
        self._reporter.line(f"grpo: group {group_id} discarded: {reason.splitlines()[0]}")
        self._journal.discarded(group_id, prompt_id, reason)

    def replaced(self, group: FinishedGroup) -> None:
        """For the journal alone: it is what dynamic sampling is for."""
        self._journal.discarded(group.header.group_id, group.header.prompt_id, EQUAL_REWARDS)

    def nonfinite(self, step: int, groups: Sequence[TrainingGroup], reason: str, updates: int) -> None:
        """A line for the reader; the learners have saved the groups."""
        what = f"stopped after update {updates} because of" if updates else "goes on without"
        self._reporter.line(f"grpo: step {step} {what} groups {_ids(groups)}: {reason}; they lie in journal/nonfinite")
        if updates:
            return  # they were trained on
        for group in groups:
            header = group.group.header
            self._journal.discarded(header.group_id, header.prompt_id, f"step {step}: {reason}")

    def measured(self, metrics: Mapping[str, float]) -> None:
        """A row of their own, at the step that made the version, or the first for what the run started with."""
        step = max(0, int(metrics["held_out/version"]) - 1)
        self._reporter.scalars("grpo", step, metrics)
        self._sound(step, metrics)

    def unmeasured(self, version: int, what: str, error: Exception) -> None:
        """A line for the reader; training does not hang on it."""
        why = (str(error).splitlines() or [""])[0]
        self._reporter.line(f"grpo: version {version}: {what} could not be measured: {type(error).__name__}: {why}")

    def _sound(self, step: int, metrics: Mapping[str, float]) -> None:
        for alarm in self._alarms.check(step, metrics):
            self.sounded.append(alarm)
            self._reporter.line(f"grpo: ALARM: {alarm}")


def _shown(reason: str) -> str:
    """Of why a reward function failed: which, and the type of the error; its words may be those of a patient."""
    if shows_samples():
        return reason
    return f"{': '.join(reason.split(': ', 2)[:2])} (the whole reason is in journal/groups.jsonl)"


def _ids(groups: Sequence[TrainingGroup]) -> str:
    return ", ".join(str(group.group_id) for group in groups)
