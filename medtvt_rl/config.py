"""The root configuration: composes the areas' settings, loads YAML and overrides, checks across fields.

Importable without torch. YAML files hold deviations from the defaults only, or from another file that their key `base`
names; an unknown key is an error that names the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.config_checks import ConfigError, check_config
from medtvt_rl.config_init import take_over_folder
from medtvt_rl.data.config import CohortConfig, DataConfig
from medtvt_rl.evaluation.config import AlarmConfig, EvaluationConfig
from medtvt_rl.learner.config import EncoderWarmupConfig, LearnerConfig, SupervisedConfig
from medtvt_rl.model.config import ModelConfig
from medtvt_rl.privacy import PrivacyConfig
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.roles import PlacementConfig
from medtvt_rl.rollout.config import RolloutConfig, WeightsConfig

LONGEST_KEY, LONGEST_LINE = 100, 500
A_LIST, A_MAPPING = "expected a list, e.g. [a, b]", "expected a mapping, e.g. {a: b}"
SHORT_KEYS = {"metrics": "evaluation.metrics"}
"""What may be written shorter on the command line."""


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
        prompts: f(config, tokenizer, split) -> list[Prompt]; splits are train, validation, and `evaluation.split`.
        examples: f(config, tokenizer, split) -> list[Example], what SFT learns from; None takes the questions and
            answers of the study store.
        items: f(config) -> object with `get(item_id) -> dict[str, array]`, the multimodal item; None for plain text.
        item_modality: the name under which the engine's model takes an item.
        evaluate: f(config, split) -> Evaluator that turns answers into metrics; None reports the mean reward alone.
    """

    prompts: str = "medtvt_rl.data.task:diagnosis_prompts"
    examples: str | None = None
    items: str | None = "medtvt_rl.data.task:StudyItems"
    item_modality: str = "study"
    evaluate: str | None = "medtvt_rl.evaluation.diagnosis:DiagnosisEvaluator"

    @property
    def medical(self) -> bool:
        """Whether any of it is the packages' own, about patients; what a user names may be about anything."""
        return any(getattr(self, name) == getattr(TaskConfig, name) for name in ("prompts", "items", "evaluate"))


@dataclass
class SupervisionConfig:
    """What becomes of an actor that died, fell silent, or gives wrong results; the same for every role.

    Attributes:
        max_restarts, restart_window_s: an actor (the learner gang: as a whole) is started again so many times within so
            many seconds; lost once more, it is given up. The run ends when a role has none left.
        max_attempts: actors that may be lost at one group before it is discarded: it may be the group that kills them.
            Those that were taken out, or lost with their node, do not count.
        silence_s: an actor that does not even say that it lives for so long is lost, whatever it was asked for; 0
            leaves that to the deadlines of its calls.
        vacancy_timeout_s: a role may be without any actor for so long, e.g. because no node has room for one; then the
            run ends, with a checkpoint and a report.
    """

    max_restarts: int = 5
    restart_window_s: float = 600.0
    max_attempts: int = 3
    silence_s: float = 60.0
    vacancy_timeout_s: float = 600.0


@dataclass
class ClusterConfig:
    """The Ray cluster: None starts a local one for the run and ends it; "auto" or HOST:PORT joins one."""

    address: str | None = None
    object_store_bytes: int = 1_000_000_000


@dataclass
class Config:
    """Everything a run needs. See the areas' dataclasses for each key.

    Attributes:
        resume: "auto" goes on from the newest whole checkpoint of an interrupted stage, "never" starts it anew.
    """

    run: RunConfig = field(default_factory=RunConfig)
    resume: Literal["auto", "never"] = "auto"
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
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.root) / self.run.name

    @property
    def best_by(self) -> str:
        """The held-out metric whose best checkpoint is kept: `grpo.held_out.best_by`, else what the gain is told in."""
        own = "jaccard" if self.task.evaluate == TaskConfig.evaluate else "reward"
        return self.grpo.held_out.best_by or own

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its model and its marker."""
        return self.folder / "stages" / stage

    @property
    def checkpoint_root(self) -> str:
        """Where the checkpoints of the GRPO stage lie: a folder, or an fsspec URL."""
        root = self.grpo.checkpoint_root
        return str(self.folder / "checkpoints") if root is None else f"{root.rstrip('/')}/{self.run.name}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; checked across fields.

    A file whose key `base` names another, relative to itself, deviates from that one. An empty mapping, such as
    `labels: {}`, takes out what stood there.

    Raises:
        ConfigError: a missing file, an unknown key (with the nearest valid name), a wrong type, or settings that
            contradict.
    """
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise ConfigError(f"override {malformed[0][:LONGEST_KEY]!r} is not of the form key=value")
    merged = _with_file(OmegaConf.structured(Config), Path(path))
    given = [_in_full(item) for item in overrides]
    merged = _merge(merged, lambda: OmegaConf.from_dotlist(given), "the command line")
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    take_over_folder(config)
    check_config(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _in_full(override: str) -> str:
    """The override with its key written out, where a shorter one stands for it."""
    key, _, value = override.partition("=")
    return f"{SHORT_KEYS.get(key, key)}={value}"


def _with_file(base: DictConfig, path: Path, within: tuple[Path, ...] = ()) -> DictConfig:
    """`base` with a file on top, after the file that it deviates from itself."""
    if not path.is_file():
        named = f" ({within[-1]} names it as its base)" if within else "; configs/ holds examples"
        raise ConfigError(f"configuration {path} does not exist{named}")
    content = _merge(OmegaConf.create(), lambda: OmegaConf.load(path), str(path))
    below = content.pop("base", None)
    if below is not None:
        if not isinstance(below, str) or path.resolve() in within:
            raise ConfigError(f"{path}: base is {below!r}: expected another file, relative to this one")
        base = _with_file(base, path.parent / below, (*within, path.resolve()))
    return _merge(base, lambda: content, str(path))


def _merge(base: DictConfig, read: Any, source: str) -> DictConfig:
    try:
        given = read()
        content = OmegaConf.to_container(given)
        if misshapen := next(_misshapen(content), None):
            raise ConfigError(f"{source}: {misshapen}: {_container(misshapen)}")
        merged: DictConfig = OmegaConf.merge(base, given)  # type: ignore[assignment]
        for key in _emptied(content):
            if get_origin(_type_at(key.split("."))) is dict:
                OmegaConf.update(merged, key, {}, merge=False)
        return merged
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise ConfigError(f"{source}: unknown key {key[:LONGEST_KEY]!r}{_nearest(key, error.object_type)}") from error
    except OmegaConfBaseException as error:
        wrong = _container(str(error.full_key)) or _first_line(error)
        raise ConfigError(f"{source}: {str(error.full_key)[:LONGEST_KEY]}: {wrong}") from error
    except ConfigError:
        raise
    except Exception as error:  # what does not parse fails in many ways; YAML's own words name line and column
        what = "valid YAML" if type(error).__module__.startswith("yaml") else "a file of key: value settings"
        raise ConfigError(f"{source}: not {what}: {' '.join(str(error).split())[:300]}") from error


def _emptied(content: Any, key: str = "") -> list[str]:
    """The dotted keys at which an empty mapping stands."""
    if not isinstance(content, dict):
        return []
    below = [found for name, value in content.items() for found in _emptied(value, f"{key}.{name}" if key else name)]
    return below if content or not key else [key]


def _misshapen(content: Any, *keys: str) -> Iterator[str]:
    """The dotted keys at which a mapping stands in the place of a list, or the other way round."""
    wanted = _container(".".join(keys))
    if (wanted == A_LIST and isinstance(content, dict)) or (wanted == A_MAPPING and isinstance(content, list)):
        yield ".".join(keys)
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _misshapen(value, *keys, str(name))


def _container(key: str) -> str:
    """What is expected at a dotted key where that is a list or a mapping; else ""."""
    kind = _type_at(key.split(".")) if key else Config
    if is_dataclass(kind):
        return A_MAPPING
    return {list: A_LIST, dict: A_MAPPING}.get(get_origin(kind), "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:LONGEST_LINE]


def _nearest(full_key: str, owner: Any) -> str:
    """The nearest valid name beside an unknown key, as text for the error; `owner` is the type that lacks it."""
    parent_key, _, name = full_key.rpartition(".")
    parent = owner if is_dataclass(owner) else _type_at(parent_key.split(".") if parent_key else [])
    candidates = [one.name for one in fields(parent)] if is_dataclass(parent) else []
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean {'.'.join(filter(None, [parent_key, matches[0]]))!r}?"
    return f"; valid names are {', '.join(candidates)}" if candidates else ""


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _type_at(keys: Sequence[str]) -> Any:
    """The declared type at a path of keys, also where there is no value yet; None for a path that leads nowhere."""
    kind: Any = Config
    for key in keys:
        kind = _hints(kind).get(key) if is_dataclass(kind) else next(iter(get_args(kind)[1:]), None)
        if get_origin(kind) is UnionType:
            kind = next(one for one in get_args(kind) if one is not NoneType)
    return kind
