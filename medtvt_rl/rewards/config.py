"""Settings of the reward: a weighted sum of named components. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RewardConfig:
    """One component.

    Attributes:
        function: dotted path "package.module:callable" of f(completion: str, ground_truth: str, **options) -> float;
            where it has a parameter `evidence`, it also gets what the prompt carries under that name.
        weight: factor in the sum.
        low, high: the declared range; a value outside it marks the completion as failed.
        options: keyword arguments handed to the function.
    """

    function: str = ""
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
