"""Whether a training run is sick, told from the metrics of its steps.

Owns: the signs of seven sicknesses and the line that each is told with. Does not own: how anything is measured, or who
is told. A sickness is told when it begins, and again only after it had ended. What is not measured, or is NaN, is no
sign of anything. The state is a function of the steps seen: after a resume, show them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, variance
from typing import NamedTuple

from medtvt_rl.evaluation.config import AlarmConfig

FINDINGS = ("held_out/findings_f1_ecg", "held_out/findings_f1_cxr", "held_out/findings_f1_lab")
HELD_OUT = ("held_out/jaccard", *FINDINGS)
NO_COMPONENTS = ("reward/total", "reward/deviation", "reward/failed")
MIN_VALUES = 3
"""On either side of a comparison of rewards; fewer say nothing of their noise."""

Signs = list[str] | None
"""What is wrong, nothing where all is well; None where nothing was measured."""
Watch = Callable[[int, Mapping[str, float]], Signs]


class Alarms:
    """Looks at every step of a run, in order."""

    def __init__(self, config: AlarmConfig) -> None:
        self._sicknesses = [
            _Sickness(
                "importance ratios blow up",
                _Ratios(config),
                "Lower grpo.max_staleness or grpo.learning_rate; at staleness 0 it is engine against learner, "
                "see sync_gap_max",
            ),
            _Sickness(
                "entropy collapses",
                _Entropy(config),
                "Raise grpo.loss.kl.coefficient or grpo.loss.clip_high, or lower grpo.learning_rate",
            ),
            _Sickness(
                "groups have equal rewards and teach nothing",
                _EqualGroups(config),
                "Raise grpo.group_size, or train on prompts that are neither solved nor hopeless",
            ),
            _Sickness(
                "answers run away in length",
                _Lengths(config),
                "Look at them in journal/; reward shorter ones, or raise rollout.sampling.max_new_tokens "
                "if they are good but cut",
            ),
            _Sickness(
                "engines and learner disagree on log-probs",
                _SyncGap(config),
                "The engines may serve other weights than were trained: compare learner.dtype with the engines', "
                "and train no further before they agree",
            ),
            _Sickness(
                "the reward rises while held-out quality falls",
                _RewardHacking(config),
                "Go back to the last good model, read samples in journal/, and change that reward or raise "
                "grpo.loss.kl.coefficient",
            ),
            _Sickness(
                "the reasoning rots",
                _Rot(config),
                "Answers may still be right, for reasons that are not there: add rewards.evidence, or raise "
                "grpo.loss.kl.coefficient or lower grpo.learning_rate",
            ),
        ]

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """One line for every sickness that has begun with this step: what was seen, the threshold, the mend."""
        lines = (sickness.begun(step, metrics) for sickness in self._sicknesses)
        return [line for line in lines if line is not None]


class _Sickness:
    """A sickness, and whether the run has it now."""

    def __init__(self, name: str, watch: Watch, mend: str) -> None:
        self._name, self._watch, self._mend = name, watch, mend
        self._ill = False

    def begun(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """The line to tell if it has begun."""
        signs = self._watch(step, metrics)
        if signs is None:
            return None
        was_ill, self._ill = self._ill, bool(signs)
        if not signs or was_ill:
            return None
        return f"step {step}: {self._name}: {'; '.join(signs)}. {self._mend}."


class _FirstMean:
    """The mean of the first values."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: list[float] = []

    def after(self, value: float) -> float | None:
        """The mean once all of them were there before this value; until then this value is one of them."""
        if len(self._values) == self._count:
            return fmean(self._values)
        self._values.append(value)
        return None


class _Ratios:
    def __init__(self, config: AlarmConfig) -> None:
        self._config = config

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        p99, ess = _value(metrics, "importance_ratio_p99"), _value(metrics, "ess_share")
        if p99 is None and ess is None:
            return None
        signs = []
        if p99 is not None and p99 > self._config.max_ratio_p99:
            signs.append(_above("importance_ratio_p99", p99, "max_ratio_p99", self._config.max_ratio_p99))
        if ess is not None and ess < self._config.min_ess_share:
            signs.append(f"ess_share is {ess:.4g}, below {self._config.min_ess_share:g} (alarms.min_ess_share)")
        return signs


class _Entropy:
    def __init__(self, config: AlarmConfig) -> None:
        self._config, self._first = config, _FirstMean(config.first_steps)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        value = _value(metrics, "entropy")
        if value is None:
            return None
        usual, share = self._first.after(value), self._config.min_entropy_share
        if usual is None or value >= share * usual:
            return []
        return [f"entropy is {value:.4g}, below {share:g} (alarms.min_entropy_share) of {usual:.4g} at first"]


class _EqualGroups:
    """Those that dynamic sampling replaced had equal rewards, too."""

    def __init__(self, config: AlarmConfig) -> None:
        self._config, self._in_a_row = config, 0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        name, most, steps = "groups/zero_variance_share", self._config.max_equal_share, self._config.equal_steps
        value = _value(metrics, name)
        if value is None:
            return None
        trained, replaced = _value(metrics, "groups/trained"), _value(metrics, "groups/replaced")
        if trained and replaced:
            name = f"{name} with the {replaced:g} groups replaced"
            value = (value * trained + replaced) / (trained + replaced)
        self._in_a_row = self._in_a_row + 1 if value > most else 0
        if self._in_a_row < steps:
            return []
        return [f"{_above(name, value, 'max_equal_share', most)} for {steps} steps (alarms.equal_steps)"]


class _Lengths:
    def __init__(self, config: AlarmConfig) -> None:
        self._config, self._first = config, _FirstMean(config.first_steps)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        mean, cut = _value(metrics, "length/mean"), _value(metrics, "length/cut_share")
        if mean is None and cut is None:
            return None
        signs, factor = [], self._config.max_length_factor
        usual = None if mean is None else self._first.after(mean)
        if mean is not None and usual is not None and mean > factor * usual:
            signs.append(
                f"length/mean is {mean:.4g}, above {factor:g} times (alarms.max_length_factor) the {usual:.4g} at first"
            )
        if cut is not None and cut > self._config.max_cut_share:
            signs.append(_above("length/cut_share", cut, "max_cut_share", self._config.max_cut_share))
        return signs


class _SyncGap:
    """By the probe, and by the tokens that the newest version sampled. Of these the mean: rounding in bfloat16 makes
    the largest of thousands large. It leaves out what is not finite, by which the largest is infinite."""

    def __init__(self, config: AlarmConfig) -> None:
        self._most = config.max_sync_gap

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        gaps = _values(metrics, ("sync_gap_max",))
        if metrics.get("fresh_tokens", 0.0) > 0:
            gaps |= _values(metrics, ("fresh_gap_mean",))
            if metrics.get("fresh_gap_max") == math.inf:
                gaps["fresh_gap_max"] = math.inf
        signs = [_above(name, gap, "max_sync_gap", self._most) for name, gap in gaps.items() if gap > self._most]
        return signs if gaps else None


class _Fall(NamedTuple):
    """Of a score, between means of `num` measurements in a row."""

    before: float
    now: float
    num: int
    since: int
    """Which measurement was the last of the earlier ones."""


class _Score:
    """The measurements of a held-out score.

    The highest of many measurements was lucky, and the latest may be unlucky. So means are compared, the longer the
    more measurements there are to choose from: of a quarter of them, up to `window`.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._values: list[float] = []
        self._count = 1
        self.seen: list[tuple[int, int]] = []
        """The step of each measurement, and how many rewards had been seen with it."""

    def add(self, value: float, step: int, num_rewards: int) -> None:
        """The next measurement."""
        self._values.append(value)
        self._count = max(1, min(self._window, len(self._values) // 4))
        self.seen.append((step, num_rewards))

    @property
    def noise(self) -> float:
        """Of a mean of so many measurements, over that of a mean of `window`."""
        return math.sqrt(self._window / self._count)

    def falls(self, most: float) -> list[_Fall]:
        """To the latest mean from all earlier ones that were higher by more than `most`, the highest first."""
        values, count = self._values, self._count
        now, ends = fmean(values[-count:]), range(count, len(values) - count + 1)
        falls = (_Fall(fmean(values[end - count : end]), now, count, end - 1) for end in ends)
        return sorted((fall for fall in falls if fall.before - now > most), reverse=True)


class _Rewards:
    """The components of the reward, step by step."""

    def __init__(self, config: AlarmConfig) -> None:
        self._window, self._deviations = config.first_steps, config.noise_deviations
        self._steps: list[dict[str, float]] = []

    def add(self, metrics: Mapping[str, float]) -> int:
        """The next row; how many have told of rewards."""
        names = [name for name in metrics if name.startswith("reward/") and name not in NO_COMPONENTS]
        if values := _values(metrics, names):
            self._steps.append(values)
        return len(self._steps)

    def rises(self, num_rewards: int) -> list[str]:
        """What is higher of late than in the steps that ended with the `num_rewards`-th, or in the first of all."""
        since = self._steps[max(0, num_rewards - self._window) :]
        names = dict.fromkeys(name for values in since for name in values)
        rises = {name: self._rise([values[name] for values in since if name in values]) for name in names}
        return [f"{name} rose from {rise}" for name, rise in rises.items() if rise]

    def _rise(self, values: Sequence[float]) -> str | None:
        """No value is on both sides, and both have equally many."""
        count = min(self._window, len(values) // 2)
        if count < MIN_VALUES:
            return None
        first, latest = values[:count], values[-count:]
        noise = self._deviations * math.sqrt((variance(first) + variance(latest)) / count)
        before, now = fmean(first), fmean(latest)
        return f"{before:.4g} to {now:.4g} (noise {noise:.2g})" if now - before > max(noise, 1e-9) else None


class _RewardHacking:
    def __init__(self, config: AlarmConfig) -> None:
        self._most = config.max_fall
        self._rewards = _Rewards(config)
        self._scores = {name: _Score(config.held_out_window) for name in HELD_OUT}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        num_rewards = self._rewards.add(metrics)
        values = _values(metrics, HELD_OUT)
        for name, value in values.items():
            self._scores[name].add(value, step, num_rewards)
        return [sign for name in values if (sign := self._sign(name))] if values else None

    def _sign(self, name: str) -> str | None:
        """Since the best measurements, or good ones after which a reward rose."""
        score = self._scores[name]
        most = self._most * score.noise
        for fall in score.falls(most):
            step, num_rewards = score.seen[fall.since]
            if rises := self._rewards.rises(num_rewards):
                return f"{', '.join(rises)} since step {step}, while {_fell(name, fall, 'max_fall', most)}"
        return None


class _Rot:
    def __init__(self, config: AlarmConfig) -> None:
        self._most = config.max_findings_fall
        self._scores = {name: _Score(config.held_out_window) for name in FINDINGS}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Signs:
        values = _values(metrics, FINDINGS)
        signs = []
        for name, value in values.items():
            self._scores[name].add(value, step, 0)
            if falls := self._scores[name].falls(self._most):
                signs.append(_fell(name, falls[0], "max_findings_fall", self._most))
        return signs if values else None


def _value(metrics: Mapping[str, float], name: str) -> float | None:
    """None where it was not measured."""
    value = metrics.get(name)
    return None if value is None or math.isnan(value) else value


def _values(metrics: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Those that were measured."""
    return {name: value for name in names if (value := _value(metrics, name)) is not None}


def _above(name: str, value: float, key: str, threshold: float) -> str:
    return f"{name} is {value:.4g}, above {threshold:g} (alarms.{key})"


def _fell(name: str, fall: _Fall, key: str, most: float) -> str:
    means = f" (means of {fall.num})" if fall.num > 1 else ""
    return f"{name} fell from {fall.before:.4g} to {fall.now:.4g}{means}, by more than {most:.4g} (alarms.{key})"
