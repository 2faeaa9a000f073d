"""The servers under test: how each is started, what its processes use, who else is busy."""

import os
import platform
import random
import resource
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PACKAGES = "flask gunicorn gevent flask-sse redis sse-starlette starlette uvicorn uvloop httptools"

GUNICORN = "gunicorn --bind 127.0.0.1:{port} --log-level error --timeout 120 --graceful-timeout 1"
GEVENT = GUNICORN + " -k gevent --worker-connections {room}"
UVICORN = "uvicorn --factory --port {port} --log-level warning --no-access-log"
REDIS = "redis-server --bind 127.0.0.1 --port {port} --save ''"
# The streams of sse_bouncer need no room: no worker, thread or greenlet is theirs.
SERVERS = {
    "blog post, gthread": GUNICORN
    + " -k gthread --threads {room} --worker-connections {room} 'apps:blog_post()'",
    "blog post, gevent": GEVENT + " 'apps:blog_post()'",
    "flask-sse, gevent": GEVENT + " 'apps:flask_sse()'",
    "sse-starlette, uvicorn": UVICORN + " apps:sse_starlette",
    "sse_bouncer, sync": GUNICORN + " 'apps:sse_bouncer()'",
    "sse_bouncer, gthread": GUNICORN + " -k gthread --threads 4 'apps:sse_bouncer()'",
    "sse_bouncer, gevent": GUNICORN + " -k gevent 'apps:sse_bouncer()'",
    "flask-sse, gevent × 2": GEVENT + " --workers 2 'apps:flask_sse()'",
    "sse_bouncer, sync × 2": GUNICORN + " --workers 2 'apps:sse_bouncer()'",
}
# Measured with an event for one of many users, too. flask-sse has no event for all beside those.
WITH_USERS = ["blog post, gevent", "sse-starlette, uvicorn", "sse_bouncer, sync"]
BASELINE = "blog post, gevent"  # the fastest of the peers that reach 10,000 subscribers


@contextmanager
def running(name: str, subscribers: int, core: int) -> Iterator[tuple[int, list[psutil.Popen]]]:
    """Start a server, all its processes on one core; yield its port and its processes."""
    started: list[psutil.Popen] = []
    with tempfile.TemporaryDirectory(prefix="sse_bouncer-bench-") as home:
        environment = {**os.environ, "HOME": home, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        log = Path(home, "log")

        def start(*command: str) -> int:
            port = next(p for p in random.sample(range(20_000, 30_000), 99) if not _listens(p))
            args = [arg.format(port=port, room=subscribers + 100) for arg in command]
            with log.open("ab") as out:
                options: dict[str, Any] = {"cwd": home, "env": environment, "process_group": 0}
                started.append(psutil.Popen(args, stdout=out, stderr=out, **options))
            started[-1].cpu_affinity([core])
            until = time.monotonic() + 20
            while not _listens(port):
                if started[-1].poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-200:]!r}")
                time.sleep(0.05)
            return port

        try:
            if name.startswith("flask-sse") or name.endswith("× 2"):
                environment["REDIS_URL"] = f"redis://127.0.0.1:{start(*shlex.split(REDIS))}"
            yield start(sys.executable, "-m", *shlex.split(SERVERS[name])), started
        finally:
            for number in signal.SIGTERM, signal.SIGKILL:
                for process in started:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                psutil.wait_procs(started, timeout=3)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def usage(roots: list[psutil.Popen]) -> dict[str, float]:
    """Return what a server's processes use. Memory is in MiB; shared pages are divided."""
    total = {"memory": 0.0, "cpu": 0.0, "threads": 0, "descriptors": 0}
    for process in [p for root in roots for p in (root, *root.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):
            total["memory"] += process.memory_full_info().pss / 2**20
            total["cpu"] += sum(process.cpu_times()[:2])
            total["threads"] += process.num_threads()
            total["descriptors"] += process.num_fds()
    return total


def prepare() -> tuple[int, int]:
    """Allow as many open files as possible; return the servers' core and that of this process."""
    allowed = sorted(os.sched_getaffinity(0))  # the first and the last are not halves of one core
    os.sched_setaffinity(0, allowed[-1:])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return allowed[0], allowed[-1]


def busy(cores: tuple[int, int]) -> float:
    """Return the CPU time of all processes on these cores, in seconds since the system started."""
    times = psutil.cpu_times(percpu=True)
    return sum(sum(times[core][:8]) - times[core].idle - times[core].iowait for core in {*cores})


def machine() -> str:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    files = f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open files"
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    packages = [f"{name} {version(name)}" for name in PACKAGES.split()]
    return ", ".join([cpu or "CPU", f"{os.cpu_count()} cores", files, system, *packages])
