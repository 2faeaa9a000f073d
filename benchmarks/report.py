"""Tables, in Markdown, from what run.py has measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from machine import DISTURBED
from servers import BASELINE

Run = dict[str, Any]
Figure = Callable[[Run], float]

# From this share of its core on, the client may be what limits the deliveries.
CLIENT_LIMIT = 0.8


def cells(data: Run) -> dict[tuple[str, int], list[Run]]:
    """Return the runs that ended well, by server and number of subscribers, in order.

    Those that were disturbed count only where there is no other.
    """
    found: dict[tuple[str, int], list[Run]] = {
        (server["name"], n): [] for n in sizes(data) for server in data["servers"]
    }
    for run in data["runs"]:
        if "failed" not in run:
            found[run["server"], run["n"]].append(run)
    return {
        cell: [run for run in runs if run["bystanders"] < DISTURBED] or runs
        for cell, runs in found.items()
        if runs
    }


def sizes(data: Run) -> list[int]:
    return sorted({run["n"] for run in data["runs"]})


def lost(run: Run) -> float:
    """Return the share of deliveries that are missing or wrong."""
    modes = run["capacity"], run["paced"]
    bad = sum(mode["lost"] + mode["strange"] for mode in modes)
    return float(bad / sum(mode["deliveries"] + mode["lost"] for mode in modes))


def client_limits(runs: list[Run]) -> bool:
    return bool(median(run["capacity"]["client_cpu"] for run in runs) >= CLIENT_LIMIT)


def reasons(entries: list[Run], why: str) -> list[str]:
    """Return a line for each reason that there is no result."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for entry in entries:
        if why in entry:
            found.setdefault((entry["server"], entry[why]), {})[f"{entry['n']:,}"] = None
    return [f"{name} with {' or '.join(ns)}: {why}" for (name, why), ns in found.items()]


def one_line(run: Run) -> str:
    if "failed" in run:
        return f"failed: {run['failed']}"
    capacity, paced = run["capacity"], run["paced"]
    text = f"{capacity['per_second']:>9,.0f}/s, p99 {paced['p99'] * 1000:,.1f} ms"
    if lost(run):
        text += f", LOST {lost(run):.2%}"
    if run["burst"] < 1:
        text += f", of a burst {run['burst']:.0%} arrived"
    if run["bystanders"] > DISTURBED:
        text += f" (others took {run['bystanders']:.0%} of the cores)"
    return text


def ratios(data: Run) -> str:
    """Deliveries a second as multiples of the baseline's in the same repeat."""
    columns = sizes(data)
    lines = [
        f"| × {BASELINE} | " + " | ".join(f"N = {n:,}" for n in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for server in data["servers"]:
        row = [_ratio(data, server["name"], n) for n in columns]
        lines.append(f"| {_strong(server)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _ratio(data: Run, name: str, n: int) -> str:
    found = cells(data)
    if (name, n) not in found:
        return "failed" if any(r["server"] == name and r["n"] == n for r in data["runs"]) else "–"
    runs = found[name, n]
    if any(map(lost, runs)):
        return f"**lost {max(map(lost, runs)):.2%}**"
    pairs = [
        (run, base)
        for run in data["runs"]
        for base in data["runs"]
        if (run["server"], base["server"]) == (name, BASELINE)
        and (run["n"], base["n"], run["repeat"]) == (n, n, base["repeat"])
        and "failed" not in run | base
    ]
    quiet = [pair for pair in pairs if all(run["bystanders"] < DISTURBED for run in pair)]
    values = [
        run["capacity"]["per_second"] / base["capacity"]["per_second"]
        for run, base in quiet or pairs
    ]
    if not values:
        return "–"
    text = ("≥ " if client_limits(runs) else "") + f"{median(values):.2f}"
    if len(values) > 1 and name != BASELINE:
        text += f" ({min(values):.2f}–{max(values):.2f})"
    return text


def _strong(server: Run) -> str:
    return f"**{server['name']}**" if server["ours"] else str(server["name"])


def _figures(data: Run) -> str:
    """Everything, in absolute numbers: medians, and for the two main ones the range."""
    lines = [
        "| server | N | deliveries/s | server µs | client µs | client CPU | p50 ms | p99 ms |"
        " KiB each | threads | lost | of a burst |",
        "| --- |" + " ---: |" * 11,
    ]
    names = {server["name"]: _strong(server) for server in data["servers"]}
    for (name, n), runs in cells(data).items():
        row = [
            names[name],
            f"{n:,}",
            ("≥ " if client_limits(runs) else "")
            + _middle(runs, lambda r: r["capacity"]["per_second"], spread=True),
            _middle(runs, lambda r: r["server_cost"] * 1e6),
            _middle(runs, lambda r: r["capacity"]["client_cost"] * 1e6),
            f"{median(r['capacity']['client_cpu'] for r in runs):.0%}",
            _middle(runs, lambda r: r["paced"]["p50"] * 1e3),
            _middle(runs, lambda r: r["paced"]["p99"] * 1e3, spread=True),
            _middle(runs, lambda r: max(0.1, r["memory"] / 1024)),
            _middle(runs, lambda r: r["threads"]),
            f"{max(map(lost, runs)):.2%}" if any(map(lost, runs)) else "0",
            f"{min(run['burst'] for run in runs):.0%}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _middle(runs: list[Run], figure: Figure, spread: bool = False) -> str:
    values = [figure(run) for run in runs]
    text = number(median(values))
    if spread and len(values) > 1:
        text += f" ({number(min(values))}–{number(max(values))})"
    return text


def number(value: float) -> str:
    """Format with three significant digits, or whole."""
    if abs(value) >= 99.5:
        return f"{value:,.0f}"
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"


def page(data: Run) -> str:
    """Everything that is generated in the benchmark's page."""
    repeats = len({run["repeat"] for run in data["runs"]})
    disturbed = sum(run.get("bystanders", 0) >= DISTURBED for run in data["runs"])
    software = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    absent = reasons(data["skipped"], "why") + reasons(data["runs"], "failed")
    notes = [f"- {line}." for line in absent]
    return "\n".join(
        [
            ratios(data),
            "",
            f"Machine: {data['machine']}; {data['descriptors']:,} open files per process. "
            f"{software}. Up to {repeats} repeats of {data['seconds']:g} seconds in each mode. "
            f"In {disturbed} of {len(data['runs'])} runs other processes took more than "
            f"{DISTURBED:.0%} of the two cores; they count only where there is no other run.",
            "",
            *(["No result:", "", *notes, ""] if notes else []),
            "All figures, as medians and, in parentheses, the lowest and the highest:",
            "",
            _figures(data),
        ]
    )


def put(path: Path, name: str, text: str) -> None:
    """Replace what is between the two marks of this name in a page, if there is such a page."""
    if path.exists():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        old = path.read_text()
        path.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))
