"""Reads what a run left behind: the numbers of summary.json and the curves of metrics.jsonl.

Owns: the shapes of both and what is tolerated as missing in them. Does not own: how they are shown (report.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAGE_NAMES = {
    "cohort": "Cohort and study store",
    "pretrain": "Pre-training (PT)",
    "sft": "Fine-tuning (SFT)",
    "grpo": "GRPO",
    "evaluate": "Evaluation",
}
METRICS = {
    "jaccard": "Jaccard, sampled answers",
    "jaccard_greedy": "Jaccard, greedy answer",
    "exact_match": "All diagnoses right",
    "f1_micro": "F1 over diagnoses, micro",
    "f1_macro": "F1 over diagnoses, macro",
    "auc": "AUC of sampled shares",
    "average_precision": "Average precision of sampled shares",
    "brier": "Brier score (lower is better)",
    "calibration_error": "Calibration error (lower is better)",
    "parse_rate_sampled": "Well-formed answers, sampled",
    "parse_rate": "Well-formed answers, greedy",
    "findings_f1_ecg": "F1 of findings named, ECG",
    "findings_f1_cxr": "F1 of findings named, film",
    "findings_f1_lab": "F1 of findings named, labs",
    "reward": "Reward, sampled answers",
    "reward_greedy": "Reward, greedy answer",
}
REWARDS = {"reward", "reward_greedy"}
LOWER_IS_BETTER = {"brier", "calibration_error"}
PAPER = {
    "precision": "precision, mean over answers",
    "recall": "recall, mean over answers",
    "f1": "F1, mean over answers",
    "auc": "AUC of 0/1 answers",
    "bleu": "BLEU, mean over answers",
    "rouge_l_recall": "ROUGE-L recall",
    "meteor": "METEOR",
    "bertscore_recall": "BERTScore recall",
    "bleu_corpus": "BLEU, all answers together",
    "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
}
PER_DISEASE = "f1/"
Curves = dict[str, dict[str, list[tuple[float, float | None]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval; the ends equal the value where none was computed."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        """[low, high], or nothing where there is no interval."""
        return f"[{self.low:.3f}, {self.high:.3f}]" if self.low != self.high else ""

    @property
    def triple(self) -> tuple[float, float, float]:
        """(value, low, high)."""
        return self.value, self.low, self.high


def estimate(found: Any) -> Estimate | None:
    """From {value, low, high} or a plain number; None where there is no value."""
    if isinstance(found, Mapping):
        value = _number(found.get("value"))
        if value is None:
            return None
        low, high = _number(found.get("low")), _number(found.get("high"))
        return Estimate(value=value, low=value if low is None else low, high=value if high is None else high)
    value = _number(found)
    return None if value is None else Estimate(value=value, low=value, high=value)


def block(summary: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at `keys`, or an empty one."""
    found: Any = summary
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def evaluated(summary: Mapping[str, Any]) -> dict[str, str]:
    """Policy -> what it is called: before and after GRPO, or the one model that was evaluated."""
    stages = block(summary, "stages")
    first = "before GRPO" if stages and "sft" not in stages else "after SFT"
    told = block(summary, "evaluation", "policies") or {"sft": first, "grpo": "after GRPO"}
    return {str(policy): str(words) for policy, words in told.items()}


def policy_metrics(summary: Mapping[str, Any], policy: str) -> dict[str, Estimate]:
    """Metric -> estimate of `policy`, one of `evaluated`, in the order of METRICS; then a task's own."""
    found_for = block(summary, "evaluation", policy)
    values = block(found_for, "metrics") or found_for
    own = [name for name in values if "value" in block(values, name) and not name.startswith(PER_DISEASE)]
    found = {name: estimate(values.get(name)) for name in dict.fromkeys([*METRICS, *own])}
    return {name: one for name, one in found.items() if one is not None}


def paper_first(summary: Mapping[str, Any]) -> bool:
    """Whether the numbers of the published evaluation were asked for."""
    return block(summary, "evaluation").get("metrics") == "paper"


def paper_metrics(summary: Mapping[str, Any], policy: str) -> dict[str, Estimate]:
    """Metric of the published evaluation -> estimate of `policy`, in the order of PAPER."""
    values = block(summary, "evaluation", policy, "paper")
    found = {name: estimate(values.get(name)) for name in PAPER}
    return {name: one for name, one in found.items() if one is not None}


def answers_dropped(summary: Mapping[str, Any], policy: str) -> int | None:
    """How many answers of `policy` the published evaluation leaves out."""
    found = estimate(block(summary, "evaluation", policy, "paper").get("answers_dropped"))
    return None if found is None else round(found.value)


def missing_metrics(summary: Mapping[str, Any]) -> dict[str, str]:
    """Why metrics that were asked for could not be computed -> which ones, in words."""
    names: dict[str, list[str]] = {}
    for name, reason in block(summary, "evaluation", "notes").items():
        names.setdefault(str(reason), []).append(PAPER.get(name, name))
    return {reason: "; ".join(missing) for reason, missing in names.items()}


def is_medical(summary: Mapping[str, Any]) -> bool:
    """Whether the task is the packages' own, about patients."""
    return summary.get("medical") is not False


def metric_names(*policies: Mapping[str, Estimate]) -> list[str]:
    """Metrics that one of the policies has: those of METRICS first, in their order."""
    found = dict.fromkeys(name for policy in policies for name in policy)
    return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]


def metric_label(summary: Mapping[str, Any], name: str) -> str:
    """A metric in words: those of METRICS, but for a task that gives such a name a meaning of its own."""
    return METRICS.get(name, name) if is_medical(summary) or name in REWARDS else name


def gained_metric(summary: Mapping[str, Any], metrics: Mapping[str, Estimate]) -> str:
    """What the gain of GRPO is measured in."""
    if is_medical(summary) and "jaccard" in metrics:
        return "sampled Jaccard"
    return "sampled reward" if "reward" in metrics else "the main metric"


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the result must know of the model."""
    found = block(summary, "evaluation").get("remarks")
    return [str(remark) for remark in found] if isinstance(found, list) else []


def per_disease(summary: Mapping[str, Any], policy: str) -> dict[str, Estimate]:
    """Disease -> F1 of `policy`."""
    found_for = block(summary, "evaluation", policy)
    values = {**block(found_for, "metrics"), **block(found_for, "per_disease")}
    listed = block(found_for, "per_disease")
    found = {
        name.removeprefix(PER_DISEASE): estimate(value)
        for name, value in values.items()
        if name in listed or name.startswith(PER_DISEASE)
    }
    return {name: one for name, one in found.items() if one is not None}


def curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    """Stage -> metric -> [(step, value)] by rising step; the last row of a step counts, as a resumed run repeats some.

    A value that is null or infinite is None, a gap in the curve.
    """
    latest: dict[tuple[str, str], dict[float, float | None]] = {}
    for row in rows:
        stage, step = row.get("stage"), _number(row.get("step"))
        if not isinstance(stage, str) or step is None:
            continue
        for name, value in row.items():
            told = value is None or isinstance(value, float) or _number(value) is not None
            if told and name not in ("stage", "step", "time"):
                latest.setdefault((stage, name), {})[step] = _number(value)
    found: Curves = {}
    for (stage, name), values in latest.items():
        found.setdefault(stage, {})[name] = sorted(values.items(), key=lambda point: point[0])
    return found


def _number(value: Any) -> float | None:
    """A finite number as float, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = float(value)
    return number if number - number == 0 else None
