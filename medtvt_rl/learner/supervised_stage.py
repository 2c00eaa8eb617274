"""One rank of a supervised stage, from the start folder to the folder that the next stage starts from. No Ray in it.

Owns: what PT and SFT are made of (questions, score, encoders), that the result appears complete or not at all, and what
a rank takes over from a checkpoint. Does not own: processes and progress (pipelines/supervised.py), the training loop
(supervised.py), the form of checkpoints (epoch_checkpoints.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from medtvt_rl.config import Config
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.dotted import resolve
from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.learner.encoder_warmup import EncoderWarmup
from medtvt_rl.learner.engine import EngineSettings, TrainingEngine
from medtvt_rl.learner.epoch_checkpoints import EpochCheckpoint, EpochCheckpoints, EpochKeeper
from medtvt_rl.learner.examples import QUESTIONS, ExampleSource, checksum_of, stage_examples
from medtvt_rl.learner.supervised import Observer, SupervisedTrainer, Validation, save_policy
from medtvt_rl.learner.validation import HeldOutLoss, SampledRewards
from medtvt_rl.model.medtvt import MedTVTConfig
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.seal import seal
from medtvt_rl.model.tower import set_encoders_trainable
from medtvt_rl.storage import sync
from medtvt_rl.user_code import task_items, task_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTask:
    """What every rank of a stage is told.

    Attributes:
        start_folder: model and tokenizer to start from.
        folder: of the stage; `model` in it is what is left behind, with the best weights and the tokenizer.
        warm_encoders: the encoders are fresh and first learn the findings.
        facts: settings, packages and identity, for the manifests of checkpoints.
        found: the checkpoint to go on from.
    """

    stage: Literal["pretrain", "sft"]
    config: Config
    start_folder: Path
    folder: Path
    warm_encoders: bool
    facts: dict[str, Any]
    found: EpochCheckpoint | None = None

    @property
    def settings(self) -> SupervisedConfig:
        """The stage's own section of the configuration."""
        return self.config.pretrain if self.stage == "pretrain" else self.config.sft

    @property
    def warms_encoders(self) -> bool:
        """Whether the warm-up is still to be done."""
        return self.warm_encoders and self.found is None


class StageObserver(Observer, Protocol):
    """Who is told how the stage goes."""

    def encoder_step(self, modality: str, step: int, total_steps: int) -> None:
        """A warm-up step of an encoder is done, on the rank that trains it."""

    def encoders(self, aucs: dict[str, float]) -> None:
        """The warm-up is done (rank 0)."""

    def line(self, text: str) -> None:
        """Something that a person should read, on the rank where it happened."""


class StageRank:
    """Runs one rank; the process group must be up."""

    def __init__(self, task: StageTask, device: torch.device, observer: StageObserver) -> None:
        self._task, self._config, self._device, self._observer = task, task.config, device, observer
        self._tokenizer: Any = AutoTokenizer.from_pretrained(task.start_folder, trust_remote_code=False)
        self._items: Any = task_items(self._config)

    def run(self) -> dict[str, Any]:
        """Trains and saves; returns what the run's summary says of it, equal on all ranks."""
        dtype: torch.dtype = getattr(torch, self._config.learner.dtype)
        torch.manual_seed(self._config.run.seed)
        policy: Any = load_policy(self._task.start_folder, dtype=dtype, lora=self._config.model.lora)
        found, checkpoints = self._task.found, stage_checkpoints(self._task.folder)
        if found is None and dist.get_rank() == 0:
            checkpoints.clear()
        aucs = self._warm_up(policy.study_tower) if self._task.warms_encoders else {}
        if found is not None:
            aucs = found.encoder_auc
            found.restore_rest(policy)
        set_encoders_trainable(policy, self._task.settings.train_encoders)
        make_engine = resolve(self._config.learner.make_engine, "learner.make_engine")
        engine: TrainingEngine = make_engine(policy, self._engine_settings(dtype), self._device)
        examples = self._examples("train")
        trainer = SupervisedTrainer(
            engine,
            self._items,
            examples,
            self._task.settings,
            self._config.run.seed,
            self._config.learner.token_budget,
            self._validation(engine),
            lambda epoch: self._keep_best(engine, checkpoints.best(epoch)),
            self._keeper(engine, checkpoints, examples, aucs).keep,
            self._observer,
        )
        if found is not None:
            # Last, since it brings the random state back.
            engine.load(Path(found.place))
        result = trainer.run(None if found is None else found.progress)
        if engine.rank == 0:
            _publish(checkpoints.best(result.best_epoch), checkpoints.output)
        return {**asdict(result), "encoder_auc": aucs}

    def _keeper(
        self, engine: TrainingEngine, checkpoints: EpochCheckpoints, examples: ExampleSource, aucs: dict[str, float]
    ) -> EpochKeeper:
        facts = self._task.facts
        identity = {**facts["identity"], "examples": checksum_of(examples)}
        content = {**facts, "identity": identity, "encoder_auc": aucs}
        return EpochKeeper(checkpoints, engine, self._task.warm_encoders, content, self._observer.line)

    def _engine_settings(self, dtype: torch.dtype) -> EngineSettings:
        settings = self._task.settings
        return EngineSettings(
            zero_stage=settings.zero_stage,
            dtype=dtype,
            gradient_clipping=settings.gradient_clipping,
            weight_decay=settings.weight_decay,
            adam_betas=(settings.adam_betas[0], settings.adam_betas[1]),
        )

    def _warm_up(self, tower: Any) -> dict[str, float]:
        warmup = EncoderWarmup(
            tower,
            self._items,
            StudyStore.open(store_folder(self._config.data)),
            self._config.encoders,
            self._config.run.seed,
            self._device,
            self._observer.encoder_step,
        )
        aucs = warmup.run()
        if dist.get_rank() == 0:
            self._observer.encoders(aucs)
        return aucs

    def _examples(self, split: str) -> ExampleSource:
        return stage_examples(self._config, self._tokenizer, self._task.stage, split)

    def _validation(self, engine: TrainingEngine) -> Callable[[], Validation]:
        """PT is judged by its loss on held-out answers, SFT by the rewards of answers that it samples."""
        limit = self._task.settings.validation_studies
        held_out = self._examples("validation").complete()[: limit * len(QUESTIONS[self._task.stage])]
        loss = HeldOutLoss(engine, self._items, held_out, self._config.learner.token_budget)
        if self._task.stage == "pretrain":
            return lambda: Validation(score=-(value := loss()), metrics={"validation_loss": value})
        prompts = task_prompts(self._config, self._tokenizer, "validation")
        rewards = SampledRewards(
            engine,
            self._items,
            prompts[:limit],
            self._tokenizer,
            self._config.rewards,
            self._config.rollout.sampling,
            self._task.settings.validation_samples,
            self._config.run.seed,
        )

        def sampled() -> Validation:
            means = rewards()
            return Validation(score=means["total"], metrics={"validation_loss": loss(), **means})

        return sampled

    def _keep_best(self, engine: TrainingEngine, folder: Path) -> None:
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._note_training(cast(Any, engine.policy).config)
        save_policy(engine, folder)
        if engine.rank == 0:
            self._tokenizer.save_pretrained(folder)
            seal(folder)
            for path in folder.rglob("*"):
                sync(path)

    def _note_training(self, found: Any) -> None:
        """What whoever asks the model later must know of its training."""
        if not isinstance(found, MedTVTConfig):
            return
        if self._task.stage == "pretrain" or self._task.settings.modality_dropout > 0:
            found.untrained_stand_ins = False
        found.film_crop = self._config.data.film.crop
        found.max_answer_tokens = self._config.rollout.sampling.max_new_tokens


def stage_checkpoints(folder: Path) -> EpochCheckpoints:
    """Those of the stage with this folder."""
    return EpochCheckpoints(folder / "checkpoint", folder / "model")


def _publish(best: Path, output: Path) -> None:
    """Moves the best policy to its place, unless that was done before the stage was cut short."""
    if best.is_dir():
        shutil.rmtree(output, ignore_errors=True)
        os.replace(best, output)
