"""The stages of a run: their order, what a finished one leaves behind, and when one must not be run again.

Owns: markers (stages/NAME/finished.json), prerequisites, timing, the run's summary.json. Does not own: what
a stage does.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medtvt_rl.config import Config, to_yaml
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.privacy import SaltError, prepare_salt
from pipelines.command import unwritable
from pipelines.memory import PeakMemory
from pipelines.reporter import Reporter

ORDER = ("cohort", "pretrain", "sft", "grpo", "evaluate")
LEARNING = ("run.seed", "task", "data", "cohort", "model")
SETTINGS_OF = {
    "cohort": (),
    "pretrain": (*LEARNING, "encoders", "pretrain", "learner.dtype"),
    "sft": (*LEARNING, "sft", "rewards", "rollout.sampling", "learner.dtype"),
    "grpo": (*LEARNING, "grpo", "rewards", "rollout.sampling", "learner"),
    "evaluate": (*LEARNING, "evaluation", "rewards", "rollout.sampling"),
}
JUDGING = ("metrics", "bootstrap_resamples", "bertscore_model", "bertscore_layer")
"""Settings below `evaluation` by which answers are judged: they may change after the model was asked."""


class StageError(RuntimeError):
    """A stage that cannot start from what is there; the message names the command that mends it."""


def run_stage(name: str, config: Config, reporter: Reporter) -> dict[str, Any]:
    """Runs one stage, unless it is finished with the same settings; returns what it leaves in the summary.

    Raises:
        StageError: it is finished with other settings, or an earlier stage is missing.
    """
    done = finished(name, config)
    if done is not None and name == "evaluate" and _judged_otherwise(done, config):
        return _judge_again(config, reporter, done)
    if done is not None:
        reporter.line(
            f"{name}: finished before in {done['seconds']:.0f} s; delete {config.stage_folder(name)} to repeat it"
        )
        return done
    _forget_later_stages(name, config)
    stage = importlib.import_module(f"pipelines.{name}")
    started = time.monotonic()
    with PeakMemory() as memory:
        result = stage.run(config, reporter)
    seconds = time.monotonic() - started
    cost = {"seconds": seconds, "peak_rss_bytes": memory.peak_bytes}
    if not result.get("built", True) and _marker(name, config).is_file():
        earlier = json.loads(_marker(name, config).read_text())
        cost = {key: earlier[key] for key in cost}  # what was found ready cost what it cost then
    result = {**result, **cost}
    _finish(name, config, result)
    if hasattr(stage, "finished"):
        stage.finished(config)
    reporter.finish(name, seconds)
    return result


def _judge_again(config: Config, reporter: Reporter, done: dict[str, Any]) -> dict[str, Any]:
    """A finished evaluation with its answers judged by the present settings; it costs what asking cost."""
    reporter.line("evaluate: finished before; its answers are judged by the present settings")
    started = time.monotonic()
    result: dict[str, Any] = importlib.import_module("pipelines.evaluate").judge_again(config, reporter, done)
    _finish("evaluate", config, {key: value for key, value in result.items() if key != "settings"})
    reporter.finish("evaluate", time.monotonic() - started)
    return result


def _judged_otherwise(done: dict[str, Any], config: Config) -> bool:
    before = done["settings"].get("evaluation") or {}
    now = resolved_settings(config)["evaluation"]
    return any(before[key] != now[key] for key in JUDGING if key in before)


def _finish(name: str, config: Config, result: dict[str, Any]) -> None:
    """Writes the stage's marker, and the run's summary with it."""
    write_json(_marker(name, config), {"settings": selected(resolved_settings(config), SETTINGS_OF[name]), **result})
    write_summary(config)


def finished(name: str, config: Config) -> dict[str, Any] | None:
    """What a finished stage left, or None. Raises StageError if it ran with other settings."""
    marker = _marker(name, config)
    if not marker.is_file() or name == "cohort":
        return None
    found: dict[str, Any] = json.loads(marker.read_text())
    changed = differences(_asked(found["settings"]), _asked(selected(resolved_settings(config), SETTINGS_OF[name])))
    if changed:
        raise StageError(
            f"{name} of {config.folder} is finished with other settings ({'; '.join(changed[:5])}); "
            f"choose another run.name, or delete {config.stage_folder(name)} to repeat it"
        )
    return found


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those by which answers are judged."""
    evaluation = settings.get("evaluation")
    if not isinstance(evaluation, dict):
        return settings
    return {**settings, "evaluation": {key: value for key, value in evaluation.items() if key not in JUDGING}}


def check_finished(names: Sequence[str], config: Config) -> None:
    """Raises StageError if a stage among `names` is finished with other settings, before anything is written.

    Stages behind the first unfinished one are not asked: they will be run again.
    """
    for name in names:
        if name != "cohort" and finished(name, config) is None:
            return


def start_model(config: Config) -> Path:
    """The folder that GRPO starts from: what SFT left, else `model.init`. Raises StageError if there is neither."""
    if config.model.init and "sft" not in config.run.stages and not is_finished("sft", config):
        return Path(config.model.init)
    return trained_model("sft", config)


def evaluated_policies(config: Config) -> dict[str, str]:
    """Policy, as the summary has it -> what it is called: what SFT and GRPO left, or the one model that there is where
    the run has no GRPO stage."""
    fine_tuned = config.model.init is None or "sft" in config.run.stages or is_finished("sft", config)
    if "grpo" in config.run.stages or is_finished("grpo", config):
        return {"sft": "after SFT" if fine_tuned else "before GRPO", "grpo": "after GRPO"}
    if fine_tuned:
        return {"sft": "after SFT"}
    return {"model": Path(str(config.model.init)).name}


def is_finished(name: str, config: Config) -> bool:
    """Whether a stage is finished, with whatever settings."""
    return _marker(name, config).is_file()


def trained_model(name: str, config: Config) -> Path:
    """The model that a finished stage left. Raises StageError if the stage is not finished: a folder alone may be of a
    run that was cut short, or older than a stage that was run again."""
    folder = config.stage_folder(name) / "model"
    if not folder.is_dir():
        missing = f"there is no {folder}"
    elif not is_finished(name, config):
        missing = f"{folder} is of an unfinished or outdated {name} stage"
    else:
        return folder
    instead = f", or take {name} out of run.stages and set model.init" if name in ("pretrain", "sft") else ""
    if name == "grpo":
        instead = ", or take grpo out of run.stages to evaluate the model that it would start from"
    raise StageError(f"{missing}; run `medtvt-rl {name}` with the same configuration first{instead}")


def write_summary(config: Config) -> dict[str, Any]:
    """Collects what the finished stages left into summary.json, and returns it."""
    simulated = config.cohort is not None
    summary: dict[str, Any] = {
        "run": config.run.name,
        "medical": config.task.medical,
        "simulated": simulated,
        "stages": {},
        "peak_rss_bytes": 0,
    }
    for name in ORDER:
        marker = _marker(name, config)
        if not marker.is_file():
            continue
        found = json.loads(marker.read_text())
        summary["stages"][name] = {"seconds": found["seconds"], "peak_rss_bytes": found["peak_rss_bytes"]}
        summary["peak_rss_bytes"] = max(summary["peak_rss_bytes"], found["peak_rss_bytes"])
        summary.update(found.get("summary", {}))
    write_json(config.folder / "summary.json", summary)
    return summary


def prepare_run_folder(config: Config) -> None:
    """Creates the run folder with its resolved configuration and the salt of its hashes.

    Raises:
        ConfigError: it cannot be written, or the configured salt cannot be used.
    """
    try:
        (config.folder / "logs").mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(to_yaml(config))
        prepare_salt(config.privacy, config.folder)
    except SaltError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(unwritable(config, error)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that appears complete or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False))
    os.replace(temporary, path)


def _finite(content: Any) -> Any:
    """A copy in which None stands for infinity and NaN, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _marker(name: str, config: Config) -> Path:
    return config.stage_folder(name) / "finished.json"


def _forget_later_stages(name: str, config: Config) -> None:
    for later in ORDER[ORDER.index(name) + 1 :]:
        if name != "cohort":
            _marker(later, config).unlink(missing_ok=True)


def resolved_settings(config: Config) -> dict[str, Any]:
    """The whole configuration, JSON-ready."""
    return OmegaConf.to_container(OmegaConf.create(to_yaml(config)))  # type: ignore[return-value]


def selected(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The settings below each dotted key."""
    tree = OmegaConf.create(settings)
    found = {key: OmegaConf.select(tree, key) for key in keys}
    return {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in found.items()}


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Each leaf that differs, as "key: A then, B now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for name in sorted({*before, *now})
            for text in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [f"{key}: {before!r} then, {now!r} now"]
