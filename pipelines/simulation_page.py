"""The page of a simulation: curves over the number of generators, the best ratio, what goes wrong, on one HTML page.

Owns: which figures are shown. Does not own: charts and style (medtvt_rl/evaluation), the numbers (sweep.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from medtvt_rl.config import Config
from medtvt_rl.evaluation.charts import Series, line_chart
from medtvt_rl.evaluation.page import card, cell, page, section, table
from medtvt_rl.simulation.timings import Timings
from pipelines.simulation import Outcome
from pipelines.sweep import Findings

X_LABEL = "generators, as powers of 2"
HEADER = ("generators", "step s", "groups/s", "tokens/s", "staleness", "generators idle", "learner idle", "limited by")


def simulation_page(config: Config, timings: Timings, found: Findings) -> str:
    """A whole document."""
    first = found.ratios[0]
    cards = [
        card("best ratio", f"{first.generators / first.learners:.2f}", under="generators for a learner rank"),
        card("a straggler", f"{found.straggler.step_s / found.usual.step_s - 1:+.0%}", under="on a step"),
        card("a lost generator", f"{found.loss.delay_s:.0f} s", under=f"for {found.loss.seconds / 60:.1f} min"),
    ]
    body = [
        f"<h1>Simulation of {escape(config.run.name)}</h1>",
        f'<p class="soft">Timings: {escape(timings.made_by or "medtvt-rl bench")}. The loop, the buffer and '
        "the sampler are the real ones; generators, scorers, references and learners only take the time that was "
        "measured, each on machines of its own unless said otherwise.</p>",
        f'<div class="cards">{"".join(cards)}</div>',
        section("More generators", _curves(found.by_generators) + _table(found.by_generators), "nothing was tried"),
        section("The best ratio", _ratios(found), "nothing was tried"),
    ]
    if found.here is not None:
        body.append(section(f"As configured, on one machine of {timings.cores} cores", _table([found.here]), ""))
    if found.elastic is not None:
        body.append(section("Elastic", _elastic(found.elastic), ""))
    return page(f"Simulation of {config.run.name}", "\n".join(body))


def _curves(outcomes: Sequence[Outcome]) -> str:
    def series(name: str, value: Callable[[Outcome], float]) -> Series:
        return Series(name=name, points=[(math.log2(o.setting.generators), value(o)) for o in outcomes])

    charts = [
        line_chart("Groups per second", [series("groups/s", lambda o: o.groups_per_s)], x_label=X_LABEL),
        line_chart(
            "Share of the time without work",
            [
                series("generators", lambda o: o.generator_idle),
                series("learner", lambda o: o.learner_idle),
                series("references", lambda o: o.reference_idle),
                series("scorers", lambda o: o.scorer_idle),
                series("driver", lambda o: o.driver_idle),
            ],
            x_label=X_LABEL,
        ),
        line_chart("Staleness, mean", [series("steps", lambda o: o.staleness)], x_label=X_LABEL),
        line_chart("Seconds a step", [series("seconds", lambda o: o.step_s)], x_label=X_LABEL),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [
            cell(str(o.setting.generators)),
            cell(f"{o.step_s:.2f}"),
            cell(f"{o.groups_per_s:.2f}"),
            cell(f"{o.tokens_per_s:.0f}"),
            cell(f"{o.staleness:.1f}", f"max {o.max_staleness}"),
            cell(f"{max(0.0, o.generator_idle):.0%}"),
            cell(f"{max(0.0, o.learner_idle):.0%}"),
            cell(o.bottleneck),
        ]
        for o in outcomes
    ]
    return table(HEADER, rows)


def _ratios(found: Findings) -> str:
    header = ("learner ranks", "groups a step", "generators", "a rank", "by the formula", "step s", "shortest s")
    rows = [
        [
            cell(str(r.learners)),
            cell(str(r.groups_per_step)),
            cell(str(r.generators)),
            cell(f"{r.generators / r.learners:.2f}"),
            cell(f"{r.formula / r.learners:.2f}"),
            cell(f"{r.step_s:.2f}"),
            cell(f"{r.shortest_s:.2f}"),
        ]
        for r in found.ratios
    ]
    return table(header, rows)


def _elastic(outcome: Outcome) -> str:
    points: list[tuple[float, float | None]] = []
    for at, count in outcome.generators:
        if points:
            points.append((at, points[-1][1]))
        points.append((at, float(count)))
    points.append((max(outcome.ends[-1], points[-1][0]), points[-1][1]))
    chart = line_chart("Generators that serve", [Series(name="generators", points=points)], x_label="seconds")
    return f'<div class="charts">{chart}</div>'
