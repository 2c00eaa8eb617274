"""Which group has which prompt, and where it stands: from its admission until its weights are published.

Owns: admission (AdmissionBuffer), the prompts of the groups under way, which finished groups make way for others, the
counts of the run, and all that a checkpoint keeps of these. Does not own: tasks, waiting, actors (grpo_loop.py).
No call blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from medtvt_rl.algorithm.advantages import has_signal
from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.rollout.buffer import AdmissionBuffer
from medtvt_rl.types import Prompt
from pipelines.grpo_roles import FinishedGroup, LoopResult

EQUAL_REWARDS = "all rewards equal"


class GroupLedger:
    """The groups of a run.

    Attributes:
        in_flight: groups that are being made.
        result: totals over the run and its resumes.
    """

    def __init__(self, config: GrpoConfig, sampler: PromptSampler) -> None:
        self._config, self._sampler = config, sampler
        self.buffer: AdmissionBuffer[FinishedGroup] = AdmissionBuffer(config.groups_per_step, config.max_staleness)
        self.result = LoopResult()
        self.in_flight: set[int] = set()
        self._prompt_of: dict[int, int] = {}
        self._undecided: dict[int, FinishedGroup | None] = {}
        self._finished: dict[int, FinishedGroup] = {}
        self._to_sift: list[int] = []
        self._again: list[int] = []

    # From prompt to buffer.

    def may_start(self) -> bool:
        """Whether a group may be started now."""
        if self._again:
            return self.buffer.can_begin(self._again[0])
        wanted = self._config.steps * self._config.groups_per_step
        counts = self.buffer.counts
        return self.buffer.can_admit() and counts.admitted - counts.discarded < wanted

    def start_wave(self) -> list[tuple[int, Prompt]]:
        """Every group that may be started now, with its prompt: first those of an earlier run."""
        wave = []
        while self.may_start():
            if self._again:
                group_id = self._again.pop(0)
                self.buffer.begin(group_id)
                prompt = self._sampler.prompt(self._prompt_of[group_id])
            else:
                group_id = self.buffer.admit()
                _, self._prompt_of[group_id], prompt = self._sampler.next()
                self._undecided[group_id] = None
            self.in_flight.add(group_id)
            wave.append((group_id, prompt))
        return wave

    def finish(self, group: FinishedGroup) -> None:
        """A group is complete; `sift` says what becomes of it."""
        group_id = group.header.group_id
        self.in_flight.discard(group_id)
        self._undecided[group_id] = self._finished[group_id] = group
        self._to_sift.append(group_id)

    def discard(self, group_id: int, reason: str) -> None:
        """A group was given up while it was made."""
        self.in_flight.discard(group_id)
        del self._undecided[group_id]
        self._drop(group_id, reason)
        self.result.discarded += 1

    def sift(self) -> list[FinishedGroup]:
        """Hands finished groups to the buffer; with dynamic sampling those of equal rewards make way for others, and
        are returned.

        They are then judged in id order, so that it does not hang on a group's speed which ones are replaced.
        """
        in_order, replaced = self._config.dynamic_sampling.max_replaced > 0, []
        finished, self._to_sift = self._to_sift, []
        for group_id in list(self._undecided) if in_order else finished:
            group = self._undecided[group_id]
            if group is None:
                break
            del self._undecided[group_id]
            if self._is_replaceable(group):
                self._drop(group_id, EQUAL_REWARDS)
                self.result.replaced += 1
                replaced.append(group)
            else:
                self.buffer.finish(group_id, group, group.header.oldest_version)
        return replaced

    def _is_replaceable(self, group: FinishedGroup) -> bool:
        allowed = self._config.dynamic_sampling.max_replaced * (self.buffer.steps_taken + 1)
        return self.result.replaced < allowed and not has_signal(group.rewards.total)

    def _drop(self, group_id: int, reason: str) -> None:
        self.buffer.discard(group_id, reason)
        self._finished.pop(group_id, None)
        del self._prompt_of[group_id]

    # From buffer to published weights.

    def take(self) -> list[FinishedGroup]:
        """A step's groups, in id order. Check `buffer.ready` first."""
        return [group for _, group in self.buffer.take()]

    def forget(self, groups: Sequence[FinishedGroup]) -> None:
        """The weights trained on these groups are published."""
        for group in groups:
            del self._prompt_of[group.header.group_id], self._finished[group.header.group_id]

    # Across a resume.

    def state_dict(self, version: int) -> tuple[dict[str, Any], list[FinishedGroup]]:
        """What a checkpoint of the learners' `version` needs beside it, JSON-ready, and the finished groups that those
        weights have not seen. The others are kept by id and prompt, and made again with the same seeds."""
        buffer = self.buffer.state_dict(version)
        state = {
            "buffer": buffer,
            "sampler": self._sampler.state_dict(),
            "prompts": {str(group_id): self._prompt_of[group_id] for group_id in buffer["pending"]},
            "undecided": list(self._undecided),
            "result": asdict(self.result),
        }
        return state, [self._finished[group_id] for group_id in buffer["pending"] if group_id in self._finished]

    def load_state_dict(self, state: Mapping[str, Any], groups: Sequence[FinishedGroup], with_reference: bool) -> None:
        """Goes on where `state` was taken; engines and learners hold the weights of its version.

        A finished group is made again where the bound on staleness has become too tight for it, or it lacks the
        reference log-probs that the others will have now.

        Args:
            with_reference: whether groups have them from now on; otherwise those that are there are left out.
        """
        self._sampler.load_state_dict(state["sampler"])
        self.result = LoopResult(**state["result"])
        undecided = set(state["undecided"])
        if with_reference:
            groups = [group for group in groups if group.reference_header is not None]
        else:
            groups = [replace(group, reference=None, reference_header=None) for group in groups]
        finished = {group.header.group_id: group for group in groups}
        for group_id in self.buffer.load_state_dict(state["buffer"]):
            self._prompt_of[group_id] = state["prompts"][str(group_id)]
            group = finished.get(group_id)
            if group is None or not self.buffer.can_restore(group_id, group.header.oldest_version):
                self._undecided[group_id] = None
                self._again.append(group_id)
                continue
            self._finished[group_id] = group
            if group_id in undecided:
                self._undecided[group_id] = group
                self._to_sift.append(group_id)
            else:
                self.buffer.finish(group_id, group, group.header.oldest_version)

    @staticmethod
    def known(state: Mapping[str, Any]) -> Callable[[int], bool]:
        """Whether what became of a group is settled in a state, so that it is not made again."""
        pending, next_id = {*state["buffer"]["pending"]}, int(state["buffer"]["next_group_id"])
        return lambda group_id: group_id < next_id and group_id not in pending

    @staticmethod
    def prompts(state: Mapping[str, Any], sampler: PromptSampler) -> dict[int, Prompt]:
        """Group id -> prompt, of the groups of a state."""
        return {int(group_id): sampler.prompt(index) for group_id, index in state["prompts"].items()}
