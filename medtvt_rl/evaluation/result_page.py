"""The sections of the report that show the held-out result: headline, as published, by disease, calibration.

Owns: which numbers of the evaluation are shown, and in what words. Does not own: the other sections and the file
(report.py), the numbers (summary.py reads them), drawing (charts.py), HTML (page.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from medtvt_rl.evaluation.charts import IntervalRow, interval_chart, reliability_chart
from medtvt_rl.evaluation.page import card, cell, details, table
from medtvt_rl.evaluation.summary import (
    LOWER_IS_BETTER,
    PAPER,
    Estimate,
    answers_dropped,
    block,
    estimate,
    gained_metric,
    is_medical,
    metric_label,
    metric_names,
    missing_metrics,
    paper_first,
    paper_metrics,
    per_disease,
    policy_metrics,
    policy_names,
)

POLICIES = ("sft", "grpo")
"""As summary.json has them; `policy_names` says what they are called."""
CARDS = {
    "jaccard": "Jaccard, sampled",
    "jaccard_greedy": "Jaccard, greedy",
    "f1_macro": "F1, macro",
    "parse_rate": "Well-formed, greedy",
    "reward": "Reward, sampled",
    "reward_greedy": "Reward, greedy",
}
DISEASE_COLUMNS = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "auc": "AUC",
    "average_precision": "AP",
    "brier": "Brier",
}
FEW = 10
"""Fewer patients than this with, or without, a disease: its numbers are marked."""


def headline(summary: Mapping[str, Any]) -> str:
    """Cards and the table of metrics; the published numbers first or folded, as was asked. Empty without evaluation."""
    before, after = policy_metrics(summary, "sft"), policy_metrics(summary, "grpo")
    if not before and not after:
        return ""
    gain = estimate(block(summary, "evaluation").get("gain"))
    rows = [
        [
            cell(metric_label(summary, name)),
            _cell(before.get(name)),
            _cell(after.get(name)),
            _change(name, before.get(name), after.get(name)),
        ]
        for name in metric_names(before, after)
    ]
    if gain is not None:
        label = cell(f"Paired gain of GRPO, {gained_metric(summary, after)}")
        rows.append([label, cell(""), cell(""), cell(f"{gain.value:+.3f}", gain.interval)])
    honest = table(["", *policy_names(summary), "change"], rows) + _note(summary)
    published = _paper(summary)
    parts = [published, honest] if paper_first(summary) else [honest, published]
    return f'<div class="cards">{_cards(before, after, gain)}</div><p></p>{"<p></p>".join(parts)}'


def _note(summary: Mapping[str, Any]) -> str:
    """On how many prompts the numbers are, and what the intervals are over."""
    medical = is_medical(summary)
    what, over = ("studies", "patients") if medical else ("prompts", "prompts")
    sizes = [block(summary, "evaluation", policy).get(f"num_{what}") for policy in ("grpo", "sft")]
    size = next((f" on {number} held-out {what}" for number in sizes if number), "")
    wrong = " An answer that breaks the format counts as wrong." if medical else ""
    return (
        f'<p class="note">Means{size}, with 95 % bootstrap intervals over {over}.{wrong} Sampled: at the training '
        "temperature. Changes in colour: the intervals do not overlap.</p>"
    )


def _cards(before: Mapping[str, Estimate], after: Mapping[str, Estimate], gain: Estimate | None) -> str:
    cards = []
    for name, label in CARDS.items():
        first, last = before.get(name), after.get(name)
        shown = last or first
        if shown is not None:
            earlier = f"{first.value:.3f}" if first is not None and last is not None else ""
            under = f"95 % interval {shown.interval}"
            if name in ("jaccard", "reward") and gain is not None:
                under = f"paired gain {gain.value:+.3f} {gain.interval}"
            cards.append(card(label, f"{shown.value:.3f}", earlier, under))
    return "".join(cards)


def _paper(summary: Mapping[str, Any]) -> str:
    """The numbers as the published evaluation computes them, and why some are missing."""
    first, last = paper_metrics(summary, "sft"), paper_metrics(summary, "grpo")
    rows = [
        [cell(label), _cell(first.get(name)), _cell(last.get(name))]
        for name, label in PAPER.items()
        if name in first or name in last
    ]
    dropped = [
        f"{number} {words}"
        for policy, words in zip(POLICIES, policy_names(summary))
        if (number := answers_dropped(summary, policy)) is not None
    ]
    left_out = f" Left out here: {', '.join(dropped)}." if dropped else ""
    note = (
        '<p class="note">Diagnoses: answers without an answer tag are left out, names must agree to the letter. For '
        f"comparison with published numbers only.{left_out}</p>"
    )
    missing = "".join(
        f'<p class="missing">Not computed: {escape(names)}: {escape(reason)}</p>'
        for reason, names in missing_metrics(summary).items()
    )
    return details(
        "As the published evaluation computes them",
        (table(["", *policy_names(summary)], rows) + note if rows else "") + missing,
        unfolded=paper_first(summary),
    )


def by_disease(summary: Mapping[str, Any]) -> str:
    """F1 as a chart, and a table of every metric for each policy. Empty without them."""
    before, after = per_disease(summary, "sft"), per_disease(summary, "grpo")
    names, policies = list(dict.fromkeys([*before, *after])), policy_names(summary)
    rows = [
        IntervalRow(label=name, values=[one.triple if one else None for one in (before.get(name), after.get(name))])
        for name in names
    ]
    chart = interval_chart("F1 by disease, greedy answer", policies, rows, "Dots: F1; bars: 95 % intervals.")
    numbers = table(["", *policies], [[cell(n), _cell(before.get(n)), _cell(after.get(n))] for n in names])
    tables = "".join(
        details(f"every metric by disease, {words}", found, unfolded=policy == "grpo")
        for policy, words in zip(POLICIES, policies)
        if (found := _disease_table(block(summary, "evaluation", policy, "by_disease")))
    )
    shown = f'<div class="charts">{chart}</div>{details("F1 as numbers", numbers)}' if names else ""
    return shown + tables


def _disease_table(diseases: Mapping[str, Any]) -> str:
    rows, few = [], False
    for name, found in diseases.items():
        values = found if isinstance(found, Mapping) else {}
        counts = [estimate(values.get(key)) for key in ("positives", "negatives")]
        scarce = any(count is not None and count.value < FEW for count in counts)
        few = few or scarce
        words = " / ".join("-" if count is None else f"{count.value:.0f}" for count in counts)
        numbers = [_cell(estimate(values.get(key)), css="tall") for key in DISEASE_COLUMNS]
        rows.append([cell(f"{name}{' *' if scarce else ''}"), cell(words), *numbers])
    if not rows:
        return ""
    scarce_words = f" * Fewer than {FEW} patients with or without it: read with care." if few else ""
    note = (
        '<p class="note">F1, precision and recall of the greedy answer; the others of the share of sampled answers '
        f"that name the disease. AP: average precision; Brier score: lower is better. "
        f"A dash: undefined, as AUC is where all or no patients have it.{scarce_words}</p>"
    )
    return table(["", "with / without", *DISEASE_COLUMNS.values()], rows) + note


def calibration(summary: Mapping[str, Any]) -> str:
    """The reliability chart and its numbers. Empty without sampled answers."""
    series, tables = [], []
    for policy, words in zip(POLICIES, policy_names(summary)):
        given = block(summary, "evaluation", policy).get("reliability")
        bins = [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []
        points, rows = [], []
        for one in bins:
            said, observed, pairs = (estimate(one.get(key)) for key in ("said", "observed", "pairs"))
            if said is not None and observed is not None and pairs is not None:
                points.append((said.value, observed.triple))
                rows.append([cell(f"{said.value:.2f}"), _cell(observed), cell(f"{pairs.value:.0f}")])
        series.append((words, points))
        tables.append(details(f"as numbers, {words}", table(["said", "observed", "pairs"], rows) if rows else ""))
    note = (
        "All diseases together, a pair for each study and disease. "
        "Below the diagonal: named more often than it is there."
    )
    chart = reliability_chart("How often a disease is there, by how many answers name it", series, note)
    return f'<div class="charts">{chart}</div>{"".join(tables)}' if chart else ""


def _cell(found: Estimate | None, css: str = "") -> str:
    return cell(f"{found.value:.3f}", found.interval, css) if found is not None else cell("-", css=css)


def _change(name: str, before: Estimate | None, after: Estimate | None) -> str:
    if before is None or after is None:
        return cell("-")
    change = after.value - before.value
    apart = before.high < after.low or after.high < before.low
    better = (change > 0) != (name in LOWER_IS_BETTER)
    return cell(f"{change:+.3f}", css=("up" if better else "down") if apart else "")
