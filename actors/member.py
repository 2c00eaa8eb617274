"""An actor that serves in a pool, and what is known of one that is lost.

Owns: these records and the two errors. Does not own: who serves, or who takes the place of a lost one (roster.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.failure import ActorError
from actors.process import Whereabouts


class MemberLostError(ActorError):
    """An actor is gone: it died, fell silent, or gave wrong results."""


class MemberLeftError(MemberLostError):
    """An actor was taken out, because its node leaves or for want of work: nothing that it was asked is at fault."""


class SickError(RuntimeError):
    """An actor answers, but not with finite values."""


class Bundles(Protocol):
    """Where actors may run."""

    def has_node(self, role: str, index: int) -> bool:
        """Whether the bundle of an actor has a place."""

    def wanting(self, role: str, index: int) -> str:
        """What it waits for where it has none."""

    def is_gone(self, node_id: str) -> bool:
        """Whether a node has died, or will be taken away."""


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """An actor that serves; its successor is another member of the same index.

    Attributes:
        load: what it has to do, in the pool's measure; groups: the groups of it.
        answered_at: when it last answered anything, on the monotonic clock.
        totals: of its engine's work, as far as it has one; seen_at: when they were last asked for; moved_at: when they
            were first seen so.
        sick: groups in a row that it gave values for that are not finite.
        gone: set when it is lost; what it was asked for may else never end, where its node is cut off.
    """

    index: int
    handle: Any
    where: Whereabouts | None = None
    load: int = 0
    groups: int = 0
    answered_at: float = field(default_factory=time.monotonic)
    totals: Any = None
    seen_at: float = 0.0
    moved_at: float = 0.0
    sick: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def node(self) -> str:
        """Address of its machine, where that is known."""
        return self.where.node if self.where is not None else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A member or a successor that was lost, and not yet replaced."""

    cause: str
    node: str
    groups: int
    log_tail: tuple[str, ...] = ()
    at: float = field(default_factory=time.monotonic)
