"""The servers under test: how to start each, and how many subscribers it can have."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Server:
    name: str
    app: str  # in apps.py
    runner: str  # "uvicorn", or the worker class of gunicorn
    ours: bool = False
    redis: bool = False
    threads: int = 0  # of gthread; 0 is one per subscriber

    def limit(self, descriptors: int) -> tuple[int, str]:
        """Return the most subscribers it can be asked to have, and why."""
        if self.redis and shutil.which("redis-server") is None:
            return 0, "redis-server is not installed"
        if self.redis:
            return descriptors // 2 - 200, (
                f"it takes two descriptors per subscriber, of {descriptors:,}"
            )
        if self.runner == "gthread" and not self.threads:
            return 5_000, "a thread for each: connecting more takes minutes"
        return descriptors - 200, f"the limit of open files is {descriptors:,}"

    def command(self, port: int, subscribers: int) -> list[str]:
        where = ["--app-dir" if self.runner == "uvicorn" else "--chdir", str(HERE)]
        if self.runner == "uvicorn":
            return [
                *(sys.executable, "-m", "uvicorn", "--factory", f"apps:{self.app}", *where),
                *("--port", str(port), "--log-level", "warning", "--no-access-log"),
            ]
        command = [sys.executable, "-m", "gunicorn", f"apps:{self.app}()", *where]
        command += ["--bind", f"127.0.0.1:{port}", "--worker-class", self.runner]
        command += ["--log-level", "error", "--timeout", "120", "--graceful-timeout", "1"]
        if self.runner == "gthread":
            command += ["--threads", str(self.threads or subscribers + 8)]
        if not self.ours:  # which needs no more than the default: its streams hold none
            command += ["--worker-connections", str(subscribers + 64)]
        return command


SERVERS = [
    Server("blog post, gthread", "blog_post", "gthread"),
    Server("blog post, gevent", "blog_post", "gevent"),
    Server("flask-sse, gevent", "flask_sse", "gevent", redis=True),
    Server("sse-starlette, uvicorn", "sse_starlette", "uvicorn"),
    Server("sse_bouncer, sync", "sse_bouncer", "sync", ours=True),
    Server("sse_bouncer, gthread", "sse_bouncer", "gthread", ours=True, threads=4),
    Server("sse_bouncer, gevent", "sse_bouncer", "gevent", ours=True),
]
BASELINE = "blog post, gevent"  # the only peer that goes as far as ten thousand at good speed


@dataclass
class Running:
    port: int
    processes: list[int]  # the roots of its process trees


@contextmanager
def running(server: Server, subscribers: int, core: int | None) -> Iterator[Running]:
    """Start a server, all its processes on one core; end them all when the block is left."""
    with tempfile.TemporaryDirectory(prefix="sse_bouncer-bench-") as folder:
        environment = {**os.environ, "HOME": folder, "PYTHONPATH": str(HERE.parent)}
        started: list[subprocess.Popen[bytes]] = []
        log = Path(folder, "log")

        def start(command: list[str], port: int) -> None:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
            started.append(process)
            if core is not None and sys.platform == "linux":
                os.sched_setaffinity(process.pid, {core})
            _wait_for(process, port, log)

        try:
            if server.redis:
                port = _free_port()
                environment["REDIS_URL"] = f"redis://127.0.0.1:{port}"
                start(_redis(port, subscribers), port)
            port = _free_port()
            start(server.command(port, subscribers), port)
            yield Running(port, [process.pid for process in started])
        finally:
            _end(started)


def _redis(port: int, subscribers: int) -> list[str]:
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "save": "",
        "appendonly": "no",
        "maxclients": subscribers + 100,
        "client-output-buffer-limit": "pubsub 0 0 0",
    }
    return ["redis-server", *(s for k, v in options.items() for s in (f"--{k}", str(v)))]


def _free_port() -> int:
    # Below the ports that systems give to outgoing connections, of which there will be many.
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise RuntimeError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    for signal_, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        until = time.monotonic() + patience
        for process in started:
            try:
                os.killpg(process.pid, signal_)  # its session is its own, so this is all of it
            except (ProcessLookupError, PermissionError):
                pass
        for process in started:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
