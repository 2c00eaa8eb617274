"""What a simulated run consists of: how many of each role, on which machines, and what goes wrong when.

Owns: the setting, and how it follows from a configuration. Does not own: what the roles do (generators.py, roles.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medtvt_rl.config import Config

BYTES_PER_S = 1.25e9
"""10 Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One simulated run.

    Attributes:
        generators, learners, scorers, references: actors; 0 references where there is no KL term.
        groups_per_step: of the whole run.
        cores: that all roles share; infinite where each has a machine of its own.
        bytes_per_s: of the learner's network link, through which each engine gets its weights; infinite on one machine.
        straggler: how many times slower than the others the last generator is.
        lost: (generator, from, to): indices and seconds between which a generator is gone.
    """

    generators: int
    learners: int
    scorers: int
    references: int
    groups_per_step: int
    cores: float = math.inf
    bytes_per_s: float = BYTES_PER_S
    straggler: float = 1.0
    lost: tuple[tuple[int, float, float], ...] = ()


def setting_of(config: Config, generators: int | None = None, cores: float | None = None) -> Setting:
    """The setting that a configuration describes.

    Args:
        generators: instead of `rollout.num_generators`.
        cores: of the one machine that a local run has; None where the roles run on a cluster, each on its own.
    """
    return Setting(
        generators=config.rollout.num_generators if generators is None else generators,
        learners=config.learner.num_workers,
        scorers=config.num_scorers,
        references=config.num_references if config.grpo.loss.kl.coefficient > 0 else 0,
        groups_per_step=config.grpo.groups_per_step,
        cores=math.inf if cores is None else cores,
        bytes_per_s=BYTES_PER_S if cores is None else math.inf,
    )
