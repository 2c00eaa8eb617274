"""What every role's owner shares: how often an actor may be started again, and to whom losses are told.

Owns: the count of restarts in a window, the incidents of a run. Does not own: noticing a loss, or starting anything
(roster.py, learner_supervisor.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medtvt_rl.config import SupervisionConfig
from medtvt_rl.faults import Incident

USUAL_ROLES = ("rollout", "reward", "reference", "learner")
NEVER = float("-inf")
"""When a start began that does not count."""


class Restarts:
    """The restarts of one actor, or of the learner gang."""

    def __init__(self, config: SupervisionConfig) -> None:
        self._config = config
        self._begun: list[float] = []
        self._free = False

    @property
    def allowed(self) -> bool:
        """Whether it may be started once more."""
        if self._free:
            return True
        since = time.monotonic() - self._config.restart_window_s
        return sum(begun > since for begun in self._begun) < self._config.max_restarts

    @property
    def limit(self) -> str:
        """The limit in words."""
        return f"supervision.max_restarts: {self._config.max_restarts} in {self._config.restart_window_s:g} s"

    def free(self) -> None:
        """The next start does not count: the actor did not fail."""
        self._free = True

    def begin(self) -> None:
        """Counts a restart."""
        self._begun.append(NEVER if self._free else time.monotonic())
        self._free = False

    def take_back(self) -> None:
        """The last one does not count: it was no fault of the actor."""
        self._free = self._begun.pop() == NEVER


class Incidents:
    """The losses of a run, each told once: a line for the reader at once, a record when it is over.

    Args:
        report: is told lines.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.over: list[Incident] = []
        self._record: Callable[[Incident], None] | None = None

    @contextmanager
    def recorded(self, record: Callable[[Incident], None]) -> Iterator[None]:
        """Within it `record` is told incidents; one that is over later is kept here alone."""
        self._record = record
        try:
            yield
        finally:
            self._record = None

    def add(self, incident: Incident) -> None:
        """An incident is over."""
        self.over.append(incident)
        if self._record is not None:
            self._record(incident)

    def of(self, role: str) -> tuple[Incident, ...]:
        """Those of a role."""
        return tuple(incident for incident in self.over if incident.role == role)

    def metrics(self) -> dict[str, float]:
        """`restarts/ROLE`: actors of each role that were replaced so far, 0 for a role that lost none."""
        replaced = Counter(incident.role for incident in self.over if incident.outcome == "replaced")
        roles = dict.fromkeys((*USUAL_ROLES, *replaced))
        return {f"restarts/{role}": float(replaced[role]) for role in roles}
