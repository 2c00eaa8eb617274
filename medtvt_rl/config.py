"""The root configuration: composes the areas' settings, loads YAML and overrides, checks across fields.

Importable without torch. YAML files hold deviations from the defaults only; an unknown key
is an error that names the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.config import CohortConfig, DataConfig
from medtvt_rl.evaluation.config import AlarmConfig, EvaluationConfig
from medtvt_rl.learner.config import EncoderWarmupConfig, LearnerConfig, SupervisedConfig
from medtvt_rl.model.config import ModelConfig
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rollout.config import RolloutConfig, WeightsConfig


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value, what was expected, and the mend."""


@dataclass
class RunConfig:
    """Name and place of the run: everything it writes lies in `root`/`name`.

    Attributes:
        stages: what `medtvt-rl run` goes through, in this order.
    """

    name: str = "run"
    root: str = "runs"
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: ["cohort", "pretrain", "sft", "grpo", "evaluate"])


@dataclass
class TaskConfig:
    """What is learnt, as dotted paths; the actors and the loop know nothing else of it.

    Attributes:
        prompts: f(config, tokenizer, split) -> list[Prompt].
        items: f(config) -> object with `get(item_id) -> dict[str, array]`, the multimodal item; None for plain text.
        item_modality: the name under which the engine's model takes an item.
        evaluate: f(config, split) -> Evaluator that turns answers into metrics; None reports the mean reward alone.
    """

    prompts: str = "medtvt_rl.data.task:diagnosis_prompts"
    items: str | None = "medtvt_rl.data.task:StudyItems"
    item_modality: str = "study"
    evaluate: str | None = "medtvt_rl.evaluation.diagnosis:DiagnosisEvaluator"


@dataclass
class RoleResources:
    """What one actor of a role asks of the cluster.

    Attributes:
        cpus, gpus: per actor.
        labels: Ray node labels that the node must carry, e.g. {"ray.io/accelerator-type": "in(L4, A10G)"}.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class PlacementConfig:
    """Where each role runs; a bundle that cannot be placed within `timeout_s` ends the run with its name."""

    rollout: RoleResources = field(default_factory=RoleResources)
    learner: RoleResources = field(default_factory=RoleResources)
    reference: RoleResources = field(default_factory=RoleResources)
    reward: RoleResources = field(default_factory=RoleResources)
    timeout_s: float = 60.0


@dataclass
class ClusterConfig:
    """The Ray cluster: None starts a local one for the run and ends it; "auto" or HOST:PORT joins one."""

    address: str | None = None
    object_store_bytes: int = 1_000_000_000


@dataclass
class Config:
    """Everything a run needs. See the areas' dataclasses for each key."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cohort: CohortConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    encoders: EncoderWarmupConfig = field(default_factory=EncoderWarmupConfig)
    pretrain: SupervisedConfig = field(default_factory=SupervisedConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    num_scorers: int = 1
    num_references: int = 1
    score_timeout_s: float = 120.0
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.root) / self.run.name

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its model and its marker."""
        return self.folder / "stages" / stage

    def checkpoint_folder(self, version: int) -> Path:
        """The checkpoint of the learners after so many GRPO steps."""
        return self.folder / "checkpoints" / f"step_{version:06d}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; checked across fields.

    Raises:
        ConfigError: a missing file, an unknown key (with the nearest valid name), a wrong type, or settings that
            contradict.
    """
    if not Path(path).is_file():
        raise ConfigError(f"configuration {path} does not exist; configs/ holds examples")
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise ConfigError(f"override {malformed[0]!r} is not of the form key=value")
    schema = OmegaConf.structured(Config)
    merged = _merge(schema, lambda: OmegaConf.load(path), str(path))
    merged = _merge(merged, lambda: OmegaConf.from_dotlist(list(overrides)), "the command line")
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    check_config(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _merge(base: DictConfig, read: Any, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(base, read())  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise ConfigError(f"{source}: unknown key {error.full_key!r}{_nearest(error.full_key or '')}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {_first_line(error)}") from error
    except Exception as error:  # a YAML file that does not parse; the parser's message names line and column
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _nearest(full_key: str) -> str:
    """The nearest valid name beside an unknown key, as text for the error."""
    parent_key, _, name = full_key.rpartition(".")
    parent = _type_at(parent_key.split(".") if parent_key else [])
    candidates = [one.name for one in fields(parent)] if is_dataclass(parent) else []
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean {'.'.join(filter(None, [parent_key, matches[0]]))!r}?"
    return f"; valid names are {', '.join(candidates)}" if candidates else ""


def _type_at(keys: Sequence[str]) -> Any:
    """The declared type at a path of keys, also where there is no value yet; None for a path that leads nowhere."""
    kind: Any = Config
    for key in keys:
        kind = get_type_hints(kind).get(key) if is_dataclass(kind) else next(iter(get_args(kind)[1:]), None)
        if get_origin(kind) is UnionType:
            kind = next(one for one in get_args(kind) if one is not NoneType)
    return kind


def check_config(config: Config) -> None:
    """Checks across fields. Raises ConfigError naming the key, the value, what was expected, and the mend."""
    checks = (_check_counts, _check_batches, _check_sampling, _check_model, _check_sync, _check_rewards, _check_stages)
    for check in checks:
        check(config)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value!r}: {expected}")


def _check_counts(config: Config) -> None:
    grpo, rollout = config.grpo, config.rollout
    _require(
        grpo.group_size >= 2, "grpo.group_size", grpo.group_size, "a group of one has no advantage; set at least 2"
    )
    positive = {
        "grpo.steps": grpo.steps,
        "grpo.groups_per_step": grpo.groups_per_step,
        "grpo.updates_per_batch": grpo.updates_per_batch,
        "rollout.num_generators": rollout.num_generators,
        "num_scorers": config.num_scorers,
        "learner.num_workers": config.learner.num_workers,
        "learner.token_budget": config.learner.token_budget,
        "evaluation.num_samples": config.evaluation.num_samples,
        "alarms.first_steps": config.alarms.first_steps,
        "alarms.equal_steps": config.alarms.equal_steps,
        "rollout.sampling.max_new_tokens": rollout.sampling.max_new_tokens,
        "pretrain.epochs": config.pretrain.epochs,
        "pretrain.batch_size": config.pretrain.batch_size,
        "sft.epochs": config.sft.epochs,
        "sft.batch_size": config.sft.batch_size,
    }
    for key, value in positive.items():
        _require(value >= 1, key, value, "set at least 1")
    _require(grpo.max_staleness >= 0, "grpo.max_staleness", grpo.max_staleness, "0 is on-policy; it can't be negative")
    _require(
        config.learner.zero_stage in (0, 1, 2, 3),
        "learner.zero_stage",
        config.learner.zero_stage,
        "ZeRO has stages 0 to 3",
    )
    _require(grpo.loss.kl.coefficient >= 0, "grpo.loss.kl.coefficient", grpo.loss.kl.coefficient, "set 0 or more")
    weight, buffer, limit = grpo.overlong.weight, grpo.overlong.buffer_tokens, rollout.sampling.max_new_tokens
    _require(weight >= 0, "grpo.overlong.weight", weight, "it weighs a penalty; set 0 (off) or more")
    _require(
        weight == 0 or 0 < buffer < limit,
        "grpo.overlong.buffer_tokens",
        buffer,
        f"set 1 or more, and less than rollout.sampling.max_new_tokens = {limit}",
    )
    needs_reference = grpo.loss.kl.coefficient > 0
    _require(
        config.num_references >= 1 or not needs_reference,
        "num_references",
        config.num_references,
        f"grpo.loss.kl.coefficient = {grpo.loss.kl.coefficient} needs a reference policy; set 1, or the coefficient 0",
    )


def _check_batches(config: Config) -> None:
    completions = config.grpo.groups_per_step * config.grpo.group_size
    workers = config.learner.num_workers
    _require(
        completions % workers == 0,
        "grpo.groups_per_step * grpo.group_size",
        completions,
        f"it does not divide by learner.num_workers = {workers}; change one of the three",
    )
    for name, stage in (("pretrain", config.pretrain), ("sft", config.sft)):
        _require(stage.num_workers >= 1, f"{name}.num_workers", stage.num_workers, "set at least 1")
        _require(
            stage.batch_size % stage.num_workers == 0,
            f"{name}.batch_size",
            stage.batch_size,
            f"it does not divide by {name}.num_workers = {stage.num_workers}; change one of the two",
        )


def _check_sampling(config: Config) -> None:
    sampling, engine = config.rollout.sampling, config.rollout.engine
    _require(
        sampling.temperature > 0,
        "rollout.sampling.temperature",
        sampling.temperature,
        "training samples; set it above 0 (evaluation adds the greedy answer by itself)",
    )
    _require(
        sampling.top_p == 1.0,
        "rollout.sampling.top_p",
        sampling.top_p,
        "scoring does not truncate, so a truncated sample would bias the importance ratio; set 1.0",
    )
    _require(
        sampling.top_k == -1,
        "rollout.sampling.top_k",
        sampling.top_k,
        "scoring does not truncate, so a truncated sample would bias the importance ratio; set -1",
    )
    _require(
        sampling.max_new_tokens < engine.max_model_len,
        "rollout.sampling.max_new_tokens",
        sampling.max_new_tokens,
        f"no room for a prompt in rollout.engine.max_model_len = {engine.max_model_len}; lower it, or raise that",
    )
    _require(engine.block_size % 32 == 0, "rollout.engine.block_size", engine.block_size, "set a multiple of 32")
    longest = engine.max_model_len
    _require(
        config.learner.token_budget >= longest,
        "learner.token_budget",
        config.learner.token_budget,
        f"one sequence can have rollout.engine.max_model_len = {longest} tokens; set at least that",
    )


def _check_model(config: Config) -> None:
    model = config.model
    _require(
        model.lora.dropout == 0,
        "model.lora.dropout",
        model.lora.dropout,
        "the learner would score another policy than the engine samples; set 0",
    )
    if config.task.items is None:
        return
    width, heads = model.backbone.hidden_size, model.backbone.num_heads
    if model.init is None:
        _require(
            config.rollout.engine.max_model_len <= model.backbone.max_positions,
            "rollout.engine.max_model_len",
            config.rollout.engine.max_model_len,
            f"the model has model.backbone.max_positions = {model.backbone.max_positions}; lower it, or raise that",
        )
        for name in ("ecg_steps", "cxr_steps", "lab_steps"):
            steps = getattr(config.encoders, name)
            _require(
                steps <= 0 or config.data.findings_csv is not None,
                f"encoders.{name}",
                steps,
                "the encoders learn findings, and data.findings_csv is null; name their table, or set 0",
            )
        _require(width % heads == 0, "model.backbone.hidden_size", width, f"it does not divide by num_heads = {heads}")
        _require(
            width % model.perception.num_heads == 0,
            "model.perception.num_heads",
            model.perception.num_heads,
            f"model.backbone.hidden_size = {width} does not divide by it",
        )
    _require(
        model.perception.tokens_per_modality >= 1,
        "model.perception.tokens_per_modality",
        model.perception.tokens_per_modality,
        "set at least 1",
    )
    _require(
        config.data.film.size == model.cxr.image_size,
        "data.film.size",
        config.data.film.size,
        f"the film encoder takes model.cxr.image_size = {model.cxr.image_size}; set both alike",
    )


def _check_sync(config: Config) -> None:
    rollout = config.rollout
    for name in ("max_restarts", "max_completions_per_engine"):
        value = getattr(rollout, name)
        _require(value is None or value >= 0, f"rollout.{name}", value, "set 0 or more")
    _require(rollout.restart_window_s > 0, "rollout.restart_window_s", rollout.restart_window_s, "set more than 0")
    try:
        config.weights.resolved(config.model.lora)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_rewards(config: Config) -> None:
    judged = config.task.evaluate is None and "evaluate" in config.run.stages
    if "grpo" in config.run.stages or judged:
        _require(
            bool(config.rewards),
            "rewards",
            {},
            "name at least one, e.g. rewards.jaccard.function=medtvt_rl.rewards.jaccard:jaccard_reward",
        )
    for name, reward in config.rewards.items():
        _require(
            ":" in reward.function,
            f"rewards.{name}.function",
            reward.function,
            "give a dotted path 'package.module:function'",
        )
        _require(reward.low < reward.high, f"rewards.{name}.low", reward.low, f"it must be below high = {reward.high}")


def _check_stages(config: Config) -> None:
    known = ["cohort", "pretrain", "sft", "grpo", "evaluate"]
    for stage in config.run.stages:
        _require(stage in known, "run.stages", stage, f"known stages are {', '.join(known)}")
    _require(
        config.run.stages == [stage for stage in known if stage in config.run.stages],
        "run.stages",
        config.run.stages,
        f"each stage stands once, in the order {', '.join(known)}",
    )
    splits = list(config.data.labs_csv)
    _require(
        config.task.items is None or config.evaluation.split in splits,
        "evaluation.split",
        config.evaluation.split,
        f"data.labs_csv has the splits {', '.join(splits)}",
    )
