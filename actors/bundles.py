"""The actors of a run and what each asks for: a plan that can be printed before anything is joined or started.

Owns: how many actors of each role there are, and their bundles. Does not own: which node a bundle gets (placement.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.config import Config
from medtvt_rl.dotted import resolve
from medtvt_rl.roles import node_kinds
from medtvt_rl.rollout.config import ROOM


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The resources of one actor.

    Attributes:
        labels: Ray label selectors that its node must meet.
        fallbacks: bundles that would do as well, the most wanted first.
    """

    role: str
    index: int
    cpus: float
    gpus: float
    labels: dict[str, str]
    fallbacks: tuple[Bundle, ...] = ()

    @property
    def resources(self) -> dict[str, float]:
        """As a placement group takes them; a bundle may not be empty."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}

    @property
    def choices(self) -> tuple[Bundle, ...]:
        """This one and its fallbacks."""
        return (self, *self.fallbacks)

    @property
    def needs(self) -> str:
        """What it asks for, in words."""
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        labels = ", ".join(f"{key} {value}" for key, value in self.labels.items())
        return wanted + (f" on a node with {labels}" if labels else "")

    def __str__(self) -> str:
        return f"{self.role} {self.index}: " + ", or else ".join(bundle.needs for bundle in self.choices)


def bundle_of(config: Config, role: str, index: int) -> Bundle:
    """The bundle of one actor."""
    workers = config.rollout.tensor_parallel if role == "rollout" else 1
    kinds = [
        Bundle(role=role, index=index, cpus=kind.cpus * workers, gpus=kind.gpus * workers, labels=kind.labels)
        for kind in node_kinds(role, getattr(config.placement, role))
    ]
    first = kinds[0]
    return Bundle(
        role=role,
        index=index,
        cpus=first.cpus,
        gpus=first.gpus,
        labels=first.labels,
        fallbacks=tuple(kinds[1:]),
    )


def plan(config: Config, roles: dict[str, int]) -> list[Bundle]:
    """The bundles of `roles` (name -> number of actors), in the order given."""
    return [bundle_of(config, role, index) for role, count in roles.items() for index in range(count)]


def grpo_roles(config: Config) -> dict[str, int]:
    """Number of actors of each role that GRPO starts."""
    needs_reference = config.grpo.loss.kl.coefficient > 0
    return {
        "learner": config.learner.num_workers,
        "rollout": config.rollout.num_generators,
        "reference": config.num_references if needs_reference else 0,
        "reward": config.num_scorers,
    }


def grpo_bundles(config: Config, num_generators: int | None = None) -> list[Bundle]:
    """What GRPO places: by the usual layout, whose module is not imported for nothing, or by the `bundles` of the one
    that is named.

    Args:
        num_generators: in the place of `rollout.num_generators`.
    """
    if num_generators is not None:
        config = replace(config, rollout=replace(config.rollout, num_generators=num_generators))
    usual = config.grpo.layout == GrpoConfig.layout
    own = None if usual else getattr(resolve(config.grpo.layout, "grpo.layout"), "bundles", None)
    return plan(config, grpo_roles(config)) if own is None else list(own(config))


def evaluation_generators(config: Config) -> int:
    """Generators of the evaluation stage."""
    return config.evaluation.num_generators or config.rollout.num_generators


def for_evaluation(config: Config) -> Config:
    """The configuration by which generators of the evaluation stage come: `rollout.min` of them are enough to begin,
    and each of the others joins when it has a node."""
    count = evaluation_generators(config)
    least = count if config.rollout.min is None else min(config.rollout.min, count)
    return replace(config, rollout=replace(config.rollout, num_generators=count, min=least, max=count, scaling=ROOM))


def logical_cpus(config: Config) -> float:
    """CPUs that the largest stage asks for; a local Ray offers at least these."""
    grpo = sum(bundle.cpus for bundle in grpo_bundles(config, config.rollout.most))
    supervised = max(config.pretrain.num_workers, config.sft.num_workers) * config.placement.learner.cpus
    evaluation = sum(bundle.cpus for bundle in plan(config, {"rollout": evaluation_generators(config)}))
    return max(grpo, supervised, evaluation) + 1
