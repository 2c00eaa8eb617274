"""Whether and where an interrupted supervised stage goes on.

Owns: what its checkpoints say of the run, what may differ in a run that goes on from one, the words for the reader.
Does not own: which are whole (medtvt_rl/learner/epoch_checkpoints.py), or taking their state over
(medtvt_rl/learner/supervised_stage.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from medtvt_rl.learner.epoch_checkpoints import EpochCheckpoint, EpochCheckpoints
from medtvt_rl.learner.supervised_stage import stage_checkpoints
from pipelines.checkpoints import packages
from pipelines.identity import model_and_items
from pipelines.resume import AND_AUTO, check_binding, check_none_lost, other_packages
from pipelines.stages import SETTINGS_OF, differences, resolved_settings, selected


def checkpoints_of(config: Config, stage: str) -> EpochCheckpoints:
    """Those of a configured stage."""
    return stage_checkpoints(config.stage_folder(stage).resolve())


def facts_of(config: Config, start_folder: Path) -> dict[str, Any]:
    """What a stage's checkpoints say of this run; each rank adds the checksum of its examples."""
    return {
        "settings": resolved_settings(config),
        "packages": packages(),
        "identity": model_and_items(config, start_folder),
    }


def find_epoch(
    config: Config,
    stage: str,
    identity: Mapping[str, str],
    examples_checksum: Callable[[], str],
    report: Callable[[str], None],
) -> EpochCheckpoint | None:
    """The checkpoint to go on from, with a line for the reader; None where the stage starts anew.

    Args:
        identity: see facts_of.
        examples_checksum: of what the stage learns from; asked where there is a checkpoint.

    Raises:
        ResumeError: what its state depends on has changed, or there are checkpoints, none of which can be read.
    """
    if config.resume == "never":
        return None
    checkpoints = checkpoints_of(config, stage)
    found = checkpoints.newest(lambda text: report(f"{stage}: {text}"))
    if found is None:
        check_none_lost(len(checkpoints.epochs), str(checkpoints.folder))
        return None
    keys = SETTINGS_OF[stage]
    check_binding(found, config, {**identity, "examples": examples_checksum()}, keys)
    shown = (*keys, "learner")
    changed = differences(selected(found.settings, shown), selected(resolved_settings(config), shown))
    changed += other_packages(found)
    at = _place(config, stage, found.progress.epochs)
    report(f"{stage}: goes on {at}{', with ' if changed else ''}{'; '.join(changed)}")
    return found


def where_it_goes_on(config: Config, stage: str) -> str:
    """For whoever reads that the stage was cut short."""
    epochs = checkpoints_of(config, stage).epochs
    if not epochs:
        return f"no epoch of {stage} was finished; the same command begins it anew"
    return f"the same command {AND_AUTO[config.resume]}goes on {_place(config, stage, epochs[0])} of {stage}"


def _place(config: Config, stage: str, epochs: int) -> str:
    of = (config.pretrain if stage == "pretrain" else config.sft).epochs
    return f"after epoch {epochs} of {of}"
