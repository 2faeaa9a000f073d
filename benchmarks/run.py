"""Compare sse_bouncer with what else a Flask developer might take; see README.md beside this file.

    .venv/bin/python benchmarks/run.py            # everything, about half an hour
    .venv/bin/python benchmarks/run.py --quick    # a minute or two: does it work here?
    .venv/bin/python benchmarks/run.py --soak 10  # ten thousand subscribers for ten minutes
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import plot
import report
import soak
from client import Client, Failed
from servers import BASELINE, HERE, SERVERS, Server, running

AHEAD = 8  # events that the publisher may be ahead of the slowest subscriber
OFFERED = 10_000  # deliveries a second, in the paced mode
BURST = 100  # events that a route broadcasts in a loop
QUIET = 20.0  # seconds to wait for a machine that is busy with something else
CONNECTING = 90.0  # seconds that all subscribers may take to connect


class Progress:
    """One line that is written over, and above it a line for each run that is done."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._begin = time.monotonic()
        self._doing = ""

    def begin(self, doing: str) -> None:
        self._count += 1
        self._doing = doing
        self.say("starting")

    def say(self, what: str) -> None:
        if sys.stderr.isatty():
            minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
            line = f"{minutes}:{seconds:02} [{self._count}/{self._total}] {self._doing}: {what}"
            sys.stderr.write(f"\r\x1b[K{line:.100}")
            sys.stderr.flush()

    def done(self, result: str) -> None:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        count = f"[{self._count}/{self._total}]"
        print(f"{clear}{count:>9} {self._doing:34} {result}", file=sys.stderr, flush=True)


def measure(
    server: Server, n: int, seconds: float, cores: tuple[int | None, int | None], tell: Progress
) -> dict[str, Any]:
    """Start a server, connect ``n`` subscribers, and measure all modes."""
    with running(server, n, cores[0]) as it:
        client = Client(it.port, tell.say)
        try:
            client.connect(1, 20)  # by now all is loaded that is loaded on first use
            empty = machine.usage(it.processes)
            client.connect(n, CONNECTING)
            full = machine.usage(it.processes)
            bystanders = machine.Bystanders(cores)
            cpu = time.process_time()
            tell.say("capacity")
            capacity = client.capacity(seconds, AHEAD)
            after = machine.usage(it.processes)
            tell.say("paced")
            paced = client.paced(seconds, OFFERED / n)
            end = machine.usage(it.processes)
            cpu = time.process_time() - cpu
            bystanders_share = bystanders.share(cpu + end.cpu - full.cpu)
            tell.say("burst")  # the last: not every server has all its subscribers afterwards
            burst = client.burst(BURST)
            return {
                "capacity": asdict(capacity),
                "paced": asdict(paced),
                "burst": burst,
                "server_cost": (after.cpu - full.cpu) / capacity.deliveries,
                "memory": (full.memory - empty.memory) / (n - 1),
                "threads": full.threads,
                "descriptors": full.descriptors,
                "bystanders": bystanders_share,
            }
        finally:
            client.close()


def attempt(
    server: Server, n: int, seconds: float, cores: tuple[int | None, int | None], tell: Progress
) -> dict[str, Any]:
    tell.begin(f"{server.name}, {n:,}")
    result: dict[str, Any] = {}
    for _ in range(2):  # once more, if other processes have disturbed it
        machine.Bystanders(cores).wait(QUIET)
        try:
            result = measure(server, n, seconds, cores, tell)
        except (Failed, OSError, RuntimeError) as error:
            result = {"failed": str(error)}
        tell.done(report.one_line(result))
        if result.get("bystanders", 0.0) < machine.DISTURBED:
            break
    return result


def plan(
    servers: list[Server], sizes: list[int], descriptors: int
) -> tuple[list[tuple[Server, int]], list[dict[str, Any]]]:
    """Return what to run, in the order of one repeat, and what to leave out, with the reason."""
    runs, skipped = [], []
    for n in sizes:
        for server in servers:
            most, why = server.limit(descriptors)
            if n <= most:
                runs.append((server, n))
            else:
                skipped.append({"server": server.name, "n": n, "why": why})
    return runs, skipped


def compare(options: argparse.Namespace, descriptors: int, out: Path) -> None:
    servers = [s for s in SERVERS if s.name == BASELINE or options.only in s.name]
    runs, skipped = plan(servers, options.sizes, descriptors)
    for line in report.reasons(skipped, "why"):
        print(f"leaving out {line}", file=sys.stderr)
    found = out / "results.json"
    data: dict[str, Any] = {"runs": []}
    if options.add:
        data = json.loads(found.read_text())
    skipped += [entry for entry in data.get("skipped", []) if entry not in skipped]
    data |= {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "descriptors": descriptors,
        "offered": OFFERED,
        "ahead": AHEAD,
        "burst": BURST,
        "seconds": options.seconds,
        "servers": [asdict(s) for s in servers],
        "skipped": skipped,
    }
    cores = pin()
    tell = Progress(len(runs) * options.repeats)
    first = max((run["repeat"] for run in data["runs"]), default=-1) + 1
    failed: set[tuple[str, int]] = set()
    for repeat in range(first, first + options.repeats):
        # There and back again: what warms up or fills up in the course of a repeat favours nobody.
        for server, n in runs if repeat % 2 == 0 else backwards(runs):
            if (server.name, n) in failed:
                continue  # it would take its whole time to connect again
            result = attempt(server, n, options.seconds, cores, tell)
            if "failed" in result:
                failed.add((server.name, n))
            data["runs"].append({"server": server.name, "n": n, "repeat": repeat, **result})
            found.write_text(json.dumps(data, indent=1) + "\n")
    publish(data, out)


def backwards(runs: list[tuple[Server, int]]) -> Iterator[tuple[Server, int]]:
    sizes = dict.fromkeys(n for _, n in runs)
    return ((server, n) for n in sizes for server, m in reversed(runs) if m == n)


def pin() -> tuple[int | None, int | None]:
    """Put this process, which is the client, on a core of its own; return the server's and it."""
    cores = machine.cores()
    if cores[1] is not None and sys.platform == "linux":
        os.sched_setaffinity(0, {cores[1]})
    return cores


def publish(data: dict[str, Any], out: Path) -> None:
    """Print the table of ratios, and write everything else."""
    (out / "results.svg").write_text(plot.results(data))
    report.put(out / "README.md", "results", report.page(data))
    print("\nDeliveries per second\n\n" + report.ratios(data))
    print(f"\nall figures: {out}/results.json, plot: {out}/results.svg")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small and short; results go to a temporary folder")
    add("--soak", type=float, metavar="MINUTES", help="one server, all subscribers, churn")
    add("--sizes", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N,...")
    add("--seconds", type=float, default=4.0, help="how long to publish in each mode (4)")
    add("--repeats", type=int, default=3, help="of everything (3)")
    add("--only", default="", metavar="NAME", help="only servers so named, and the baseline")
    add("--add", action="store_true", help="add repeats to the results that are there")
    add("--draw", action="store_true", help="tables and plots from the results that are there")
    add("--out", type=Path, metavar="FOLDER", help="where to write results (beside this file)")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.repeats = 1.0, 1
    options.sizes = options.sizes or ([50, 200] if options.quick else [100, 1000, 5000, 10_000])
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of each finally
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if options.quick else HERE)
    descriptors = machine.raise_descriptor_limit()
    if options.draw:
        for name, draw in (("results.json", publish), ("soak.json", soak.publish)):
            if (out / name).exists():
                draw(json.loads((out / name).read_text()), out)
    elif options.soak:
        soak.run(options.soak, min(10_000, descriptors - 200), pin(), out)
    else:
        compare(options, descriptors, out)


if __name__ == "__main__":
    main()
