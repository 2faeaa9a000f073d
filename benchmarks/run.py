"""Measure sse_bouncer and what else a Flask developer might use; see README.md in this folder."""

import argparse
import gc
import json
import signal
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import report
from client import Client, Users
from numpy import percentile
from servers import HERE, SERVERS, WITH_USERS, busy, machine, prepare, running, usage
from tqdm import tqdm, trange

OFFERED = 10_000  # deliveries a second, in the second part


def compare(options: argparse.Namespace, data: dict[str, Any]) -> None:
    kinds = [("subscribers", Client, name) for name in SERVERS]
    kinds += [("users", Users, name) for name in WITH_USERS]
    kinds = [kind for kind in kinds if options.only in kind[2]]
    plan = list(product(range(options.repeats), options.sizes, kinds))
    data |= {"machine": machine(), "subscribers": [], "users": [], "missing": {}}
    for repeat, n, (part, kind, name) in (bar := tqdm(plan, unit="run")):
        what = f"{name} with {n:,} {part}"
        if what in data["missing"]:
            continue
        try:
            gc.collect()  # what the last client left, its sockets too
            run = measure(kind, name, n, options)
            data[part].append({"server": name, "n": n, "repeat": repeat, **run})
            said = f"{run['rate']:,.0f}/s, lost {run['lost']:.2%}, others took {run['others']:.0%}"
        except (OSError, RuntimeError) as error:
            said = data["missing"][what] = str(error)
        bar.write(f"{what}: {said}")


def measure(kind: type[Client], name: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    seconds, cores = options.seconds, options.cores
    with running(name, n, cores[0]) as (port, processes):
        client = kind(port)
        client.connect(1)  # now all is loaded that is loaded on first use
        empty = usage(processes)
        client.connect(n)
        full, begin = usage(processes), time.monotonic()
        other_cpu = busy(cores) - full["cpu"] - time.process_time()
        fast = client.measure(seconds)
        server_cpu = usage(processes)["cpu"] - full["cpu"]
        paced = client.measure(seconds, OFFERED / n)
        other_cpu = busy(cores) - usage(processes)["cpu"] - time.process_time() - other_cpu
        figures = {
            "rate": fast["rate"],
            "p99_ms": percentile(paced["late"], 99) * 1e3,
            "server_us": server_cpu / len(fast["late"]) * 1e6,
            "client": fast["cpu"],
            "kib": (full["memory"] - empty["memory"]) / (n - 1) * 1024,
            "threads": full["threads"],
            "others": max(0.0, other_cpu / (time.monotonic() - begin) / len({*cores})),
            "lost": max(fast["lost"], paced["lost"], client.wrong() / n),
            "burst": client.burst(100),  # the last, because some servers drop subscribers here
        }
        return {key: float(f"{value:.4g}") for key, value in figures.items()}


def soak(options: argparse.Namespace, data: dict[str, Any]) -> None:
    """Twice all come, some are replaced while events flow, and all but one leave."""
    n, seconds = max(options.sizes), round(options.soak * 60)
    data |= {"soak": [], "about": "Interrupted."}
    with running("sse_bouncer, gthread", n, options.cores[0]) as (port, processes):
        client = Client(port)

        def sample(when: str) -> None:
            use, late = usage(processes), client.latencies()
            row = {"when": when, "subscribers": len(client.subscribers), **use}
            data["soak"].append(row | {"p99_ms": round(percentile(late, 99) * 1e3) if late else 0})

        client.connect(1)
        sample("at the start")
        for number in "first", "second":
            client.connect(n)
            sample(f"{number} round: all have come")
            for second in trange(1, seconds + 1, unit="s"):
                until = time.monotonic() + 1
                client.publish(time.monotonic())
                for _ in range(n // 100):  # one in a hundred is replaced each second
                    client.leave(1)
                    client.join()
                    client.turn(0.005)
                while not client.idle or time.monotonic() < until:
                    client.turn(0.01)
                if second % max(1, seconds // 5) == 0:
                    sample(f"{number} round: after {second / 60:.2g} minutes")
            client.wait()
            client.publish(time.monotonic())  # to those that came last, too
            client.wait()
            client.leave(n - 1)
            time.sleep(4)
            client.turn(0)  # by now the server may have ended the publisher's connection
            sample(f"{number} round: all but one have left")
        ends = f"Streams with wrong bytes: {client.wrong()}; ended by the server: {client.closed}"
        data["about"] = f"{machine()}. {ends}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="does it work here? Into a temporary folder")
    add("--soak", type=float, metavar="MINUTES", help="instead: two rounds of so long")
    add("--sizes", type=int, nargs="+", default=[100, 1000, 10_000], metavar="N")
    add("--seconds", type=float, default=4.0, help="how long to publish in each part (4)")
    add("--repeats", type=int, default=3, help="of everything (3)")
    add("--only", default="", metavar="NAME", help="servers with this in their name")
    add("--out", type=Path, default=HERE, metavar="FOLDER", help="for the results (this folder)")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.seconds, options.repeats = [100, 200], 1.0, 1
        options.out = Path(tempfile.mkdtemp(prefix="sse_bouncer-bench-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers, too
    gc.disable()  # millions of numbers and no cycles: its pauses would count as the server's
    options.cores = prepare()
    path = options.out / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    try:
        (soak if options.soak else compare)(options, data)
    finally:
        report.save(data, options.out)


if __name__ == "__main__":
    main()
