"""What a process tree uses, and what else the machine is busy with."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# From this share of the benchmark's cores on, other processes disturb a run.
DISTURBED = 0.25
PACKAGES = (
    "flask gunicorn gevent flask-sse redis sse-starlette starlette uvicorn uvloop httptools"
).split()


@dataclass
class Usage:
    """Of all processes of a server. Threads and descriptors are 0 where they cannot be seen."""

    memory: int  # bytes; shared pages are divided among those that share them
    cpu: float  # seconds
    threads: int
    descriptors: int


def usage(roots: Iterable[int]) -> Usage:
    total = Usage(0, 0.0, 0, 0)
    for memory, cpu, threads, descriptors in (
        map(_of_process, _tree(roots)) if sys.platform == "linux" else _from_ps(roots)
    ):
        total.memory += memory
        total.cpu += cpu
        total.threads += threads
        total.descriptors += descriptors
    return total


def _of_process(pid: int) -> tuple[int, float, int, int]:
    folder = Path("/proc", str(pid))
    try:
        fields = _stat(folder)
        rollup = (folder / "smaps_rollup").read_text()
        kib = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        cpu = (int(fields[11]) + int(fields[12])) / _TICKS
        return kib * 1024, cpu, int(fields[17]), len(os.listdir(folder / "fd"))
    except (OSError, StopIteration):
        return 0, 0.0, 0, 0  # it has just ended


def _stat(folder: Path) -> list[str]:
    # The second field is the program's name in parentheses, which may hold anything.
    return (folder / "stat").read_text().rpartition(") ")[2].split()


def _tree(roots: Iterable[int]) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(int(_stat(folder)[1]), []).append(int(folder.name))
        except OSError:
            pass
    return _below(roots, children)


def _below(roots: Iterable[int], children: dict[int, list[int]]) -> Iterator[int]:
    for pid in roots:
        yield pid
        yield from _below(children.get(pid, ()), children)


def _from_ps(roots: Iterable[int]) -> Iterator[tuple[int, float, int, int]]:
    output = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,rss=,time="], capture_output=True, text=True, check=True
    ).stdout
    rows = {int(row[0]): row for line in output.splitlines() if len(row := line.split()) == 4}
    children: dict[int, list[int]] = {}
    for pid, row in rows.items():
        children.setdefault(int(row[1]), []).append(pid)
    for pid in _below(roots, children):
        if pid in rows:
            cpu = 0.0
            for part in rows[pid][3].split(":"):
                cpu = cpu * 60 + float(part)
            yield int(rows[pid][2]) * 1024, cpu, 0, 0


def cores() -> tuple[int, int] | tuple[None, None]:
    """Return one core for the servers and one for the client, if they can be chosen.

    The first and the last: in either of the usual orders those are not two halves of one.
    """
    if sys.platform == "linux":
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) > 1:
            return allowed[0], allowed[-1]
    return None, None


class Bystanders:
    """How much of the benchmark's two cores went to processes that are not part of it."""

    def __init__(self, cores: Iterable[int | None]) -> None:
        self._cores = [core for core in cores if core is not None]
        self._begin = time.monotonic()
        self._busy = self._all()

    def share(self, ours: float) -> float:
        """Return their share of the cores since then, given the CPU seconds of our own."""
        if not self._cores:
            return 0.0
        elapsed = (time.monotonic() - self._begin) * len(self._cores)
        return max(0.0, (self._all() - self._busy - ours) / elapsed)

    def wait(self, seconds: float) -> None:
        """Wait until they are quiet, but not for long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._begin, self._busy = time.monotonic(), self._all()
            time.sleep(0.5)
            if self.share(0.0) < DISTURBED:
                break

    def _all(self) -> float:
        if not self._cores:
            return 0.0
        names = [f"cpu{core}" for core in self._cores]
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in names:  # user nice system idle iowait irq softirq steal
                ticks += sum(map(int, fields[:3] + fields[5:8]))
        return ticks / _TICKS


def raise_descriptor_limit() -> int:
    """Allow this process and what it starts as many open files as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, 65_536, 10_240):  # an unlimited one is none that can be set everywhere
        if limit != resource.RLIM_INFINITY:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return limit
            except (OSError, ValueError):
                pass
    return soft


def describe() -> str:
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}"
    )


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found
