"""Which groups may be started, and which finished ones make up the next step: the bound on staleness lives here.

Owns: admission, group ids, the order of consumption, the counts, and what of them survives a resume.
Does not own: generation, time, waiting. No call blocks; one asyncio loop asks again after each event. Items are opaque.

Why the bound holds. With `version` published, N groups a step and S = max_staleness, the j-th group in id order that is
not discarded is admitted only while j < (version + S + 1) * N. So in id order it is trained in step j // N <= version
+ S, and its oldest token is no older than `version`. Taking a later group first delays an earlier one: `look_ahead`
therefore holds back that many admissions, and `take` passes over an unfinished group only where each group left
behind can still be trained by its last step, admission version + S. At S = 0 nothing is passed over: strictly in
order, on-policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StalenessError(AssertionError):
    """A group older than the bound reached the learner: an engine sampled with weights older than those published."""


@dataclass(slots=True, kw_only=True)
class BufferCounts:
    """Totals over a run and its resumes.

    Attributes:
        admitted, finished, discarded: groups; `finished` counts discarded ones, too, if they had finished.
        trained: groups whose weights were published.
    """

    admitted: int = 0
    finished: int = 0
    trained: int = 0
    discarded: int = 0


@dataclass(slots=True, kw_only=True)
class _Slot(Generic[T]):
    """`admission_version`: no token is older; None for a group of an earlier run that was not begun again."""

    admission_version: int | None
    item: T | None = None
    oldest_version: int | None = None

    @property
    def finished(self) -> bool:
        return self.oldest_version is not None


class AdmissionBuffer(Generic[T]):
    """Admits groups, holds finished ones, hands out whole steps.

    Life of a group: `admit` -> `finish` -> `take` -> `published`, or `discard` instead of or after `finish`. After a
    resume, in place of `admit`: `begin`, once `can_begin`, or at once `finish` with the item of the run before, where
    `can_restore`.

    Args:
        groups_per_step: N, groups of one step.
        max_staleness: S, steps that a group may lag behind the learner.
        look_ahead: later groups that may be taken in place of slow ones; at most S * N. None: N // 8, or 0
            at S < 2, where any group held back would leave the engines idle while the learner trains.
    """

    def __init__(self, groups_per_step: int, max_staleness: int, look_ahead: int | None = None) -> None:
        if groups_per_step < 1:
            raise ValueError(f"grpo.groups_per_step: {groups_per_step}, expected 1 or more")
        if max_staleness < 0:
            raise ValueError(f"grpo.max_staleness: {max_staleness}, expected 0 (on-policy) or more")
        if look_ahead is None:
            look_ahead = groups_per_step // 8 if max_staleness >= 2 else 0
        if not 0 <= look_ahead <= max_staleness * groups_per_step:
            raise ValueError(
                f"look_ahead: {look_ahead}, expected 0 to max_staleness * groups_per_step = "
                f"{max_staleness * groups_per_step}; more would leave no full step to wait for"
            )
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.look_ahead = look_ahead
        self.version = 0
        self.steps_taken = 0
        self.counts = BufferCounts()
        self.staleness_histogram: Counter[int] = Counter()
        self.discard_reasons: Counter[str] = Counter()
        self._next_id = 0
        self._waiting: dict[int, _Slot[T]] = {}
        self._in_training: dict[int, dict[int, int]] = {}
        self._num_finished = 0  # of those that wait

    def can_admit(self) -> bool:
        """Whether another group may be started now."""
        return self.counts.admitted - self.counts.discarded < self._limit()

    def admit(self) -> int:
        """Starts a group and returns its id, unique over the run and its resumes. Check `can_admit` first."""
        assert self.can_admit(), f"no slot: version {self.version}, {self.counts}"
        group_id = self._next_id
        self._next_id += 1
        self._waiting[group_id] = _Slot(admission_version=self.version)
        self.counts.admitted += 1
        return group_id

    def finish(self, group_id: int, item: T, oldest_version: int) -> None:
        """Hands in a group whose rewards and log-probs are complete.

        Args:
            item: handed back by `take`.
            oldest_version: smallest policy version of any of its tokens.
        """
        slot = self._slot(group_id)
        assert not slot.finished, f"group {group_id} finished twice"
        slot.item, slot.oldest_version = item, oldest_version
        if slot.admission_version is None:
            slot.admission_version = oldest_version
        self.counts.finished += 1
        self._num_finished += 1

    def discard(self, group_id: int, reason: str) -> None:
        """Gives up a group that has not been taken; its slot is free at once, for a group with a new id."""
        self._num_finished -= self._slot(group_id).finished
        del self._waiting[group_id]
        self.counts.discarded += 1
        self.discard_reasons[reason] += 1

    def ready(self) -> bool:
        """Whether a full step can be taken."""
        return self._selection() is not None

    def blocking(self) -> tuple[int, ...]:
        """Unfinished groups among those that the next step would take in order: what a stuck run waits for."""
        first = list(self._waiting.items())[: self.groups_per_step]
        return tuple(group_id for group_id, slot in first if not slot.finished)

    def take(self) -> list[tuple[int, T]]:
        """The groups of the next step, in id order, each exactly once. Check `ready` first.

        Raises:
            StalenessError: a group lags more than max_staleness steps behind the learner. Nothing is taken then.
        """
        selection = self._selection()
        assert selection is not None, f"no full step: waiting for groups {self.blocking()} of {len(self._waiting)}"
        ages: dict[int, int] = {}
        for group_id in selection:
            oldest = self._waiting[group_id].oldest_version
            assert oldest is not None
            ages[group_id] = self.steps_taken - oldest
            if ages[group_id] > self.max_staleness:
                raise StalenessError(
                    f"group {group_id}: oldest token of version {oldest}, learner at {self.steps_taken}, staleness "
                    f"{ages[group_id]} exceeds max_staleness {self.max_staleness}; check its engine's weights"
                )
        step = [(group_id, self._waiting.pop(group_id).item) for group_id in selection]
        self._num_finished -= len(step)
        self.staleness_histogram.update(ages.values())
        self._in_training[self.steps_taken] = ages
        self.steps_taken += 1
        return step  # type: ignore[return-value]

    def published(self, version: int) -> None:
        """Every engine now holds `version`: slots of the groups trained for it come back. Versions may be skipped."""
        assert self.version <= version <= self.steps_taken, (
            f"published version {version}, expected {self.version} to {self.steps_taken}, the steps taken"
        )
        for step in range(self.version, version):
            self.counts.trained += len(self._in_training.pop(step))
        self.version = version

    def state_dict(self, completed_steps: int | None = None) -> dict[str, Any]:
        """What a checkpoint of the learner after `completed_steps` optimizer steps must carry; JSON-ready.

        Groups that the checkpoint's weights have not seen (running, finished, taken for a later step) are kept by id.

        Args:
            completed_steps: None where every step taken was published.
        """
        if completed_steps is None:
            assert self.version == self.steps_taken, "a step is between take and published: say completed_steps"
            completed_steps = self.steps_taken
        assert self.version <= completed_steps <= self.steps_taken
        undone = {step: ages for step, ages in self._in_training.items() if step >= completed_steps}
        done = sum(len(ages) for step, ages in self._in_training.items() if step < completed_steps)
        finished = sum(slot.finished for slot in self._waiting.values()) + sum(map(len, undone.values()))
        histogram = self.staleness_histogram.copy()
        for ages in undone.values():
            histogram.subtract(ages.values())
        return {
            "completed_steps": completed_steps,
            "next_group_id": self._next_id,
            "pending": sorted([*self._waiting, *(group_id for ages in undone.values() for group_id in ages)]),
            "admitted": self.counts.admitted,
            "finished": self.counts.finished - finished,
            "trained": self.counts.trained + done,
            "discarded": self.counts.discarded,
            "staleness_histogram": {str(age): count for age, count in sorted(histogram.items()) if count},
            "discard_reasons": dict(self.discard_reasons),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, ...]:
        """Goes on from a checkpoint whose weights the engines hold.

        Returns:
            Ids of the groups to restore, or to begin again: same ids, so same prompts and seeds. They are admitted, but
            under a bound that may have been another.
        """
        assert self.counts.admitted == 0, "load_state_dict on a buffer that is in use"
        self.version = self.steps_taken = int(state["completed_steps"])
        self._next_id = int(state["next_group_id"])
        names = ("admitted", "finished", "trained", "discarded")
        self.counts = BufferCounts(**{name: int(state[name]) for name in names})
        self.staleness_histogram = Counter({int(age): n for age, n in state["staleness_histogram"].items()})
        self.discard_reasons = Counter(state["discard_reasons"])
        pending = tuple(int(group_id) for group_id in state["pending"])
        self._waiting = {group_id: _Slot(admission_version=None) for group_id in pending}
        return pending

    def can_restore(self, group_id: int, oldest_version: int) -> bool:
        """Whether a finished group of the run before can still be trained within the bound of now."""
        return self.steps_taken + self._place(group_id) // self.groups_per_step - oldest_version <= self.max_staleness

    def can_begin(self, group_id: int) -> bool:
        """Whether a group of the run before may be started now: it waits where fewer may be under way than then."""
        return self.steps_taken * self.groups_per_step + self._place(group_id) < self._limit()

    def begin(self, group_id: int) -> None:
        """Starts a group of the run before again. Check `can_begin` first."""
        self._slot(group_id).admission_version = self.version

    def _place(self, group_id: int) -> int:
        """How many groups wait before this one."""
        self._slot(group_id)
        return list(self._waiting).index(group_id)

    def _limit(self) -> int:
        """Groups, not discarded, that may have been started by now."""
        return (self.version + self.max_staleness + 1) * self.groups_per_step - self.look_ahead

    def _slot(self, group_id: int) -> _Slot[T]:
        assert group_id in self._waiting, (
            f"group {group_id} is not waiting: never admitted, discarded, or taken already"
        )
        return self._waiting[group_id]

    def _selection(self) -> list[int] | None:
        """The first finished groups within the window, if those left behind can all be trained in time."""
        if self._num_finished < self.groups_per_step:
            return None  # asked after every group that finishes: this answer is cheap
        window = list(islice(self._waiting.items(), self.groups_per_step + self.look_ahead))
        chosen = [group_id for group_id, slot in window if slot.finished][: self.groups_per_step]
        if len(chosen) < self.groups_per_step:
            return None
        taken = set(chosen)
        left = [slot for group_id, slot in self._waiting.items() if group_id not in taken]
        next_step = self.steps_taken + 1
        in_time = all(
            slot.admission_version is None
            or slot.admission_version + self.max_staleness >= next_step + position // self.groups_per_step
            for position, slot in enumerate(left)
        )
        return chosen if in_time else None
