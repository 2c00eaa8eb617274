"""The HTML page of a report: one self-contained file without scripts, readable on a light and on a dark screen.

Owns: the style sheet, tables, sections and the page around them; every text that comes in is escaped here or by the
caller, as each function says. Does not own: what is shown (report.py) and how charts are drawn (charts.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5c6775; --rule: #dfe4ea; --page: #f5f7f9; --card: #fff;
  --warn: #8a4b00; --warn-back: #fff4e0; --c0: #0b6bb8; --c1: #d0561c; --c2: #0f8a63; --c3: #b3539c; --c4: #b98900;
  --c5: #4b5aa8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e9ef; --soft: #9aa6b4; --rule: #343d49; --page: #14191f;
  --card: #1c232b; --warn: #ffc877; --warn-back: #33260f; --c0: #5fb2f2; --c1: #ff9460; --c2: #4ccfa3; --c3: #e292ce;
  --c4: #ecc24a; --c5: #9fabf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 38px 0 10px; }
p { margin: 6px 0 12px; max-width: 75ch; } .soft, .note, .missing { color: var(--soft); }
.missing { font-style: italic; } .note { font-size: 13px; margin: 4px 0 0; }
.warning { background: var(--warn-back); color: var(--warn); border-left: 4px solid currentColor; padding: 10px 14px;
  margin: 16px 0; border-radius: 4px; max-width: none; }
.cards, .charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.card, figure, .table, details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card { padding: 12px 16px; } .card .big { font-size: 25px; font-weight: 650; white-space: nowrap; }
.card .big small { color: var(--soft); font-weight: 400; font-size: 17px; } .card .name { color: var(--soft); }
.card .under { font-size: 13px; color: var(--soft); }
figure { margin: 0; padding: 12px 14px; } figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .end, svg .label { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .label { fill: var(--text); font-size: 12px; }
svg .grid { stroke: var(--rule); } svg .zero { stroke: var(--text); } svg .bar { fill: var(--c0); }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { stroke-width: 1; opacity: .35; } svg .whisker { stroke-width: 2; opacity: .65; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
svg .dot.c0 { fill: var(--c0); } svg .dot.c1 { fill: var(--c1); } svg .dot.c2 { fill: var(--c2); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); margin-bottom: 4px; }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin: 0 6px 4px 0; }
.legend .k0 { background: var(--c0); } .legend .k1 { background: var(--c1); } .legend .k2 { background: var(--c2); }
.legend .k3 { background: var(--c3); } .legend .k4 { background: var(--c4); } .legend .k5 { background: var(--c5); }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-top: 0; } th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); } td.tall small { display: block; }
td.up { color: var(--c2); } td.down { color: var(--c1); }
details { margin: 10px 0; padding: 8px 14px; } summary { cursor: pointer; font-weight: 600; }
section > .charts + .charts { margin-top: 14px; }
details .charts { margin-top: 10px; } details figure { border: 0; padding: 4px; }
pre { overflow-x: auto; font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 8px 0; }
.sample { padding: 8px 0 4px 12px; margin: 10px 0 0; border-left: 3px solid var(--rule); }
.sample b { font-weight: 600; } .sample .tag { color: var(--c5); } .sample p { margin: 2px 0; max-width: none; }
"""


def page(title: str, body: str) -> str:
    """A whole document; `title` is escaped, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, body: str, missing: str) -> str:
    """A heading and `body` (HTML); where that is empty, a line that says what is `missing`."""
    return f"<section><h2>{escape(title)}</h2>\n{body or missing_line(missing)}\n</section>"


def missing_line(text: str) -> str:
    """A line in place of what is not there."""
    return f'<p class="missing">{escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; header texts are escaped, cells are whole `cell(...)` elements. Empty without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(text: str, small: str = "", css: str = "") -> str:
    """A table cell with a smaller addition; texts are escaped."""
    addition = f" <small>{escape(small)}</small>" if small else ""
    return f"<td{f' class={css!r}' if css else ''}>{escape(text)}{addition}</td>"


def card(name: str, big: str, before: str = "", under: str = "") -> str:
    """One number in large letters, with what it was before; texts are escaped."""
    first = f"<small>{escape(before)} → </small>" if before else ""
    return (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="big">{first}{escape(big)}</div>'
        f'<div class="under">{escape(under)}</div></div>'
    )


def details(summary: str, body: str, unfolded: bool = False) -> str:
    """Something to fold and unfold; `summary` is escaped, `body` is HTML. Empty without body."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>{body}</details>" if body else ""
