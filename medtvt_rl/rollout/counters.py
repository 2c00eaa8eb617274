"""What a rollout engine has done since its start, counted in its thread and read from others."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Totals:
    """Sums since the start.

    Attributes:
        tokens_generated: of finished completions.
        prompt_tokens, prompt_tokens_shared: of finished completions, and how many came out of the prefix cache; it
            shares whole blocks, so that nothing of a prompt below EngineConfig.block_size is shared.
        busy_s, idle_s: stepping, and waiting for something to do.
        num_updates, update_s, load_s: weight updates, what they took, and what of it was loading.
    """

    tokens_generated: float = 0.0
    prompt_tokens: float = 0.0
    prompt_tokens_shared: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    num_updates: float = 0.0
    update_s: float = 0.0
    load_s: float = 0.0


class EngineCounters:
    """Thread-safe totals."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._lock = threading.Lock()

    def add(self, gained: Totals) -> None:
        """Adds all of `gained` at once."""
        with self._lock:
            for field in fields(Totals):
                setattr(self._totals, field.name, getattr(self._totals, field.name) + getattr(gained, field.name))

    def read(self) -> dict[str, float]:
        """The totals of one moment, by name."""
        with self._lock:
            return asdict(self._totals)
