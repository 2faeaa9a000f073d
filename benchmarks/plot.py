"""The plots, as SVG written by hand: one file each, good in light and dark, without libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median
from typing import Any

import report

WIDTH = 830  # pixels: that of a README
_GAP = 14  # between two labels

_STYLE = """
svg { --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0; --ground: #ffffff;
  --ours: #0a7d3c; --peer0: #b35900; --peer1: #8250df; --peer2: #cf222e; --peer3: #0969da; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #f0f6fc; --quiet: #9198a1; --line: #30373e; --ground: #0d1117;
    --ours: #3fd07a; --peer0: #f0973d; --peer1: #bb96ff; --peer2: #ff7b72; --peer3: #58a6ff; } }
.whisker { stroke-width: 1.5; }
text { font: 11.5px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--quiet); }
.title { font-size: 13.5px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--quiet); stroke-width: 1; }
.leader { stroke-width: 1; stroke-dasharray: 1 3; fill: none; }
.curve { stroke-width: 1.75; fill: none; stroke-linejoin: round; }
.ours { stroke-width: 2.75; }
.label { font-size: 11.5px; }
.bold { font-weight: 600; }
"""


@dataclass
class Curve:
    label: str
    color: str  # of a variable in the style
    points: list[tuple[float, float]]
    ours: bool = False
    dash: str = ""
    ranges: list[tuple[float, float, float]] = field(default_factory=list)  # x, lowest, highest


@dataclass
class Panel:
    """One diagram: a title, two axes, curves, and the name of each at its end."""

    title: str
    note: str
    curves: list[Curve]
    x_ticks: Sequence[float]
    y_format: Callable[[float], str]
    x_format: Callable[[float], str]
    x_name: str
    log: bool = True
    floor: float = 0.0  # least that is shown; what is below is drawn there
    left: float = 0
    top: float = 0
    width: float = WIDTH / 2
    height: float = 300
    names: float = 158  # space for the labels

    def draw(self) -> Iterable[str]:
        left, right = self.left + 50, self.left + self.width - self.names
        top, bottom = self.top + 54, self.top + self.height - 30
        values = [y for c in self.curves for y in self._ys(c)]
        ticks = _decades(values) if self.log else _round_steps(values)
        ends = _around(values) if self.log else ticks
        scale = math.log10 if self.log else float
        x_of = _scale(self.x_ticks, left, right, scale)
        y_of = _scale(ends, bottom, top, scale)
        yield f'<text class="title" x="{self.left + 16}" y="{self.top + 22}">{self.title}</text>'
        yield f'<text x="{self.left + 16}" y="{self.top + 38}">{self.note}</text>'
        for y in ticks:
            yield _line("grid", left, y_of(y), right, y_of(y))
            yield _text(self.y_format(y), left - 7, y_of(y) + 4, "end")
        yield _line("axis", left, bottom, right, bottom)
        yield _text(self.x_name, right + 14, bottom + 17, "start")
        for x in self.x_ticks:
            yield _line("axis", x_of(x), bottom, x_of(x), bottom + 4)
            yield _text(self.x_format(x), x_of(x), bottom + 17, "middle")
        for curve in self.curves:
            yield from self._curve(curve, x_of, y_of)
        yield from self._labels(right, top, bottom, x_of, y_of)

    def _ys(self, curve: Curve) -> list[float]:
        ys = [y for _, y in curve.points] + [y for _, *range_ in curve.ranges for y in range_]
        return [max(self.floor, y) for y in ys]

    def _curve(
        self, curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float]
    ) -> Iterable[str]:
        style = f'stroke="var(--{curve.color})"'
        for x, low, high in curve.ranges:
            a, b = y_of(max(self.floor, low)), y_of(max(self.floor, high))
            yield _line("whisker", x_of(x), a, x_of(x), b, style + ' opacity="0.45"')
        path = " ".join(
            f"{x_of(x):.1f},{y_of(max(self.floor, y)):.1f}" for x, y in curve.points
        )
        kind = "curve ours" if curve.ours else "curve"
        dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        yield f'<polyline class="{kind}" points="{path}" {style}{dash}/>'
        if len(curve.points) < 20:
            for x, y in curve.points:
                yield (
                    f'<circle cx="{x_of(x):.1f}" cy="{y_of(max(self.floor, y)):.1f}" '
                    f'r="{3 if curve.ours else 2.5}" fill="var(--{curve.color})"/>'
                )

    def _labels(
        self,
        right: float,
        top: float,
        bottom: float,
        x_of: Callable[[float], float],
        y_of: Callable[[float], float],
    ) -> Iterable[str]:
        """Name each curve at its end, moved up or down where names would meet."""
        named = sorted(
            ((y_of(max(self.floor, c.points[-1][1])), c) for c in self.curves if c.label),
            key=lambda pair: pair[0],
        )
        places = _apart([y for y, _ in named], top - 4, bottom)
        for (y, curve), place in zip(named, places, strict=True):
            x = x_of(curve.points[-1][0])
            color = f"var(--{curve.color})"
            if right - x > 2 or abs(place - y) > 2:
                style = f'stroke="{color}"'
                yield _line("leader", x + 5, y, right + 3, y, style)
                yield _line("leader", right + 3, y, right + 11, place, style)
            yield _text(
                curve.label,
                right + 14,
                place + 4,
                "start",
                f'class="label{" bold" if curve.ours else ""}" style="fill:{color}"',
            )


def _apart(wanted: list[float], top: float, bottom: float) -> list[float]:
    """Return places for labels, in order, at least a line apart, each near where it should be."""
    places = list(wanted)
    for _ in range(500):
        for i in range(len(places) - 1):
            lack = _GAP - (places[i + 1] - places[i])
            if lack > 0:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
        places = [min(max(y, top), bottom) for y in places]
    return places


def _around(values: list[float]) -> list[float]:
    """Return what a logarithmic axis has to hold: a little more than the values."""
    return [min(values) / 1.4, max(values) * 1.4]


def _decades(values: list[float]) -> list[float]:
    low, high = _around(values)
    return [10.0**i for i in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def _round_steps(values: list[float]) -> list[float]:
    """Return four or five round numbers from 0 to above all values."""
    step = 10 ** math.floor(math.log10(max(values) or 1))
    for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5):
        if max(values) / (step * part) <= 4:
            step *= part
            break
    return [i * step for i in range(math.ceil(max(values) / step) + 1)]


def _scale(
    ticks: Sequence[float], begin: float, end: float, scale: Callable[[float], float]
) -> Callable[[float], float]:
    low, high = scale(ticks[0]), scale(ticks[-1])
    return lambda value: begin + (scale(value) - low) / ((high - low) or 1) * (end - begin)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" {style}/>'


def _text(text: str, x: float, y: float, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


def _svg(title: str, panels: list[Panel], height: float) -> str:
    parts = [line for panel in panels for line in panel.draw()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            # Its own ground: the page may be dark where the system is light.
            f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="var(--ground)"/>',
            *parts,
            "</svg>\n",
        ]
    )


def results(data: dict[str, Any]) -> str:
    """Draw deliveries, latency, memory and threads against the number of subscribers."""
    sizes = [float(n) for n in report.sizes(data)]
    offered = f"{data['offered']:,}"

    def panel(title: str, note: str, figure: report.Figure, **options: Any) -> Panel:
        curves = _curves(data, figure)
        return Panel(title, note, curves, sizes, _short, _short, "subscribers", **options)

    panels = [
        panel(
            "Deliveries per second",
            "as fast as it goes, more is better",
            lambda run: run["capacity"]["per_second"],
        ),
        panel(
            "Latency, 99th percentile",
            f"ms, at {offered} deliveries per second, less is better",
            lambda run: run["paced"]["p99"] * 1000,
        ),
        panel(
            "Memory per subscriber",
            "KiB, less is better",
            lambda run: run["memory"] / 1024,
            floor=0.1,
        ),
        panel("Threads", "in all processes of the server", lambda run: run["threads"]),
    ]
    for i, each in enumerate(panels):
        each.left, each.top = i % 2 * WIDTH / 2, i // 2 * 310
    return _svg("Servers of server-sent events, against subscribers", panels, 625)


_DASHES = {"sync": "", "gthread": "7 3", "gevent": "2 3"}


def _curves(data: dict[str, Any], figure: report.Figure) -> list[Curve]:
    curves = []
    cells = report.cells(data)
    peers = 0
    for server in data["servers"]:
        points, ranges = [], []
        for n in report.sizes(data):
            if values := [figure(run) for run in cells.get((server["name"], n), ())]:
                points.append((float(n), median(values)))
                ranges.append((float(n), min(values), max(values)))
        color = "ours" if server["ours"] else f"peer{peers}"
        peers += not server["ours"]
        # The server that each peer is always run under goes without saying.
        label = server["name"] if server["app"] in ("blog_post", "sse_bouncer") else (
            server["name"].partition(",")[0]
        )
        if points:
            dash = _DASHES[server["runner"]] if server["ours"] else ""
            curves.append(Curve(label, color, points, server["ours"], dash, ranges))
    return curves


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def soak(data: dict[str, Any]) -> str:
    """Draw what has to stay flat against time."""
    samples = data["samples"]
    minutes = _round_steps([s["minute"] for s in samples])

    def curve(label: str, color: str, key: str, factor: float = 1.0) -> Curve:
        return Curve(label, color, [(s["minute"], s[key] * factor) for s in samples])

    def panel(title: str, note: str, *curves: Curve) -> Panel:
        return Panel(
            title,
            note,
            list(curves),
            minutes,
            _short,
            _short,
            "minutes",
            log=False,
            height=210,
            names=100,
        )

    panels = [
        panel("Memory", "MiB", curve("process tree", "ours", "memory", 2**-20)),
        panel(
            "Latency",
            "ms",
            curve("p99", "peer0", "p99", 1000),
            curve("median", "ours", "p50", 1000),
        ),
        panel(
            "Descriptors",
            "as many as subscribers, and a few",
            curve("descriptors", "ours", "descriptors"),
        ),
        panel("Threads", "in all processes", curve("threads", "ours", "threads")),
    ]
    for i, each in enumerate(panels):
        each.left, each.top = i % 2 * WIDTH / 2, i // 2 * 215
    return _svg("Soak: memory, latency, descriptors and threads against time", panels, 440)
