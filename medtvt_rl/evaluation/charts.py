"""Small charts as inline SVG: lines over steps, and values with intervals.

Owns: scales, ticks, paths, and the HTML figure around a chart. Does not own: which numbers are shown (report.py), nor
colours, which are the page's style sheet's (page.py), so that a chart follows a light or dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 30
MAX_POINTS = 400
NUM_COLOURS = 6
ROW_HEIGHT, LABEL_WIDTH, AXIS_HEIGHT, BAR_TEXT_WIDTH = 19, 190, 20, 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: points (x, y) by rising x; y None where there is no value."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRow:
    """A label with one (value, low, high) for each series, None where it is missing."""

    label: str
    values: Sequence[tuple[float, float, float] | None]


def line_chart(title: str, series: Sequence[Series], note: str = "", x_label: str = "step") -> str:
    """A figure with one line a series; noisy lines stay visible, thin, beneath their moving average.

    Empty if no series has a value.
    """
    series = [Series(name=s.name, points=thinned(s.points)) for s in series]
    xs = [x for s in series for x, y in s.points if y is not None]
    ys = [y for s in series for _, y in s.points if y is not None]
    if not ys:
        return ""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_range, y_range = (min(xs), max(max(xs), min(xs) + 1e-9)), (y_ticks[0], y_ticks[-1])
    parts = [_grid(x_ticks, y_ticks, x_range, y_range, x_label)]
    for index, one in enumerate(series):
        smooth = moving_average(one.points)
        colour = f"c{index % NUM_COLOURS}"
        raw = "raw " if smooth is not None else ""
        parts.append(_path(one.points, x_range, y_range, f"{raw}line {colour}"))
        if smooth is not None:
            parts.append(_path(smooth, x_range, y_range, f"line {colour}"))
    return _figure(title, note, _legend([s.name for s in series]), _svg(HEIGHT, title, "".join(parts)))


def interval_chart(
    title: str, series: Sequence[str], rows: Sequence[IntervalRow], note: str = "", zero: bool = False
) -> str:
    """A figure with a dot and a whisker for each row and series; with `zero` a line marks 0. Empty without values."""
    numbers = [number for row in rows for value in row.values if value is not None for number in value]
    if not numbers:
        return ""
    x_ticks = ticks(min([*numbers, 0.0] if zero else numbers), max([*numbers, 0.0] if zero else numbers))
    span = (x_ticks[0], x_ticks[-1])
    row_height = ROW_HEIGHT + 9 * (len(series) - 1)
    height = TOP + row_height * len(rows) + AXIS_HEIGHT

    def place(value: float) -> float:
        return LABEL_WIDTH + (value - span[0]) / (span[1] - span[0]) * (WIDTH - LABEL_WIDTH - RIGHT - 8)

    bottom = height - AXIS_HEIGHT
    parts = []
    for tick in x_ticks:
        strong = " zero" if zero and tick == 0 else ""
        parts.append(
            f'<line class="grid{strong}" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        parts.append(
            f'<text class="tick mid" x="{place(tick):.1f}" y="{bottom + 14}">{tick_text(tick, x_ticks)}</text>'
        )
    for number, row in enumerate(rows):
        middle = TOP + row_height * (number + 0.5)
        parts.append(f'<text class="label" x="{LABEL_WIDTH - 12}" y="{middle + 4:.1f}">{escape(row.label)}</text>')
        for index, value in enumerate(row.values):
            if value is not None:
                y = middle + 9 * (index - (len(series) - 1) / 2)
                parts.append(_whisker(place, value, y, f"c{index % NUM_COLOURS}", row.label, series[index]))
    return _figure(title, note, _legend(series), _svg(height, title, "".join(parts)))


def reliability_chart(
    title: str, series: Sequence[tuple[str, Sequence[tuple[float, tuple[float, float, float]]]]], note: str = ""
) -> str:
    """A figure of what was observed, with whiskers, over what was said, both 0 to 1; on the diagonal they agree.

    Args:
        series: (name, points); a point is (said, (observed, low, high)).

    Empty without points.
    """
    if not any(points for _, points in series):
        return ""
    unit, tenths = (0.0, 1.0), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [_grid(tenths, tenths, unit, unit, "share of sampled answers that name the disease")]
    parts.append(_path([(0.0, 0.0), (1.0, 1.0)], unit, unit, "grid line"))
    for index, (name, points) in enumerate(series):
        colour = f"c{index % NUM_COLOURS}"
        parts.append(_path([(said, observed[0]) for said, observed in points], unit, unit, f"line {colour}"))
        for said, (middle, low, high) in points:
            x = _x(said, unit) + 3 * (index - (len(series) - 1) / 2)
            words = escape(f"{name}: said {said:.2f}, observed {middle:.3f} [{low:.3f}, {high:.3f}]")
            parts.append(
                f'<g><title>{words}</title><line class="whisker {colour}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{_y(low, unit):.1f}" y2="{_y(high, unit):.1f}"/>'
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{_y(middle, unit):.1f}" r="3.2"/></g>'
            )
    return _figure(title, note, _legend([name for name, _ in series]), _svg(HEIGHT, title, "".join(parts)))


def bar_chart(title: str, rows: Sequence[tuple[str, float, str]], note: str = "") -> str:
    """Horizontal bars from 0: (label, value, text beside the bar). Empty without rows."""
    if not rows:
        return ""
    largest = max(max(value for _, value, _ in rows), 1e-9)
    parts = []
    for number, (label, value, text) in enumerate(rows):
        y = TOP + ROW_HEIGHT * 1.25 * number
        width = max(1.0, value / largest * (WIDTH - LABEL_WIDTH - BAR_TEXT_WIDTH))
        parts.append(f'<text class="label" x="{LABEL_WIDTH - 12}" y="{y + 13:.1f}">{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{LABEL_WIDTH}" y="{y + 2:.1f}" width="{width:.1f}" height="15" rx="2"/>')
        parts.append(f'<text class="tick" x="{LABEL_WIDTH + width + 6:.1f}" y="{y + 13:.1f}">{escape(text)}</text>')
    height = int(TOP + ROW_HEIGHT * 1.25 * len(rows) + 6)
    return _figure(title, note, "", _svg(height, title, "".join(parts)))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`; at least two, so that they span a range."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        half = max(abs(high) * 0.1, 1e-6)
        low, high = low - half, high + half
    raw = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """`value` with as many decimals as the distance of the ticks needs."""
    step = all_ticks[1] - all_ticks[0]
    largest = max(abs(tick) for tick in all_ticks)
    if value == 0:
        return "0"
    if largest >= 1e6 or largest < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(round(step, decimals) - step) > 1e-9 * step:  # steps of 2.5, 0.25, ...
        decimals += 1
    return f"{value:.{decimals}f}"


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: means over equal runs of neighbours; a run without a value stays a gap."""
    if len(points) <= limit:
        return list(points)
    run = -(-len(points) // limit)
    thin: list[Point] = []
    for start in range(0, len(points), run):
        part = points[start : start + run]
        values = [y for _, y in part if y is not None]
        thin.append((sum(x for x, _ in part) / len(part), sum(values) / len(values) if values else None))
    return thin


def moving_average(points: Sequence[Point]) -> list[Point] | None:
    """Centred mean over a twelfth of the points, over fewer at the ends; None for fewer than 24 points."""
    if len(points) < 24:
        return None
    half = max(1, len(points) // 24)
    smooth: list[Point] = []
    for index, (x, _) in enumerate(points):
        values = [y for _, y in points[max(0, index - half) : index + half + 1] if y is not None]
        smooth.append((x, sum(values) / len(values) if values else None))
    return smooth


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
) -> str:
    parts = []
    for tick in y_ticks:
        y = _y(tick, y_range)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_text(tick, y_ticks)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            text = tick_text(tick, x_ticks)
            parts.append(f'<text class="tick mid" x="{_x(tick, x_range):.1f}" y="{HEIGHT - BOTTOM + 14}">{text}</text>')
    parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{escape(x_label)}</text>')
    return "".join(parts)


def _x(value: float, span: tuple[float, float]) -> float:
    return LEFT + (value - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)


def _y(value: float, span: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (value - span[0]) / (span[1] - span[0]) * (HEIGHT - TOP - BOTTOM)


def _path(points: Sequence[Point], x_range: tuple[float, float], y_range: tuple[float, float], css: str) -> str:
    """A path with a gap where a value is missing; a value alone between gaps is a dot."""
    commands, previous = [], None
    for x, y in points:
        if y is not None:
            commands.append(f"{'L' if previous is not None else 'M'}{_x(x, x_range):.1f} {_y(y, y_range):.1f}")
            if previous is None:
                commands.append("h0.01")
        previous = y
    return f'<path class="{css}" d="{"".join(commands)}"/>'


def _whisker(
    place: Callable[[float], float], value: tuple[float, float, float], y: float, colour: str, label: str, name: str
) -> str:
    middle, low, high = value
    words = escape(f"{label}, {name}: {middle:.3f} [{low:.3f}, {high:.3f}]" if name else f"{label}: {middle:.3f}")
    return (
        f'<g><title>{words}</title><line class="whisker {colour}" x1="{place(low):.1f}" x2="{place(high):.1f}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/><circle class="dot {colour}" cx="{place(middle):.1f}" cy="{y:.1f}" r="3.6"/></g>'
    )


def _svg(height: int, title: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{content}</svg>'


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = (f'<span><i class="k{i % NUM_COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def _figure(title: str, note: str, legend: str, svg: str) -> str:
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{svg}{words}</figure>"
