"""What a careless user may name in a configuration: functions whose exceptions hold the patient's own words."""

from __future__ import annotations

from typing import Any

import psutil

from medtvt_rl.config import Config
from medtvt_rl.data.task import StudyItems

MARK = "zqxveil"


class Items(StudyItems):
    """Refuses a quarter of the studies, by name, where answers are sampled: training cannot do without them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._samples = psutil.Process().cmdline()[0].startswith("ray::RolloutGenerator")

    def get(self, item_id: str) -> dict[str, Any]:
        """The item, or an error that names the patient."""
        if self._samples and int(item_id[-1]) % 4 == 0:
            raise KeyError(f"{item_id} of {MARK} is strange")
        return super().get(item_id)


def reward(completion: str, ground_truth: str) -> float:
    """Refuses half of the completions, with their text."""
    if len(completion) % 2:
        raise ValueError(f"{MARK}: {completion} is not {ground_truth}")
    return 0.0


def prompts(config: Config, tokenizer: Any, split: str) -> Any:
    """Fails with a patient's words."""
    raise RuntimeError(f"{MARK} has no prompt in {split}")
