"""Settings of advantages, losses, KL and importance correction. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ADVANTAGES = ("group", "mean_only", "rloo")
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


@dataclass
class KlConfig:
    """KL to the reference policy; estimators k1, k2, k3 after Schulman, "Approximating KL divergence" (2020).

    Attributes:
        coefficient: 0 needs no reference policy, and none is started.
        placement: in the loss (arXiv 2402.03300), or subtracted from the reward (2203.02155).
    """

    coefficient: float = 0.1
    estimator: Literal["k1", "k2", "k3"] = "k3"
    placement: Literal["loss", "reward"] = "loss"


@dataclass
class ImportanceConfig:
    """Correction between the behaviour policy (engine, when sampled) and the proximal one (learner, before the update).

    Attributes:
        mode: "truncated" caps the ratio at `cap` (Ionides 2008); "masked" drops what exceeds it, or lies below `floor`
            (arXiv 2510.18855); "none" trusts the samples.
        level: ratio per token (2505.24298), or of the whole sequence.
    """

    mode: Literal["none", "truncated", "masked"] = "truncated"
    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0
    floor: float = 0.0


@dataclass
class LossConfig:
    """The policy loss.

    Attributes:
        kind: grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), cispo (2506.13585),
            or the dotted path of an Objective (algorithm/losses.py), of which the mean over all tokens is taken.
        clip_low, clip_high: the ratio policy/proximal is clipped to [1 - clip_low, 1 + clip_high]; equal bounds after
            PPO (1707.06347), a higher upper one after DAPO (2503.14476).
    """

    kind: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KlConfig = field(default_factory=KlConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)


@dataclass
class DynamicSamplingConfig:
    """Groups whose rewards are all equal teach nothing; others may take their place (DAPO, arXiv 2503.14476).

    Attributes:
        max_replaced: groups that may be replaced for each step, on average over the run so far; 0 trains on all. They
            are judged by the rewards as they were scored, before overlong punishment and KL.
    """

    max_replaced: int = 0


@dataclass
class HeldOutConfig:
    """Held-out answers while training goes on, by the same engines.

    Attributes:
        every_steps: 0 measures never.
        max_prompts: of the split, the first so many; one answer is sampled for each and one greedy.
        best_by: the metric (the higher, the better) whose best checkpoint is kept, as metrics.jsonl names it behind
            "held_out/". None: jaccard, or the reward where task.evaluate is not the packages' own.
        timeout_s: deadline for judging the answers; one that is missed is told, and training goes on.
    """

    every_steps: int = 15
    max_prompts: int = 50
    split: str = "validation"
    best_by: str | None = None
    timeout_s: float = 300.0


@dataclass
class OverlongConfig:
    """Soft overlong punishment (arXiv 2503.14476): `weight` times a penalty of 0 to -1 is added to the reward.

    Attributes:
        weight: 0 is off.
        buffer_tokens: the penalty grows over so many tokens before rollout.sampling.max_new_tokens.
    """

    weight: float = 0.0
    buffer_tokens: int = 16


@dataclass
class GrpoConfig:
    """One GRPO step trains on `groups_per_step` groups of `group_size` completions.

    Attributes:
        max_staleness: steps that a sample may lag behind the learner; 0 is on-policy training by the same code.
        advantage: group (mean and deviation, arXiv 2402.03300), mean_only (2503.20783), rloo (2402.14740), or the
            dotted path of f(rewards [G] float64) -> [G].
        layout: dotted path of f(config, reporter, stop) -> object with `run()`, which puts actors and loop together;
            its `bundles(config)`, where it has one, says what is placed.
        final_lr_share: the learning rate falls linearly to this share of its start.
        max_nonfinite_groups: groups that may be left out of a run because their loss or gradient was not finite.
        record_steps: the learners' inputs are kept, so that `medtvt-rl replay` can repeat a step bit for bit.
        checkpoint_every: steps between two checkpoints, from which an interrupted run goes on; 0 writes none. Steps
            whose policy is measured on held-out answers get one, too.
        keep_checkpoints: the newest so many are kept, and the best on held-out answers (`held_out.best_by`).
        checkpoint_root: folder or fsspec URL (s3://BUCKET/FOLDER needs `pip install s3fs`) below which they lie, in a
            folder named as the run; null: `checkpoints` in the run folder. Every learner must reach it.
        checkpoint_in_background: "always": a checkpoint is copied in host memory and written while training goes on;
            "never": training waits; "auto": copied where the node has twice the memory free that this takes.
        checkpoint_timeout_s: deadline for writing one, and for reading it where the learners are started again.
    """

    steps: int = 100
    groups_per_step: int = 16
    group_size: int = 8
    max_staleness: int = 1
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    final_lr_share: float = 0.1
    advantage: str = "group"
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    updates_per_batch: int = 1
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    max_nonfinite_groups: int = 16
    record_steps: bool = True
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    checkpoint_root: str | None = None
    checkpoint_in_background: Literal["auto", "always", "never"] = "auto"
    checkpoint_timeout_s: float = 600.0
    layout: str = "pipelines.grpo:Layout"
