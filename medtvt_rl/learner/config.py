"""Settings of the learner and of the supervised stages. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LearnerConfig:
    """The learner gang.

    Attributes:
        num_workers: ranks; each is one Ray actor.
        make_engine: dotted path of f(policy, settings, device) -> TrainingEngine (learner/engine.py), here and in the
            supervised stages.
        zero_stage: DeepSpeed ZeRO stage (arXiv 1910.02054).
        token_budget: padded tokens of one micro-batch of one rank, a prompt counted once for all its completions in it;
            memory follows it, whatever the group size.
        num_threads: torch threads per rank.
        step_timeout_s: deadline of one training step; also that of every collective in it.
        spares: 1 keeps, beside each rank, a process that has torch and DeepSpeed imported and takes its place when the
            gang is started again; 0 none; None one where the node has memory to spare.
    """

    num_workers: int = 1
    make_engine: str = "medtvt_rl.learner.deepspeed_engine:DeepSpeedEngine"
    zero_stage: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    token_budget: int = 8192
    gradient_clipping: float = 1.0
    weight_decay: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    num_threads: int = 1
    spares: int | None = None
    start_timeout_s: float = 300.0
    step_timeout_s: float = 300.0


@dataclass
class EncoderWarmupConfig:
    """The short supervised stage on findings that stands in for pre-trained encoders; 0 steps leaves one out."""

    ecg_steps: int = 300
    cxr_steps: int = 300
    lab_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3


@dataclass
class SupervisedConfig:
    """One supervised stage (PT or SFT): next-token loss on answers.

    Attributes:
        epochs: at most so many passes.
        decay_epochs: the learning rate falls to `final_lr_share` over so many by a cosine and stays there; 0: over all.
        batch_size: examples of one optimizer step over all ranks.
        modality_dropout: probability that a modality is withheld from an example.
        patience: stop when the validation score did not rise for so many epochs, not before `decay_epochs` are done; 0
            runs all epochs. The best are kept.
        validate_from: the first epoch (from 1) after which the score is measured; sampling answers takes time.
        min_rise: what counts as a rise; set it to the noise of the score.
        validation_studies, validation_samples: the score is the mean reward of that many sampled answers.
        train_encoders: whether the modality encoders learn, too.
        adam_betas: decay rates of Adam's first and second moment.
    """

    epochs: int = 6
    decay_epochs: int = 0
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_share: float = 0.05
    final_lr_share: float = 0.1
    weight_decay: float = 0.05
    modality_dropout: float = 0.05
    patience: int = 0
    min_rise: float = 0.0
    validate_from: int = 1
    validation_studies: int = 150
    validation_samples: int = 4
    train_encoders: bool = False
    num_workers: int = 2
    num_threads: int = 1
    zero_stage: int = 1
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    gradient_clipping: float = 1.0
    timeout_s: float = 3600.0
