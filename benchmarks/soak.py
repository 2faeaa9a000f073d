"""As many subscribers as the system allows on one process, for minutes, while they come and go.

What must stay flat is memory, descriptors, threads and latency, and at the end, when all have
left, the process must be what it was at the beginning.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import machine
import plot
import report
from client import Client
from servers import SERVERS, running

SERVER = next(s for s in SERVERS if s.ours and s.runner == "gthread")
EVENTS = 1.0  # a second
CHURN = 0.01  # share of the subscribers that leave, and are replaced, in a second
STEP = 0.1  # seconds between two portions of those
SAMPLE = 5.0  # seconds


def run(minutes: float, n: int, cores: tuple[int | None, int | None], out: Path) -> None:
    samples: list[dict[str, Any]] = []
    with running(SERVER, n, cores[0]) as it:
        client = Client(it.port)
        try:
            client.connect(1, 20)
            before = machine.usage(it.processes)
            client.connect(n, 120)
            _soak(client, it.processes, minutes * 60, int(n * CHURN * STEP), samples)
            strange, closed, behind = client.strange, client.closed, client.behind
        finally:
            client.close()
        time.sleep(2)
        after = machine.usage(it.processes)
    data = {
        "machine": machine.describe(),
        "server": SERVER.name,
        "subscribers": n,
        "minutes": round(minutes, 1),
        "events": EVENTS,
        "churn": CHURN,
        "strange": strange,
        "closed": closed,
        "behind": behind,
        "before": vars(before),
        "after": vars(after),
        "samples": samples,
    }
    (out / "soak.json").write_text(json.dumps(data, indent=1) + "\n")
    publish(data, out)


def publish(data: dict[str, Any], out: Path) -> None:
    (out / "soak.svg").write_text(plot.soak(data))
    report.put(out / "README.md", "soak", page(data))
    print("\n" + page(data))


def _soak(
    client: Client,
    processes: list[int],
    seconds: float,
    portion: int,
    samples: list[dict[str, Any]],
) -> None:
    """Publish, let subscribers leave and come, and look at the server every few seconds."""
    begin = time.monotonic()
    event_at = churn_at = begin
    sample_at, seen, joined = begin + SAMPLE, len(client.stamps), 0
    cpu = machine.usage(processes).cpu
    while (now := time.monotonic()) < begin + seconds:
        if now >= sample_at:
            use = machine.usage(processes)
            newest = len(client.stamps) - 1  # which may be under way
            samples.append(
                {
                    "minute": (now - begin) / 60,
                    "subscribers": client.size,
                    "joined": joined,
                    "memory": use.memory,
                    "descriptors": use.descriptors,
                    "threads": use.threads,
                    "cpu": (use.cpu - cpu) / SAMPLE,
                    **_latencies(client, seen, newest),
                }
            )
            _show(samples[-1], seconds)
            cpu, seen = use.cpu, newest
            sample_at += SAMPLE
        if now >= event_at and client.idle:
            client.publish(event_at)
            event_at += 1 / EVENTS
        if now >= churn_at:
            client.churn(portion)
            joined += portion
            churn_at += STEP
        client.turn(max(0.0, min(event_at, churn_at, sample_at) - time.monotonic()))
    client.drain()
    # Those that have just come get one more event, so that nobody's stream ends unchecked.
    client.publish(time.monotonic())
    client.drain()


def _latencies(client: Client, first: int, end: int) -> dict[str, float]:
    values = sorted(
        at - client.stamps[number] for number in range(first, end) for at in client.arrivals[number]
    )
    for number in range(first, end):
        client.arrivals[number] = array("d")  # ten minutes of them would be a lot
    if not values:
        return {"p50": 0.0, "p99": 0.0}
    return {"p50": values[len(values) // 2], "p99": values[int(len(values) * 0.99)]}


def _show(sample: dict[str, Any], seconds: float) -> None:
    print(
        f"{sample['minute']:5.1f} of {seconds / 60:g} min: {sample['subscribers']:,} subscribers, "
        f"{sample['memory'] / 2**20:.1f} MiB, {sample['descriptors']:,} descriptors, "
        f"{sample['threads']} threads, p99 {sample['p99'] * 1000:.0f} ms",
        file=sys.stderr,
        flush=True,
    )


def page(data: dict[str, Any]) -> str:
    samples = data["samples"]
    # Ten rows, the first and the last sample among them.
    picked = sorted({round(i * (len(samples) - 1) / 9) for i in range(10)})
    lines = [
        f"{data['subscribers']:,} subscribers of {data['server']}, in one process, for "
        f"{data['minutes']:g} minutes; {data['events']:g} event a second, and {data['churn']:.0%} "
        f"of the subscribers replaced every second, every other one by a reset: "
        f"{samples[-1]['joined']:,} came and left. {data['machine']}.",
        "",
        f"Bytes that were not those due: {data['strange']}. Streams that the server ended: "
        f"{data['closed']}. Subscribers without the last event at the end: {data['behind']}.",
        "",
        "| minute | subscribers | memory, MiB | descriptors | threads | CPU | p50 ms | p99 ms |",
        "| ---: |" + " ---: |" * 7,
        _row("before", 1, data["before"]),
    ]
    lines += [
        _row(f"{s['minute']:.1f}", s["subscribers"], s)
        + f" {s['cpu']:.0%} | {s['p50'] * 1000:.0f} | {s['p99'] * 1000:.0f} |"
        for s in (samples[i] for i in picked)
    ]
    lines.append(_row("after", 0, data["after"]))
    return "\n".join(line if line.count("|") != 6 else line + " | | |" for line in lines)


def _row(when: str, subscribers: int, use: dict[str, Any]) -> str:
    return (
        f"| {when} | {subscribers:,} | {use['memory'] / 2**20:.1f} | {use['descriptors']:,} |"
        f" {use['threads']} |"
    )
