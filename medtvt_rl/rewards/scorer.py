"""From the texts of one group to its rewards, by component and in total.

Owns: calling the configured reward functions, what happens when one fails, and the weighted sum.
Does not own: the functions, decoding, or advantages.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.dotted import resolve
from medtvt_rl.rewards.config import RewardConfig

RewardFunction = Callable[..., float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """Rewards of the G completions of one group. `total` is the weighted sum of the components, for each completion.

    Attributes:
        components: name -> [G] float32, before weighting; the worst of its range where the completion failed.
        total: [G] float32.
        failed: [G] bool, True where a function raised or gave a value outside its declared range.
        reasons: [G], which function failed and how; None where none did.
        seconds: what scoring took.
    """

    components: dict[str, NDArray[np.float32]]
    total: NDArray[np.float32]
    failed: NDArray[np.bool_]
    reasons: tuple[str | None, ...]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(self.total), len(self.failed), len(self.reasons), *map(len, self.components.values())}
        if len(sizes) != 1:
            raise ValueError(f"rewards of one group: unequal lengths {sorted(sizes)}, expected one entry a completion")


class Scorer:
    """Scores completions with every configured reward function.

    A function that raises, or returns what is no finite number within its declared range, marks that completion as
    failed, and the run goes on. A failed completion gets the worst value of every component (its `low`, or its `high`
    under a negative weight), so that failing never pays.
    A function with a parameter named `evidence` is handed what the prompt carries under that name, by keyword.

    Raises:
        ValueError: no component, a function that does not exist or does not take the configured options, or a range or
            weight that makes no sense.
    """

    def __init__(self, configs: Mapping[str, RewardConfig]) -> None:
        if not configs:
            raise ValueError("rewards: no component, expected at least one, e.g. rewards.jaccard.function")
        self._configs = dict(configs)
        self._functions = {name: _resolved(name, config) for name, config in self._configs.items()}
        self._with_evidence = {name for name, function in self._functions.items() if _takes_evidence(function)}
        self._worst = {name: c.low if c.weight >= 0 else c.high for name, c in self._configs.items()}

    def score(self, texts: Sequence[str], ground_truth: str, evidence: Mapping[str, Any] | None = None) -> GroupRewards:
        """Rewards of the completions `texts` [G] of one prompt, whose `ground_truth` and `evidence` are given."""
        started = time.perf_counter()
        values = {name: np.empty(len(texts), dtype=np.float32) for name in self._configs}
        reasons: list[str | None] = []
        for index, text in enumerate(texts):
            row, reason = self._score_one(text, ground_truth, evidence)
            reasons.append(reason)
            for name, value in row.items():
                values[name][index] = value
        total = sum((c.weight * values[name] for name, c in self._configs.items()), np.zeros(len(texts)))
        failed = np.array([reason is not None for reason in reasons], dtype=bool)
        return GroupRewards(
            components=values,
            total=np.asarray(total, dtype=np.float32),
            failed=failed,
            reasons=tuple(reasons),
            seconds=time.perf_counter() - started,
        )

    def _score_one(
        self, text: str, ground_truth: str, evidence: Mapping[str, Any] | None
    ) -> tuple[dict[str, float], str | None]:
        """The components of one completion, and why it failed."""
        row, reasons = {}, []
        for name, config in self._configs.items():
            extra = {"evidence": evidence} if name in self._with_evidence else {}
            try:
                value = float(self._functions[name](text, ground_truth, **config.options, **extra))
            except (
                Exception
            ) as error:  # a reward function is the user's code: whatever it raises concerns one completion
                reasons.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if not math.isfinite(value) or not config.low <= value <= config.high:
                reasons.append(f"{name}: returned {value}, outside its declared range [{config.low}, {config.high}]")
            row[name] = value
        return (dict(self._worst), "; ".join(reasons)) if reasons else (row, None)


def _resolved(name: str, config: RewardConfig) -> RewardFunction:
    key = f"rewards.{name}"
    function: RewardFunction = resolve(config.function, f"{key}.function")
    if not config.low < config.high:
        raise ValueError(f"{key}.low: {config.low}, expected less than {key}.high, {config.high}")
    if not all(map(math.isfinite, (config.weight, config.low, config.high))):
        raise ValueError(f"{key}: weight {config.weight}, range [{config.low}, {config.high}], expected finite numbers")
    given = {"evidence": None} if _takes_evidence(function) else {}
    try:
        inspect.signature(function).bind("", "", **config.options, **given)
    except TypeError as error:
        raise ValueError(
            f"{key}.options: {config.options} do not fit {config.function!r}: {error}; "
            "expected f(completion, ground_truth, **options), or with a parameter `evidence`, which the prompt gives"
        ) from error
    return function


def _takes_evidence(function: RewardFunction) -> bool:
    parameter = inspect.signature(function).parameters.get("evidence")
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
