"""The results in one file, and the tables and the plot that are made from it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from servers import BASELINE, SERVERS

DISTURBED = 0.25  # a run is marked if other processes took more of the two cores
# The plot has no background, and colours that are easy to see on white and on black.
INK = "#757c85"
COLORS = ["#c2620c", "#d1365a", "#8c62d9", "#2f81d8", *["#218a3f"] * 3, "#8c62d9", "#218a3f"]


def save(data: dict[str, Any], folder: Path) -> None:
    """Write the results, one line for each run or sample; print and publish what they say."""
    (folder / "results.json").write_text(json.dumps(data).replace('{"', '\n{"').lstrip() + "\n")
    for name, table in ("subscribers", results), ("users", results), ("soak", soak):
        if data.get(name):
            print(f"\n{table(data, name)}")
            if (page := folder / "README.md").exists() and f"<!-- {name} -->" in page.read_text():
                before, begin, rest = page.read_text().partition(f"<!-- {name} -->")
                _, end, after = rest.partition(f"<!-- end of {name} -->")
                page.write_text(f"{before}{begin}\n\n{table(data, name)}\n\n{end}{after}")
    if data.get("subscribers"):
        plot(data["subscribers"], folder / "results.svg")


def number(value: float) -> str:
    """Format with three significant digits, or as a whole number."""
    digits = 0 if value >= 99.5 or value % 1 == 0 else 1 if value >= 9.95 else 2
    return f"{value:,.{digits}f}"


def spread(values: list[float]) -> str:
    ends = f" ({number(min(values))}–{number(max(values))})" if len(values) > 1 else ""
    return number(median(values)) + ends


COLUMNS: dict[str, Callable[[dict[str, list[float]]], str]] = {
    "deliveries/s": lambda c: "≥ " * (median(c["client"]) >= 0.8) + spread(c["rate"]),
    "× baseline": lambda c: spread(c["ratio"]),
    "p99 ms": lambda c: spread(c["p99_ms"]),
    "server µs": lambda c: number(median(c["server_us"])),
    "client CPU": lambda c: f"{median(c['client']):.0%}",
    "KiB each": lambda c: number(max(0.1, median(c["kib"]))),
    "threads": lambda c: number(median(c["threads"])),
    "lost": lambda c: f"{max(c['lost']):.2%}",
    "of a burst": lambda c: f"{min(c['burst']):.0%}",
    "disturbed": lambda c: f"{sum(c['bad'])} of {len(c['bad'])}" + " *" * all(c["bad"]),
}


def cells(runs: list[dict[str, Any]]) -> dict[tuple[str, int], Any]:
    """Return all figures of each server and size, without disturbed runs if there are others."""
    found = {}
    quiet = [run for run in runs if run["others"] <= DISTURBED]
    base = {(r["n"], r["repeat"]): r["rate"] for r in quiet if r["server"] == BASELINE}
    for n in sorted({run["n"] for run in runs}):
        for name in SERVERS:
            mine = [run for run in runs if (run["server"], run["n"]) == (name, n)]
            if used := [run for run in mine if run["others"] <= DISTURBED] or mine:
                cell = {key: [run[key] for run in used] for key in used[0]}
                pairs = [(run["rate"], base.get((n, run["repeat"]))) for run in used]
                cell["ratio"] = [rate / other for rate, other in pairs if other] or [math.nan]
                cell["bad"] = [run["others"] > DISTURBED for run in mine]
                found[name, n] = cell
    return found


def results(data: dict[str, Any], part: str) -> str:
    lines = [data["machine"] + ".", "", f"| server | N | {' | '.join(COLUMNS)} |"]
    lines.append("| --- |" + " ---: |" * (1 + len(COLUMNS)))
    for (name, n), cell in cells(data[part]).items():
        strong = "**" * name.startswith("sse_bouncer")
        row = " | ".join(column(cell) for column in COLUMNS.values())
        lines.append(f"| {strong}{name}{strong} | {n:,} | {row} |")
    missing = [f"- No result for {what}: {why}" for what, why in data["missing"].items()]
    return "\n".join([*lines, "", *(line for line in missing if f" {part}:" in line)]).strip()


def soak(data: dict[str, Any], part: str) -> str:
    lines = [data["about"], "", "| when | subscribers | MiB | descriptors | threads | p99 ms |"]
    lines.append("| --- |" + " ---: |" * 5)
    for row in data[part]:
        figures = row["subscribers"], row["memory"], row["descriptors"], row["threads"]
        lines.append(f"| {row['when']} | {' | '.join(map(number, (*figures, row['p99_ms'])))} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    matplotlib.rcParams |= {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
    matplotlib.rcParams |= {"xtick.color": INK, "ytick.color": INK}
    matplotlib.rc("svg", fonttype="none", hashsalt="-")
    matplotlib.rc("axes", labelcolor=INK, edgecolor=INK, titlecolor=INK, titlelocation="left")
    panels = {
        "rate": ("Deliveries per second: more is better", "deliveries / s"),
        "p99_ms": ("Latency, 99th percentile: less is better", "milliseconds"),
        "kib": ("Memory per subscriber: less is better", "KiB"),
    }
    figure = Figure(figsize=(4, 9), layout="constrained")
    for axes, (key, (title, unit)) in zip(figure.subplots(3), panels.items(), strict=True):
        for name, color, marker in zip(SERVERS, COLORS, "osD^osDvv", strict=True):
            mine = {n: c[key] for (server, n), c in cells(runs).items() if server == name}
            low, mid, high = ([max(0.1, f(ys)) for ys in mine.values()] for f in (min, median, max))
            axes.plot(list(mine), mid, marker + "-", c=color, ms=4, label=name)
            axes.vlines(list(mine), low, high, color)
        axes.set(xscale="log", yscale="log", title=title, xlabel="subscribers", ylabel=unit)
        axes.grid(color=INK, alpha=0.3)
        axes.set_xticks(sorted({run["n"] for run in runs}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
        for axis in axes.xaxis, axes.yaxis:
            axis.set_major_formatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
    servers = axes.get_legend_handles_labels()
    figure.legend(*servers, loc="outside upper left", ncols=2, labelcolor=INK)
    figure.savefig(path, transparent=True)
    print(f"\nplot: {path}")
