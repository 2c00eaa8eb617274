"""The records that travel through the system, from the prompt to the learner.

Owns: Study (what a patient's item is), Prompt, Example, Completion, RolloutGroup and TrainingSequence, with their
invariants; GroupHeader and LearnerStep, what the driver sees of a group and of a step.
Does not own: how any of them is made, moved or stored. Later stages derive new records; none is changed in place.
Arrays are numpy, so that a record travels through the Ray object store without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.privacy import hashed

MODALITIES = ("ecg", "cxr", "lab")
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What was measured of one patient at one visit. A modality that was not taken is None, never invented.

    Attributes:
        study_id: unique over all splits; everything joins on it.
        patient_id: patients never appear in two splits.
        ecg: [12, 1000] float32, mV at 100 Hz, leads I II III aVR aVF aVL V1..V6; None if not taken.
        cxr: [S, S] uint8 film, 0 = black; None if not taken.
        lab_percentiles: [50] float32 in 0..1, percentile in the training split; NaN where not measured.
        lab_measured: [50] bool.
    """

    study_id: str
    patient_id: str
    ecg: NDArray[np.float32] | None
    cxr: NDArray[np.uint8] | None
    lab_percentiles: NDArray[np.float32]
    lab_measured: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.ecg is not None and self.ecg.shape != (12, 1000):
            raise ValueError(f"{hashed(self.study_id)}: ecg has shape {self.ecg.shape}, expected (12, 1000)")
        if self.cxr is not None and (self.cxr.ndim != 2 or self.cxr.shape[0] != self.cxr.shape[1]):
            raise ValueError(f"{hashed(self.study_id)}: cxr has shape {self.cxr.shape}, expected a square (S, S)")
        if self.lab_percentiles.shape != self.lab_measured.shape:
            raise ValueError(
                f"{hashed(self.study_id)}: {self.lab_percentiles.shape} percentiles, {self.lab_measured.shape} flags"
            )

    @property
    def present(self) -> tuple[bool, bool, bool]:
        """Which of (ecg, cxr, lab) were taken; labs count as taken when at least one value was measured."""
        return self.ecg is not None, self.cxr is not None, bool(self.lab_measured.any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One thing to be answered.

    Attributes:
        prompt_id: unique within its split.
        token_ids: [P] int32, placeholders of the multimodal item already expanded, exactly once.
        item_id: key of the multimodal item in the task's item source (a study id); None for plain text.
        ground_truth: what the reward functions compare with, in the task's own format.
        evidence: what is known of the item beyond the answer, in the task's own format; handed to the reward functions
            that ask for it. It travels with the prompt, so it is small.
    """

    prompt_id: str
    token_ids: NDArray[np.int32]
    item_id: str | None
    ground_truth: str
    evidence: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or len(self.token_ids) == 0:
            raise ValueError(
                f"prompt {hashed(self.prompt_id)}: token_ids has shape {self.token_ids.shape}, expected (P,), P > 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the answer that supervised training teaches.

    Attributes:
        answer: text; the end token is added behind its tokens.
    """

    prompt: Prompt
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer.

    Attributes:
        completion_id: "GROUP_ID/INDEX".
        token_ids: [T] int32; ends with an end-of-sequence token only if the model sampled one.
        behaviour_logprobs: [T] float32, of the engine when it sampled, at the sampling temperature.
        policy_versions: [T] int32, the policy version whose weights produced each token.
        finish_reason: "stop" (the model ended it) or "length" (it was cut).
    """

    completion_id: str
    token_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    policy_versions: NDArray[np.int32]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.behaviour_logprobs), len(self.policy_versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"completion {self.completion_id}: unequal lengths of tokens, log-probs and versions {lengths}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """One prompt and its G completions. `group_id` is unique over a run and its resumes."""

    group_id: int
    prompt: Prompt
    completions: tuple[Completion, ...]

    @property
    def oldest_version(self) -> int:
        """The smallest policy version of any token, 0 without one; staleness = learner version - this."""
        return min((int(c.policy_versions.min()) for c in self.completions if len(c.policy_versions)), default=0)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the whole group."""
        return sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSequence:
    """One completion as the learner consumes it.

    Attributes:
        advantage: of the completion, already normalised within its group.
        reference_logprobs: [T] float32 of the frozen policy; None when no KL term needs them.
    """

    group_id: int
    prompt: Prompt
    completion: Completion
    advantage: float
    reference_logprobs: NDArray[np.float32] | None

    def __post_init__(self) -> None:
        if self.reference_logprobs is not None and len(self.reference_logprobs) != len(self.completion.token_ids):
            raise ValueError(
                f"completion {self.completion.completion_id}: {len(self.reference_logprobs)} reference log-probs "
                f"for {len(self.completion.token_ids)} tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHeader:
    """What the driver sees of a group; the payload stays where it was made.

    Attributes:
        lengths: completion tokens of each completion.
        num_cut: completions that ended at the length limit.
        oldest_version, newest_version: over all tokens of the group.
        generate_s: seconds between the request and the last token.
        finite: whether every behaviour log-prob is.
    """

    group_id: int
    prompt_id: str
    lengths: tuple[int, ...]
    num_cut: int
    oldest_version: int
    newest_version: int
    generate_s: float
    finite: bool = True

    @classmethod
    def of(cls, group: RolloutGroup, generate_s: float, version: int = 0) -> GroupHeader:
        """The header of a finished group; one without a single token is of `version`."""
        newest = max(
            (int(c.policy_versions.max()) for c in group.completions if len(c.policy_versions)), default=version
        )
        return cls(
            group_id=group.group_id,
            prompt_id=group.prompt.prompt_id,
            lengths=tuple(len(c.token_ids) for c in group.completions),
            num_cut=sum(c.finish_reason == "length" for c in group.completions),
            oldest_version=group.oldest_version if group.num_tokens else version,
            newest_version=newest,
            generate_s=generate_s,
            finite=all(bool(np.isfinite(c.behaviour_logprobs).all()) for c in group.completions),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceHeader:
    """What the driver sees of a group's reference log-probs.

    Attributes:
        kl: [G] float32, KL of each completion by the configured estimator, summed over its tokens.
        seconds: the reference policy took.
        finite: whether every log-prob is.
    """

    kl: NDArray[np.float32]
    seconds: float
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStep:
    """What the learner made of a batch.

    Attributes:
        metrics: over all ranks; `updates` are those taken, `skipped` is 1 where there were none.
        skipped: what was not finite, so that this update and those after it were not taken; None where all were.
        culprits: sorted ids of the groups it came from; at least one where it was not finite.
    """

    metrics: dict[str, float]
    skipped: str | None = None
    culprits: tuple[int, ...] = ()

    @property
    def updates(self) -> int:
        """Those that were taken, 0 where the learner does not say."""
        return int(self.metrics.get("updates", 0.0))

    @property
    def changed_nothing(self) -> bool:
        """Whether the first update was not finite."""
        return self.skipped is not None and not self.updates
