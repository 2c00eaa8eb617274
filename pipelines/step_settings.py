"""The settings that the steps of a GRPO run were learnt with: those of each of its lives, beside the journal.

Owns: journal/settings/STEP.yaml, the resolved configuration from that step on, and what of it the weights depend on.
Does not own: config.yaml, which every stage writes with its own settings, or which steps there are (journal.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medtvt_rl.config import Config, load_config
from medtvt_rl.storage import Storage
from pipelines.stages import differences, resolved_settings, selected

SETTINGS_FOLDER = "settings"
# Of what may change when a run goes on (see BINDING in resume.py), what other weights would come of.
LEARNT_WITH = ("grpo.loss", "grpo.updates_per_batch", "learner", "placement.learner.gpus", "weights.send")
INDIFFERENT = ("spares", "start_timeout_s", "step_timeout_s")
"""Settings below `learner` that change no weight."""


def keep_settings(journal: Path, first_step: int, settings: str) -> None:
    """Notes the resolved configuration, as YAML, that the steps from `first_step` on are learnt with."""
    Storage(str(journal / SETTINGS_FOLDER)).write(f"{first_step:06d}.yaml", settings.encode())


def load_kept(run: Path, settings: Path) -> Config:
    """A configuration of a run, which may lie elsewhere by now."""
    place = run.resolve()
    return load_config(settings, [f"run.root={place.parent}", f"run.name={place.name}"])


def learnt_with(run: Path, first: int, last: int) -> Config:
    """The settings of the steps first to last - 1.

    Raises:
        ValueError: none were kept, they cannot be read, or they changed in between.
    """
    files = {int(path.stem): path for path in (run / "journal" / SETTINGS_FOLDER).glob("*.yaml") if path.stem.isdigit()}
    before = [start for start in files if start <= first]
    if not before:
        later = f", and can be repeated from step {min(files)} on" if files else ""
        raise ValueError(
            f"the journal does not say with which settings step {first} was learnt: there is no "
            f"{run / 'journal' / SETTINGS_FOLDER}/STEP.yaml of it; the run is of an earlier version{later}"
        )
    config = load_kept(run, files[max(before)])
    for start in sorted(start for start in files if first < start < last):
        if changed := differences(_learnt_with(config), _learnt_with(load_kept(run, files[start]))):
            raise ValueError(
                f"the steps from {start} on were learnt with other settings ({'; '.join(changed)}); "
                f"end with --to-step {start}"
            )
    return config


def _learnt_with(config: Config) -> dict[str, Any]:
    found = selected(resolved_settings(config), LEARNT_WITH)
    for name in INDIFFERENT:
        found["learner"].pop(name)
    return found
