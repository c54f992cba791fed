"""Self-contained HTML pages: tables, charts as SVG, and embedded pictures, so that a browser loads nothing else.

Charts are drawn by hand because a run writes its page wherever it trains: that must not need a plotting library, or the seconds
that it takes. All given texts are escaped here.
"""
from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Table = list[list[str]]  # the first line is the header
Point = tuple[float, float]

#: Distinguishable for most eyes, also from black.
COLORS = ("#1769c4", "#e0700f", "#2a9950", "#c22f4e", "#7d50b5", "#8a6a3f", "#d35bb0", "#64748b", "#a09a1a", "#1ba3b5")
MOST_POINTS = 300  # per line; more are averaged
DOTTED = 30  # up to this many points are drawn as dots too
LEFT, RIGHT, TOP, BOTTOM = 46, 24, 8, 34  # px around the plot; on the right, room for half a step number


@dataclass(frozen=True)
class Line:
    """One line of a chart. Lines of the same name share an entry of the legend, which has the first one's colour."""

    name: str
    points: Sequence[Point]  # by ascending x
    color: int = 0  # place in COLORS, cyclic
    thin: bool = False


def page(title: str, body: Sequence[str]) -> str:
    """A whole page; ``body`` is HTML, ``title`` is text."""
    head = _HEAD.replace("TITLE", html.escape(title))
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *body, "</body></html>", ""])


def section(title: str, *parts: str) -> str:
    """A heading over HTML parts."""
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(lines: Table) -> str:
    """Numbers are right-aligned, the first column left-aligned."""
    rows = []
    for number, (first, *rest) in enumerate(lines):
        tag = "td" if number else "th"
        rows.append(f"<tr><th>{html.escape(first)}</th>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in rest)}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def picture(data: bytes, kind: str, caption: str) -> str:
    """An embedded picture; ``kind`` is "png" or "jpeg"."""
    text = html.escape(caption)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'


def folded(title: str, text: str) -> str:
    """Preformatted text that unfolds when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def charts(parts: Sequence[str]) -> str:
    """Charts side by side, as many as the window has room for."""
    return f'<div class="charts">{"".join(parts)}</div>'


def chart(
    title: str, lines: Sequence[Line], x_label: str = "step", top: float | None = None, right: float | None = None,
    size: tuple[int, int] = (400, 230),
) -> str:
    """A chart whose axes start at 0.

    Args:
        title: of the chart.
        lines: values that are not finite are left out; negative ones lie below 0. With only one name there is no legend.
        top, right: where the axes end; None: at the largest value, or 0.
        size: width and height in px.
    """
    width, height = size
    shown = [(line, _thinned([point for point in line.points if all(map(math.isfinite, point))])) for line in lines]
    values = [(0.0, 0.0), *(point for _, points in shown for point in points)]
    right = right or max(x for x, _ in values) or 1.0
    low, high = min(y for _, y in values), top or max(y for _, y in values)
    steps = _ticks(low, high if high > low else 1.0)
    bottom, top = min(steps[0], low), top or steps[-1]

    def place(x: float, y: float) -> str:
        across = LEFT + x / right * (width - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (top - y) / (top - bottom) * (height - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for y in steps:
        _, down = place(0, y).split(",")
        parts.append(f'<path class="grid" d="M{LEFT} {down}H{width - RIGHT}"/><text x="{LEFT - 6}" '
                     f'y="{float(down) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(0, right):
        if x <= right:
            across, _ = place(x, bottom).split(",")
            parts.append(f'<text x="{across}" y="{height - BOTTOM + 15}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<text x="{(LEFT + width - RIGHT) / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    for line, points in shown:
        color = COLORS[line.color % len(COLORS)]
        name = html.escape(line.name)
        path = " ".join(place(*point) for point in points)
        parts.append(f'<g stroke="{color}" fill="{color}"><title>{name}</title>'
                     f'<polyline points="{path}"{" class=thin" if line.thin else ""} />')
        if len(points) <= DOTTED:
            for point in points:
                across, down = place(*point).split(",")
                parts.append(f'<circle cx="{across}" cy="{down}" r="{1.5 if line.thin else 2.5}"><title>{name}: '
                             f'{point[1]:.4g} at {point[0]:.4g}</title></circle>')
        parts.append("</g>")
    head = f'<div class="chart" style="width:{width}px"><h3>{html.escape(title)}</h3>{_legend(lines)}'
    return f'{head}{"".join(parts)}</svg></div>'


def _legend(lines: Sequence[Line]) -> str:
    first: dict[str, Line] = {}
    for line in lines:
        first.setdefault(line.name, line)
    if len(first) < 2:
        return ""
    entries = [f'<span><i style="background:{COLORS[line.color % len(COLORS)]}"></i>{html.escape(name)}</span>'
               for name, line in first.items()]  # fmt: skip
    return f'<div class="legend">{"".join(entries)}</div>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means over groups of neighbours; the last point stays where it is."""
    if len(points) <= MOST_POINTS:
        return list(points)
    run = math.ceil((len(points) - 1) / (MOST_POINTS - 1))
    parts = [points[start : start + run] for start in range(0, len(points) - 1, run)]
    means = [(math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)) for part in parts]
    return [*means, points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above, about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.10g}"


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
tr:first-child th { border-bottom: 2px solid #222; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem 1.6rem; align-items: flex-end; }
.chart svg { display: block; width: 100%; }
.chart { max-width: 100%; }
.legend { font-size: 12px; line-height: 1.4; }
.legend span { margin-right: .8rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; }
svg text { font-size: 11px; fill: #555; font-variant-numeric: tabular-nums; }
svg .grid { stroke: #e4e4e4; fill: none; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg polyline.thin { stroke-width: 1; opacity: .5; }
figure { margin: 0 0 1.2rem; }
figcaption { color: #555; margin-bottom: .3rem; }
img { max-width: 100%; }
p { color: #555; margin: .4rem 0; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12.5px; }
summary { cursor: pointer; color: #1769c4; }
</style></head><body>"""
