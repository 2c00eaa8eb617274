"""What is told of an actor that was lost, and the error that ends a run for want of a role.

Owns: the records. Does not own: who notices a loss, who mends it (actors/), or where it is written (pipelines/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["replaced", "moved", "given up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """An actor, or the learner gang, that was lost.

    Attributes:
        index: of the actor in its role; of the learner gang the rank that failed.
        node: address of its machine; "" where it never came up.
        cause: in one line.
        log, log_tail: the file of its own words, and the last of them.
        outcome: whether another serves in its place ("moved": on another node, since its own will be taken away), or
            none will.
        seconds: from the loss to the outcome.
        groups: that were with it, and were asked of another.
    """

    role: str
    index: int
    node: str
    cause: str
    log: str
    log_tail: tuple[str, ...]
    outcome: Outcome
    seconds: float
    groups: int


class TooFewCompletionsError(ValueError):
    """A step has fewer completions than the learner has ranks."""


class RoleLostError(RuntimeError):
    """A role has no actor left and gets none any more, so that the run ends.

    Args:
        reason: in one line, what ends it.
        incidents: those that led to it, the last one last.
    """

    def __init__(self, reason: str, incidents: tuple[Incident, ...]) -> None:
        super().__init__(reason)
        self.incidents = incidents
