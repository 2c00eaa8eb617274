"""The stages of a run: their order, what a finished one leaves behind, and when one must not be run again.

Owns: markers (stages/NAME/finished.json), prerequisites, timing, the run's summary.json. Does not own: what
a stage does.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medtvt_rl.config import Config, ConfigError, to_yaml
from pipelines.memory import PeakMemory
from pipelines.reporter import Reporter

ORDER = ("cohort", "pretrain", "sft", "grpo", "evaluate")
LEARNING = ("run.seed", "task", "data", "cohort", "model")
SETTINGS_OF = {
    "cohort": (),
    "pretrain": (*LEARNING, "encoders", "pretrain"),
    "sft": (*LEARNING, "sft"),
    "grpo": (*LEARNING, "grpo", "rewards", "rollout.sampling", "learner"),
    "evaluate": (*LEARNING, "evaluation", "rollout.sampling"),
}


class StageError(RuntimeError):
    """A stage that cannot start from what is there; the message names the command that mends it."""


def run_stage(name: str, config: Config, reporter: Reporter) -> dict[str, Any]:
    """Runs one stage, unless it is finished with the same settings; returns what it leaves in the summary.

    Raises:
        StageError: it is finished with other settings, or an earlier stage is missing.
    """
    done = finished(name, config)
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
    result = {**result, "seconds": time.monotonic() - started, "peak_rss_bytes": memory.peak_bytes}
    write_json(_marker(name, config), {"settings": _settings(name, config), **result})
    write_summary(config)
    reporter.finish(name, result["seconds"])
    return result


def finished(name: str, config: Config) -> dict[str, Any] | None:
    """What a finished stage left, or None. Raises StageError if it ran with other settings."""
    marker = _marker(name, config)
    if not marker.is_file() or name == "cohort":
        return None
    found: dict[str, Any] = json.loads(marker.read_text())
    changed = _differences(found["settings"], _settings(name, config))
    if changed:
        raise StageError(
            f"{name} of {config.folder} is finished with other settings ({'; '.join(changed[:5])}); "
            f"choose another run.name, or delete {config.stage_folder(name)} to repeat it"
        )
    return found


def start_model(config: Config) -> Path:
    """The folder that GRPO starts from: what SFT left, else `model.init`."""
    trained = config.stage_folder("sft") / "model"
    if trained.is_dir():
        return trained
    if config.model.init and "sft" not in config.run.stages:
        return Path(config.model.init)
    raise StageError(f"there is no {trained}; run `medtvt-rl sft` with the same configuration first, or set model.init")


def write_summary(config: Config) -> dict[str, Any]:
    """Collects what the finished stages left into summary.json, and returns it."""
    summary: dict[str, Any] = {"run": config.run.name, "stages": {}, "peak_rss_bytes": 0}
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
    """Creates the run folder with its resolved configuration. Raises ConfigError if it cannot be written."""
    try:
        (config.folder / "logs").mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run.root is {config.run.root!r}: {error}; choose a folder that can be written") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def _marker(name: str, config: Config) -> Path:
    return config.stage_folder(name) / "finished.json"


def _forget_later_stages(name: str, config: Config) -> None:
    for later in ORDER[ORDER.index(name) + 1 :]:
        if name != "cohort":
            _marker(later, config).unlink(missing_ok=True)


def _settings(name: str, config: Config) -> dict[str, Any]:
    resolved = OmegaConf.create(to_yaml(config))
    return {key: _plain(OmegaConf.select(resolved, key)) for key in SETTINGS_OF[name]}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for name in sorted({*before, *now})
            for text in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [f"{key}: {before!r} then, {now!r} now"]
