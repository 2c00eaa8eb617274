"""The report of a run: report.html, one file that needs nothing else, and the table at the end of the terminal.

Owns: which curves and samples are shown, and in what words. Does not own: the sections of the result (result_page.py),
the computation of numbers, drawing (charts.py), the page (page.py). What is missing is named, never an error: a report
of half a run is a report.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from medtvt_rl.evaluation.charts import IntervalRow, Series, bar_chart, interval_chart, line_chart
from medtvt_rl.evaluation.page import card, cell, details, missing_line, page, section, table
from medtvt_rl.evaluation.result_page import by_disease, calibration, headline
from medtvt_rl.evaluation.summary import (
    PAPER,
    STAGE_NAMES,
    Curves,
    Estimate,
    answers_dropped,
    block,
    curves,
    estimate,
    evaluated,
    gained_metric,
    is_medical,
    metric_label,
    metric_names,
    missing_metrics,
    paper_first,
    paper_metrics,
    per_disease,
    policy_metrics,
    remarks,
)

MODALITY_NAMES = {"ecg": "without the ECG", "cxr": "without the film", "lab": "without the labs"}
SIMULATED = (
    "These scores are of a simulated cohort: its signals, films and values were drawn by a program. They show that the "
    "system learns, and mean nothing clinically. Nothing here may guide the care of a patient."
)
RESEARCH = "A research system, not a medical device: nothing here may guide the care of a patient."
SCORES = ("validation*", "score*", "*/score", "epoch/total", "epoch/reward/*")
# (stages, title, patterns of metric names, note); the first that matches takes the metric.
CHARTS = (
    (("pretrain", "sft"), "Loss", ("loss", "*_loss", "loss/*", "*/loss"), "Next-token loss on the answers."),
    (("pretrain", "sft"), "Validation score", SCORES, "Mean reward of sampled answers."),
    (("grpo",), "Reward by component", ("reward/*",), "Mean over the completions of a step."),
    (("grpo",), "KL to the reference policy", ("kl",), "Nats a token. A rise says how far the policy has moved."),
    (("grpo",), "Entropy", ("entropy",), "Nats a token. A fall to 0 says that the policy no longer explores."),
    (
        ("grpo",),
        "Held-out, beside training",
        ("held_out/jaccard*", "held_out/findings_f1_*", "held_out/parse_rate*", "held_out/reward*"),
        "Of a few studies. A reward that rises while these fall is being hacked.",
    ),
    (
        ("grpo",),
        "Staleness",
        ("staleness/mean", "staleness/max"),
        "Steps between the oldest token's weights and those it trains.",
    ),
    (
        ("grpo",),
        "Log-probs, engine against learner",
        ("sync_gap*", "fresh_gap*", "engine_gap*"),
        "Absolute difference; sync: right after new weights; fresh: of samples drawn with the weights that score them.",
    ),
    (
        ("grpo",),
        "Importance ratio, proximal over behaviour",
        ("importance_ratio_mean", "importance_ratio_p99"),
        "Before truncation. Far from 1: samples are stale, or engine and learner disagree.",
    ),
    (("grpo",), "Completion length", ("length/mean", "length/max"), "Tokens."),
    (("grpo",), "Gradient norm", ("gradient_norm", "grad_norm"), "Before clipping."),
    (("grpo",), "Shares", ("*_share",), "Of groups without a gradient, completions cut, and tokens clipped."),
    (
        ("grpo",),
        "Tokens a second by generator",
        ("generator_tokens_per_s/*",),
        "While it had work, a moving average; unlike generators get groups in proportion to it.",
    ),
    (("grpo",), "Share of the tokens by generator", ("generator_share/*",), "Of all tokens of the run so far."),
    (("grpo",), "Seconds of a step", ("seconds/*",), "Waiting long for groups: add rollout generators."),
)
GENERATOR_CELLS = {"groups": "{:,.0f}", "tokens": "{:,.0f}", "share": "{:.1%}", "tokens_per_s": "{:,.0f}"}
APART = ("reward/deviation", "reward/failed")
NO_SAMPLES = "No samples are shown: none were journalled, or privacy.show_samples is false."
MAX_SAMPLES, MAX_COMPLETIONS = 6, 3


def write_report(
    path: str | Path,
    *,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    config_yaml: str = "",
) -> None:
    """Writes report.html; it appears complete or not at all. Arguments as those of `render_report`."""
    target = Path(path)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(
        render_report(summary=summary, metrics=metrics, samples=samples, config_yaml=config_yaml), encoding="utf-8"
    )
    os.replace(temporary, target)


def render_report(
    *,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    config_yaml: str = "",
) -> str:
    """The report as HTML.

    Args:
        summary: content of summary.json: stages, evaluation, grpo, peak_rss_bytes; any part may be missing.
        metrics: rows of metrics.jsonl, {"stage", "step", "time", name: value}.
        samples: lines of journal/samples.jsonl: step, prompt_id, ground_truth, completions of {text, reward}.
        config_yaml: the resolved configuration, as text.
    """
    name = str(summary.get("run", "run"))
    lines, medical, worth = curves(metrics), is_medical(summary), _ablations(summary)
    part = "modality" if medical else "part"
    body = [
        f"<h1>{escape(name)}</h1>",
        _subject(config_yaml) if medical else "",
        section("Result", headline(summary), "No evaluation was found: the evaluate stage has not run."),
        *(_of_diseases(summary) if medical else ()),
        section(f"What each {part} is worth", worth, "No ablations (evaluation.ablations).")
        if medical or worth
        else "",
        section(
            "GRPO",
            _grpo_facts(summary) + _generators(summary) + _charts(lines, "grpo"),
            "No curves of GRPO were found.",
        ),
        section(
            "Supervised stages",
            _charts(lines, "pretrain", "Pre-training: ") + _charts(lines, "sft", "SFT: "),
            "No curves of the supervised stages were found.",
        ),
        section("Time and memory", _timing(summary), "No stage has left its time."),
        section("Sampled answers during GRPO", _samples(samples, medical), NO_SAMPLES),
        section(
            "Configuration",
            details("resolved configuration", f"<pre>{escape(config_yaml)}</pre>") if config_yaml else "",
            "No configuration was found.",
        ),
    ]
    return page(f"{name}: report", "\n".join(body))


def print_table(summary: Mapping[str, Any], stream: IO[str] | None = None) -> None:
    """Prints the metrics of each policy, and F1 by disease; with rules and colours only on a terminal."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 110
    policies = evaluated(summary)
    metrics = [policy_metrics(summary, policy) for policy in policies]
    if not any(metrics):
        console.print("no evaluation: the evaluate stage has not run")
        return
    shown = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    shown.add_column("held-out, 95 % interval")
    for header in policies.values():
        shown.add_column(escape_markup(header), justify="right")
    if paper_first(summary):
        published = [paper_metrics(summary, policy) for policy in policies]
        _add_rows(shown, published, {name: f"as published: {label}" for name, label in PAPER.items()})
        left_out = [answers_dropped(summary, policy) for policy in policies]
        if any(number is not None for number in left_out):
            shown.add_row("as published: answers left out", *("-" if n is None else str(n) for n in left_out))
    _add_rows(shown, metrics, {name: metric_label(summary, name) for name in metric_names(*metrics)})
    diseases = [per_disease(summary, policy) for policy in policies]
    _add_rows(shown, diseases, {name: f"F1, {name}" for found in diseases for name in found})
    console.print(shown)
    gain = estimate(block(summary, "evaluation").get("gain"))
    if gain is not None:
        over = "patients" if is_medical(summary) and "jaccard" in metrics[-1] else "prompts"
        what = f"{gained_metric(summary, metrics[-1])}, paired over {over}"
        console.print(f"gain of GRPO in {what}: {gain.value:+.3f} {gain.interval}", markup=False)
    for remark in remarks(summary):
        console.print(remark, markup=False, soft_wrap=True)
    for reason, names in missing_metrics(summary).items():
        console.print(f"not computed: {names}: {reason}", markup=False, soft_wrap=True)
    if summary.get("simulated") is True and is_medical(summary):
        console.print("These are scores on a simulated cohort: they mean nothing clinically.")


def _subject(config_yaml: str) -> str:
    """What the packages' own task is about, and what its scores are worth."""
    return (
        '<p class="soft">Diagnoses from an ECG, a chest film and blood values: pre-training, fine-tuning, GRPO.</p>'
        f'<p class="warning">{RESEARCH if _real_data(config_yaml) else SIMULATED}</p>'
    )


def _of_diseases(summary: Mapping[str, Any]) -> tuple[str, str]:
    return (
        section("By disease", by_disease(summary), "No F1 by disease was found."),
        section("Calibration", calibration(summary), "No shares of sampled answers were found."),
    )


def _add_rows(shown: Table, found: Sequence[Mapping[str, Estimate]], labels: Mapping[str, str]) -> None:
    """A row for each label of which a policy has a value."""
    for name, label in labels.items():
        if any(name in values for values in found):
            shown.add_row(escape_markup(label), *(_text(values.get(name)) for values in found))


def _ablations(summary: Mapping[str, Any]) -> str:
    found = {name: estimate(value) for name, value in block(summary, "evaluation", "ablations").items()}
    rows = [
        IntervalRow(label=MODALITY_NAMES.get(name, f"without {name}"), values=[one.triple])
        for name, one in found.items()
        if one is not None
    ]
    note, what = "Change when one part is withheld from every item, paired over prompts.", "the evaluator's metric"
    if is_medical(summary):
        note = "Change of the greedy Jaccard when one modality is withheld from every patient, paired over patients."
        what = "Jaccard"
    chart = interval_chart(f"Held-out {what}, change", [""], rows, note, zero=True)
    numbers = [
        [cell(row.label), cell(f"{v[0]:+.3f}", f"[{v[1]:.3f}, {v[2]:.3f}]")] for row in rows for v in row.values if v
    ]
    return f'<div class="charts">{chart}<div>{table(["", f"change of {what}"], numbers)}</div></div>' if rows else ""


def _grpo_facts(summary: Mapping[str, Any]) -> str:
    grpo = block(summary, "grpo")
    facts = [
        ("Steps", "steps", "{:,.0f}"),
        ("Completions", "completions", "{:,.0f}"),
        ("Largest staleness", "max_staleness_seen", "{:.0f}"),
        ("Largest log-prob difference", "logprob_max_abs_diff", "{:.1e}"),
        ("Reward, first tenth", "reward_first", "{:.3f}"),
        ("Reward, last tenth", "reward_last", "{:.3f}"),
    ]
    cards = [
        card(label, form.format(found.value))
        for label, key, form in facts
        if (found := estimate(grpo.get(key))) is not None
    ]
    alarms = [f"<li>{escape(str(alarm))}</li>" for alarm in grpo.get("alarms") or []]
    sounded = f"<p>Alarms that sounded:</p><ul>{''.join(alarms)}</ul>" if alarms else ""
    return (f'<div class="cards">{"".join(cards)}</div><p></p>' if cards else "") + sounded


def _generators(summary: Mapping[str, Any]) -> str:
    """What each rollout generator did of the whole, where there were several."""
    found = [one for one in block(summary, "grpo").get("generators") or [] if isinstance(one, Mapping)]
    if len(found) < 2:
        return ""
    header = ["rollout generator", "node", "groups", "tokens", "share of tokens", "tokens/s while it worked"]
    rows = [
        [
            cell(str(one.get("index", "?"))),
            cell(str(one.get("node", "?"))),
            *(
                cell("-" if (value := estimate(one.get(key))) is None else form.format(value.value))
                for key, form in GENERATOR_CELLS.items()
            ),
        ]
        for one in found
    ]
    return table(header, rows)


def _charts(lines: Curves, stage: str, prefix: str = "") -> str:
    """Every metric of a stage: those that have a chart of their own, then the others, folded."""
    left = dict(lines.get(stage, {}))
    drawn = []
    for stages, title, patterns, note in CHARTS:
        names = [n for n in left if n not in APART and any(fnmatchcase(n, pattern) for pattern in patterns)]
        if stage in stages and names:
            series = [Series(name=_short(n), points=left.pop(n)) for n in sorted(names, key=_totals_first)]
            drawn.append(line_chart(prefix + title, series, note))
    others = [line_chart(prefix + name, [Series(name=name, points=points)]) for name, points in sorted(left.items())]
    folded = "".join(others)
    return (f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else "") + details(
        f"{prefix}{len(others)} more curves", f'<div class="charts">{folded}</div>' if folded else ""
    )


def _short(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _totals_first(name: str) -> tuple[bool, str]:
    return not name.endswith("/total"), name


def _timing(summary: Mapping[str, Any]) -> str:
    stages = block(summary, "stages")
    rows, total = [], 0.0
    for name in [*STAGE_NAMES, *(extra for extra in stages if extra not in STAGE_NAMES)]:
        seconds, memory = estimate(block(stages, name).get("seconds")), block(stages, name).get("peak_rss_bytes")
        if seconds is not None:
            total += seconds.value
            rows.append((STAGE_NAMES.get(name, name), seconds.value, f"{seconds.value:.0f} s{_memory(memory)}"))
    note = f"{total:.0f} s together" + (f"; at most {m}" if (m := _memory(summary.get("peak_rss_bytes"))[2:]) else "")
    return f'<div class="charts">{bar_chart("Seconds by stage", rows, note + ".")}</div>' if rows else ""


def _memory(found: Any) -> str:
    size = estimate(found)
    return f", {size.value / 2**30:.1f} GiB" if size is not None and size.value > 0 else ""


def _samples(samples: Sequence[Mapping[str, Any]], medical: bool) -> str:
    """The first, the last, and some between; of each the best, the worst and one more completion."""
    if len(samples) > MAX_SAMPLES:
        samples = [samples[round(i * (len(samples) - 1) / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]
    parts, label = [], "True diagnoses" if medical else "Ground truth"
    for sample in samples:
        given = sample.get("completions")
        completions = [c for c in given if isinstance(c, Mapping)] if isinstance(given, Sequence) else []
        completions = sorted(completions, key=lambda c: -(r.value if (r := estimate(c.get("reward"))) else 0.0))
        shown = completions[: MAX_COMPLETIONS - 1] + completions[MAX_COMPLETIONS - 1 :][-1:]
        truth = f"<p><b>{label}:</b> {escape(str(sample.get('ground_truth', 'unknown')))}</p>"
        texts = "".join(_completion(one) for one in shown) or missing_line("no completion was kept")
        title = f"step {sample.get('step', '?')}, {sample.get('prompt_id', '?')}"
        parts.append(details(title, truth + texts, unfolded=sample is samples[-1]))
    return "".join(parts)


def _completion(completion: Mapping[str, Any]) -> str:
    text = escape(str(completion.get("text", "")))
    text = re.sub(r"&lt;/?(?:think|answer)&gt;", lambda match: f'<span class="tag">{match[0]}</span>', text)
    text = re.sub(r"\b(ECG|CXR|LAB):", r"<b>\1:</b>", text)
    reward = estimate(completion.get("reward"))
    words = f"reward {reward.value:.2f}" if reward is not None else "no reward"
    parts = [f"{escape(str(name))} {value:.2f}" for name, value in (completion.get("components") or {}).items()]
    words += f" ({', '.join(parts)})" if parts else ""
    return f'<div class="sample"><p class="soft">{words}</p><p>{text}</p></div>'


def _real_data(config_yaml: str) -> bool:
    """Whether the configuration says that the studies are not simulated."""
    return re.search(r"^cohort: *(null|~) *$", config_yaml, re.MULTILINE) is not None


def _text(found: Estimate | None) -> str:
    return f"{found.value:.3f} {found.interval}".replace("[", r"\[") if found is not None else "-"
