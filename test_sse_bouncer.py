"""Tests of sse_bouncer: real servers, real sockets, a real browser, and no part of ours mocked.

    pytest                              everything
    pytest -k "wire or fan_out"         the rooms that need no server
    pytest -k gthread                   one server
    FUZZ=100 pytest -k fuzz             the random tests, a hundred times as long

The rooms are those of the module: WIRE FORMAT, FAN-OUT, RESPONSE. SERVERS has the same promises
under every server, HUB those of streams that hold no worker, HISTORY and RELAY what is not lost,
CLIENTS what others read of it, WAYS TO USE IT the README's, and PROMISES is about the package as a
whole. Flask and pytest are enough to run the file: a test skips, and says so, where a server, the
browser or a tool it needs is not there. Under ``CI=true`` nothing may be skipped, so there the same
is a failure.

Nothing here asserts how long something takes, and nothing sleeps to let something else happen: a
test waits for what it wants to see, and fails at TIMEOUT. Random tests print their seed; ``SEED=``
in the environment plays it again.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import copy
import datetime
import decimal
import enum
import errno
import functools
import gc
import http.client
import importlib.util
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, NoReturn, ParamSpec, TypeVar

import flask
import pytest
from werkzeug.serving import make_server
from werkzeug.test import create_environ

import sse_bouncer
from sse_bouncer import (
    EventBouncer,
    Frame,
    RedisRelay,
    Subscription,
    format_sse,
    sse_response,
)

TIMEOUT = 30.0  # seconds until a test gives up: far beyond what anything takes on a busy machine
ROOT = Path(__file__).resolve().parent
# How many times as long the fuzz tests run: FUZZ=100 pytest -k fuzz
FUZZ = int(os.environ.get("FUZZ", 1))
P = ParamSpec("P")
T = TypeVar("T")
EXAMPLE = (ROOT / "example_app.py").read_text("utf-8")


# =================================================================================================
# HARNESS
#
# What the tests stand on: waiting, threads, a parser and a client of our own, servers, a browser.
# =================================================================================================


def need(module: str) -> None:
    """Skip the test, or fail it under CI, where a package that it drives is not installed."""
    if importlib.util.find_spec(module) is None:
        go_without(module)


def need_program(name: str) -> str:
    """Return where a program is; skip the test, or fail it under CI, where there is none."""
    return shutil.which(name) or go_without(name)


def go_without(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and CI skips nothing")
    pytest.skip(f"{what} is not installed")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition`` holds; fail, naming ``what`` did not happen, at TIMEOUT.

    The pause leaves the processor to those whom the test waits for. No test depends on its length.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {TIMEOUT} s")
        time.sleep(0.005)


class Task(Generic[T]):
    """A function running in a daemon thread: one that hangs fails its own test, not the run."""

    def __init__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._do = functools.partial(function, *args, **kwargs)
        self._future: Future[T] = Future()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._do())
        except BaseException as error:  # also pytest.fail's: it belongs to who asks for the result
            self._future.set_exception(error)

    def result(self) -> T:
        return self._future.result(TIMEOUT)

    def wait_until_parked(self) -> None:
        """Wait until the thread waits for another: its innermost frame is in a Condition's wait.

        Without this a test of "wakes a blocked reader" mostly wakes a reader not yet blocked.
        """

        def parked() -> bool:
            frame = sys._current_frames().get(self.thread.ident or 0)
            code = frame and frame.f_code
            return bool(code and code.co_filename == threading.__file__ and code.co_name == "wait")

        wait_until(parked, "the thread waits")


@pytest.fixture
def rng() -> random.Random:
    """Randomness that can be had again: pytest shows the seed where the test fails."""
    seed = int(os.environ.get("SEED", time.time_ns() % 10**9))
    print(f"SEED={seed}")
    return random.Random(seed)


def run_python(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that finds the module under test."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for a subprocess, with the repository's root to import from.

    A REDIS_URL that the developer has set is not for the tests: it may be in use.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "REDIS_URL": ""}
    return {**os.environ, **ours, **extra}


class Event(NamedTuple):
    """What a browser would dispatch."""

    data: str
    type: str = "message"
    id: str = ""


class Parser:
    """An event stream read as the standard says, in pieces cut wherever the network cut them.

    Written from https://html.spec.whatwg.org/multipage/server-sent-events.html sections 9.2.5 and
    9.2.6 alone, so that it and ``format_sse`` cannot share a misunderstanding.
    """

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retry: int | None = None
        self.last_event_id = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True  # where one byte order mark is ignored
        self._after_cr = False  # a LF that comes next is the second half of a CR LF
        self._line = ""  # of which the end has not come yet
        self._data = self._type = self._id = ""

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes and return the events that they complete."""
        text = self._decoder.decode(chunk)
        if not text:
            return []
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r") or (self._after_cr and not text)
        *lines, self._line = re.split("\r\n|\n|\r", self._line + text)
        return [event for line in lines if (event := self._take(line))]

    def _take(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line.startswith(":"):
            self.comments.append(line[1:])
        elif field == "event":
            self._type = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, type_ = self._data, self._type
        self._data = self._type = ""
        if not data:
            return None
        return Event(data[:-1], type_ or "message", self.last_event_id)


def parse(stream: bytes) -> list[Event]:
    return Parser().feed(stream)


class Client:
    """One HTTP request on a socket of its own, with its body read as an event stream.

    It reads only when it is asked to, so the test decides when a client is slow, leaves or resets.
    """

    def __init__(
        self,
        port: int,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        receive_buffer: int | None = None,
        protocol: str = "HTTP/1.1",
        connection: socket.socket | None = None,
        more: bytes = b"",  # sent along with the head: the request's body, or what is none
    ) -> None:
        self.body = bytearray()
        self.ended = False  # the server has ended the body, or closed the connection
        self.whole = False  # ... and had sent all of it
        self.parser = Parser()
        self._raw = b""  # received, not yet decoded
        self._events: deque[Event] = deque()
        self._head: tuple[int, list[tuple[str, str]]] | None = None
        self._chunked = False
        self._socket = connection or socket.socket()
        self._socket.settimeout(TIMEOUT)
        if receive_buffer:  # bounded before the connection opens: the window never grows past it
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if connection is None:
            self._socket.connect(("127.0.0.1", port))
        lines = [f"{method} {path} {protocol}", f"Host: 127.0.0.1:{port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
        self._socket.sendall(head + more)

    @property
    def address(self) -> tuple[str, int]:
        """Where the server sees it come from."""
        host, port = self._socket.getsockname()
        return host, port

    @property
    def status(self) -> int:
        return self._wait_for_head()[0]

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The response's headers: names in lower case, in the order sent, repeats as they are."""
        return self._wait_for_head()[1]

    def event(self) -> Event:
        """Return the next event."""
        self.wait_until(lambda: bool(self._events), "an event")
        return self._events.popleft()

    def events(self, count: int) -> list[Event]:
        self.wait_until(lambda: len(self._events) >= count, f"{count} events")
        return [self._events.popleft() for _ in range(count)]

    def wait_opening(self) -> None:
        """Read what a stream opens with: from then on it misses nothing."""
        self.wait_until(lambda: bool(self.body), "the opening")

    def wait_for_body(self, end: bytes) -> None:
        """Read until what has been read since the call has this in it."""
        start = len(self.body)
        self.wait_until(lambda: self.body.find(end, start) >= 0, f"{end!r}")

    def wait_end(self) -> list[Event]:
        """Read until the server ends the stream; return the events not yet asked for."""
        deadline = time.monotonic() + TIMEOUT
        while not self.ended:
            self._receive(deadline, "the end of the stream")
        return list(self._events)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Read until ``condition`` holds."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if self.ended:
                pytest.fail(f"the stream ended before {what}, after {self.body[-500:]!r}")
            self._receive(deadline, what)

    def say(self, something: bytes) -> None:
        """Send what no server has asked for."""
        self._socket.sendall(something)

    def close(self) -> None:
        """Leave politely, with a FIN."""
        self._socket.close()

    def half_close(self) -> None:
        """Send a FIN, but go on listening."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leave as a crashed program does, with a RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _wait_for_head(self) -> tuple[int, list[tuple[str, str]]]:
        self.wait_until(lambda: self._head is not None, "the response's head")
        assert self._head
        return self._head

    def _receive(self, deadline: float, what: str) -> None:
        """Take in what one recv brings; a heartbeat must not keep a test waiting for ever."""
        try:
            received = self._socket.recv(65536)
        except TimeoutError:
            received = None
        except ConnectionResetError:
            self.ended = True
            return
        if received is None or time.monotonic() > deadline:
            pytest.fail(f"no {what} within {TIMEOUT} s, after {self.body[-500:]!r}")
        if not received:
            self.ended = True
            self.whole = self.whole or not self._chunked
            return
        self._raw += received
        if self._head is None and b"\r\n\r\n" in self._raw:
            head, _, self._raw = self._raw.partition(b"\r\n\r\n")
            status, *lines = head.decode("latin-1").split("\r\n")
            pairs = [line.partition(":")[::2] for line in lines]
            headers = [(name.lower(), value.strip()) for name, value in pairs]
            self._head = int(status.split()[1]), headers
            self._chunked = ("transfer-encoding", "chunked") in headers
        if self._head is not None:
            part = self._dechunk() if self._chunked else self._raw
            self._raw = self._raw if self._chunked else b""
            self.body += part
            self._events += self.parser.feed(part)

    def _dechunk(self) -> bytes:
        """Take the complete chunks off what was received."""
        parts = []
        while not self.ended:
            size_line, found, rest = self._raw.partition(b"\r\n")
            if not found or len(rest) < (size := int(size_line, 16)) + 2:
                break
            parts.append(rest[:size])
            self._raw = rest[size + 2 :]
            self.ended = self.whole = size == 0
        return b"".join(parts)


# A script as `python app.py` runs it, but for the port, which its `app.run()` leaves at 5000.
SCRIPT = """
import functools, runpy, sys
from flask import Flask
Flask.run = functools.partialmethod(Flask.run, port=0)
runpy.run_path(sys.argv[1], run_name="__main__")
"""

WAITRESS = """
import waitress.server
from {module} import app
server = waitress.server.create_server(app, host="127.0.0.1", port=0, threads=32)
print("Running on http://127.0.0.1:%s" % server.effective_port, flush=True)
server.run()
"""

# How each kind of server is started, so that it finds a free port by itself and prints it: a port
# that a test had looked for could be somebody else's when the server gets to it.
GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--worker-class"]
COMMANDS = {
    "script": [sys.executable, "-c", SCRIPT, "{module}.py"],
    "development": [sys.executable, "-m", "flask", "--app", "{module}", "run", "--port", "0"],
    "sync": [*GUNICORN, "sync", "{module}:app"],
    "gthread": [*GUNICORN, "gthread", "--threads", "32", "{module}:app"],
    "gevent": [*GUNICORN, "gevent", "{module}:app"],
    "waitress": [sys.executable, "-c", WAITRESS],
}
NEEDS = {
    "sync": ["gunicorn"],
    "gthread": ["gunicorn"],
    "gevent": ["gunicorn", "gevent", "packaging"],
    "waitress": ["waitress"],
}
KINDS = ["development", "sync", "gthread", "gevent", "waitress"]
ADDRESS = re.compile(r"(?:Running on|Listening at:) https?://127\.0\.0\.1:(\d+)")

# What no log may hold, whatever clients do.
COMPLAINTS = re.compile("Traceback|Exception ignored|Error (on|handling) request|WORKER TIMEOUT")


class Server:
    """A server in a subprocess (a group of them: workers, reloader), with its log in a file."""

    def __init__(
        self, kind: str, command: list[str], folder: Path, environ: dict[str, str]
    ) -> None:
        self.kind = kind
        self._log = folder / "log"
        self._clients: list[Client] = []
        self._forgiven = 0  # how much of the log is looked through for complaints
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group that can be killed whole
            )
        self.port = 0  # both are found when the server prints them
        self.side_port = 0
        self.by_side_door = False

    def log(self) -> str:
        """Return what all its processes have printed so far."""
        return self._log.read_text("utf-8", "replace")

    def wait_for_log(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until something like ``pattern`` is in the log."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            running = self.process.poll() is None
            found.extend(re.finditer(pattern, self.log()))
            if not found and not running:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log()}")
            return bool(found)

        wait_until(look, f"{pattern} in the log")
        return found[0]

    def complaints(self) -> str:
        """Return the log since the last call, if it has a traceback or the like in it."""
        log = self.log()
        new, self._forgiven = log[self._forgiven :], len(log)
        return new if COMPLAINTS.search(new) else ""

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal the server, wait until it has ended, and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(TIMEOUT)

    def count(self, what: str) -> int:
        """Return how many threads ("task") or descriptors ("fd") all its processes have."""
        if not Path("/proc/self", what).exists():
            pytest.skip("this platform has no /proc")
        pids, total = [self.process.pid], 0
        while pids:
            process = Path(f"/proc/{pids.pop()}")
            with contextlib.suppress(OSError):  # it ended meanwhile
                total += len(list((process / what).iterdir()))
                for children in process.glob("task/*/children"):
                    pids += map(int, children.read_text().split())
        return total

    def kill(self) -> None:
        """End every process of the server, however it is."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)

    def client(self, path: str, **options: Any) -> Client:
        """Open a stream. It is closed with the test."""
        client = Client(self.port, path, **options)
        self._clients.append(client)
        return client

    def subscribe(self, path: str, **headers: str) -> Client:
        """Open a bouncer's stream and wait for its opening: from then on nothing is missed."""
        client = self.client(path, headers=headers)
        client.wait_opening()
        return client

    def close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        """Make an ordinary request; return its JSON, or its text where it is none.

        ``bytes`` are sent as they are, anything else as JSON.
        """
        port = self.side_port if self.by_side_door else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status >= 400:
                raise RefusedRequest(response.status, text)
            is_json = response.getheader("Content-Type") == "application/json"
            return json.loads(text) if is_json else text

    def get(self, path: str, **headers: str) -> Any:
        return self.request("GET", path, **headers)

    def post(self, path: str, body: object = None, **headers: str) -> Any:
        return self.request("POST", path, body, **headers)


class RefusedRequest(Exception):
    """An ordinary request was answered with a status of 400 or more."""


@contextlib.contextmanager
def serve(kind: str, source: str = "", *options: str, app: str = "app") -> Iterator[Server]:
    """Run a server of ``kind`` with ``source`` as its module ``app``, or with a module named.

    It ends with the block, and so do its clients; a traceback in its log fails the test.
    """
    for module in NEEDS.get(kind, []):
        need(module)
    command = [word.replace("{module}", app) for word in COMMANDS[kind]] + list(options)
    if "gunicorn" in command:
        command += gunicorn_options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source:
            (folder / f"{app}.py").write_text(source, "utf-8")
        environ = environment(SIDE_DOOR="yes" if kind == "sync" else "")
        server = Server(kind, command, folder, environ)
        try:
            server.port = int(server.wait_for_log(ADDRESS)[1])
            if kind == "sync" and "SIDE_DOOR" in source:
                server.side_port = int(server.wait_for_log(r"side door: (\d+)")[1])
            yield server
            assert "" == server.complaints()
        finally:
            server.close_clients()
            server.kill()


def gunicorn_options() -> list[str]:
    """Newer versions open a control socket in the home folder: one that servers would share."""
    major, minor = version("gunicorn").split(".")[:2]
    return ["--no-control-socket"] if (int(major), int(minor)) >= (25, 1) else []


# The app under test in SERVERS. Each test makes a bouncer of its own in it, by a name.
#
# A stream that goes through the sync worker holds the whole worker, so there the same process opens
# a side door: a second, threaded server, by which the test publishes and looks.
APP = '''
import itertools, os, threading
from flask import Flask, request
from sse_bouncer import EventBouncer, sse_response

app = Flask(__name__)
bouncers = {}
pace = threading.Event()  # never set: what paces a generator
gates = {}
ended = []
errors = []

@app.post("/new/<name>")
def new(name):
    bouncers[name] = EventBouncer(**request.get_json())
    gates[name] = threading.Event()
    return {}

@app.get("/subscribe/<name>")
def subscribe(name):
    return bouncers[name].stream(*request.args.getlist("channel"))

@app.post("/broadcast/<name>")
def broadcast(name):
    for message in request.get_json():
        bouncers[name].broadcast(**message)
    return {}

@app.post("/burst/<name>/<int:count>")
def burst(name, count):
    size, first = (int(request.args.get(key, 0)) for key in ("size", "first"))
    for number in range(first, first + count):
        bouncers[name].broadcast(str(number).rjust(size))
    return {}

@app.post("/close/<name>")
def close(name):
    bouncers[name].close(*request.args.getlist("channel"))
    return {}

@app.get("/stats/<name>")
def stats(name):
    return {**bouncers[name].stats(), "ended": name in ended}

@app.get("/generate/<name>")
def generate(name):
    def numbers():
        try:
            gates[name].wait()
            for number in itertools.count():
                yield number
                pace.wait(0.02)
        finally:
            ended.append(name)
    return sse_response(numbers())

@app.post("/open/<name>")
def open_gate(name):
    gates[name].set()
    return {}

@app.get("/fail/<name>")
def fail(name):
    subscription = bouncers[name].subscribe()
    raise KeyError(name)

app.log_exception = errors.append  # keeps tracebacks, as a log handler may, and so local variables

@app.get("/discard/<name>")
def discard(name):
    bouncers[name].stream()
    return {}

if os.environ.get("SIDE_DOOR"):
    from werkzeug.serving import make_server
    side_door = make_server("127.0.0.1", 0, app, threaded=True)
    print("side door:", side_door.port, flush=True)
    threading.Thread(target=side_door.serve_forever, daemon=True).start()
'''


class Remote:
    """A bouncer of one test's own, in the server that all tests of a kind share."""

    _numbers = itertools.count()

    def __init__(self, server: Server, **options: object) -> None:
        self.server = server
        self.name = f"bouncer{next(self._numbers)}"
        self.readers = 1 if server.by_side_door else 20  # how many streams there may be at a time
        server.post(f"/new/{self.name}", options)

    def client(self, query: str = "", **options: Any) -> Client:
        """Open a stream, and wait until its subscription stands."""
        before = self.stats()["subscribers"]
        client = self.server.client(f"/subscribe/{self.name}{query}", **options)
        wait_until(lambda: self.stats()["subscribers"] > before, "the subscription stands")
        return client

    def broadcast(self, *messages: object, **fields: object) -> None:
        self.server.post(
            f"/broadcast/{self.name}", [{"msg": message, **fields} for message in messages]
        )

    def close(self, query: str = "") -> None:
        self.server.post(f"/close/{self.name}{query}")

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = self.server.get(f"/stats/{self.name}")
        return stats

    def wait_for(self, **counts: int) -> None:
        """Wait until the bouncer's stats have these in them."""
        wait_until(lambda: counts.items() <= self.stats().items(), f"{counts} in its stats")


@contextlib.contextmanager
def serve_here(app: flask.Flask) -> Iterator[int]:
    """Serve the app from this process by the development server; its streams are detached."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join(TIMEOUT)
        server.server_close()


@pytest.fixture(autouse=True)
def leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a server that several tests share: end each test's clients, and look at the log."""
    values = [request.getfixturevalue(n) for n in request.fixturenames if n != "leave_nothing"]
    servers = [value for value in values if isinstance(value, Server)]
    yield
    for server in servers:
        server.close_clients()
        assert "" == server.complaints()


@pytest.fixture(scope="module", params=KINDS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(request.param, APP) as server:
        yield server


@pytest.fixture(params=["detached", "served"])
def remote(
    request: pytest.FixtureRequest, shared_server: Server
) -> Iterator[Callable[..., Remote]]:
    """Makes bouncers in the shared server. Their streams end with the test.

    They are taken over from the server where that can be done, or go through it: to a client there
    is no difference.
    """
    detach = request.param == "detached"
    shared_server.by_side_door = shared_server.kind == "sync" and not detach
    made = []

    def new(**options: object) -> Remote:
        made.append(Remote(shared_server, **{"heartbeat": None, "detach": detach, **options}))
        return made[-1]

    yield new
    for bouncer in made:
        bouncer.close()


class Browser:
    """Headless Chromium behind chromedriver, spoken to over WebDriver's HTTP."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        self._session = ""
        options = {
            "args": [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
            ]
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"/session/{self._send('POST', '/session', wanted)['sessionId']}"

    def go(self, url: str) -> None:
        self._send("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Run ``script``, the body of a function, in the page and return what it returns."""
        command = {"script": script, "args": arguments}
        return self._send("POST", f"{self._session}/execute/sync", command)

    def wait_until(self, expression: str) -> None:
        """Wait until ``expression`` is true in the page."""
        wait_until(lambda: self.run(f"return {expression}"), f"in the page: {expression}")

    def quit(self) -> None:
        self._send("DELETE", self._session)

    def _send(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body) if body is not None else None)
            value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_program("chromium")
    folder = tmp_path_factory.mktemp("browser")
    command = [need_program("chromedriver"), "--port=0"]
    driver = Server("chromedriver", command, folder, environment())
    try:
        port = int(driver.wait_for_log(r"started successfully on port (\d+)")[1])
        chromium = Browser(port, folder / "profile")
        yield chromium
        chromium.quit()
    finally:
        driver.kill()


# =================================================================================================
# WIRE FORMAT
# =================================================================================================


class Unshowable:
    """What an ORM's object is like when its session is closed."""

    def __repr__(self) -> str:
        raise LookupError("detached")


def nested(depth: int) -> list[Any]:
    items: list[Any] = []
    for _ in range(depth):
        items = [items]
    return items


class Colour(enum.StrEnum):
    RED = "red"


class OldColour(str, enum.Enum):  # noqa: UP042 - the way it was written before StrEnum
    RED = "red"


# What is given to format_sse, what is sent, and what a browser makes of it.
FRAMES: list[tuple[dict[str, Any], str, list[Event]]] = [
    # fields
    ({"data": "hi"}, "data: hi\n\n", [Event("hi")]),
    ({"data": "hi", "event": "greet"}, "event: greet\ndata: hi\n\n", [Event("hi", "greet")]),
    ({"data": "hi", "event": ""}, "data: hi\n\n", [Event("hi")]),
    ({"data": "hi", "event": Colour.RED}, "event: red\ndata: hi\n\n", [Event("hi", "red")]),
    ({"data": "hi", "id": "7"}, "id: 7\ndata: hi\n\n", [Event("hi", id="7")]),
    ({"data": "hi", "id": 7}, "id: 7\ndata: hi\n\n", [Event("hi", id="7")]),
    ({"data": "hi", "id": 0}, "id: 0\ndata: hi\n\n", [Event("hi", id="0")]),
    ({"data": "hi", "id": ""}, "id: \ndata: hi\n\n", [Event("hi")]),
    ({"data": "hi", "retry": 0}, "retry: 0\ndata: hi\n\n", [Event("hi")]),
    ({"data": "hi", "comment": "so"}, ": so\ndata: hi\n\n", [Event("hi")]),
    (
        {"data": "d", "event": "e", "id": "i", "retry": 1, "comment": "c"},
        ": c\nevent: e\nid: i\nretry: 1\ndata: d\n\n",
        [Event("d", "e", "i")],
    ),
    # no data: no event, but the rest counts
    ({"comment": "only"}, ": only\n\n", []),
    ({"comment": ""}, ": \n\n", []),
    ({"id": "7"}, "id: 7\n\n", []),
    ({"id": ""}, "id: \n\n", []),
    ({"retry": 1500}, "retry: 1500\n\n", []),
    ({"event": "greet"}, "event: greet\n\n", []),
    # line ends
    ({"data": "a\nb"}, "data: a\ndata: b\n\n", [Event("a\nb")]),
    ({"data": "a\rb"}, "data: a\ndata: b\n\n", [Event("a\nb")]),
    ({"data": "a\r\nb"}, "data: a\ndata: b\n\n", [Event("a\nb")]),
    ({"data": "a\n\rb"}, "data: a\ndata: \ndata: b\n\n", [Event("a\n\nb")]),
    (
        {"data": "a\nb\r\nc\rd"},
        "data: a\ndata: b\ndata: c\ndata: d\n\n",
        [Event("a\nb\nc\nd")],
    ),
    ({"data": ""}, "data: \n\n", [Event("")]),
    ({"data": "\n"}, "data: \ndata: \n\n", [Event("\n")]),
    ({"data": "x\n"}, "data: x\ndata: \n\n", [Event("x\n")]),
    ({"data": "\nx"}, "data: \ndata: x\n\n", [Event("\nx")]),
    ({"data": "a\n\nb"}, "data: a\ndata: \ndata: b\n\n", [Event("a\n\nb")]),
    ({"data": "x\n\n"}, "data: x\ndata: \ndata: \n\n", [Event("x\n\n")]),
    ({"comment": "a\nb\r\nc\rd"}, ": a\n: b\n: c\n: d\n\n", []),
    ({"comment": "a\ndata: evil"}, ": a\n: data: evil\n\n", []),
    # what is no line end, though str.splitlines() thinks so
    *[
        ({"data": f"a{char}b"}, f"data: a{char}b\n\n", [Event(f"a{char}b")])
        for char in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    ],
    # what a client strips, and what only looks like it
    ({"data": " x"}, "data:  x\n\n", [Event(" x")]),
    ({"data": "  x "}, "data:   x \n\n", [Event("  x ")]),
    ({"data": "\tx"}, "data: \tx\n\n", [Event("\tx")]),
    ({"data": "\ufeffx"}, "data: \ufeffx\n\n", [Event("\ufeffx")]),
    ({"data": "\0"}, "data: \0\n\n", [Event("\0")]),
    ({"data": "grüß 😀"}, "data: grüß 😀\n\n", [Event("grüß 😀")]),
    # text that looks like protocol is text
    ({"data": ":x"}, "data: :x\n\n", [Event(":x")]),
    ({"data": "data: x"}, "data: data: x\n\n", [Event("data: x")]),
    ({"data": "a\nevent: evil"}, "data: a\ndata: event: evil\n\n", [Event("a\nevent: evil")]),
    ({"data": "data: x\n\n"}, "data: data: x\ndata: \ndata: \n\n", [Event("data: x\n\n")]),
    ({"data": "x", "event": "a: b"}, "event: a: b\ndata: x\n\n", [Event("x", "a: b")]),
    ({"data": "x", "id": " 7"}, "id:  7\ndata: x\n\n", [Event("x", id=" 7")]),
    # what is not text
    ({"data": b"gr\xc3\xbc\xc3\x9f"}, "data: grüß\n\n", [Event("grüß")]),
    ({"data": b"a\r\nb"}, "data: a\ndata: b\n\n", [Event("a\nb")]),
    ({"data": b""}, "data: \n\n", [Event("")]),
    ({"data": bytearray(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": memoryview(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": Colour.RED}, "data: red\n\n", [Event("red")]),
    ({"data": OldColour.RED}, "data: red\n\n", [Event("red")]),
    ({"data": {"n": 1}}, 'data: {"n": 1}\n\n', [Event('{"n": 1}')]),
    ({"data": ["a\nb"]}, 'data: ["a\\nb"]\n\n', [Event('["a\\nb"]')]),
    ({"data": 0}, "data: 0\n\n", [Event("0")]),
    ({"data": False}, "data: false\n\n", [Event("false")]),
    ({"data": {}}, "data: {}\n\n", [Event("{}")]),
    ({"data": []}, "data: []\n\n", [Event("[]")]),
]
FRAME_IDS = [ascii(given) for given, _, _ in FRAMES]


@pytest.mark.parametrize(("given", "sent", "read"), FRAMES, ids=FRAME_IDS)
def test_wire_to_the_byte(given: dict[str, Any], sent: str, read: list[Event]) -> None:
    frame = format_sse(**given)
    assert (sent, Frame) == (str(frame), type(frame))


@pytest.mark.parametrize(("given", "sent", "read"), FRAMES, ids=FRAME_IDS)
def test_wire_is_read_back(given: dict[str, Any], sent: str, read: list[Event]) -> None:
    """A client reads the same whether the frame comes whole or byte by byte."""
    wire = format_sse(**given).encode()
    bytewise = Parser()
    assert [read, read] == [parse(wire), [e for n in wire for e in bytewise.feed(bytes([n]))]]


def test_wire_arguments_by_position() -> None:
    assert "event: greet\ndata: hi\n\n" == format_sse("hi", "greet")


def test_wire_none_is_no_data() -> None:
    assert "id: 1\n\n" == format_sse(None, id=1)


PIECES = [
    *("\n", "\r", "\r\n", "\n\n", "\n\r", ":", ": ", " ", "\t", "\0", "\ufeff", "😀", "é", "x", ""),
    *("data", "data: ", "event: evil", "id: 1", "id:\0", "retry: 5", "\nid: 2\n\n", "0", "٣"),
    *("\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\U0010ffff", "\ud7ff"),
]


def test_wire_any_text_in_any_cut(rng: random.Random) -> None:
    """Whatever is sent arrives as it was, however the network cuts the stream."""

    def text(without: str = "") -> str:
        joined = "".join(rng.choices(PIECES, k=rng.randrange(8)))
        return "".join(char for char in joined if char not in without)

    sent = bytearray()
    expected = []
    last_id = ""
    for _ in range(20_000):
        data = text()
        event = text(without="\r\n\0") if rng.random() < 0.3 else None
        id = text(without="\r\n\0") if rng.random() < 0.3 else None
        retry = rng.randrange(10**6) if rng.random() < 0.1 else None
        comment = text() if rng.random() < 0.1 else None
        sent += format_sse(data, event, id=id, retry=retry, comment=comment).encode()
        last_id = last_id if id is None else id
        expected.append(Event(re.sub("\r\n?", "\n", data), event or "message", last_id))
    parser = Parser()
    read = []
    rest = bytes(sent)
    while rest:
        cut = rng.choice([1, 2, 3, rng.randrange(1, 100), rng.randrange(1, 10_000)])
        read += parser.feed(rest[:cut])
        rest = rest[cut:]
    for wanted, got in itertools.zip_longest(expected, read):
        assert wanted == got


def test_wire_any_json(rng: random.Random) -> None:
    """Any JSON value is one event that parses to the same value."""

    def value(depth: int) -> object:
        simple = [None, True, -1, 1.5, 10**30, "", "a\nb\r\u2028", "😀", "\0"]
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(simple)
        items = [value(depth - 1) for _ in range(rng.randrange(4))]
        return items if rng.random() < 0.5 else {f"k\n{n}": item for n, item in enumerate(items)}

    values = [[value(3)] for _ in range(2_000)]
    read = parse("".join(map(format_sse, values)).encode())
    assert values == [json.loads(event.data) for event in read]


def test_wire_json_by_the_apps_provider() -> None:
    """Within an app context dates, UUIDs and decimals are written as in jsonify."""
    given = {
        "date": datetime.date(2030, 1, 2),
        "uuid": uuid.UUID(int=7),
        "price": decimal.Decimal("1.10"),
    }
    with flask.Flask("test").app_context():
        assert flask.json.loads(flask.jsonify(given).data) == json.loads(
            parse(format_sse(given).encode())[0].data
        )


def test_wire_frame_passes_unchanged() -> None:
    frame = format_sse("a\nb", "greet")
    assert format_sse(frame) is frame


@pytest.mark.parametrize("text", ["data: x\n\n", "data: x\r\n\r\n", "data: x\r\r", ": x\n\r\n"])
def test_wire_frame_by_hand(text: str) -> None:
    """Protocol that somebody writes themselves is sent as it is."""
    assert text == format_sse(Frame(text))


BY_HAND = """
import logging, sys
logging.basicConfig(format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
from sse_bouncer import format_sse
format_sse("data: one line\\n"), format_sse("hello\\n\\n"), format_sse(format_sse("fine"))
format_sse("data: by hand\\n\\n")
format_sse("event: by hand\\ndata: too\\n\\n")
"""


def test_wire_warns_once_of_text_formatted_by_hand() -> None:
    lines = run_python(BY_HAND).stdout.splitlines()
    assert [True] == [line.startswith("sse_bouncer WARNING ") for line in lines]
    assert "data: by hand" in lines[0]
    assert "format_sse" in lines[0]
    assert "Frame(" in lines[0]


# Streams as the standard's own examples and the web platform tests have them, and what is read:
# the tests' parser is tested too, since everything else believes it.
STREAMS: list[tuple[str, list[Event]]] = [
    ("data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
    (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third\n\n",
        [Event("first event", id="1"), Event("second event"), Event(" third")],
    ),
    ("data\n\ndata\ndata\n\ndata:", [Event(""), Event("\n")]),
    ("data:test\n\ndata: test\n\n", [Event("test"), Event("test")]),
    ("\ufeffdata: 1\n\n\ufeffdata: 2\n\ndata: 3\n\n", [Event("1"), Event("3")]),
    ("\ufeff\ufeffdata: 1\n\ndata: 2\n\n", [Event("2")]),
    ("data: a\rdata: b\r\ndata: c\n\r\ndata: d\r\r", [Event("a\nb\nc"), Event("d")]),
    ("data: a\r\n\r\ndata: b\r\n\r\n", [Event("a"), Event("b")]),
    ("Data: a\ndata : b\n data: c\nxdata: d\n\n", []),
    ("data: a\nid: 1\n\nid: 2\n\ndata: b\n\n", [Event("a", id="1"), Event("b", id="2")]),
    ("id: 1\n\nid: 2\0\ndata: a\n\n", [Event("a", id="1")]),
    ("id: 1\n\nid\ndata: a\n\n", [Event("a")]),
    ("event: x\n\ndata: a\n\n", [Event("a")]),
    ("event: x\ndata: a\n\ndata: b\n\n", [Event("a", "x"), Event("b")]),
    ("event: x\nevent\ndata: a\n\n", [Event("a")]),
    ("data: a\n\ndata: b", [Event("a")]),
    ("data: a\n\ndata: b\n", [Event("a")]),
]


@pytest.mark.parametrize(("stream", "expected"), STREAMS)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_parser_reads_as_the_standard_says(stream: str, expected: list[Event], size: int) -> None:
    parser = Parser()
    wire = stream.encode()
    pieces = [wire[start : start + size] for start in range(0, len(wire), size)]
    assert expected == [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("5", 5), ("02000", 2000), ("", None), ("1000x", None), ("-1", None), ("1.5", None)]
    + [("+1", None), ("1_000", None), ("²", None), ("１", None)],
)
def test_parser_retry_is_ascii_digits(line: str, expected: int | None) -> None:
    parser = Parser()
    parser.feed(f"retry: {line}\n".encode())
    assert expected == parser.retry


def test_parser_commits_an_id_at_the_blank_line() -> None:
    parser = Parser()
    parser.feed(b"id: 1\n\nid: 2\n")
    assert "1" == parser.last_event_id


def anything(rng: random.Random, depth: int = 2) -> object:
    """Return an object of any type, often one that is nearly right."""
    text = "".join(rng.choices([*PIECES, "\ud800", "\udfff"], k=rng.randrange(4)))
    if depth and rng.random() < 0.2:
        items = [anything(rng, depth - 1) for _ in range(rng.randrange(3))]
        return rng.choice([items, tuple(items), {text: items}, {1: items}])
    return rng.choice(
        [text, text, text, text.encode(errors="replace"), rng.randbytes(3), None, True, 0, -1]
        + [10**6, 1.5, float("nan"), float("-inf"), {1, 2}, object(), ..., int, memoryview(b"x")]
    )


def test_wire_fuzz_anything_is_sent_as_it_is_or_refused(rng: random.Random) -> None:
    """Whatever the arguments are, there is a frame that holds one event, of them and nothing else,
    or an error that names one of them."""
    names = ["data", "event", "id", "retry", "comment"]
    for _ in range(5000 * FUZZ):
        given: Any = {name: anything(rng) for name in names if rng.random() < 0.6}
        try:
            frame = format_sse(**given)
        except (TypeError, ValueError) as error:
            assert re.match(f"({'|'.join(names)}): expected .+ got ", str(error), re.DOTALL)
            continue
        data = given.get("data")
        events = parse(frame.encode())
        assert (data is not None) == len(events)
        for event in events:
            assert (given.get("event") or "message") == event.type
            id = given.get("id")
            assert ("" if id is None else str(id)) == event.id
            if isinstance(data, str):
                assert re.sub("\r\n?", "\n", data) == event.data


# =================================================================================================
# FAN-OUT
# =================================================================================================


def datas(frames: Iterable[Frame]) -> list[str]:
    """The data of each event in ``frames``; of all that there will be, if it is a subscription."""
    return [event.data for event in parse("".join(frames).encode())]


def held(subscription: Subscription) -> list[str]:
    """Take what the subscription holds; return its data."""
    return datas([subscription.get_nowait() for _ in range(subscription.qsize())])


def test_fan_out_reaches_every_subscriber() -> None:
    bouncer = EventBouncer()
    subscriptions = [bouncer.subscribe() for _ in range(3)]
    bouncer.broadcast("hi")
    assert [["hi"]] * 3 == [held(subscription) for subscription in subscriptions]


def test_fan_out_formats_once() -> None:
    """All subscribers get the same frame object, however many they are."""
    bouncer = EventBouncer()
    first, second = bouncer.subscribe(), bouncer.subscribe()
    bouncer.broadcast({"n": 1}, "greet", id=5, retry=7)
    frame = first.get_nowait()
    assert second.get_nowait() is frame
    assert format_sse({"n": 1}, "greet", id=5, retry=7) == frame


def test_fan_out_passes_frames_unchanged() -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    frame = format_sse("hi")
    bouncer.broadcast(msg=frame)
    assert subscription.get_nowait() is frame


def test_fan_out_subscribes_at_once() -> None:
    """What is broadcast before anybody reads is not missed; what came before is not there."""
    bouncer = EventBouncer()
    bouncer.broadcast("before")
    subscription = bouncer.subscribe()
    bouncer.broadcast("after")
    assert ["after"] == held(subscription)


# Who subscribes to what, and who of them gets a broadcast on which channel.
@pytest.mark.parametrize(
    ("channels", "broadcast_on", "arrives"),
    [
        ([], None, True),
        ([], "a", False),
        (["a"], None, True),
        (["a"], "a", True),
        (["a"], "b", False),
        (["a", "b"], "b", True),
        (["a", "a"], "a", True),
        (["a"], "A", False),
    ],
)
def test_fan_out_channels(channels: list[str], broadcast_on: str | None, arrives: bool) -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe(*channels)
    bouncer.broadcast("hi", channel=broadcast_on)
    assert ["hi"] * arrives == held(subscription)


def test_fan_out_counts() -> None:
    bouncer = EventBouncer(maxsize=1, max_subscribers=2)
    one, two = bouncer.subscribe(), bouncer.subscribe()
    with pytest.raises(EventBouncer.Refused):
        bouncer.subscribe()
    bouncer.unsubscribe(two)
    bouncer.broadcast("kept")
    bouncer.broadcast("drops one")
    bouncer.subscribe("a")
    expected = {"subscribers": 0, "detached": 0, "broadcasts": 2, "dropped": 1, "refused": 1}
    assert expected == {**bouncer.stats(), "subscribers": len(bouncer.subscribers)}
    assert ["kept"] == datas(one)


def test_fan_out_full_is_dropped_and_ends_with_what_it_holds() -> None:
    bouncer = EventBouncer(maxsize=3)
    subscription = bouncer.subscribe()
    for number in range(3):
        bouncer.broadcast(number)
    assert subscription.full()
    assert (subscription,) == bouncer.subscribers
    bouncer.broadcast(3)
    assert not bouncer.subscribers
    assert 1 == bouncer.stats()["dropped"]
    bouncer.broadcast(4)
    assert ["0", "1", "2"] == datas(subscription)


def test_fan_out_drops_only_who_is_full() -> None:
    bouncer = EventBouncer(maxsize=2)
    slow, quick = bouncer.subscribe(), bouncer.subscribe()
    read = []
    for number in range(5):
        bouncer.broadcast(number)
        read.append(quick.get_nowait())
    assert [["0", "1"], ["0", "1", "2", "3", "4"]] == [datas(slow), datas(read)]
    assert (quick,) == bouncer.subscribers


def test_fan_out_a_burst_drops_nobody_who_keeps_up() -> None:
    """A thousand broadcasts in a loop at the default maxsize reach twenty reading threads."""
    bouncer = EventBouncer()
    subscriptions = [bouncer.subscribe() for _ in range(20)]
    readers = [Task(datas, subscription) for subscription in subscriptions]
    for number in range(1000):
        bouncer.broadcast(number)
    bouncer.close()
    expected = [str(number) for number in range(1000)]
    assert [expected] * 20 == [reader.result() for reader in readers]
    assert 0 == bouncer.stats()["dropped"]


def test_fan_out_a_reader_that_never_catches_up_is_dropped_in_the_end() -> None:
    """One that makes room each time, but no more than that, would slow publishers down for ever."""
    bouncer = EventBouncer(maxsize=2)
    subscription = bouncer.subscribe()

    def read() -> None:
        with contextlib.suppress(Subscription.Ended):
            while True:
                wait_until(lambda: subscription.full() or not bouncer.subscribers, "it is full")
                subscription.get()

    def publish() -> None:
        while not bouncer.stats()["dropped"]:
            bouncer.broadcast("x")

    reader = Task(read)
    Task(publish).result()
    reader.result()


def test_fan_out_racing_publishers_and_subscribers() -> None:
    """Tens of threads lose nothing, repeat nothing, and all subscribers see one order.

    Besides the steady subscribers there are passers-by, who come for a few frames and leave: what
    each of them sees, to the last frame held, is an unbroken piece of that order.
    """
    bouncer = EventBouncer(maxsize=100_000)
    start = threading.Barrier(30)

    def publish(who: int) -> None:
        start.wait(TIMEOUT)
        for number in range(300):
            bouncer.broadcast([who, number])

    def pass_by() -> list[list[str]]:
        visits = []
        start.wait(TIMEOUT)
        with contextlib.suppress(EventBouncer.Refused):
            while True:
                with bouncer.subscribe() as subscription:
                    frames = list(itertools.islice(subscription, 7))
                visits.append(datas(frames + list(subscription)))
        return visits

    def read(subscription: Subscription) -> list[str]:
        start.wait(TIMEOUT)
        return datas(subscription)

    steady = [bouncer.subscribe() for _ in range(10)]
    readers = [Task(read, subscription) for subscription in steady]
    passers_by = [Task(pass_by) for _ in range(10)]
    publishers = [Task(publish, who) for who in range(10)]
    for publisher in publishers:
        publisher.result()
    bouncer.close()

    order, *others = [reader.result() for reader in readers]
    assert [order] * 9 == others
    assert Counter(f"[{who}, {n}]" for who in range(10) for n in range(300)) == Counter(order)
    for who in range(10):
        own = [data for data in order if data.startswith(f"[{who},")]
        assert [f"[{who}, {number}]" for number in range(300)] == own
    position = {data: index for index, data in enumerate(order)}
    for visit in itertools.chain.from_iterable(task.result() for task in passers_by):
        first = position[visit[0]] if visit else 0
        assert order[first : first + len(visit)] == visit


def test_fan_out_one_order_while_broadcasts_wait_for_room() -> None:
    """Publishers that overtake the readers still do not overtake each other.

    Who is dropped has seen the beginning of what those saw who were not.
    """
    bouncer = EventBouncer(maxsize=2)
    subscriptions = [bouncer.subscribe() for _ in range(5)]
    readers = [Task(datas, subscription) for subscription in subscriptions]
    start = threading.Barrier(8)

    def publish(who: int) -> None:
        start.wait(TIMEOUT)
        for number in range(100):
            bouncer.broadcast([who, number])

    for publisher in [Task(publish, who) for who in range(8)]:
        publisher.result()
    bouncer.close()
    orders = sorted((reader.result() for reader in readers), key=len)
    assert [orders[-1][: len(order)] for order in orders] == orders


def test_fan_out_racing_closers_leave_nobody() -> None:
    """However subscribing, unsubscribing and dropping race, the count returns to nothing."""
    bouncer = EventBouncer(maxsize=2)
    start = threading.Barrier(20)

    def visit(channel: str) -> None:
        start.wait(TIMEOUT)
        for number in range(50):
            with bouncer.subscribe(channel) as subscription:
                bouncer.broadcast(number, channel=channel)
                if number % 3 == 0:
                    bouncer.close(channel)
                if number % 3 == 1:
                    bouncer.unsubscribe(subscription)

    tasks = [Task(visit, f"c{number % 5}") for number in range(20)]
    for task in tasks:
        task.result()
    assert not bouncer.subscribers
    assert 0 == bouncer.stats()["subscribers"]


def parked_reader(subscription: Subscription) -> Task[list[str]]:
    """Start a thread that iterates the subscription, and wait until it waits for a frame."""
    reader = Task(lambda: datas(subscription))
    reader.wait_until_parked()
    return reader


@pytest.mark.parametrize("timeout", [None, 1e12, math.inf])
def test_fan_out_broadcast_wakes_a_reader(timeout: float | None) -> None:
    bouncer = EventBouncer()
    reader = Task(bouncer.subscribe().get, timeout=timeout)
    reader.wait_until_parked()
    bouncer.broadcast("hi")
    assert "data: hi\n\n" == reader.result()


@pytest.mark.parametrize(
    "end",
    [
        lambda bouncer, subscription: bouncer.close(),
        lambda bouncer, subscription: bouncer.close("a"),
        EventBouncer.unsubscribe,
    ],
    ids=["close", "close-channel", "unsubscribe"],
)
def test_fan_out_end_wakes_a_reader(end: Callable[[EventBouncer, Subscription], None]) -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe("a")
    reader = parked_reader(subscription)
    end(bouncer, subscription)
    assert [] == reader.result()
    assert not bouncer.subscribers


def test_fan_out_close_of_a_channel_ends_its_readers_only() -> None:
    bouncer = EventBouncer()
    leaving = bouncer.subscribe("ada", "news")
    staying = bouncer.subscribe("bob", "news")
    readers = [parked_reader(leaving), parked_reader(staying)]
    bouncer.close("ada")
    assert [] == readers[0].result()
    assert (staying,) == bouncer.subscribers
    bouncer.broadcast("still here", channel="bob")
    bouncer.close("bob", "nobody")
    assert ["still here"] == readers[1].result()


def test_fan_out_a_closed_channel_may_be_subscribed_again() -> None:
    bouncer = EventBouncer()
    bouncer.close("ada")
    subscription = bouncer.subscribe("ada")
    bouncer.broadcast("hi", channel="ada")
    assert ["hi"] == held(subscription)


def test_fan_out_close_is_final_and_harmless_twice() -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.broadcast("held")
    bouncer.close()
    bouncer.close()
    bouncer.broadcast("too late")
    assert ["held"] == datas(subscription)
    with pytest.raises(EventBouncer.Refused, match="closed"):
        bouncer.subscribe()


def test_fan_out_max_subscribers() -> None:
    bouncer = EventBouncer(max_subscribers=1)
    with bouncer.subscribe():
        with pytest.raises(EventBouncer.Refused, match="max_subscribers=1"):
            bouncer.subscribe()
    assert bouncer.subscribe() in bouncer.subscribers
    assert issubclass(EventBouncer.Refused, RuntimeError)


def test_subscription_is_a_queue() -> None:
    bouncer = EventBouncer(maxsize=2)
    subscription = bouncer.subscribe()
    assert (0, True, False, 2) == queue_state(subscription)
    bouncer.broadcast("a")
    assert (1, False, False, 2) == queue_state(subscription)
    bouncer.broadcast("b")
    assert (2, False, True, 2) == queue_state(subscription)
    assert ["data: a\n\n", "data: b\n\n"] == [subscription.get(), subscription.get(timeout=1)]


def queue_state(subscription: Subscription) -> tuple[int, bool, bool, int]:
    return (
        subscription.qsize(),
        subscription.empty(),
        subscription.full(),
        subscription.maxsize,
    )


@pytest.mark.parametrize(
    "get",
    [
        Subscription.get_nowait,
        lambda subscription: subscription.get(False),
        lambda subscription: subscription.get(block=False, timeout=9),
        lambda subscription: subscription.get(timeout=0),
        lambda subscription: subscription.get(timeout=0.001),
    ],
)
def test_subscription_get_raises_empty(get: Callable[[Subscription], Frame]) -> None:
    with pytest.raises(queue.Empty):
        get(EventBouncer().subscribe())


def test_subscription_ended_reads_as_a_client_that_left() -> None:
    """What get raises at the end is a BrokenPipeError with EPIPE, and stays so."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.close()
    for _ in range(2):
        with pytest.raises(Subscription.Ended) as caught:
            subscription.get()
        assert isinstance(caught.value, BrokenPipeError)
        assert errno.EPIPE == caught.value.errno
    with pytest.raises(Subscription.Ended):
        subscription.get_nowait()


def test_subscription_leaves_with_its_block() -> None:
    bouncer = EventBouncer()
    with bouncer.subscribe() as subscription:
        assert (subscription,) == bouncer.subscribers
        bouncer.broadcast("held")
    assert not bouncer.subscribers
    assert ["held"] == datas(subscription)


def test_subscription_that_nobody_refers_to_is_gone() -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe("a")
    del subscription
    gc.collect()
    assert not bouncer.subscribers
    assert 0 == bouncer.stats()["subscribers"]


def test_subscription_of_a_generator_closed_in_the_middle_is_gone() -> None:
    """A view's own ``while True: yield messages.get()`` leaves nothing behind."""
    bouncer = EventBouncer()

    def stream() -> Iterator[Frame]:
        messages = bouncer.subscribe()
        while True:
            yield messages.get()

    generator = stream()
    reader = Task(lambda: next(generator))
    reader.wait_until_parked()
    bouncer.broadcast("hi")
    assert "data: hi\n\n" == reader.result()
    assert 1 == len(bouncer.subscribers)
    del reader
    generator.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not bouncer.subscribers


def test_unsubscribe_twice_is_harmless() -> None:
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.unsubscribe(subscription)
    bouncer.unsubscribe(subscription)
    assert not bouncer.subscribers


def test_fan_out_in_a_forked_child() -> None:
    """A child starts with no subscribers, locks that are free, and parents unharmed."""
    code = """
import os, threading
from sse_bouncer import EventBouncer
bouncer = EventBouncer()
subscription = bouncer.subscribe()
publisher = threading.Thread(target=lambda: [bouncer.broadcast(n) for n in range(17)])
publisher.start()  # its last broadcast waits for room, with the bouncer's state half way
while not subscription.full():
    pass
pid = os.fork()
if pid == 0:
    assert bouncer.subscribers == ()
    with bouncer.subscribe() as own:
        bouncer.broadcast("child")
        assert own.get(timeout=10) == "data: child\\n\\n"
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
publisher.join()
assert len(list(subscription)) == 16
print("parent too")
"""
    if not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    finished = run_python(code, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert ("parent too\n", "") == (finished.stdout, finished.stderr)


# Everything the public API refuses: the call, the error, the argument its message must begin with,
# and how it shows what was given.
BOUNCER = EventBouncer()
REDIS = SimpleNamespace(xadd=None)  # as much of a client as is looked at
REFUSED: list[tuple[Callable[[], object], type[Exception], str, str]] = [
    (lambda: format_sse(), ValueError, "data", "None"),
    (lambda: format_sse(event=""), ValueError, "data", "None"),
    (lambda: format_sse(b"\xff"), ValueError, "data", r"b'\xff'"),
    (lambda: format_sse("\ud800"), ValueError, "data", r"'\ud800'"),
    (lambda: format_sse(math.nan), ValueError, "data", "nan"),
    (lambda: format_sse([math.inf]), ValueError, "data", "[inf]"),
    (lambda: format_sse({"n": -math.inf}), ValueError, "data", "{'n': -inf}"),
    (lambda: format_sse({1, 2}), TypeError, "data", "{1, 2}"),
    (lambda: format_sse(object()), TypeError, "data", "<object object"),
    (lambda: format_sse(circular()), ValueError, "data", "[[...]]"),
    (lambda: format_sse(nested(100_000)), ValueError, "data", "<list, whose repr() fails>"),
    (lambda: format_sse(Unshowable()), TypeError, "data", "<Unshowable, whose repr() fails>"),
    (lambda: format_sse("x", id=10**5000), ValueError, "id", "<int, whose repr() fails>"),
    (lambda: format_sse("x", retry=10**5000), ValueError, "retry", "<int, whose repr() fails>"),
    (lambda: format_sse(format_sse("x"), "greet"), ValueError, "data", r"'data: x\n\n'"),
    (lambda: format_sse(format_sse("x"), id=1), ValueError, "data", r"'data: x\n\n'"),
    (lambda: format_sse(format_sse("x"), retry=1), ValueError, "data", r"'data: x\n\n'"),
    (lambda: format_sse(format_sse("x"), comment="c"), ValueError, "data", r"'data: x\n\n'"),
    (lambda: format_sse("x", "a\nb"), ValueError, "event", r"'a\nb'"),
    (lambda: format_sse("x", "a\rdata: evil"), ValueError, "event", r"'a\rdata: evil'"),
    (lambda: format_sse("x", "a\0b"), ValueError, "event", r"'a\x00b'"),
    (lambda: format_sse("x", "\ud800"), ValueError, "event", r"'\ud800'"),
    (lambda: format_sse("x", 5), TypeError, "event", "5"),  # type: ignore[arg-type]
    (lambda: format_sse("x", b"a"), TypeError, "event", "b'a'"),  # type: ignore[arg-type]
    (lambda: format_sse("x", id="1\n\ndata: evil"), ValueError, "id", r"'1\n\ndata: evil'"),
    (lambda: format_sse("x", id="1\r"), ValueError, "id", r"'1\r'"),
    (lambda: format_sse("x", id="1\0"), ValueError, "id", r"'1\x00'"),
    (lambda: format_sse("x", id="\udfff"), ValueError, "id", r"'\udfff'"),
    (lambda: format_sse("x", id=1.5), TypeError, "id", "1.5"),  # type: ignore[arg-type]
    (lambda: format_sse("x", id=True), TypeError, "id", "True"),
    (lambda: format_sse("x", retry=-1), ValueError, "retry", "-1"),
    (lambda: format_sse("x", retry=1.5), TypeError, "retry", "1.5"),  # type: ignore[arg-type]
    (lambda: format_sse("x", retry=True), TypeError, "retry", "True"),
    (lambda: format_sse("x", retry="9"), TypeError, "retry", "'9'"),  # type: ignore[arg-type]
    (lambda: format_sse("x", comment="\ud800"), ValueError, "comment", r"'\ud800'"),
    (lambda: format_sse("x", comment=5), TypeError, "comment", "5"),  # type: ignore[arg-type]
    (lambda: Frame("data: x\n"), ValueError, "frame", r"'data: x\n'"),
    (lambda: Frame("data: x\r\n"), ValueError, "frame", r"'data: x\r\n'"),
    (lambda: Frame(""), ValueError, "frame", "''"),
    (lambda: Frame("data: \ud800\n\n"), ValueError, "frame", r"'data: \ud800\n\n'"),
    (lambda: Frame(b"data: x\n\n"), TypeError, "frame", "b'data"),  # type: ignore[arg-type]
    (lambda: EventBouncer(0), ValueError, "maxsize", "0"),
    (lambda: EventBouncer(-1), ValueError, "maxsize", "-1"),
    (lambda: EventBouncer(1.5), TypeError, "maxsize", "1.5"),  # type: ignore[arg-type]
    (lambda: EventBouncer(True), TypeError, "maxsize", "True"),
    (lambda: EventBouncer(None), TypeError, "maxsize", "None"),  # type: ignore[arg-type]
    (lambda: EventBouncer(heartbeat=0), ValueError, "heartbeat", "0"),
    (lambda: EventBouncer(heartbeat=-1), ValueError, "heartbeat", "-1"),
    (lambda: EventBouncer(heartbeat=math.nan), ValueError, "heartbeat", "nan"),
    (lambda: EventBouncer(heartbeat=math.inf), ValueError, "heartbeat", "inf"),
    (lambda: EventBouncer(heartbeat=True), TypeError, "heartbeat", "True"),
    (lambda: EventBouncer(heartbeat="1"), TypeError, "heartbeat", "'1'"),  # type: ignore[arg-type]
    (lambda: EventBouncer(retry=-1), ValueError, "retry", "-1"),
    (lambda: EventBouncer(retry=True), TypeError, "retry", "True"),
    (lambda: EventBouncer(retry=1.5), TypeError, "retry", "1.5"),  # type: ignore[arg-type]
    (lambda: EventBouncer(retry=(2, 1)), ValueError, "retry", "(2, 1)"),
    (lambda: EventBouncer(retry=(-1, 1)), ValueError, "retry", "-1"),
    (lambda: EventBouncer(retry=(1,)), ValueError, "retry", "(1,)"),  # type: ignore[arg-type]
    (lambda: EventBouncer(max_subscribers=0), ValueError, "max_subscribers", "0"),
    (lambda: EventBouncer(max_subscribers=True), TypeError, "max_subscribers", "True"),
    (lambda: BOUNCER.subscribe(""), ValueError, "channel", "''"),
    (lambda: BOUNCER.subscribe("a", 5), TypeError, "channel", "5"),  # type: ignore[arg-type]
    (lambda: BOUNCER.subscribe(["a"]), TypeError, "channel", "['a']"),  # type: ignore[arg-type]
    (lambda: BOUNCER.subscribe(last_event_id=5), TypeError, "last_event_id", "5"),  # type: ignore[arg-type]
    (lambda: BOUNCER.broadcast(None), ValueError, "data", "None"),
    (lambda: BOUNCER.broadcast("x", "a\nb"), ValueError, "event", r"'a\nb'"),
    (lambda: BOUNCER.broadcast("x", id="\n"), ValueError, "id", r"'\n'"),
    (lambda: BOUNCER.broadcast("x", retry=-1), ValueError, "retry", "-1"),
    (lambda: BOUNCER.broadcast(format_sse("x"), "a"), ValueError, "data", r"'data: x\n\n'"),
    (lambda: BOUNCER.broadcast("x", channel=""), ValueError, "channel", "''"),
    (lambda: BOUNCER.broadcast("x", channel=5), TypeError, "channel", "5"),  # type: ignore[arg-type]
    (lambda: BOUNCER.close(""), ValueError, "channel", "''"),
    (lambda: BOUNCER.close(5), TypeError, "channel", "5"),  # type: ignore[arg-type]
    (lambda: BOUNCER.unsubscribe("x"), TypeError, "subscription", "'x'"),  # type: ignore[arg-type]
    (lambda: BOUNCER.unsubscribe(EventBouncer().subscribe()), ValueError, "subscription", "<Subs"),
    (lambda: BOUNCER.subscribe().get(timeout=-1), ValueError, "timeout", "-1"),
    (lambda: BOUNCER.subscribe().get(timeout=math.nan), ValueError, "timeout", "nan"),
    (lambda: sse_response("data"), TypeError, "source", "'data'"),
    (lambda: sse_response(b"data"), TypeError, "source", "b'data'"),
    (lambda: sse_response({"n": 1}), TypeError, "source", "{'n': 1}"),
    (lambda: sse_response(5), TypeError, "source", "5"),  # type: ignore[arg-type]
    (lambda: sse_response(None), TypeError, "source", "None"),  # type: ignore[arg-type]
    (lambda: sse_response([], status=True), TypeError, "status", "True"),
    (lambda: sse_response([], status=100), ValueError, "status", "100"),
    *[
        (lambda name=name: sse_response([], headers={name: "x"}), ValueError, "headers", name)
        for name in ("Connection", "connection", "Content-Length", "Transfer-Encoding", "Upgrade")
    ],
    (
        lambda: sse_response([], headers={"Content-Type": "text/html"}),
        ValueError,
        "headers",
        "'text/html'",
    ),
    (lambda: RedisRelay("redis://localhost"), TypeError, "client", "'redis://localhost'"),
    (lambda: RedisRelay(None), TypeError, "client", "None"),
    (lambda: RedisRelay(REDIS, ""), ValueError, "key", "''"),
    (lambda: RedisRelay(REDIS, 5), TypeError, "key", "5"),  # type: ignore[arg-type]
    (lambda: RedisRelay(REDIS, maxlen=0), ValueError, "maxlen", "0"),
    (lambda: RedisRelay(REDIS, maxlen=True), TypeError, "maxlen", "True"),
    (lambda: RedisRelay(REDIS, maxlen=1.5), TypeError, "maxlen", "1.5"),  # type: ignore[arg-type]
    (lambda: EventBouncer(relay="redis://localhost"), TypeError, "relay", "'redis://localhost'"),  # type: ignore[arg-type]
    (lambda: EventBouncer(history=-1), ValueError, "history", "-1"),
    (lambda: EventBouncer(history=True), TypeError, "history", "True"),
    (lambda: EventBouncer(history=None), TypeError, "history", "None"),  # type: ignore[arg-type]
]


def circular() -> list[object]:
    """A list that holds itself, which JSON cannot say."""
    items: list[object] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("call", "error", "argument", "given"),
    REFUSED,
    ids=[f"{argument}-{ascii(given)}" for _, _, argument, given in REFUSED],
)
def test_bad_input_is_refused(
    call: Callable[[], object], error: type[Exception], argument: str, given: str
) -> None:
    """The message names the argument, states what was expected and shows what was given."""
    with pytest.raises(error) as caught:
        call()
    assert error is type(caught.value)
    assert re.match(f"{argument}: expected .+ got .*{re.escape(given)}", str(caught.value))


def test_bad_input_reaches_nobody() -> None:
    """A broadcast that is refused loses nothing of what others send, and ends nobody's stream."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.broadcast("before")
    for bad in (math.nan, "\ud800", None, object()):
        with pytest.raises((ValueError, TypeError)):
            bouncer.broadcast(bad)
    bouncer.broadcast("after")
    assert ["before", "after"] == held(subscription)


def test_bad_input_is_shown_in_short() -> None:
    """A message stays readable, whatever the size of what was given."""
    with pytest.raises(TypeError) as caught:
        format_sse({"key": ["x" * 10**6, object()]})
    assert len(str(caught.value)) < 500


BROADCASTING_HANDLER = """
import signal
from sse_bouncer import EventBouncer

bouncer = EventBouncer(history=1, maxsize=10**6)
subscription = bouncer.subscribe()
signal.signal(signal.SIGALRM, lambda *_: bouncer.broadcast("signal"))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for number in range(10_000):
    bouncer.broadcast(number)
signal.setitimer(signal.ITIMER_REAL, 0)
bouncer.close()
ids = [tuple(map(int, frame.split()[1].split("-"))) for frame in subscription]
print(sum(one >= other for one, other in zip(ids, ids[1:])), "out of order")
"""


def test_fan_out_ids_increase_when_a_signal_handler_broadcasts() -> None:
    """In the very middle of a broadcast of the thread that it interrupts."""
    finished = run_python(BROADCASTING_HANDLER)
    assert ("0 out of order\n", "") == (finished.stdout, finished.stderr)


SUBSCRIBING_UNDER_A_HANDLER = """
import signal
from sse_bouncer import EventBouncer

def value(frame):
    return tuple(map(int, frame.split()[1].split("-")))

bouncer = EventBouncer(history=10**6, maxsize=10**6)
start = bouncer.last_event_id
last, subscriptions, busy = start, [], True
signal.signal(signal.SIGALRM, lambda *_: busy and bouncer.broadcast("signal"))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for number in range(5000):
    if number % 100 == 0:
        last = bouncer.last_event_id
    subscriptions.append((last, bouncer.subscribe(last_event_id=last)))
    if number % 10:
        bouncer.unsubscribe(subscriptions.pop()[1])
busy = False
signal.setitimer(signal.ITIMER_REAL, 0)
everything = bouncer.subscribe(last_event_id=start)
bouncer.close()
ids = list(map(value, everything))
bad = 0
for last, subscription in subscriptions:
    after = tuple(map(int, last.split("-")))
    bad += [id for id in ids if id > after] != list(map(value, subscription))
print(len(ids) > 100, bad)
"""


def test_fan_out_a_signal_handler_broadcasts_in_the_middle_of_subscribing() -> None:
    """Whoever subscribes just then gets it, once, and in its place."""
    finished = run_python(SUBSCRIBING_UNDER_A_HANDLER)
    assert ("True 0\n", "") == (finished.stdout, finished.stderr)


UNSUBSCRIBING_HANDLER = """
import signal
from sse_bouncer import EventBouncer

bouncer = EventBouncer(maxsize=1)
leaving = [bouncer.subscribe() for _ in range(20_000)]
bouncer.broadcast("fills them")
signal.signal(signal.SIGALRM, lambda *_: leaving and bouncer.unsubscribe(leaving.pop()))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
bouncer.broadcast("waits for them, and drops them")
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(leaving) < 20_000, bouncer.stats()["subscribers"])
"""


def test_fan_out_a_signal_handler_unsubscribes_who_is_waited_for() -> None:
    finished = run_python(UNSUBSCRIBING_HANDLER)
    assert ("True 0\n", "") == (finished.stdout, finished.stderr)


# =================================================================================================
# RESPONSE
# =================================================================================================


def app_of(view: Callable[[], Any]) -> flask.Flask:
    """An app with ``view`` at ``/``."""
    app = flask.Flask("test")
    app.add_url_rule("/", "view", view)
    return app


def call(app: flask.Flask, method: str = "GET") -> Any:
    """Call the app as a server does, and return the body: not iterated, not closed."""
    return app(create_environ("/", method=method), lambda status, headers, exc_info=None: bytes)


HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-store, no-transform",
    "x-accel-buffering": "no",
}


def test_response_headers() -> None:
    bouncer = EventBouncer()
    with app_of(bouncer.stream).test_client().get("/") as response:
        assert HEADERS == {name.lower(): value for name, value in response.headers.items()}
        assert 200 == response.status_code


def test_response_status_and_headers_of_ones_own() -> None:
    app = app_of(
        lambda: sse_response(["x"], status=202, headers={"X-Mine": "1", "cache-control": "private"})
    )
    response = app.test_client().get("/")
    expected = {**HEADERS, "x-mine": "1", "cache-control": "private"}
    assert expected == {name.lower(): value for name, value in response.headers.items()}
    assert 202 == response.status_code


def test_response_leaves_the_callers_headers_alone() -> None:
    headers = {"X-Mine": "1"}
    with app_of(lambda: sse_response(["x"], headers=headers)).test_client().get("/"):
        assert {"X-Mine": "1"} == headers


def test_response_does_not_hang_the_test_client() -> None:
    """The client returns before the first event, and each event can be had when it is sent."""
    bouncer = EventBouncer()
    with app_of(bouncer.stream).test_client().get("/") as response:
        body = iter(response.response)
        assert b":\n" == next(body)
        bouncer.broadcast("hi", "greet")
        assert b"event: greet\ndata: hi\n\n" == next(body)
        assert 1 == len(bouncer.subscribers)
    assert not bouncer.subscribers


def test_response_ends_when_the_bouncer_closes() -> None:
    bouncer = EventBouncer()
    with app_of(bouncer.stream).test_client().get("/") as response:
        bouncer.broadcast("held")
        bouncer.close()
        assert b":\ndata: held\n\n" == response.data


def test_response_has_heartbeats_while_nothing_happens() -> None:
    bouncer = EventBouncer(heartbeat=0.001)
    with app_of(bouncer.stream).test_client().get("/") as response:
        body = iter(response.response)
        assert [b":\n", b":\n", b":\n"] == [next(body) for _ in range(3)]
        bouncer.broadcast("hi", id=1)
        wait_until(lambda: next(body) == b"id: 1\ndata: hi\n\n", "the event among the heartbeats")
        assert b":\n" == next(body)


def test_response_streams_a_subscription() -> None:
    """sse_response(subscription) is the same stream as stream(), for a route with its own ideas."""
    bouncer = EventBouncer(retry=5)
    subscription = bouncer.subscribe()
    bouncer.broadcast("hi")
    with app_of(lambda: sse_response(subscription)).test_client().get("/") as response:
        bouncer.close()
        assert b"retry: 5\ndata: hi\n\n" == response.data


def test_response_stream_of_channels() -> None:
    bouncer = EventBouncer()
    with app_of(lambda: bouncer.stream("a", "b")).test_client().get("/") as response:
        for channel in ("a", "c", "b", None):
            bouncer.broadcast(str(channel), channel=channel)
        bouncer.close()
        assert b":\ndata: a\n\ndata: b\n\ndata: None\n\n" == response.data


def opening(bouncer: EventBouncer) -> bytes:
    with app_of(bouncer.stream).test_client().get("/") as response:
        return next(response.iter_encoded())


@pytest.mark.parametrize(
    ("retry", "expected"), [(None, b":\n"), (0, b"retry: 0\n"), (1500, b"retry: 1500\n")]
)
def test_response_opening(retry: int | None, expected: bytes) -> None:
    """A stream opens with a line that is no block of its own: a block would be a phantom event."""
    assert expected == opening(EventBouncer(retry=retry))


def test_response_retry_is_spread_over_its_range() -> None:
    bouncer = EventBouncer(retry=(10**6, 10**9))
    opened = [re.fullmatch(rb"retry: ([0-9]+)\n", opening(bouncer)) for _ in range(20)]
    values = {int(match[1]) for match in opened if match}
    assert len(values) > 10
    assert 10**6 <= min(values) <= max(values) <= 10**9


@pytest.mark.parametrize("retry", [None, 700, (700, 700)])
def test_response_refused_is_told_to_come_back(retry: Any) -> None:
    """Beyond max_subscribers the answer is 200, a retry and the end: no event, no 503."""
    bouncer = EventBouncer(max_subscribers=1, retry=retry)
    with bouncer.subscribe():
        response = app_of(bouncer.stream).test_client().get("/")
    parser = Parser()
    assert (200, []) == (response.status_code, parser.feed(response.data))
    assert re.fullmatch(rb"retry: [0-9]+\n: [^\n]+\n", response.data)
    assert parser.retry == 700 if retry else parser.retry is not None and parser.retry >= 1000
    assert HEADERS["content-type"] == response.headers["Content-Type"]


def test_response_after_close_is_told_to_come_back() -> None:
    bouncer = EventBouncer(retry=9)
    bouncer.close()
    assert app_of(bouncer.stream).test_client().get("/").data.startswith(b"retry: 9\n: ")


def test_response_of_a_generator_is_its_items_and_nothing_else() -> None:
    def items() -> Iterator[object]:
        yield "a\nb"
        yield format_sse("c", "greet")
        yield {"n": 1}
        yield b"bytes"
        yield ""

    expected = "data: a\ndata: b\n\nevent: greet\ndata: c\n\n" 'data: {"n": 1}\n\n'
    expected += "data: bytes\n\ndata: \n\n"
    assert expected == app_of(lambda: sse_response(items())).test_client().get("/").text


@pytest.mark.parametrize("source", [["a", "b"], ("a", "b"), map(str, ["a", "b"]), deque("ab")])
def test_response_of_any_iterable(source: Any) -> None:
    body = app_of(lambda: sse_response(source)).test_client().get("/").text
    assert "data: a\n\ndata: b\n\n" == body


def test_response_of_nothing_is_empty() -> None:
    assert b"" == app_of(lambda: sse_response([])).test_client().get("/").data


def test_response_items_by_the_apps_json_provider() -> None:
    """A generator's dates go as in jsonify, though its app context has ended when it runs."""
    day = datetime.date(2030, 1, 2)
    app = app_of(lambda: sse_response([day]))
    assert f"data: {app.json.dumps(day)}\n\n" == app.test_client().get("/").text


def test_response_leaves_out_what_cannot_be_formatted(caplog: pytest.LogCaptureFixture) -> None:
    """One bad item is logged, and the stream goes on."""
    app = app_of(lambda: sse_response(["a", math.nan, None, "\ud800", Unshowable(), "b"]))
    assert "data: a\n\ndata: b\n\n" == app.test_client().get("/").text
    assert [("sse_bouncer", logging.ERROR)] * 4 == [
        (record.name, record.levelno) for record in caplog.records
    ]
    assert "nan" in caplog.messages[0]


def test_response_raises_what_the_generator_raises() -> None:
    """The server hears of it as of any view's error, and the generator has cleaned up."""
    cleaned = []

    def items() -> Iterator[str]:
        try:
            yield "a"
            raise LookupError("broken")
        finally:
            cleaned.append(True)

    read = []
    with app_of(lambda: sse_response(items())).test_client().get("/") as response:
        with pytest.raises(LookupError, match="broken"):
            for part in response.response:
                read.append(part)
    assert (b"data: a\n\n", [True]) == (b"".join(read), cleaned)  # type: ignore[arg-type]


class Source:
    """An iterable with a close, that keeps count."""

    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("items", [0, 1, 2, 3])
def test_response_closes_its_source(items: int) -> None:
    """However far the body was read, closing it closes the source, once."""
    source = Source()
    body = call(app_of(lambda: sse_response(source)))
    list(itertools.islice(body, items))
    assert 0 == source.closed
    body.close()
    assert 1 == source.closed


def test_response_to_head_closes_its_source() -> None:
    source = Source()
    response = app_of(lambda: sse_response(source)).test_client().head("/")
    response.close()
    assert (1, b"") == (source.closed, response.data)


def test_response_to_head_subscribes_nobody() -> None:
    bouncer = EventBouncer(max_subscribers=1)
    app = app_of(bouncer.stream)
    body = call(app, "HEAD")
    assert not bouncer.subscribers
    body.close()
    with app.test_client().head("/") as response:
        assert HEADERS == {name.lower(): value for name, value in response.headers.items()}
    assert 0 == bouncer.stats()["refused"]


@pytest.mark.parametrize("items", [0, 1, 2])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
def test_response_releases_its_subscription(items: int, closes: bool) -> None:
    """Never iterated, or left in the middle, closed or just forgotten, as the development server
    forgets the body when its client resets: nothing is left."""
    bouncer = EventBouncer()
    body = call(app_of(bouncer.stream))
    bouncer.broadcast("hi")
    iterator = iter(body)
    for _ in range(items):
        next(iterator)
    assert 1 == len(bouncer.subscribers)
    if closes:
        body.close()
    else:
        del body, iterator
        gc.collect()
    assert not bouncer.subscribers


def test_response_that_the_view_throws_away_releases_its_subscription() -> None:
    bouncer = EventBouncer()

    def view() -> str:
        bouncer.stream()
        return "something else"

    assert "something else" == app_of(view).test_client().get("/").text
    gc.collect()
    assert not bouncer.subscribers


@pytest.mark.parametrize("handled", [True, False])
def test_response_of_a_view_that_fails_releases_its_subscription(handled: bool) -> None:
    """At once, though a log handler keeps the traceback, and so the view's variables."""
    bouncer = EventBouncer()
    kept: list[BaseException] = []

    def view() -> Any:
        subscription = bouncer.subscribe()
        if subscription:
            raise LookupError("no such thing")

    def keep(error: LookupError) -> tuple[str, int]:
        kept.append(error)
        if handled:
            return "sorry", 404
        raise error

    app = app_of(view)
    app.register_error_handler(LookupError, keep)
    assert app.test_client().get("/").status_code == (404 if handled else 500)
    assert kept and kept[0].__traceback__
    assert not bouncer.subscribers


def test_response_of_a_view_that_keeps_its_subscription_stays() -> None:
    """A subscription made in a request that went well may be kept beyond it."""
    bouncer = EventBouncer()
    kept: list[Subscription] = []

    def view() -> str:
        kept.append(bouncer.subscribe())
        return "ok"

    assert "ok" == app_of(view).test_client().get("/").text
    assert tuple(kept) == bouncer.subscribers


def test_response_uses_the_apps_response_class() -> None:
    class Response(flask.Response):
        pass

    app = app_of(lambda: sse_response(["a"]))
    app.response_class = Response
    with app.test_request_context():
        assert isinstance(app.dispatch_request(), Response)


# =================================================================================================
# SERVERS
#
# The same promises under the development server, gunicorn's three kinds of worker, and waitress.
# =================================================================================================

HOLD_HEADERS_BACK = {"waitress"}  # until there is something of the body

generators = pytest.mark.parametrize("remote", ["served"], indirect=True)  # are always served


def test_server_sends_the_headers_at_once(remote: Callable[..., Remote]) -> None:
    """EventSource fires onopen before the first event: there is none in this stream."""
    client = remote().client()
    client.wait_opening()
    assert b":\n" == client.body
    assert 200 == client.status
    assert HEADERS.items() <= dict(client.headers).items()
    names = [name for name, _ in client.headers]
    assert sorted(set(names)) == sorted(names)


def test_server_sends_events_in_order_and_to_the_byte(remote: Callable[..., Remote]) -> None:
    bouncer = remote(retry=1234)
    client = bouncer.client()
    rows = [row for row in FRAMES if {"data"} == set(row[0]) and isinstance(row[0]["data"], str)]
    for start in range(0, len(rows), 16):  # no more at a time than the queue holds
        bouncer.broadcast(*[given["data"] for given, _, _ in rows[start : start + 16]])
    bouncer.close()
    assert [event for _, _, read in rows for event in read] == client.wait_end()
    assert client.whole
    assert "".join(["retry: 1234\n", *[sent for _, sent, _ in rows]]).encode() == client.body


def test_server_sends_heartbeats(remote: Callable[..., Remote]) -> None:
    client = remote(heartbeat=0.05).client()
    client.wait_until(lambda: len(client.body) >= 8, "three heartbeats")
    assert b":\n" * 4 == client.body[:8]


@pytest.mark.parametrize("leave", [Client.close, Client.reset])
def test_server_notices_a_leaver_by_the_next_heartbeat(
    remote: Callable[..., Remote], leave: Callable[[Client], None]
) -> None:
    bouncer = remote(heartbeat=0.1)
    client = bouncer.client()
    client.wait_opening()
    leave(client)
    bouncer.wait_for(subscribers=0)


def test_server_keeps_no_descriptor_of_leavers(remote: Callable[..., Remote]) -> None:
    """However clients leave, the server has as many descriptors as it had."""
    bouncer = remote(heartbeat=0.05)
    server = bouncer.server
    before: list[int] = []
    for leave in [Client.close, Client.reset] * 5:
        client = bouncer.client()
        client.wait_opening()
        leave(client)
        bouncer.wait_for(subscribers=0)
        before = before or [server.count("fd")]  # with what the first stream ever has set up
    wait_until(lambda: server.count("fd") <= before[0], "the descriptors are closed")


def test_server_notices_a_client_that_never_read(remote: Callable[..., Remote]) -> None:
    bouncer = remote(heartbeat=0.1)
    bouncer.client().reset()
    bouncer.wait_for(subscribers=0)


def test_server_ends_a_stream_that_is_closed(remote: Callable[..., Remote]) -> None:
    """What was sent arrives whole, and the end of the body is a proper one."""
    bouncer = remote()
    client = bouncer.client("?channel=ada")
    bouncer.broadcast("to ada", channel="ada")
    bouncer.close("?channel=ada")
    assert [Event("to ada")] == client.wait_end()
    assert client.whole


def test_server_burst_drops_nobody_who_keeps_up(remote: Callable[..., Remote]) -> None:
    """A route that broadcasts a thousand events in a loop loses no reader."""
    bouncer = remote()
    clients = [bouncer.client() for _ in range(bouncer.readers)]
    readers = [Task(client.events, 1000) for client in clients]
    bouncer.server.post(f"/burst/{bouncer.name}/1000")
    expected = [Event(str(number)) for number in range(1000)]
    for reader in readers:
        assert expected == reader.result()
    assert 0 == bouncer.stats()["dropped"]


def test_server_drops_who_stops_reading(remote: Callable[..., Remote]) -> None:
    """A stalled client gets what was held for it and then the end; others lose nothing."""
    bouncer = remote()
    stalled = bouncer.client(receive_buffer=4096)
    others = [bouncer.client() for _ in range(min(bouncer.readers - 1, 2))]
    for first in range(0, 450, 15):  # in portions below maxsize, so that others do keep up
        bouncer.server.post(f"/burst/{bouncer.name}/15?size=65536&first={first}")
        for other in others:
            assert list(range(first, first + 15)) == [int(e.data) for e in other.events(15)]
    bouncer.wait_for(dropped=1)
    bouncer.broadcast("last")
    assert [Event("last")] * len(others) == [other.event() for other in others]
    numbers = [int(event.data) for event in stalled.wait_end()]
    assert list(range(len(numbers))) == numbers
    assert stalled.whole
    assert len(numbers) >= 16


def test_server_head_subscribes_nobody(remote: Callable[..., Remote]) -> None:
    bouncer = remote(max_subscribers=1)
    client = bouncer.server.client(f"/subscribe/{bouncer.name}", method="HEAD")
    assert 200 == client.status
    assert HEADERS.items() <= dict(client.headers).items()
    client.close()
    bouncer.wait_for(subscribers=0)
    assert 0 == bouncer.stats()["refused"]


@pytest.mark.parametrize(("path", "status"), [("/fail/", 500), ("/discard/", 200)])
def test_server_releases_what_never_became_a_stream(
    remote: Callable[..., Remote], path: str, status: int
) -> None:
    """A view that raises after subscribing, or that answers with something else."""
    bouncer = remote()
    for _ in range(3):
        client = bouncer.server.client(path + bouncer.name)
        assert status == client.status
        client.close()
    bouncer.wait_for(subscribers=0)


@generators
@pytest.mark.parametrize("leave", [Client.close, Client.reset])
def test_server_runs_a_generators_finally(
    remote: Callable[..., Remote], leave: Callable[[Client], None]
) -> None:
    bouncer = remote()
    bouncer.server.post(f"/open/{bouncer.name}")
    client = bouncer.server.client(f"/generate/{bouncer.name}")
    assert [Event("0"), Event("1"), Event("2")] == client.events(3)
    assert not bouncer.stats()["ended"]
    leave(client)
    bouncer.wait_for(ended=True)


@generators
def test_server_sends_a_generators_headers_before_its_first_item(
    remote: Callable[..., Remote]
) -> None:
    bouncer = remote()
    client = bouncer.server.client(f"/generate/{bouncer.name}")
    if bouncer.server.kind not in HOLD_HEADERS_BACK:
        assert (200, b"") == (client.status, bytes(client.body))
    bouncer.server.post(f"/open/{bouncer.name}")
    assert Event("0") == client.event()
    assert client.body.startswith(b"data: 0\n\n")


# =================================================================================================
# HUB
#
# A stream holds no worker: under the four servers that hand out their connections, thousands of
# streams cost one thread. And a stream costs nobody else anything, whatever its client does.
# =================================================================================================

HUBS = ["development", "sync", "gthread", "gevent"]  # the servers that hand out their connections
MANY = 1_000

# The app of SERVERS, with middleware and hooks around it, and ways to look at its process.
HUB_APP = (
    APP
    + '''
import gc, logging, resource, sys, time, zlib
from flask import Response
import sse_bouncer

seen = {}  # by path: what middleware and teardown functions saw of the last request

class Watched:
    """A body as middleware passes it on."""

    def __init__(self, chunks, sight, compressor):
        self.chunks, self.sight, self.compressor = chunks, sight, compressor

    def __iter__(self):
        for chunk in self.chunks:
            self.sight["bytes"] += len(chunk)
            if self.compressor and chunk:
                chunk = self.compressor.compress(chunk)
                chunk += self.compressor.flush(zlib.Z_SYNC_FLUSH)
            yield chunk
        if self.compressor:
            yield self.compressor.flush()

    def close(self):
        if hasattr(self.chunks, "close"):
            self.chunks.close()
        self.sight["closed"] = True

def middleware(wsgi):
    def call(environ, start_response):
        sight = seen[environ["PATH_INFO"]] = {"bytes": 0, "closed": False, "teardown": None}
        query = environ["QUERY_STRING"]
        if "http2" in query:
            environ["SERVER_PROTOCOL"] = "HTTP/2"
        if "held" in query:  # as some do that look at the response before they pass it on
            held = []
            def hold(status, headers, exc_info=None):
                held[:] = status, headers
                return write
            def write(data):
                return real(data)
            chunks = wsgi(environ, hold)
            real = start_response(held[0], held[1] + [("X-Middleware", "yes")])
            return chunks
        added = [("X-Middleware", "yes")]
        if "deflate" in query:
            added.append(("Content-Encoding", "deflate"))
        def start(status, headers, exc_info=None):
            sight["status"] = status
            return start_response(status, headers + added, exc_info)
        compressor = zlib.compressobj() if "deflate" in query else None
        return Watched(wsgi(environ, start), sight, compressor)
    return call

app.wsgi_app = middleware(app.wsgi_app)

@app.after_request
def after(response):
    response.headers["X-After"] = "yes"
    response.headers["X-Pid"] = str(os.getpid())
    response.set_cookie("first", "1")
    response.set_cookie("second", "2")
    change = request.args.get("change")
    if change == "status":
        response.status_code = 201
    if change == "headers":  # as people have it from blog posts
        response.headers["Connection"] = "keep-alive"
        response.headers["Transfer-Encoding"] = "chunked"
    if change == "body":
        response.response = (chunk for chunk in response.response)
    return response

@app.teardown_request
def teardown(error):
    seen[request.path]["teardown"] = repr(error)

@app.get("/seen/<path:path>")
def look(path):
    return seen["/" + path]

@app.route("/respond/<name>", methods=["GET", "POST"])
def respond(name):
    return sse_response(bouncers[name].subscribe())

@app.get("/primed/<name>")
def primed(name):
    """A stream that holds something before it begins, and may have ended already."""
    response = sse_response(bouncers[name].subscribe("primed"))
    bouncers[name].broadcast("first")
    bouncers[name].broadcast("second")
    if request.args.get("end"):
        bouncers[name].close("primed")
    return response

class Hostile(str):
    """A channel that breaks in the hub's thread only."""
    def __hash__(self):
        if threading.current_thread().name == "sse_bouncer":
            raise RuntimeError("hostile")
        return super().__hash__()

@app.get("/hostile/<name>")
def hostile(name):
    subscription = bouncers[name].subscribe("channel")
    subscription.channels = (Hostile("channel"),)
    return sse_response(subscription)

@app.get("/threads")
def threads():
    return [thread.name for thread in threading.enumerate()]

@app.get("/peak-memory")
def peak_memory():
    """In bytes; Linux counts in units of 1,024."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

@app.post("/frame/<name>/<int:count>")
def frame(name, count):
    """One frame, made before, so that nothing slows the loop down."""
    one = sse_bouncer.format_sse("x" * int(request.args["size"]))
    for _ in range(count):
        bouncers[name].broadcast(one)
    return {}

# A busy process.

turns = [0]
busy = []

@app.post("/busy/<int:on>")
def make_busy(on):
    busy[:] = [True] * on
    def work():
        while busy:
            turns[0] += 1
    if on:
        threading.Thread(target=work, daemon=True).start()
    return {}

@app.get("/turns")
def count_turns():
    return {"turns": turns[0]}

# Broadcasts from where one would not expect them.

class Finaliser:
    def __init__(self, name, number):
        self.own = self  # only the collector finds it, when and where that happens to run
        self.name, self.number = name, number

    def __del__(self):
        bouncers[self.name].broadcast(self.number)

@app.post("/finalisers/<name>/<int:count>")
def finalisers(name, count):
    for number in range(count):
        Finaliser(name, number)
    gc.collect()
    return {}

mine = threading.Lock()
in_handler = threading.Event()

class Handler(logging.Handler):
    """Tells a bouncer what the module logs; takes a lock that its app holds elsewhere too."""

    def __init__(self, name, broken):
        super().__init__()
        self.name, self.broken = name, broken

    def emit(self, record):
        if self.broken:
            raise OSError("no space left on device")
        in_handler.set()
        with mine:
            bouncers[self.name].broadcast(record.levelname)

@app.post("/handler/<name>")
def add_handler(name):
    in_handler.clear()
    sse_bouncer.logger.addHandler(Handler(name, "broken" in request.args))
    return {}

@app.delete("/handler/<name>")
def remove_handlers(name):
    sse_bouncer.logger.handlers.clear()
    return {}

@app.post("/hold-lock/<name>")
def hold_lock(name):
    """Broadcast more than the hub has room for, while the hub waits for a lock that is held."""
    with mine:
        bouncers[name].broadcast("locked")
        in_handler.wait()
        bouncers[name].broadcast("far ahead".rjust(2 * 65536))
    return {}

# What breaks in the system below: reading fails in a way that no one has thought of.

read = os.read

def hostile_read(fd, size):
    data = read(fd, size)
    if b"BOOM" in data:
        raise RuntimeError("boom")
    return data

os.read = hostile_read

@app.post("/descriptors/<int:more>")
def limit_descriptors(more):
    """Let the process have so many more descriptors than it has now; 0 is what there may be."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = len(os.listdir("/proc/self/fd")) + more if more else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return {}

@app.get("/options/<int:port>")
def options(port):
    """The options of the process's connection to a port: its name, and value."""
    import socket
    wanted = {"SOL_SOCKET": ["SO_SNDBUF", "SO_KEEPALIVE"],
              "IPPROTO_TCP": ["TCP_NODELAY", "TCP_KEEPIDLE", "TCP_USER_TIMEOUT"]}
    for fd in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(fd)))
        except OSError:
            continue
        with copy:
            try:
                found = copy.getpeername()[1] == port
            except (OSError, IndexError):
                continue
            if found:
                return {
                    option: copy.getsockopt(getattr(socket, level), getattr(socket, option))
                    for level, names in wanted.items() for option in names
                }

@app.post("/fork")
def fork():
    """Fork, and return the port at which the child serves the same app."""
    from werkzeug.serving import make_server
    ear, mouth = os.pipe()
    if os.fork() == 0:
        server = make_server("127.0.0.1", 0, app, threaded=True)
        os.write(mouth, b"%d" % server.port)
        server.serve_forever()
    return {"port": int(read(ear, 100))}
'''
)


def allow_descriptors() -> None:
    """Raise the soft limit of this process, and so of those it starts, to what MANY take."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * MANY:
        go_without(f"a limit of {2 * MANY} descriptors")
    if soft != resource.RLIM_INFINITY and soft < 2 * MANY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * MANY, hard))


@pytest.fixture(scope="module", params=HUBS)
def hub(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with one worker, and that as small as can be: a stream that held it would show."""
    options = {"gthread": ["--threads", "1"]}.get(request.param, [])
    if request.param != "development":
        options += ["--access-logfile", "-"]
    allow_descriptors()
    with serve(request.param, HUB_APP, *options) as server:
        yield server


def quiet(server: Server, **options: object) -> Remote:
    """Make a bouncer without heartbeats: what is noticed is noticed by itself."""
    return Remote(server, **{"heartbeat": None, **options})


def open_streams(bouncer: Remote, count: int) -> list[Client]:
    """Open many streams, and wait until all are the hub's."""
    clients: list[Client] = []
    while len(clients) < count:
        # No more at once than wait for the development server to accept them.
        for _ in range(min(count - len(clients), 100)):
            clients.append(bouncer.server.client(f"/subscribe/{bouncer.name}"))
        bouncer.wait_for(detached=len(clients))
    return clients


only_development = pytest.mark.parametrize("hub", ["development"], indirect=True)
# Where a stream that goes through the server leaves it able to do something else.
concurrent = pytest.mark.parametrize("hub", ["development", "gevent"], indirect=True)


def test_hub_many_streams_hold_no_worker(hub: Server) -> None:
    """Beside 1,000 streams the only worker answers, and there is no thread more than with one.

    When they have left, there is nothing left of them.
    """
    bouncer = quiet(hub)
    open_streams(bouncer, 1)  # with what the first stream ever has set up
    hub.close_clients()
    bouncer.wait_for(subscribers=0)
    log, descriptors, threads = hub.log(), hub.count("fd"), hub.count("task")
    clients = open_streams(bouncer, MANY)
    assert MANY == bouncer.stats()["subscribers"]
    wait_until(lambda: hub.count("task") <= threads, "the requests' threads end")
    bouncer.broadcast("hi")
    for client in clients:
        assert Event("hi") == client.event()
    hub.close_clients()
    bouncer.wait_for(subscribers=0)
    wait_until(lambda: hub.count("fd") <= descriptors, "the descriptors are closed")
    odd = re.compile(r'^(?!127\.0\.0\.1 - - \[[^]]*\] "(GET|POST) /\S* HTTP/1.1" 200 ).*\n', re.M)
    assert [] == odd.findall(hub.log().removeprefix(log))


def test_hub_first_streams_at_once(hub: Server) -> None:
    """However many first streams there are at once, one hub is started, and none gets lost."""
    kind = hub.kind
    with serve(kind, HUB_APP) as server:
        bouncer = quiet(server)
        start = threading.Barrier(20)

        def connect() -> Client:
            start.wait()
            return server.client(f"/subscribe/{bouncer.name}")

        for task in [Task(connect) for _ in range(20)]:
            client = task.result()
            client.wait_opening()
        assert 20 == bouncer.stats()["detached"]
        assert 1 == server.get("/threads").count("sse_bouncer")


def test_hub_sends_what_the_app_and_middleware_have_set(hub: Server) -> None:
    client = quiet(hub).client()
    assert {("x-after", "yes"), ("x-middleware", "yes")} <= set(client.headers)
    cookies = [value for name, value in client.headers if name == "set-cookie"]
    assert ["first=1; Path=/", "second=2; Path=/"] == cookies
    names = Counter(name for name, _ in client.headers if name != "set-cookie")
    assert {1} == set(names.values())
    assert {"date", "connection"} <= set(names)
    assert not {"content-length", "transfer-encoding"} & set(names)


def test_hub_leaves_out_headers_that_are_the_servers_own(hub: Server) -> None:
    """They would say of the body what it is not."""
    bouncer = quiet(hub)
    client = bouncer.client("?change=headers")
    check_stream(bouncer, client, detached=True)
    names = Counter(name for name, _ in client.headers if name != "set-cookie")
    assert {1} == set(names.values())
    assert ("connection", "close") in client.headers


def test_hub_hands_over_what_a_subscriber_holds(hub: Server) -> None:
    bouncer = quiet(hub)
    client = hub.client(f"/primed/{bouncer.name}")
    assert 200 == client.status
    assert 1 == bouncer.stats()["detached"]
    bouncer.broadcast("third")
    assert [Event("first"), Event("second"), Event("third")] == client.events(3)


def test_hub_hands_over_who_has_ended(hub: Server) -> None:
    """It gets what it holds, and then the end."""
    client = hub.client(f"/primed/{quiet(hub).name}?end=now")
    assert [Event("first"), Event("second")] == client.wait_end()


def test_hub_server_sees_a_short_and_normal_request(hub: Server) -> None:
    """Middleware, teardown functions and the access log do, while the stream goes on."""
    bouncer = quiet(hub)
    client = bouncer.client()
    path = f"/subscribe/{bouncer.name}"
    expected = {"status": "200 OK", "bytes": 0, "closed": True, "teardown": "None"}
    wait_until(lambda: hub.get(f"/seen{path}") == expected, "the request has ended")
    hub.wait_for_log(rf'"GET {path} HTTP/1.1" 200 ')
    bouncer.broadcast("hi")
    assert Event("hi") == client.event()


# What leaves a stream to the server: the method, the query, and the bouncer's options.
FALL_BACKS: dict[str, tuple[str, str, dict[str, object]]] = {
    "the bouncer is told not to": ("GET", "", {"detach": False}),
    "method": ("POST", "", {}),
    "status": ("GET", "?change=status", {}),
    "HTTP/2": ("GET", "?http2", {}),
    "body wrapped": ("GET", "?change=body", {}),
    "compressed by middleware": ("GET", "?deflate", {}),
    "headers that middleware holds back": ("GET", "?held", {}),
}


def check_stream(bouncer: Remote, client: Client, *, detached: bool) -> None:
    """The client gets the same bytes whichever way they go, and they go the way they should."""
    bouncer.wait_for(subscribers=1, detached=int(detached))
    bouncer.broadcast("hi")
    bouncer.close()
    client.wait_end()
    assert client.whole
    assert client.status in (200, 201)
    compressed = ("content-encoding", "deflate") in client.headers
    assert b":\ndata: hi\n\n" == (zlib.decompress(client.body) if compressed else client.body)


@concurrent
@pytest.mark.parametrize(
    ("method", "query", "options"), FALL_BACKS.values(), ids=list(FALL_BACKS)
)
def test_hub_leaves_to_the_server(
    hub: Server, method: str, query: str, options: dict[str, object]
) -> None:
    bouncer = quiet(hub, **options)
    client = hub.client(f"/respond/{bouncer.name}{query}", method=method)
    check_stream(bouncer, client, detached=False)
    assert ("x-middleware", "yes") in client.headers


@concurrent
def test_hub_sends_the_head_that_the_server_would(hub: Server) -> None:
    """But for the date, and for how the server frames the body."""
    own = {"date", "server", "connection", "transfer-encoding"}
    heads = [
        [pair for pair in quiet(hub, detach=detach).client().headers if pair[0] not in own]
        for detach in (True, False)
    ]
    assert sorted(heads[1]) == sorted(heads[0])


def test_hub_head_leaves_nothing_behind(hub: Server) -> None:
    bouncer = quiet(hub)
    client = hub.client(f"/respond/{bouncer.name}", method="HEAD")
    assert 200 == client.status
    bouncer.wait_for(subscribers=0)
    assert b"" == client.body


def test_hub_takes_over_http_1_0(hub: Server) -> None:
    bouncer = quiet(hub)
    check_stream(bouncer, bouncer.client(protocol="HTTP/1.0"), detached=True)


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_hub_takes_over_a_unix_socket(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with serve(kind, APP, "--bind", f"unix:{path}") as server:
        bouncer = quiet(server)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        client = server.client(f"/subscribe/{bouncer.name}", connection=connection)
        check_stream(bouncer, client, detached=True)


@pytest.mark.parametrize("kind", ["development", "gthread", "gevent"])
def test_hub_leaves_tls_to_the_server(kind: str, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    subprocess.run(
        [need_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2"]
        + ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    names = ["--cert", "--key"] if kind == "development" else ["--certfile", "--keyfile"]
    with serve(kind, APP, names[0], certificate, names[1], key) as server:
        context = ssl.create_default_context(cafile=certificate)

        def client(path: str, method: str = "GET", body: bytes = b"") -> Client:
            plain = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
            tls = context.wrap_socket(plain, server_hostname="127.0.0.1")
            headers = {"Connection": "close", "Content-Type": "application/json"}
            headers["Content-Length"] = str(len(body))
            return server.client(path, method=method, headers=headers, connection=tls, more=body)

        def ask(path: str, method: str = "GET", body: bytes = b"") -> Any:
            answer = client(path, method, body)
            answer.wait_until(lambda: answer.body.endswith(b"}\n"), "the answer")
            answer.close()
            return json.loads(answer.body)

        ask("/new/tls", "POST", b"{}")
        stream = client("/subscribe/tls")
        assert 200 == stream.status
        stats = ask("/stats/tls")
        assert (1, 0) == (stats["subscribers"], stats["detached"])
        ask("/broadcast/tls", "POST", b'[{"msg": "hi"}]')
        ask("/close/tls", "POST")
        assert [Event("hi")] == stream.wait_end()


def test_hub_leaves_waitress_its_connections() -> None:
    with serve("waitress", APP) as server:
        bouncer = quiet(server)
        check_stream(bouncer, bouncer.client(), detached=False)


COMPRESSED = (
    APP
    + """
from flask_compress import Compress
app.config["COMPRESS_MIMETYPES"] = ["text/event-stream"]
Compress(app)
"""
)


def test_hub_leaves_what_flask_compress_has_wrapped() -> None:
    need("flask_compress")
    with serve("development", COMPRESSED) as server:
        bouncer = quiet(server)
        client = bouncer.client(headers={"Accept-Encoding": "deflate"})
        check_stream(bouncer, client, detached=False)
        assert ("content-encoding", "deflate") in client.headers


FORKS_FOR_EACH_REQUEST = """
from flask import Flask
from sse_bouncer import EventBouncer

app = Flask(__name__)
app.add_url_rule("/", view_func=EventBouncer(heartbeat=0.05).stream)
app.run(processes=4, threaded=False)
"""


def test_hub_leaves_alone_a_server_that_forks_for_each_request() -> None:
    """Its process would end with the request, and the hub with it."""
    with serve("script", FORKS_FOR_EACH_REQUEST) as server:
        server.client("/").wait_for_body(b":\n" * 5)


WITHOUT_A_THREAD = """
import socket, threading
from flask import Flask
from werkzeug.serving import make_server
from sse_bouncer import EventBouncer

def start(thread):
    if thread.name == "sse_bouncer" and no_more:
        raise RuntimeError("can't start new thread")
    real_start(thread)

real_start, threading.Thread.start, no_more = threading.Thread.start, start, True
app = Flask("app")
bouncer = EventBouncer()
app.add_url_rule("/", view_func=bouncer.stream)
server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()

def client():
    connection = socket.create_connection(("127.0.0.1", server.port), 20)
    connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
    stream = connection.makefile("rb")
    while stream.readline() != b":\\n":
        pass
    return stream

streams = [client()]
served = bouncer.stats()
no_more = False
streams.append(client())
while bouncer.stats()["detached"] < 1:
    pass
bouncer.broadcast("hi")
print(served["subscribers"], served["detached"], [b"data: hi\\n" in stream for stream in streams])
"""


def test_hub_leaves_streams_to_the_server_while_there_is_no_thread_for_it() -> None:
    finished = run_python(WITHOUT_A_THREAD)
    assert "1 0 [True, True]\n" == finished.stdout, finished.stderr
    assert 1 == finished.stderr.count("streams hold workers, for want of a thread")


def test_hub_leaves_the_test_client_alone() -> None:
    bouncer = EventBouncer()
    with app_of(bouncer.stream).test_client().get("/"):
        assert (1, 0) == (bouncer.stats()["subscribers"], bouncer.stats()["detached"])


def test_hub_leaves_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that the app is given there is no socket's."""
    bouncer = EventBouncer()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environ = {**create_environ("/"), "werkzeug.socket": ours}
        app = app_of(bouncer.stream)
        monkeypatch.setattr(sys, "platform", "win32")
        body = app(environ, lambda status, headers, exc_info=None: lambda data: None)
        monkeypatch.undo()
        assert b":\n" == next(iter(body))
        assert (1, 0) == (bouncer.stats()["subscribers"], bouncer.stats()["detached"])


def test_hub_sends_without_ctypes() -> None:
    """Where Python is built without it, the same arrives."""
    with serve("development", "import sys; sys.modules['ctypes'] = None\n" + APP) as server:
        bouncer = quiet(server)
        stalled = bouncer.client(receive_buffer=4096)
        others = [bouncer.client() for _ in range(3)]
        for first in range(0, 300, 15):
            server.post(f"/burst/{bouncer.name}/15?size=16384&first={first}")
            for other in others:
                assert list(range(first, first + 15)) == [int(e.data) for e in other.events(15)]
        bouncer.wait_for(dropped=1)
        numbers = [int(event.data) for event in stalled.wait_end()]
        assert list(range(len(numbers))) == numbers
        assert len(numbers) >= 16


# -- fork -----------------------------------------------------------------------------------------

PRELOADED = '''
import os
from flask import Flask
from sse_bouncer import EventBouncer

app = Flask(__name__)
bouncer = EventBouncer(heartbeat=None)

@app.get("/")
def subscribe():
    response = bouncer.stream()
    response.headers["X-Pid"] = str(os.getpid())
    return response

@app.post("/")
def publish():
    bouncer.broadcast(os.getpid())
    return str(os.getpid())
'''


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_hub_of_each_worker_of_a_preloaded_app(kind: str) -> None:
    """Who is subscribed in one worker gets what is broadcast there, and nothing else."""
    with serve(kind, PRELOADED, "--preload", "--workers", "2") as server:
        clients: dict[str, list[Client]] = collections.defaultdict(list)
        published: Counter[str] = Counter()

        def both_serve() -> bool:
            client = server.client("/")
            clients[dict(client.headers)["x-pid"]].append(client)
            return len(clients) == 2

        def both_publish() -> bool:
            published[server.post("/")] += 1
            return len(published) == 2

        wait_until(both_serve, "both workers have a stream")
        wait_until(both_publish, "both workers broadcast")
        assert clients.keys() == published.keys()
        for pid, own in clients.items():
            for client in own:
                assert [Event(pid)] * published[pid] == client.events(published[pid])
        server.stop()
        for client in itertools.chain.from_iterable(clients.values()):
            assert Counter() == Counter(client.wait_end())


@pytest.fixture
def forked() -> Iterator[tuple[Remote, Client, Remote]]:
    """A bouncer with a detached stream, that stream's client, and the bouncer in a fork's child."""
    if not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    with serve("development", "import warnings; warnings.simplefilter('ignore')\n" + HUB_APP) as s:
        parent = quiet(s)
        client = parent.client()
        assert 200 == client.status
        assert 1 == parent.stats()["detached"]
        child = copy.copy(parent)
        child.server = copy.copy(s)
        child.server.port = s.post("/fork")["port"]
        yield parent, client, child


def test_hub_child_begins_with_no_stream(forked: tuple[Remote, Client, Remote]) -> None:
    _, _, child = forked
    assert (0, 0) == (child.stats()["subscribers"], child.stats()["detached"])


def test_hub_child_has_one_of_its_own(forked: tuple[Remote, Client, Remote]) -> None:
    """What is broadcast in one of the two processes arrives at its own clients alone."""
    parent, parents, child = forked
    childs = child.client()
    assert 200 == childs.status
    assert 1 == child.stats()["detached"]
    child.broadcast("child")
    parent.broadcast("parent")
    assert Event("child") == childs.event()
    assert Event("parent") == parents.event()
    child.close()
    parent.close()
    assert [[], []] == [childs.wait_end(), parents.wait_end()]


def test_hub_child_holds_no_connection_of_its_parent(
    forked: tuple[Remote, Client, Remote],
) -> None:
    """The parent is killed, its child lives on: the parent's clients see the end."""
    parent, client, child = forked
    parent.server.stop(signal.SIGKILL)
    client.wait_end()
    assert 0 == child.stats()["subscribers"]


GENERATIONS = """
import os, sse_bouncer
bouncer = sse_bouncer.EventBouncer()
for generation in range(5):
    sse_bouncer._hub()
    print(len(os.listdir("/proc/self/fd")), flush=True)
    if pid := os.fork():
        os.waitpid(pid, 0)
        break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_hub_child_inherits_no_descriptor() -> None:
    finished = run_python(GENERATIONS, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert 1 == len(set(finished.stdout.split())), finished.stdout
    assert 5 == len(finished.stdout.split()), finished.stderr


# -- slow and dead clients ------------------------------------------------------------------------


def here(bouncer: EventBouncer, port: int, **headers: str) -> Client:
    """Open a stream of a bouncer in this process, whose client takes little before it is read."""
    before = bouncer.stats()["detached"]
    client = Client(port, "/", headers=headers, receive_buffer=4096)
    wait_until(lambda: bouncer.stats()["detached"] > before, "it is detached")
    return client


BIG = 65536  # bytes: a connection that is not read takes one or two events of this size


def broadcast_big(bouncer: EventBouncer, count: int) -> None:
    for number in range(count):
        bouncer.broadcast(str(number).rjust(BIG))


@pytest.mark.parametrize(
    ("sizes", "read"), [([BIG] * 30, 20), ([BIG] * 3 + [0] * 40, 43)], ids=["in part", "wholly"]
)
def test_hub_keeps_a_client_that_catches_up_in_time(
    sizes: list[int], read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was over its bound, and reads, stays; one that does not is dropped."""
    monkeypatch.setattr(sse_bouncer, "_PATIENCE", 2.0)
    bouncer = EventBouncer(heartbeat=None)
    with serve_here(app_of(bouncer.stream)) as port, contextlib.ExitStack() as stack:
        client, other = (
            stack.enter_context(contextlib.closing(here(bouncer, port))) for _ in range(2)
        )
        for number, size in enumerate(sizes):
            bouncer.broadcast(str(number).rjust(size))
        events = client.events(read)
        wait_until(lambda: bouncer.stats()["dropped"] > 0, "the other one is dropped")
        bouncer.broadcast(len(sizes))
        events += client.events(len(sizes) + 1 - read)
        assert list(range(len(sizes) + 1)) == [int(event.data) for event in events]
        assert 1 == bouncer.stats()["dropped"]
        assert other.wait_end()


def test_hub_bound_holds_after_a_replay() -> None:
    """What a client came to fetch does not count; once it has it, the bound is what it was."""
    bouncer = EventBouncer(heartbeat=None, history=200)
    start = bouncer.last_event_id or ""
    for number in range(100):
        bouncer.broadcast(number)
    with serve_here(app_of(bouncer.stream)) as port:
        with contextlib.closing(here(bouncer, port, **{"Last-Event-ID": start})) as client:
            assert list(range(100)) == [int(event.data) for event in client.events(100)]
            broadcast_big(bouncer, 40)
            wait_until(lambda: bouncer.stats()["dropped"] == 1, "it is dropped")


def test_hub_drops_at_once_who_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the time that a client over its bound has: memory is not to be had without end."""
    monkeypatch.setattr(sse_bouncer, "_PATIENCE", 10 * TIMEOUT)
    bouncer = EventBouncer(heartbeat=None)
    with serve_here(app_of(bouncer.stream)) as port:
        with contextlib.closing(here(bouncer, port)):
            for number in range(3000):
                bouncer.broadcast(str(number).rjust(1024))
            wait_until(lambda: bouncer.stats()["dropped"] == 1, "it is dropped")


def test_hub_heartbeats_drop_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has yet to take an event is not sent any: they would add up."""
    monkeypatch.setattr(sse_bouncer, "_PATIENCE", 0.1)
    bouncer = EventBouncer(heartbeat=0.005)
    with serve_here(app_of(bouncer.stream)) as port, contextlib.ExitStack() as stack:
        stalled, other = (
            stack.enter_context(contextlib.closing(here(bouncer, port))) for _ in range(2)
        )
        broadcast_big(bouncer, 8)
        other.wait_until(lambda: other.body.count(b":\n") > 200, "heartbeats")
        assert 0 == bouncer.stats()["dropped"]
        assert list(range(8)) == [int(event.data) for event in stalled.events(8)]


def test_hub_hands_over_nobody_in_the_middle_of_a_broadcast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader whose queue is full is not made one that never was: it is dropped, and told."""
    monkeypatch.setattr(sse_bouncer, "_MOMENT", 2.0)
    bouncer = EventBouncer(maxsize=1, heartbeat=None)

    def view() -> Any:
        subscription = bouncer.subscribe()
        bouncer.broadcast("held")
        Task(bouncer.broadcast, "no room").wait_until_parked()
        return sse_response(subscription)

    with serve_here(app_of(view)) as port, contextlib.closing(Client(port, "/")) as client:
        assert [Event("held")] == client.wait_end()


HAND_OVER = EventBouncer._hand_over.__code__


@pytest.mark.parametrize("line", sorted({n for *_, n in HAND_OVER.co_lines() if n})[1:])
def test_hub_close_in_the_middle_of_a_hand_over(line: int) -> None:
    """As a signal handler may: whichever line it comes before, the stream ends."""
    bouncer = EventBouncer(heartbeat=None)
    closed: list[bool] = []

    def trace(frame: Any, event: str, argument: object) -> Any:
        if frame.f_code is HAND_OVER and event == "line" and frame.f_lineno == line and not closed:
            closed.append(True)
            bouncer.close("x")
        return trace

    def view() -> Any:
        sys.settrace(trace)  # of this request's thread
        return bouncer.stream("x")

    with serve_here(app_of(view)) as port, contextlib.closing(Client(port, "/")) as client:
        client.wait_opening()
        wait_until(lambda: closed or bouncer.stats()["detached"], "it is handed over")
        bouncer.broadcast("x")
        if not closed:  # a line that is for those who were closed alone
            bouncer.close("x")
        assert {Event("x")} >= set(client.wait_end())
        assert not bouncer.subscribers


def test_hub_keeps_one_copy_of_a_big_event(hub: Server) -> None:
    """However many clients have yet to take the rest of it."""
    bouncer, size = quiet(hub), 8 * 2**20
    hub.post(f"/frame/{bouncer.name}/1?size={size}")  # what it takes to make one
    before = hub.get("/peak-memory")["bytes"]
    with contextlib.ExitStack() as stack:
        connections = []
        for number in range(1, 11):
            connections.append(stack.enter_context(connect(bouncer)))
            bouncer.wait_for(detached=number)
        hub.post(f"/frame/{bouncer.name}/1?size={size}")
        readers = [Task(count_bytes, connection) for connection in connections]
        bouncer.close()
        assert {len(f"data: {'x' * size}\n\n")} == {reader.result() for reader in readers}
    assert hub.get("/peak-memory")["bytes"] - before < 4 * size


def connect(bouncer: Remote) -> socket.socket:
    """Open a stream of which only the length is looked at."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.settimeout(TIMEOUT)
    connection.connect(("127.0.0.1", bouncer.server.port))
    connection.sendall(f"GET /subscribe/{bouncer.name} HTTP/1.1\r\n\r\n".encode())
    return connection


def count_bytes(connection: socket.socket) -> int:
    """Read a stream to its end; return the length of what comes after its opening."""
    head, _, rest = connection.recv(4096).partition(b"\r\n\r\n")
    total = len(rest.removeprefix(b":\n"))
    chunk = bytearray(2**20)
    while received := connection.recv_into(chunk):
        total += received
    return total


def test_hub_stalled_client_costs_the_kernel_little(hub: Server) -> None:
    """One that reads nothing is dropped before a megabyte is under way to it."""
    bouncer = quiet(hub)
    stalled = bouncer.client(receive_buffer=4096)
    hub.post(f"/burst/{bouncer.name}/1000?size=1024")
    bouncer.wait_for(dropped=1)
    assert 0 == bouncer.stats()["subscribers"]
    numbers = [int(event.data) for event in stalled.wait_end()]
    assert list(range(len(numbers))) == numbers
    assert stalled.whole


@pytest.mark.parametrize("leave", [Client.close, Client.reset, Client.half_close])
def test_hub_sees_a_client_leave(hub: Server, leave: Callable[[Client], None]) -> None:
    """At once: there is no heartbeat, and no event, that would find out."""
    bouncer = quiet(hub)
    client, other = bouncer.client(), bouncer.client()
    leave(client)
    bouncer.wait_for(subscribers=1)
    bouncer.broadcast("hi")
    assert Event("hi") == other.event()


def test_hub_half_closed_client_sees_the_end(hub: Server) -> None:
    client = quiet(hub).client()
    client.half_close()
    assert [] == client.wait_end()


# What a client may send after its request, and go on: little, or what looks like a request.
SAYINGS = {
    "garbage": b"\x00\xff" * 1000,
    "request": b"GET /threads HTTP/1.1\r\nHost: x\r\n\r\n",
    "post": b"POST /close/nobody HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("saying", SAYINGS.values(), ids=list(SAYINGS))
def test_hub_takes_no_notice_of_what_a_client_says(hub: Server, saying: bytes) -> None:
    bouncer = quiet(hub)
    client = bouncer.client()
    client.say(saying)
    check_stream(bouncer, client, detached=True)


@pytest.mark.parametrize("saying", SAYINGS.values(), ids=list(SAYINGS))
def test_hub_takes_no_notice_of_what_came_with_the_request(hub: Server, saying: bytes) -> None:
    """A pipelined request, or what is none, that the server has read along with the first."""
    bouncer = quiet(hub)
    client = hub.client(f"/subscribe/{bouncer.name}", more=saying)
    check_stream(bouncer, client, detached=True)


def test_hub_cuts_off_who_says_too_much(hub: Server) -> None:
    """And nobody else: in pieces, as one that means no harm could send them."""
    bouncer = quiet(hub)
    client, other = bouncer.client(), bouncer.client()

    def is_cut_off() -> bool:
        with contextlib.suppress(ConnectionError):
            client.say(b"blah" * 256)
        return bouncer.stats()["subscribers"] == 1

    wait_until(is_cut_off, "the talker is cut off")
    client.wait_end()
    bouncer.broadcast("hi")
    assert Event("hi") == other.event()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@only_development
def test_hub_asks_the_kernel_to_watch_the_peer(hub: Server) -> None:
    client = quiet(hub).client()
    options = hub.get(f"/options/{client.address[1]}")
    assert options.pop("SO_SNDBUF") <= 2 * 64 * 1024  # Linux doubles what it is given
    expected = {"SO_KEEPALIVE": 1, "TCP_NODELAY": 1, "TCP_KEEPIDLE": 30, "TCP_USER_TIMEOUT": 30_000}
    assert expected == options


# A network of its own that can be taken down: a peer vanishes without a word.
VANISHED = """
import fcntl, socket, struct, sys, threading, time
import sse_bouncer
from flask import Flask
from werkzeug.serving import make_server

def loopback(flags):  # SIOCSIFFLAGS; 1 is up
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags))

# One second where it is thirty: the kernel counts them.
quick = {socket.TCP_KEEPIDLE: 1, socket.TCP_USER_TIMEOUT: 1000}
sse_bouncer._OPTIONS = tuple((l, o, quick.get(o, v)) for l, o, v in sse_bouncer._OPTIONS)

loopback(1)
app = Flask("app")
bouncer = sse_bouncer.EventBouncer(heartbeat=0.2)
app.add_url_rule("/", view_func=bouncer.stream)
server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = socket.create_connection(("127.0.0.1", server.port))
client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
client.recv(1)
while not bouncer.stats()["detached"]:
    time.sleep(0.01)
loopback(0)
while bouncer.subscribers:
    time.sleep(0.01)
print("reaped")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes a network of its own")
def test_hub_reaps_a_peer_that_has_vanished() -> None:
    """Its machine has lost power, or its network: no FIN, no RST, no answer."""
    unshare = [need_program("unshare"), "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        go_without("the right to a network of one's own")
    finished = subprocess.run(
        [*unshare, sys.executable, "-c", VANISHED],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert "reaped\n" == finished.stdout, finished.stderr


def fill(bouncer: Remote) -> list[Client]:
    """Open streams until the server has no descriptor to spare; return those let in."""
    clients: list[Client] = []
    refused = 0
    while refused < 3:  # one may be let in yet: other connections have just been closed
        if (client := come(bouncer)) is None:
            refused += 1
        else:
            clients.append(client)
    return clients


def come(bouncer: Remote) -> Client | None:
    """Return a client that was let in, or None."""
    client = bouncer.server.client(f"/subscribe/{bouncer.name}")
    client.wait_opening()
    assert 200 == client.status
    if client.body == b"retry: 4321\n":
        return client
    assert [] == client.wait_end()
    assert b"retry: 4321\n: no room now, come back later\n" == client.body
    client.close()
    return None


@contextlib.contextmanager
def few_descriptors(server: Server) -> Iterator[None]:
    server.post("/descriptors/60")
    try:
        yield
    finally:
        server.close_clients()
        server.post("/descriptors/0")


def test_hub_at_the_limit_of_descriptors(hub: Server) -> None:
    """Those beyond it are told to come back, the others lose nothing, and there is room again.

    The log says so once.
    """
    bouncer = quiet(hub, retry=4321)
    with few_descriptors(hub):
        clients = fill(bouncer)
        assert 1 == hub.log().count("for want of descriptors")
        assert len(clients) == bouncer.stats()["detached"] == bouncer.stats()["subscribers"]
        for _ in range(5):
            clients.pop().close()
        bouncer.wait_for(detached=len(clients))
        wait_until(lambda: come(bouncer), "somebody is let in")
        bouncer.broadcast("hi")
        for client in clients:
            assert Event("hi") == client.event()


@pytest.mark.parametrize("hub", ["development", "gthread", "gevent"], indirect=True)
def test_hub_leaves_the_server_descriptors(hub: Server) -> None:
    """Streams take no more than leaves some for ordinary connections, also for idle ones."""
    bouncer = quiet(hub, retry=4321)
    with few_descriptors(hub), contextlib.ExitStack() as stack:
        clients = fill(bouncer)
        for _ in range(3):
            idle = socket.create_connection(("127.0.0.1", hub.port), TIMEOUT)
            stack.enter_context(idle)
        assert len(clients) == bouncer.stats()["detached"]


# -- one order ------------------------------------------------------------------------------------


def test_hub_one_order_while_clients_come_and_go(hub: Server, rng: random.Random) -> None:
    """Whatever clients do, each sees an unbroken piece of one order, and only its own channels.

    Descriptors are reused all the time here, by clients of other channels.
    """
    bouncer = quiet(hub, maxsize=1000)
    open_streams(bouncer, 1)
    hub.close_clients()
    bouncer.wait_for(subscribers=0)
    descriptors = hub.count("fd")
    threads = hub.count("task")
    sets = [("a",), ("b",), ("a", "b"), ()]
    queries = {channels: "?" + "&".join(f"channel={c}" for c in channels) for channels in sets}
    steady = [bouncer.client(queries["a", "b"]) for _ in range(3)]
    readers = [Task(client.wait_end) for client in steady]
    over = threading.Event()

    def visit(seed: int) -> list[tuple[tuple[str, ...], list[str]]]:
        own = random.Random(seed)
        visits = []
        while not over.is_set():
            channels = own.choice(sets)
            path = f"/subscribe/{bouncer.name}{queries[channels]}"
            client = Client(hub.port, path, receive_buffer=own.choice([None, 4096]))
            seen = []
            if own.random() < 0.8:
                assert 200 == client.status
                seen = client.events(own.choice([0, 1, 3, 10])) if not over.is_set() else []
            how = own.choice(["close", "reset", "say", "half-close"])
            if how == "say":
                with contextlib.suppress(ConnectionError):
                    client.say(b"blah" * own.randrange(20_000))
            if how == "half-close":
                client.half_close()
                seen += client.wait_end()
            client.reset() if how == "reset" else client.close()
            visits.append((channels, [event.data for event in seen]))
        return visits

    def publish(seed: int) -> list[str]:
        own = random.Random(seed)
        sent = []
        for number in range(40):
            channel = own.choice([None, "a", "b"])
            texts = [f"{channel} {seed} {number} {i}" for i in range(own.choice([1, 1, 20]))]
            bouncer.broadcast(*texts, channel=channel)
            sent += texts
        return sent

    seeds = [rng.randrange(10**9) for _ in range(14)]
    visitors = [Task(visit, seed) for seed in seeds[:12]]
    publishers = [Task(publish, seed) for seed in seeds[12:]]
    sent = list(itertools.chain.from_iterable(task.result() for task in publishers))
    over.set()
    last = [f"None over {number}" for number in range(10)]  # for those who wait for some more
    bouncer.broadcast(*last)
    visits = list(itertools.chain.from_iterable(task.result() for task in visitors))
    bouncer.close()
    order, *others = [[event.data for event in reader.result()] for reader in readers]
    hub.close_clients()
    assert [order] * 2 == others
    assert Counter(sent + last) == Counter(order)
    for channels in sets:
        told = [data for data in order if data.split()[0] in ("None", *channels)]
        position = {data: index for index, data in enumerate(told)}
        for seen in [seen for its, seen in visits if its == channels and seen]:
            start = position[seen[0]]
            assert told[start : start + len(seen)] == seen
    bouncer.wait_for(subscribers=0)
    wait_until(lambda: hub.count("fd") <= descriptors, "the descriptors are closed")
    wait_until(lambda: hub.count("task") <= threads, "the threads have ended")


# -- publishers -----------------------------------------------------------------------------------

# Each event must wake the hub by itself: the next is not broadcast before it has arrived.
PING_PONG = """
import socket, sys, threading
from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server
from sse_bouncer import EventBouncer

WSGIRequestHandler.log_request = lambda *_: None
app = Flask("app")
bouncers = [EventBouncer(heartbeat=None) for _ in range(4)]
app.add_url_rule("/<int:n>", "stream", lambda n: bouncers[n].stream())
server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()

def play(n):
    client = socket.create_connection(("127.0.0.1", server.port), float(sys.argv[1]))
    client.sendall(b"GET /%d HTTP/1.1\\r\\n\\r\\n" % n)
    stream = client.makefile("rb")
    while stream.readline() != b":\\n":
        pass
    for number in range(1000):
        bouncers[n].broadcast(number)
        assert (b"data: %d\\n" % number, b"\\n") == (stream.readline(), stream.readline())
    print("played\\n", end="")  # in one piece

sys.setswitchinterval(1e-6)  # threads are interrupted wherever they can be
players = [threading.Thread(target=play, args=[n]) for n in range(4)]
for player in players:
    player.start()
for player in players:
    player.join()
"""


def test_hub_misses_no_wake_up() -> None:
    """Four publishers play with the hub, each of them a ball of its own."""
    finished = run_python(PING_PONG, str(TIMEOUT / 2))
    assert ("played\n" * 4, "") == (finished.stdout, finished.stderr)



@pytest.mark.parametrize("hub", ["development", "sync", "gthread"], indirect=True)
def test_hub_in_a_busy_process(hub: Server) -> None:
    """With a thread that never pauses, nothing is lost, and that thread goes on too."""
    bouncer = quiet(hub)
    clients = open_streams(bouncer, 50)
    hub.post("/busy/1")
    try:
        before = hub.get("/turns")["turns"]
        hub.post(f"/burst/{bouncer.name}/500")
        expected = [Event(str(number)) for number in range(500)]
        for client in clients:
            assert expected == client.events(500)
        assert hub.get("/turns")["turns"] > before
    finally:
        hub.post("/busy/0")
    assert 0 == bouncer.stats()["dropped"]


@pytest.mark.parametrize(("size", "count"), [(64, 20_000), (64 * 1024, 1_000)])
def test_hub_holds_back_a_publisher_in_a_loop(hub: Server, size: int, count: int) -> None:
    """It cannot get so far ahead of the hub that it fills the memory, and nothing is lost.

    The clients only count, and may fall behind: they are not what it waits for.
    """
    bouncer = quiet(hub, maxsize=count)
    hub.post(f"/frame/{bouncer.name}/1?size={size}")  # what it takes to make one
    before = hub.get("/peak-memory")["bytes"]
    with contextlib.ExitStack() as stack:
        readers = []
        for number in (1, 2, 3):
            readers.append(Task(count_bytes, stack.enter_context(connect(bouncer))))
            bouncer.wait_for(detached=number)
        hub.post(f"/frame/{bouncer.name}/{count}?size={size}")
        bouncer.close()
        (total,) = {reader.result() for reader in readers}
    assert 0 == bouncer.stats()["dropped"]
    assert count * len(f"data: {'x' * size}\n\n") == total
    assert hub.get("/peak-memory")["bytes"] - before < 32 * 2**20


def test_hub_takes_what_finalisers_broadcast(hub: Server) -> None:
    """The collector runs them in any thread, in the middle of anything."""
    bouncer = quiet(hub, maxsize=4000)
    client = bouncer.client()
    reader = Task(lambda: client.events(4000))
    for _ in range(4):
        hub.post(f"/finalisers/{bouncer.name}/1000")
    assert Counter([Event(str(n)) for n in range(1000)] * 4) == Counter(reader.result())


@contextlib.contextmanager
def log_handler(bouncer: Remote, kind: str = "") -> Iterator[None]:
    bouncer.server.post(f"/handler/{bouncer.name}{kind}")
    try:
        yield
    finally:
        bouncer.server.request("DELETE", f"/handler/{bouncer.name}")


def test_hub_survives_what_nobody_has_thought_of(hub: Server) -> None:
    """It is logged once, with its traceback, and costs the stream that it was about."""
    bouncer = quiet(hub)
    hub.complaints()
    unlucky, other = bouncer.client(), bouncer.client()
    unlucky.say(b"BOOM")
    unlucky.wait_end()
    bouncer.wait_for(subscribers=1)
    bouncer.broadcast("hi")
    assert Event("hi") == other.event()
    hub.wait_for_log("RuntimeError: boom\n")
    complaints = hub.complaints()
    assert 1 == complaints.count("Traceback (most recent call last)")
    assert 1 == complaints.count("unexpected; it costs one stream")


def test_hub_survives_a_subscription_that_breaks(hub: Server) -> None:
    """One whose channel cannot even be looked up to forget it: its client sees the end."""
    bouncer = quiet(hub)
    hub.complaints()
    other = bouncer.client()
    unlucky = hub.client(f"/hostile/{bouncer.name}")
    hub.wait_for_log("RuntimeError: hostile\n")
    hub.complaints()
    bouncer.broadcast("hi")
    assert Event("hi") == other.event()
    unlucky.wait_end()
    bouncer.wait_for(subscribers=1)


def test_hub_may_log_to_a_handler_that_broadcasts(hub: Server) -> None:
    bouncer, elsewhere = quiet(hub), quiet(hub)
    client, unlucky = bouncer.client(), elsewhere.client()
    with log_handler(bouncer):
        unlucky.say(b"BOOM")
        assert Event("ERROR") == client.event()
    bouncer.broadcast("hi")
    assert Event("hi") == client.event()


def test_hub_survives_a_log_handler_that_raises(hub: Server) -> None:
    """And what it was to log costs one stream, as ever."""
    bouncer = quiet(hub)
    with log_handler(bouncer, "?broken"):
        for _ in range(2):
            client, unlucky = bouncer.client(), bouncer.client()
            unlucky.say(b"BOOM")
            unlucky.wait_end()
            bouncer.broadcast("hi")
            assert Event("hi") == client.event()


@only_development
def test_hub_may_need_a_lock_that_a_publisher_holds(hub: Server) -> None:
    """The publisher is far ahead, and the hub, in a log handler, waits for the publisher."""
    bouncer, elsewhere = quiet(hub), quiet(hub)
    client, unlucky = bouncer.client(), elsewhere.client()
    with log_handler(bouncer):
        publisher = Task(lambda: hub.post(f"/hold-lock/{bouncer.name}"))
        assert Event("locked") == client.event()
        unlucky.say(b"BOOM")
        publisher.result()
        got = [event.data.strip() for event in client.events(2)]
    assert ["far ahead", "ERROR"] == got


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_hub_lets_a_worker_stop(kind: str) -> None:
    """SIGTERM ends it and 1,000 streams; gunicorn waits longer than we do for open requests."""
    allow_descriptors()
    with serve(kind, APP, "--graceful-timeout", "60") as server:
        clients = open_streams(quiet(server), MANY)
        assert 0 == server.stop()
        for client in clients:
            assert [] == client.wait_end()


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_hub_streams_of_a_recycled_worker_end(kind: str) -> None:
    """By gunicorn's --max-requests: its clients see the end, and the next worker has room."""
    with serve(kind, APP, "--max-requests", "100", "--graceful-timeout", "60") as server:
        bouncer = quiet(server)
        clients = open_streams(bouncer, 5)

        def is_recycled() -> bool:
            with contextlib.suppress(RefusedRequest, OSError):  # by the next one, or in between
                bouncer.stats()
            return "Autorestarting" in server.log()

        wait_until(is_recycled, "the worker is recycled")
        for client in clients:
            assert [] == client.wait_end()
        bouncer = quiet(server)
        client = bouncer.client()
        bouncer.broadcast("hi")
        assert Event("hi") == client.event()
        assert "" == server.complaints()


def test_hub_close_delivers_what_a_slow_client_has_still_to_get(hub: Server) -> None:
    """Also to one that has said something since, for which its connection could be reset."""
    bouncer = quiet(hub)
    client = bouncer.client(receive_buffer=4096)
    hub.post(f"/burst/{bouncer.name}/16?size=65536")
    bouncer.close()
    bouncer.wait_for(subscribers=0)
    client.say(b"blah")
    assert list(range(16)) == [int(event.data) for event in client.wait_end()]
    assert client.whole


def test_hub_lets_the_client_close_first(hub: Server) -> None:
    """One that has seen the end may say something before it closes, and gets no reset for it."""
    bouncer = quiet(hub)
    client = bouncer.client()
    bouncer.close()
    client.wait_end()
    for _ in range(10):
        client.say(b"blah")


@only_development
def test_hub_gives_up_an_ended_stream_that_nobody_reads(hub: Server) -> None:
    bouncer = quiet(hub)
    descriptors = hub.count("fd")
    for _ in range(5):
        bouncer.client(receive_buffer=4096)
    hub.post(f"/burst/{bouncer.name}/16?size=65536")
    bouncer.close()
    wait_until(lambda: hub.count("fd") <= descriptors, "the descriptors are closed")


SCRIPT_THAT_ENDS = '''
import signal, threading
from flask import Flask
from werkzeug.serving import make_server
from sse_bouncer import EventBouncer

app = Flask(__name__)
bouncer = EventBouncer()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # before any thread: for sigwait()
app.add_url_rule("/subscribe", view_func=bouncer.stream)
app.add_url_rule("/stats", view_func=bouncer.stats)

server = make_server("127.0.0.1", 0, app, threaded=True)
print(f"Running on http://127.0.0.1:{server.port}", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
signal.sigwait([signal.SIGTERM])
for number in range(100):
    bouncer.broadcast(str(number).rjust(SIZE))
'''


@pytest.mark.parametrize(("count", "size"), [(100, 0), (3, 50_000)])
def test_hub_sends_what_was_broadcast_right_before_exit(count: int, size: int) -> None:
    """All of it, to all, in as many parts as they take it; and nothing is printed as it goes."""
    with serve("script", SCRIPT_THAT_ENDS.replace("SIZE", str(size))) as server:
        clients = [server.client("/subscribe") for _ in range(count)]
        wait_until(lambda: server.get("/stats")["detached"] == count, "the streams are detached")
        readers = [Task(client.wait_end) for client in clients]
        server.process.send_signal(signal.SIGTERM)
        for reader in readers:
            assert list(range(100)) == [int(event.data) for event in reader.result()]
        assert 0 == server.process.wait(TIMEOUT)
        assert [] == re.findall(r"^(?!Running on|127\.0\.0\.1 - - ).+\n", server.log(), re.M)


# =================================================================================================
# HISTORY
#
# Nothing is lost between two connections: in one process, under every server, in a real browser.
# =================================================================================================


class Clock:
    """What the module takes for the time, in milliseconds."""

    def __init__(self) -> None:
        self.now = 1_900_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sse_bouncer, "_milliseconds", clock)
    return clock


def ids_of(bouncer: EventBouncer, *messages: object) -> list[str]:
    """Broadcast each message; return the id that each got."""
    ids = []
    for message in messages:
        bouncer.broadcast(message)
        ids.append(bouncer.last_event_id or "")
    return ids


def id_value(id: str) -> tuple[int, int]:
    milliseconds, sequence = map(int, id.split("-"))
    return milliseconds, sequence


def are_increasing(ids: Sequence[str]) -> bool:
    values = [id_value(id) for id in ids]
    return all(before < after for before, after in itertools.pairwise(values))


def test_history_numbers_events() -> None:
    """Ids look like ``<milliseconds>-<sequence>``, increase, and are what the subscribers see."""
    bouncer = EventBouncer(history=1)
    subscription = bouncer.subscribe()
    ids = ids_of(bouncer, *"abc")
    frames = [subscription.get_nowait() for _ in range(3)]
    assert ids == [event.id for event in parse("".join(frames).encode())]
    assert all(re.fullmatch("[0-9]{13}-[0-9]+", id) for id in ids)
    assert are_increasing(ids)


def test_history_keeps_what_the_publisher_wrote() -> None:
    """The id is added to an event's own fields; none of them is changed."""
    bouncer = EventBouncer(history=1)
    subscription = bouncer.subscribe()
    bouncer.broadcast("a\nb", "greet", retry=7)
    frame = format_sse("a\nb", "greet", id=bouncer.last_event_id, retry=7)
    assert parse(frame.encode()) == parse(subscription.get_nowait().encode())


def test_history_ids_tell_the_time(clock: Clock) -> None:
    bouncer = EventBouncer(history=1)
    clock.now += 1
    assert [f"{clock.now}-0", f"{clock.now}-1"] == ids_of(bouncer, "a", "b")


def test_history_ids_increase_when_the_clock_steps_back(clock: Clock) -> None:
    bouncer = EventBouncer(history=10)
    ids = ids_of(bouncer, "a", "b")
    clock.now -= 3_600_000
    ids += ids_of(bouncer, "c", "d")
    clock.now += 3_600_001
    ids += ids_of(bouncer, "e")
    assert are_increasing(ids)
    assert ["c", "d", "e"] == held(bouncer.subscribe(last_event_id=ids[1]))


def test_history_ids_increase_across_restarts(clock: Clock) -> None:
    """Also past an earlier process that gave thousands of ids in its last millisecond."""
    ids = ids_of(EventBouncer(history=1), *range(3000))
    clock.now += 1
    restarted = EventBouncer(history=1)
    assert are_increasing([ids[-1], restarted.last_event_id or "", *ids_of(restarted, "a")])


def test_history_none() -> None:
    """Without a history there are no ids, and one that a client sends has no effect."""
    bouncer = EventBouncer()
    bouncer.broadcast("missed")
    subscription = bouncer.subscribe(last_event_id="1-1")
    bouncer.broadcast("a")
    assert (None, False) == (bouncer.last_event_id, subscription.gap)
    assert "data: a\n\n" == subscription.get_nowait()


# How many events are kept, how many there were, after which of them a client comes back (0 is
# before the first), which of them it gets, and whether it has to be told of a gap: exactly when
# one that it has not seen is kept no more.
RESUMES = [
    (3, 0, 0, [], False),
    (3, 2, 0, [1, 2], False),
    (3, 2, 1, [2], False),
    (3, 2, 2, [], False),
    (3, 3, 0, [1, 2, 3], False),
    (3, 4, 0, [2, 3, 4], True),
    (3, 4, 1, [2, 3, 4], False),
    (3, 9, 9, [], False),
    (3, 9, 8, [9], False),
    (3, 9, 6, [7, 8, 9], False),
    (3, 9, 5, [7, 8, 9], True),
    (3, 9, 1, [7, 8, 9], True),
    (1, 2, 1, [2], False),
    (1, 2, 0, [2], True),
]
resumes = pytest.mark.parametrize(("history", "count", "after", "missed", "gap"), RESUMES)


@resumes
def test_history_replays_what_was_missed(
    history: int, count: int, after: int, missed: list[int], gap: bool
) -> None:
    """In order, then the live stream; a gap is one exactly if something is kept no more."""
    bouncer = EventBouncer(history=history)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(1, count + 1))]
    subscription = bouncer.subscribe(last_event_id=ids[after])
    bouncer.broadcast("live")
    assert ([*map(str, missed), "live"], gap) == (held(subscription), subscription.gap)


@pytest.mark.parametrize("id", ["0-0", "1-1", "99999999999999-0", "9" * 20 + "-" + "9" * 20])
def test_history_of_another_process_is_a_gap(id: str) -> None:
    """An id of the past, or of a future that never was: the client gets all there is."""
    bouncer = EventBouncer(history=3)
    ids_of(bouncer, *range(5))
    subscription = bouncer.subscribe(last_event_id=id)
    assert (["2", "3", "4"], True) == (held(subscription), subscription.gap)


@pytest.mark.parametrize(
    ("channels", "missed"), [([], "ad"), (["x"], "abd"), (["y"], "acd"), (["y", "x"], "abcd")]
)
def test_history_replays_ones_own_channels(channels: list[str], missed: str) -> None:
    bouncer = EventBouncer(history=9)
    start = bouncer.last_event_id
    for message, channel in [("a", None), ("b", "x"), ("c", "y"), ("d", None)]:
        bouncer.broadcast(message, channel=channel)
    assert [*missed] == held(bouncer.subscribe(*channels, last_event_id=start))


def test_history_last_event_id_closes_the_gap_between_page_and_stream() -> None:
    """What falls between the rendering of a page and its connecting is replayed."""
    bouncer = EventBouncer(history=9)
    app = app_of(lambda: bouncer.stream(last_event_id=flask.request.args.get("after")))
    rendered_at = bouncer.last_event_id
    bouncer.broadcast("between")
    response = app.test_client().get("/", query_string={"after": rendered_at})
    with response:
        bouncer.close()
        assert ["between"] == [event.data for event in parse(response.data)]


def test_history_replay_may_be_longer_than_maxsize() -> None:
    """The bound is for what a subscriber falls behind by, not for what it came to fetch."""
    bouncer = EventBouncer(maxsize=2, history=100)
    start = bouncer.last_event_id
    ids_of(bouncer, *range(100))
    subscription = bouncer.subscribe(last_event_id=start)
    assert not subscription.full()
    ids_of(bouncer, 100, 101)
    assert subscription.full()
    bouncer.broadcast("too much")
    assert [str(number) for number in range(102)] == datas(subscription)


def test_history_replay_once_read_counts_no_more() -> None:
    """As the replay is read, the room for what comes live does not grow."""
    bouncer = EventBouncer(maxsize=2, history=100)
    start = bouncer.last_event_id
    ids_of(bouncer, *range(10))
    subscription = bouncer.subscribe(last_event_id=start)
    replay = [subscription.get_nowait() for _ in range(10)]
    ids_of(bouncer, *range(10, 13))
    bouncer.close()
    assert [str(n) for n in range(12)] == datas([*replay, *subscription])


def test_history_no_gap_and_no_repeat_while_events_flow(rng: random.Random) -> None:
    """Whenever threads leave and come back, each sees an unbroken piece of the one order."""
    bouncer = EventBouncer(maxsize=10_000, history=10_000)
    start = bouncer.last_event_id
    stays = [[rng.randrange(1, 8) for _ in range(100)] for _ in range(8)]

    def come_and_go(stays: list[int]) -> list[str]:
        seen: list[Event] = []
        for stay in stays:
            last = seen[-1].id if seen else start
            with bouncer.subscribe(last_event_id=last) as subscription:
                assert not subscription.gap
                seen += parse("".join(itertools.islice(subscription, stay)).encode())
        return [event.data for event in seen]

    readers = [Task(come_and_go, own) for own in stays]
    publishers = [Task(lambda: ids_of(bouncer, *range(500))) for _ in range(2)]
    for publisher in publishers:
        publisher.result()
    order = held(bouncer.subscribe(last_event_id=start))
    assert 1000 == len(order)
    assert [order[: sum(stay)] for stay in stays] == [reader.result() for reader in readers]


# Whoever gives the bouncer ids of their own would break those that clients come back with.
OWN_IDS: list[Callable[[EventBouncer], None]] = [
    lambda bouncer: bouncer.broadcast("x", id=7),
    lambda bouncer: bouncer.broadcast("x", id=""),
    lambda bouncer: bouncer.broadcast(format_sse("x", id="7")),
    lambda bouncer: bouncer.broadcast(format_sse(id="7")),
    lambda bouncer: bouncer.broadcast(Frame("id\ndata: x\n\n")),
    lambda bouncer: bouncer.broadcast(Frame("data: x\rid:7\r\r")),
    lambda bouncer: bouncer.broadcast(Frame("data: x\r\nid:7\r\n\r\n")),
]


@pytest.mark.parametrize("broadcast", OWN_IDS)
def test_history_refuses_ids(broadcast: Callable[[EventBouncer], None]) -> None:
    """It reaches nobody, neither now nor in a replay."""
    bouncer = EventBouncer(history=9)
    start = bouncer.last_event_id
    subscription = bouncer.subscribe()
    with pytest.raises(ValueError, match="id: expected none, as the bouncer .* got .*; leave it"):
        broadcast(bouncer)
    assert [[], []] == [held(subscription), held(bouncer.subscribe(last_event_id=start))]


@pytest.mark.parametrize("text", ["x\nid: 7", "id: 7", "xid: 7", "x\nid"])
def test_history_takes_text_that_only_looks_like_an_id(text: str) -> None:
    bouncer = EventBouncer(history=9)
    subscription = bouncer.subscribe()
    bouncer.broadcast(text)
    assert [text] == held(subscription)


# What is no event's id, though int() or a careless pattern would take some of it for one.
STRANGERS = [
    *("", " ", "-", "x", "0", "1", "1-", "-1", "--", "1-1-1", "1--1", "-1-1", "+1-1", "1-+1"),
    *(" 1-1", "1-1 ", "1 -1", "1-1\n", "\n1-1", "1-1\r\n", "1-1\0", "1-1,2-2", "1.0-1", "1e3-1"),
    *("0x1-1", "1_0-1", "１-１", "²-1", "٣-٣", "1–1", "1−1", "None", "null", "NaN-0", "$", "*"),
    *("9" * 21 + "-1", "1-" + "9" * 21, "1" * 100_000, "-" * 100_000, "1-" * 50_000, "é", "😀"),
    *("<script>", "../../etc/passwd", "' OR 1=1", "%00", "\ufeff1-1", "\ud800", "1-\udfff"),
]


@pytest.mark.parametrize("text", STRANGERS, ids=lambda text: ascii(text[:20]))
def test_history_a_malformed_id_is_as_none(text: str) -> None:
    bouncer = EventBouncer(history=9)
    bouncer.broadcast("missed")
    subscription = bouncer.subscribe(last_event_id=text)
    bouncer.broadcast("live")
    assert (["live"], False) == (held(subscription), subscription.gap)


DIGITS = set("0123456789")


def test_history_fuzz_any_last_event_id(rng: random.Random) -> None:
    """Random texts, many of them nearly ids: what is one by hand's reckoning is replayed from."""
    bouncer = EventBouncer(history=20)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(50))]
    values = [id_value(id) for id in ids]
    for _ in range(3000 * FUZZ):
        milliseconds, sequence = rng.choice(values)
        number = rng.choice([milliseconds, milliseconds, 0, rng.randrange(10 ** rng.randrange(25))])
        text = f"{number}-{max(0, sequence + rng.randrange(-1, 2))}"
        if rng.random() < 0.5:
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + rng.choice(PIECES) + text[cut + rng.randrange(2) :]
        halves = text.split("-")
        missed: Sequence[object] = []
        gap = False
        if len(halves) == 2 and all(set(h) <= DIGITS and 1 <= len(h) <= 20 for h in halves):
            after = id_value(text)
            missed = [number for number in range(30, 50) if values[number + 1] > after]
            if gap := not values[30] <= after <= values[50]:
                missed = range(30, 50)
        with bouncer.subscribe(last_event_id=text) as subscription:
            found = held(subscription), subscription.gap
            assert ([str(number) for number in missed], gap) == found, text


def response_to(bouncer: EventBouncer, **headers: str) -> bytes:
    """Return what a client is sent that connects when nothing more is broadcast."""
    with app_of(bouncer.stream).test_client().get("/", headers=headers) as response:
        bouncer.close()
        data: bytes = response.data
        return data


def test_history_resumes_by_the_header() -> None:
    bouncer = EventBouncer(history=9)
    first, _ = ids_of(bouncer, "a", "b")
    read = parse(response_to(bouncer, **{"Last-Event-ID": first}))
    assert [Event("b", id=bouncer.last_event_id or "")] == read


@pytest.mark.parametrize(("in_url", "in_header"), [(0, 1), (1, 0), (1, 1)])
def test_history_stream_goes_on_from_the_newer_id(in_url: int, in_header: int) -> None:
    """The one in a page's URL stays there while the browser's own goes on, and the other way."""
    bouncer = EventBouncer(history=9)
    ids = ids_of(bouncer, "a", "b", "c")
    app = app_of(lambda: bouncer.stream(last_event_id=ids[in_url]))
    with app.test_client().get("/", headers={"Last-Event-ID": ids[in_header]}) as response:
        bouncer.close()
        assert ["c"] == [event.data for event in parse(response.data)]


def test_history_opening_tells_where_the_client_is() -> None:
    """One that is cut off before its first event comes back with an id, and misses nothing."""
    bouncer = EventBouncer(history=9)
    ids_of(bouncer, "a")
    parser = Parser()
    assert [] == parser.feed(response_to(bouncer))
    assert bouncer.last_event_id == parser.last_event_id


def test_history_opening_is_no_event_to_httpx() -> None:
    """httpx-sse makes an event of a block without data, so it gets none."""
    assert b":\n" == response_to(EventBouncer(history=9), **{"User-Agent": "python-httpx/0.28.1"})


def test_history_gap_event() -> None:
    """A stream with a gap opens with an event named gap; cut off after it, nothing is missed."""
    bouncer = EventBouncer(history=2)
    ids = ids_of(bouncer, *"abcd")
    read = parse(response_to(bouncer, **{"Last-Event-ID": ids[0]}))
    assert [Event("", "gap", ids[1]), Event("c", id=ids[2]), Event("d", id=ids[3])] == read


# Under every server, detached and not.


def left_after(bouncer: Remote, count: int, **options: Any) -> str:
    """Let a client come, see ``count`` events of a burst and leave; return the last one's id."""
    client = bouncer.client(**options)
    bouncer.server.post(f"/burst/{bouncer.name}/{count}")
    id = client.events(count)[-1].id
    client.close()
    bouncer.wait_for(subscribers=0)
    return id


def test_history_server_resumes(remote: Callable[..., Remote]) -> None:
    """What was missed, more of it than any buffer holds, then the live stream; no gap, no repeat.

    The client begins to read only when the live events are there too.
    """
    bouncer = remote(history=10_000, heartbeat=0.05)
    last = left_after(bouncer, 5)
    bouncer.server.post(f"/burst/{bouncer.name}/2500?first=5&size=500")
    client = bouncer.client(headers={"Last-Event-ID": last})
    bouncer.server.post(f"/burst/{bouncer.name}/5?first=2505")
    events = client.events(2505)
    assert list(range(5, 2510)) == [int(event.data) for event in events]
    assert 0 == bouncer.stats()["dropped"]
    assert are_increasing([last, *[event.id for event in events]])


def test_history_server_resumes_on_ones_own_channels(remote: Callable[..., Remote]) -> None:
    bouncer = remote(history=9, heartbeat=0.05)
    last = left_after(bouncer, 1)
    for message, channel in [("a", "x"), ("b", "y"), ("c", None), ("d", "x")]:
        bouncer.broadcast(message, channel=channel)
    client = bouncer.client("?channel=x", headers={"Last-Event-ID": last})
    assert ["a", "c", "d"] == [event.data for event in client.events(3)]


def test_history_server_tells_of_a_gap(remote: Callable[..., Remote]) -> None:
    bouncer = remote(history=2, heartbeat=0.05)
    last = left_after(bouncer, 1)
    bouncer.broadcast(*"abcd")
    client = bouncer.client(headers={"Last-Event-ID": last})
    assert [("gap", ""), ("message", "c"), ("message", "d")] == [
        (event.type, event.data) for event in client.events(3)
    ]


def test_history_server_takes_any_header(remote: Callable[..., Remote]) -> None:
    """Bytes that are no text, thousands of digits, no value at all: the stream is a new one."""
    for text in ["\xff\xfe\x80", "9" * 4000, "", "1-1, 2-2", "%0d%0adata: x", "\t"]:
        bouncer = remote(history=9)
        bouncer.broadcast("missed")
        client = bouncer.client(headers={"Last-Event-ID": text})
        bouncer.broadcast("live")
        assert "live" == client.event().data
        bouncer.close()
        client.close()


def test_history_server_dropped_client_resumes(remote: Callable[..., Remote]) -> None:
    """One that stopped reading is dropped, comes back, and in all has missed nothing."""
    bouncer = remote(history=10_000)
    stalled = bouncer.client(receive_buffer=4096)
    sent = itertools.count(step=15)

    def was_dropped() -> bool:
        bouncer.server.post(f"/burst/{bouncer.name}/15?size=16384&first={next(sent)}")
        return bouncer.stats()["dropped"] > 0

    wait_until(was_dropped, "the stalled client is dropped")
    events = stalled.wait_end()
    stalled.close()
    bouncer.broadcast("last")
    resumed = bouncer.client(headers={"Last-Event-ID": events[-1].id})
    total = next(sent)
    events += resumed.events(total - len(events) + 1)
    assert [*range(total), "last"] == [*(int(e.data) for e in events[:-1]), events[-1].data]


class RestlessClient(Client):
    """A client that leaves in any manner, at any moment."""

    def read(self) -> list[Event]:
        """Take in what one recv brings; return the events that it completes."""
        self._receive(time.monotonic() + TIMEOUT, "more of the stream")
        events = list(self._events)
        self._events.clear()
        return events

    def say(self, words: bytes) -> None:
        """Send what nobody has asked for. A server may cut off who says too much."""
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(words)

    def leave(self, rng: random.Random) -> None:
        if rng.random() < 0.2:
            self.say(rng.randbytes(rng.randrange(10_000)))
        if rng.random() < 0.2:
            with contextlib.suppress(OSError):  # the server was first
                self._socket.shutdown(socket.SHUT_WR)
        rng.choice([self.close, self.reset])()


def follow(
    rng: random.Random, ports: list[int], path: str, settled: threading.Event
) -> list[Event]:
    """Read a stream over connections that are cut at random, until its event "end" has come."""
    seen: list[Event] = []
    last = ""
    while not seen or seen[-1].data != "end":
        headers = {"Last-Event-ID": last} if last else {}
        client = RestlessClient(rng.choice(ports), path, headers=headers)
        looks = rng.choice([0, 1, 2, 3, 10])
        while not client.ended and (looks > 0 or settled.is_set()):
            seen += client.read()
            looks -= 1
            if seen and seen[-1].data == "end":
                break
        last = client.parser.last_event_id or last
        client.leave(rng)
    return seen


def check_followed(seen: list[Event], total: int) -> None:
    """Every event from the first on, once, in order, with ids that increase, and no gap."""
    first = next((int(event.data) for event in seen if event.data.isdigit()), total)
    assert [*map(str, range(first, total)), "end"] == [event.data for event in seen]
    assert {"message"} == {event.type for event in seen}
    assert are_increasing([event.id for event in seen])


def check_random_cuts(bouncer: Remote, rng: random.Random) -> None:
    """Dozens of clients whose connections are cut at random, while events flow, miss nothing."""
    ports, path = [bouncer.server.port], f"/subscribe/{bouncer.name}"
    settled = threading.Event()
    followers = [
        Task(follow, random.Random(rng.random()), ports, path, settled)
        for _ in range(bouncer.readers)
    ]
    total = 0
    for _ in range(60):
        count = rng.choice([1, 1, 3, 20])
        bouncer.server.post(f"/burst/{bouncer.name}/{count}?first={total}")
        total += count
    settled.set()
    bouncer.broadcast("end")
    for follower in followers:
        check_followed(follower.result(), total)


@pytest.mark.parametrize("shared_server", KINDS[:-1], indirect=True)  # all that can detach
@pytest.mark.parametrize("remote", ["detached"], indirect=True)
def test_history_random_cuts(remote: Callable[..., Remote], rng: random.Random) -> None:
    """Without heartbeats: they would wake a hub that has lost a wake-up."""
    check_random_cuts(remote(history=10_000, heartbeat=None), rng)


@pytest.mark.parametrize("remote", ["served"], indirect=True)
def test_history_random_cuts_of_served_streams(
    remote: Callable[..., Remote], rng: random.Random
) -> None:
    """With heartbeats, by which a worker notices that its client has left."""
    check_random_cuts(remote(history=10_000, heartbeat=0.02), rng)


# While the page's main thread waits for /outrun, nothing of its EventSource is read.
OUTRUN = '''
import itertools, threading
from flask import Flask
from sse_bouncer import EventBouncer

app = Flask(__name__)
bouncer = EventBouncer(history=10_000, retry=1)
pace = threading.Event()  # never set

@app.get("/")
def page():
    return """
<script>
  let opened = 0, gaps = 0, numbers = [];
  const source = new EventSource("/subscribe");
  source.onopen = () => opened += 1;
  source.onmessage = (event) => numbers.push(parseInt(event.data));
  source.addEventListener("gap", () => gaps += 1);
  function outrun() {
    const request = new XMLHttpRequest();
    request.open("POST", "/outrun", false);
    request.send();
    return parseInt(request.responseText);
  }
</script>
"""

@app.get("/subscribe")
def subscribe():
    return bouncer.stream()

@app.post("/outrun")
def outrun():
    for number in itertools.count():
        bouncer.broadcast(str(number).ljust(16_384))
        pace.wait(0.002)
        if bouncer.stats()["dropped"]:
            bouncer.broadcast(str(number + 1))  # while nobody is there
            return str(number + 2)
'''


def test_history_browser_opens_is_dropped_and_resumes(browser: Browser) -> None:
    """EventSource opens before the first event, is dropped while its page is busy, comes back by
    itself, and has missed nothing."""
    with serve("development", OUTRUN) as server:
        browser.go(f"http://127.0.0.1:{server.port}/")
        browser.wait_until("opened === 1")
        assert [] == browser.run("return numbers")
        count = browser.run("return outrun()")
        browser.wait_until(f"numbers.length >= {count}")
        assert list(range(count)) == browser.run("return numbers")
        assert [2, 0] == browser.run("return [opened, gaps]")
        browser.go("about:blank")


# =================================================================================================
# RELAY
#
# Many processes: what a bouncer makes of any relay, shown with one of a few lines; RedisRelay with
# a real Redis; and servers of several processes with a Redis between them that dies and comes back.
# =================================================================================================


Entry = tuple[str, str | None, str | None]


class SharedMemory:
    """A relay of one's own, as short as the contract allows: a list, between bouncers here."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.changed = threading.Condition()
        self._numbers = itertools.count()

    def publish(self, channel: str | None, frame: str | None) -> None:
        with self.changed:
            id = f"{time.time_ns() // 1_000_000}-{next(self._numbers)}"
            self.entries.append((id, channel, frame))
            self.changed.notify_all()

    def recent(self, count: int) -> tuple[str, list[Entry]]:
        with self.changed:
            start = max(0, len(self.entries) - count)
            return self.entries[start - 1][0] if start else "0-0", self.entries[start:]

    def read(
        self, after: str, timeout: float
    ) -> tuple[bool, list[Entry]]:
        with self.changed:
            self.changed.wait_for(lambda: self._after(after), timeout)
            return True, self._after(after)

    def _after(self, id: str) -> list[Entry]:
        return [entry for entry in self.entries if id_value(entry[0]) > id_value(id)]


class BrokenMemory(SharedMemory):
    """A relay that is away, loses events or keeps its readers waiting when a test says so."""

    class Away(Exception):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.away = self.lost = self.held = False
        self.tries = 0

    def publish(self, channel: str | None, frame: str | None) -> None:
        if self.away:
            raise self.Away
        super().publish(channel, frame)

    def recent(self, count: int) -> tuple[str, list[Entry]]:
        self.tries += 1
        if self.away:
            raise self.Away
        return super().recent(count)

    def read(
        self, after: str, timeout: float
    ) -> tuple[bool, list[Entry]]:
        self.tries += 1
        super().read(after, timeout)
        with self.changed:
            self.changed.wait_for(lambda: not self.held, TIMEOUT)
            if self.away:
                raise self.Away
            whole, self.lost = not self.lost, False
            return whole, self._after(after)

    def lose_last(self) -> None:
        """Lose an event that readers, who are held, have yet to read."""
        del self.entries[-1]
        self.lost = True

    def let_go(self) -> None:
        with self.changed:
            self.held = False
            self.changed.notify_all()


def relay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sse_bouncer relay"]


class Bouncers:
    """Makes bouncers, and closes them with the test."""

    def __init__(self) -> None:
        self._made: list[EventBouncer] = []
        self._others = relay_threads()

    def __call__(self, relay: Any, **options: Any) -> EventBouncer:
        self._made.append(EventBouncer(**{"history": 100, "relay": relay, **options}))
        return self._made[-1]

    def close(self) -> None:
        for bouncer in self._made:
            bouncer.close()
            # Wakes the reader, which then sees that it is over.
            with contextlib.suppress(Exception):
                bouncer.broadcast("closed")
        # Or what they log would be found in the next test.
        wait_until(lambda: set(relay_threads()) <= set(self._others), "the readers end")


@pytest.fixture
def bouncers() -> Iterator[Bouncers]:
    bouncers = Bouncers()
    yield bouncers
    bouncers.close()


def next_datas(subscription: Subscription, count: int) -> list[str]:
    return [event.data for event in next_events(subscription, count)]


def next_events(subscription: Subscription, count: int) -> list[Event]:
    return parse("".join(subscription.get(timeout=TIMEOUT) for _ in range(count)).encode())


def test_relay_contract_carries_events_to_every_process(bouncers: Bouncers) -> None:
    relay = SharedMemory()
    one, two = bouncers(relay), bouncers(relay)
    subscriptions = [one.subscribe("x"), one.subscribe(), two.subscribe("x"), two.subscribe()]
    one.broadcast("a\nb", "greet")
    two.broadcast("private", channel="x")
    two.broadcast("c")
    expected = [["a\nb", "private", "c"], ["a\nb", "c"]] * 2
    assert expected == [
        next_datas(s, len(wanted)) for s, wanted in zip(subscriptions, expected, strict=True)
    ]


def test_relay_contract_gives_one_order_and_one_id_everywhere(bouncers: Bouncers) -> None:
    relay = SharedMemory()
    made = [bouncers(relay, maxsize=1000) for _ in range(3)]
    subscriptions = [bouncer.subscribe() for bouncer in made]

    def publish(who: int) -> None:
        for number in range(50):
            made[who].broadcast([who, number])

    for publisher in [Task(publish, who) for who in range(3)]:
        publisher.result()
    order, *others = [next_events(subscription, 150) for subscription in subscriptions]
    assert [order, order] == others
    assert are_increasing([event.id for event in order])
    assert [entry[0] for entry in relay.entries] == [event.id for event in order]


@resumes
def test_relay_contract_resumes_at_a_process_just_started(
    bouncers: Bouncers, history: int, count: int, after: int, missed: list[int], gap: bool
) -> None:
    relay = SharedMemory()
    ids = [bouncers(relay).last_event_id or ""]
    for number in range(1, count + 1):
        relay.publish(None, f"data: {number}\n\n")
    ids += [entry[0] for entry in relay.entries]
    started = bouncers(relay, history=history)
    subscription = started.subscribe(last_event_id=ids[after])
    started.broadcast("live")
    received = next_datas(subscription, len(missed) + 1)
    assert ([*map(str, missed), "live"], gap) == (received, subscription.gap)


def test_relay_contract_works_without_a_history(bouncers: Bouncers) -> None:
    """There are ids all the same, and a client that missed something is told of a gap."""
    relay = SharedMemory()
    bouncer = bouncers(relay, history=0)
    subscription = bouncer.subscribe()
    bouncer.broadcast("a")
    bouncer.broadcast("b")
    first, second = next_events(subscription, 2)
    assert [True, False] == [
        bouncer.subscribe(last_event_id=event.id).gap for event in (first, second)
    ]


def test_relay_contract_publish_error_reaches_the_publisher(bouncers: Bouncers) -> None:
    """The very exception, and nobody gets anything of what was not accepted."""
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    subscription = bouncer.subscribe()
    relay.away = True
    with pytest.raises(BrokenMemory.Away):
        bouncer.broadcast("not accepted")
    relay.away = False
    bouncer.broadcast("accepted")
    assert ["accepted"] == next_datas(subscription, 1)


@pytest.mark.parametrize("broadcast", OWN_IDS)
def test_relay_contract_refuses_ids(
    broadcast: Callable[[EventBouncer], None], bouncers: Bouncers
) -> None:
    """Before it is published: no process has to find out by itself."""
    relay = SharedMemory()
    bouncer = bouncers(relay)
    with pytest.raises(ValueError, match="id: expected none"):
        broadcast(bouncer)
    assert [] == relay.entries


def test_relay_contract_reader_tries_until_it_can(
    bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """One line when the relay goes, one when it is back, and what it kept arrives."""
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    subscription = bouncer.subscribe()
    with caplog.at_level(logging.WARNING, "sse_bouncer"):
        relay.held = relay.away = True
        SharedMemory.publish(relay, None, "data: kept\n\n")
        tries = relay.tries
        relay.let_go()
        wait_until(lambda: relay.tries >= tries + 3, "it tries again and again")
        relay.away = False
        assert ["kept"] == next_datas(subscription, 1)
        wait_until(lambda: len(caplog.messages) >= 2, "it is said that the relay is back")
    cannot, back = caplog.messages
    assert "cannot be read; trying until it can: Away()" in cannot
    assert "the relay is back" == back


def test_relay_contract_loss_is_told_to_everyone(
    bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """A gap event, then what is left; one that comes back later from before it is told as well."""
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    subscriptions = [bouncer.subscribe(), bouncer.subscribe("x")]
    bouncer.broadcast("before")
    before = [next_events(s, 1) for s in subscriptions][0][0]
    relay.held = True
    bouncer.broadcast("lost")
    relay.lose_last()
    bouncer.broadcast("after")
    relay.let_go()
    received = [next_events(s, 2) for s in subscriptions]
    assert [[("gap", ""), ("message", "after")]] * 2 == [
        [(event.type, event.data) for event in events] for events in received
    ]
    assert are_increasing([before.id, *[event.id for event in received[0]]])
    assert bouncer.subscribe(last_event_id=before.id).gap
    assert not bouncer.subscribe(last_event_id=received[0][0].id).gap
    assert 1 == sum("events were lost in the relay" in message for message in caplog.messages)


def test_relay_contract_close_of_a_channel_ends_its_streams_everywhere(
    bouncers: Bouncers,
) -> None:
    """A user logs out at one process, and has tabs at others. Who comes later is let in."""
    relay = SharedMemory()
    one, two = bouncers(relay), bouncers(relay)
    tabs = [one.subscribe("ada"), two.subscribe("ada", "news")]
    bob = two.subscribe("bob")
    one.broadcast("before", channel="ada")
    one.close("ada", "nobody")
    assert [["before"]] * 2 == [Task(datas, tab).result() for tab in tabs]
    two.broadcast("still here")
    assert ["still here"] == next_datas(bob, 1)
    start = relay.entries[-1][0]
    again = two.subscribe("ada", last_event_id=relay.entries[0][0])
    one.broadcast("after", channel="ada")
    assert ["still here", "after"] == next_datas(again, 2)
    assert ["after"] == next_datas(bouncers(relay).subscribe("ada", last_event_id=start), 1)


def test_relay_contract_close_without_channels_is_for_one_process(bouncers: Bouncers) -> None:
    """One that stops must not end the others' streams."""
    relay = SharedMemory()
    one, two = bouncers(relay), bouncers(relay)
    mine, others = one.subscribe(), two.subscribe()
    one.close()
    two.broadcast("goes on")
    assert [[], ["goes on"]] == [datas(mine), next_datas(others, 1)]


def test_relay_contract_close_ends_streams_here_though_the_relay_is_away(
    bouncers: Bouncers,
) -> None:
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    subscription = bouncer.subscribe("ada")
    relay.away = True
    with pytest.raises(BrokenMemory.Away):
        bouncer.close("ada")
    assert [] == datas(subscription)
    relay.away = False


def test_relay_contract_who_missed_what_was_lost_is_told_so(bouncers: Bouncers) -> None:
    """Also one that has seen, at another process, some of what this one has lost."""
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    start = bouncer.last_event_id
    subscription = bouncer.subscribe()
    bouncer.broadcast("0")
    next_events(subscription, 1)
    relay.held = True
    for number in (1, 2, 3):
        bouncer.broadcast(number)
    first, second, _, last = [entry[0] for entry in relay.entries]
    del relay.entries[1:3]
    relay.lost = True
    relay.let_go()
    gap, third = next_events(subscription, 2)
    assert (("gap", ""), "3") == ((gap.type, gap.data), third.data)
    expected = [(start, True, ["3"]), (first, True, ["3"]), (second, True, ["3"])]
    expected += [(gap.id, False, ["3"]), (last, False, [])]
    for id, is_gap, missed in expected:
        resumed = bouncer.subscribe(last_event_id=id)
        assert (is_gap, missed) == (resumed.gap, held(resumed))


def test_relay_contract_who_comes_right_after_a_loss_is_told_so(bouncers: Bouncers) -> None:
    """Before anything has come after it: the client's id may be of what is lost."""
    relay = BrokenMemory()
    bouncer = bouncers(relay)
    subscription = bouncer.subscribe()
    bouncer.broadcast("0")
    next_events(subscription, 1)
    relay.held = True
    bouncer.broadcast("1")
    lost = relay.entries[-1][0]
    relay.lose_last()
    relay.let_go()
    (gap,) = next_events(subscription, 1)
    assert ("gap", "") == (gap.type, gap.data)
    resumed = bouncer.subscribe(last_event_id=lost)
    assert resumed.gap
    bouncer.broadcast("2")
    assert ["2"] == next_datas(resumed, 1)


def test_relay_contract_who_has_seen_what_was_lost_misses_nothing(bouncers: Bouncers) -> None:
    """A client that comes from a process that has read it all is told of no gap, and its id does
    not go back: at the next process, all would come again."""
    relay = BrokenMemory()
    behind = bouncers(relay)
    subscription = behind.subscribe()
    behind.broadcast("0")
    next_events(subscription, 1)
    relay.held = True
    for number in (1, 2, 3):
        behind.broadcast(number)
    ahead = behind.subscribe(last_event_id=relay.entries[-1][0])
    del relay.entries[1:3]
    relay.lost = True
    relay.let_go()
    assert ["", "3"] == next_datas(subscription, 2)
    behind.broadcast("4")
    assert (["4"], False) == (next_datas(ahead, 1), ahead.gap)


@pytest.mark.parametrize("seconds", [10, 3600])
def test_relay_contract_that_has_lost_all_with_its_processes_is_a_gap(
    seconds: int, bouncers: Bouncers
) -> None:
    """All machines have begun anew, and a client comes back with an id of before."""
    id = f"{time.time_ns() // 1_000_000 - seconds * 1000}-0"
    relay = SharedMemory()
    assert bouncers(relay).subscribe(last_event_id=id).gap
    relay.publish(None, "data: x\n\n")
    assert bouncers(relay).subscribe(last_event_id=id).gap


def test_relay_contract_reader_is_started_once_there_is_a_thread_for_it(
    bouncers: Bouncers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who subscribes when there is none hears of it; the next one is served."""
    bouncer = bouncers(SharedMemory())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more_threads)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            bouncer.subscribe()
    subscription = bouncer.subscribe()
    bouncer.broadcast("hi")
    assert ["hi"] == next_datas(subscription, 1)


def no_more_threads(thread: threading.Thread) -> None:
    """What Thread.start does when the system has no more."""
    raise RuntimeError("can't start new thread")


def test_relay_contract_reader_survives_a_log_handler_that_raises(bouncers: Bouncers) -> None:
    relay = SharedMemory()
    bouncer = bouncers(relay)
    subscription = bouncer.subscribe()
    handler = RaisingHandler()
    sse_bouncer.logger.addHandler(handler)
    try:
        relay.publish(None, "no frame")
        bouncer.broadcast("hi")
        assert ["hi"] == next_datas(subscription, 1)
    finally:
        sse_bouncer.logger.removeHandler(handler)
    assert handler.called


class RaisingHandler(logging.Handler):
    called = False

    def emit(self, record: logging.LogRecord) -> None:
        self.called = True
        raise OSError("no space left on device")


def test_relay_contract_resuming_waits_for_a_relay_that_is_away(bouncers: Bouncers) -> None:
    """What was missed cannot be told yet, so the client is told to come back; a new one may stay,
    and gets what is published from then on, but not what was before."""
    relay = BrokenMemory()
    relay.publish(None, "data: old\n\n")
    relay.entries[0] = ("1000-0", None, "data: old\n\n")
    relay.away = True
    bouncer = bouncers(relay)
    with pytest.raises(EventBouncer.Refused, match="waiting for its relay"):
        bouncer.subscribe(last_event_id="1000-0")
    told = app_of(bouncer.stream).test_client().get("/", headers={"Last-Event-ID": "1000-0"})
    assert (200, []) == (told.status_code, parse(told.data))
    assert re.fullmatch(rb"retry: [0-9]+\n: [^\n]+\n", told.data)
    staying = bouncer.subscribe()
    SharedMemory.publish(relay, None, "data: new\n\n")
    relay.away = False
    assert ["new"] == next_datas(staying, 1)
    assert ["new"] == held(bouncer.subscribe(last_event_id="1000-0"))


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "served"])
def test_relay_contract_a_client_may_know_more_than_the_process(
    bouncers: Bouncers, detach: bool
) -> None:
    """It comes from a process that was faster: what this one has yet to read, it does not get
    again, but whatever comes after that."""
    relay = BrokenMemory()
    fast = bouncers(relay)
    slow = bouncers(relay, detach=detach)
    ahead = fast.subscribe()
    assert [] == held(slow.subscribe())  # its reader reads
    relay.held = True
    for message in "abcd":
        fast.broadcast(message)
    with serve_here(app_of(slow.stream)) as port:
        client = Client(port, "/", headers={"Last-Event-ID": relay.entries[1][0]})
        with contextlib.closing(client):
            expected = {"subscribers": 1, "detached": int(detach)}.items()
            wait_until(lambda: expected <= slow.stats().items(), "the stream stands")
            relay.let_go()
            assert ["c", "d"] == [event.data for event in client.events(2)]
            fast.broadcast("e")
            assert "e" == client.event().data
    assert [*"abcde"] == next_datas(ahead, 5)


def test_relay_contract_clocks_may_differ(bouncers: Bouncers) -> None:
    """The relay's is behind: an id of an event that is still to come here is no unknown one."""
    early = time.time_ns() // 1_000_000 - 10_000
    relay = SharedMemory()
    relay.entries.append((f"{early}-0", None, "data: a\n\n"))
    assert not bouncers(relay).subscribe(last_event_id=f"{early}-5").gap


@pytest.mark.parametrize("end", [EventBouncer.close, None], ids=["closed", "forgotten"])
def test_relay_contract_the_reader_ends_with_its_bouncer(
    end: Callable[[EventBouncer], None] | None,
) -> None:
    relay = SharedMemory()
    others = relay_threads()
    bouncer = EventBouncer(relay=relay, history=1)
    bouncer.subscribe()
    (reader,) = set(relay_threads()) - set(others)
    if end is not None:
        end(bouncer)
    else:
        del bouncer

    def ended() -> bool:
        gc.collect()
        relay.publish(None, "data: wakes it\n\n")
        return not reader.is_alive()

    wait_until(ended, "the reader ends")


def test_relay_contract_only_publishing_starts_no_thread(bouncers: Bouncers) -> None:
    others = relay_threads()
    bouncer = bouncers(SharedMemory())
    bouncer.broadcast("a")
    assert others == relay_threads()


def test_relay_contract_one_reader_for_all_subscribers(bouncers: Bouncers) -> None:
    others = relay_threads()
    bouncer = bouncers(SharedMemory())
    subscriptions = [bouncer.subscribe() for _ in range(100)]
    bouncer.broadcast("a")
    assert [["a"]] * 100 == [next_datas(s, 1) for s in subscriptions]
    assert 1 == len(set(relay_threads()) - set(others))


# With a real Redis.


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Keep a port for a server that cannot find one by itself: bound, but not listened at.

    Nobody else is given it, while a server that sets SO_REUSEADDR, as all do, can have it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class Redis:
    """A redis-server that can be killed and started again."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self._folder = folder
        # A file over its limit shall be an error to Redis, as on a full disk, and not its end.
        self._command = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]
        self._command += [need_program("redis-server"), "--port", str(port), "--save", ""]
        self._command += ["--bind", "127.0.0.1", "--dir", str(folder), *options]
        self._server: Server | None = None
        self._clients: list[Any] = []
        self.port = port
        self.url = f"redis://127.0.0.1:{port}"

    def start(self) -> None:
        self._server = Server("redis", self._command, self._folder, environment())
        self._server.wait_for_log("Ready to accept connections")

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server = None

    def limit_files(self, size: int) -> None:
        """Let no file of it grow beyond so many bytes; -1 is without a limit."""
        import resource

        assert self._server
        if not hasattr(resource, "prlimit"):
            pytest.skip("this platform has no prlimit")
        limits = size, resource.RLIM_INFINITY
        resource.prlimit(self._server.process.pid, resource.RLIMIT_FSIZE, limits)

    def signal(self, number: signal.Signals) -> None:
        assert self._server
        self._server.process.send_signal(number)

    def client(self, **options: Any) -> Any:
        """Return a client that does not try again by itself: its errors come promptly."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = {"retry": Retry(NoBackoff(), 0), **options}
        self._clients.append(redis.Redis(port=self.port, **options))
        return self._clients[-1]

    def relay(self, key: str = "sse", maxlen: int = 10_000, **options: Any) -> RedisRelay:
        return RedisRelay(self.client(**options), key, maxlen)

    def close(self) -> None:
        self.kill()
        for client in self._clients:
            client.close()


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[Redis]:
    need("redis")
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        redis = Redis(Path(folder), port, *options)
        try:
            redis.start()
            yield redis
        finally:
            redis.close()


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[Redis]:
    with redis_server() as redis:
        yield redis


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """The key of one test's own stream, in the Redis that all share."""
    return request.node.name  # type: ignore[no-any-return]


# What users pass to redis.Redis; where the server wants a password, it is "secret".
REDIS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"decode_responses": True},
    {"protocol": 2},
    {"protocol": 3},
    {"protocol": 3, "decode_responses": True},
    {"socket_timeout": 0.5},
    {"password": "secret"},
]
redis_options = pytest.mark.parametrize("options", REDIS_OPTIONS, ids=str)


@redis_options
def test_relay_redis_carries_anything(options: dict[str, Any], bouncers: Bouncers) -> None:
    """Text of any kind, on channels of any name, by any client: live, and to who comes later."""
    texts = ["a\nb", "", " x", "grüß 😀", "\0", "x\u2028y", "id: 7", "last"]
    arguments = ["--requirepass", "secret"] if "password" in options else []
    with redis_server(*arguments) as redis:
        one, two = bouncers(redis.relay(**options)), bouncers(redis.relay(**options))
        start = one.last_event_id
        subscription, of_none = two.subscribe("grüß 😀"), two.subscribe()
        for text in texts:
            one.broadcast(text, channel="grüß 😀")
        one.broadcast("to all")
        live = next_events(subscription, len(texts))
        assert texts == [event.data for event in live]
        assert ["to all"] == next_datas(of_none, 1)
        late = bouncers(redis.relay(**options)).subscribe("grüß 😀", last_event_id=start)
        assert live == next_events(late, len(texts))
        bouncers.close()


def test_relay_redis_wrong_password_is_the_publishers_to_hear(bouncers: Bouncers) -> None:
    with redis_server("--requirepass", "secret") as redis:
        import redis as package

        with pytest.raises(package.AuthenticationError):
            bouncers(redis.relay(password="wrong")).broadcast("x")


def test_relay_redis_key_of_something_else(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """A key that holds no stream: the publisher hears Redis's own words."""
    import redis as package

    shared_redis.client().set(key, "a string")
    with pytest.raises(package.ResponseError, match="WRONGTYPE"):
        bouncers(shared_redis.relay(key)).broadcast("x")


def test_relay_redis_keys_are_apart(shared_redis: Redis, key: str, bouncers: Bouncers) -> None:
    one, two = bouncers(shared_redis.relay(key)), bouncers(shared_redis.relay(key + "2"))
    subscription = two.subscribe()
    one.broadcast("not for two")
    two.broadcast("for two")
    assert ["for two"] == next_datas(subscription, 1)


@resumes
def test_relay_redis_resumes_at_a_process_just_started(
    shared_redis: Redis,
    bouncers: Bouncers,
    key: str,
    history: int,
    count: int,
    after: int,
    missed: list[int],
    gap: bool,
) -> None:
    """A process that starts fills its history from the stream before it answers."""
    client = shared_redis.client(decode_responses=True)
    ids = [bouncers(shared_redis.relay(key)).last_event_id or ""]
    for number in range(1, count + 1):
        bouncers(shared_redis.relay(key)).broadcast(number)
    ids += [id for id, _ in client.xrange(key)]
    started = bouncers(shared_redis.relay(key), history=history)
    subscription = started.subscribe(last_event_id=ids[after])
    started.broadcast("live")
    received = next_datas(subscription, len(missed) + 1)
    assert ([*map(str, missed), "live"], gap) == (received, subscription.gap)


def test_relay_redis_keeps_about_maxlen_and_tells_of_the_rest(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """What Redis has trimmed is a gap to who missed it, and to nobody else."""
    client = shared_redis.client(decode_responses=True)
    publisher = bouncers(shared_redis.relay(key, maxlen=10))
    publisher.broadcast(0)
    first = client.xrange(key)[0][0]
    for number in range(1, 300):
        publisher.broadcast(number)
    kept = [id for id, _ in client.xrange(key)]
    assert 10 <= len(kept) < 300
    started = bouncers(shared_redis.relay(key), history=1000)
    late, latest = started.subscribe(last_event_id=first), started.subscribe(last_event_id=kept[0])
    assert [True, False] == [late.gap, latest.gap]
    numbers = [str(number) for number in range(300 - len(kept), 300)]
    assert [numbers, numbers[1:]] == [held(late), held(latest)]


def test_relay_redis_tells_once_that_all_was_trimmed(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """By hand, while everything is quiet: nobody can say what of it had not been read."""
    bouncer = bouncers(shared_redis.relay(key, socket_timeout=0.2))
    subscription = bouncer.subscribe()
    bouncer.broadcast("a")
    assert ["a"] == next_datas(subscription, 1)
    shared_redis.client().xtrim(key, maxlen=0, approximate=False)
    (gap,) = next_events(subscription, 1)
    assert ("gap", "") == (gap.type, gap.data)
    wait_for_idle_reader(shared_redis)
    bouncer.broadcast("b")
    bouncer.broadcast("c")
    assert ["b", "c"] == next_datas(subscription, 2)


def test_relay_redis_trimmed_and_then_begun_anew_with_lower_ids(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key, socket_timeout=0.2))
    subscription = bouncer.subscribe()
    bouncer.broadcast("a")
    next_events(subscription, 1)
    for command in (["XTRIM", key, "MAXLEN", "0"], ["DEL", key]):
        client.execute_command(*command)
        (gap,) = next_events(subscription, 1)
        assert ("gap", "") == (gap.type, gap.data)
    client.xadd(key, {"frame": "data: b\n\n", "once": "b"}, id="1000-1")
    assert ["b"] == next_datas(subscription, 1)


def test_relay_redis_that_was_trimmed_before_anything_was_read(
    shared_redis: Redis, key: str
) -> None:
    relay = shared_redis.relay(key, maxlen=100)
    assert ("0-0", []) == relay.recent(10)
    for number in range(1000):
        relay.publish(None, format_sse(number))
    whole, entries = relay.read("0-0", 1)
    assert not whole
    assert "data: 999\n\n" == entries[-1][2]


@pytest.mark.parametrize("id", ["1900000000000-0", "1900000000000-1"])
def test_relay_redis_deleted_and_begun_anew_with_low_ids(
    id: str, shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """As happens within one millisecond: the ids begin at zero again."""
    client = shared_redis.client(decode_responses=True)
    bouncer = bouncers(shared_redis.relay(key))
    subscription = bouncer.subscribe()
    client.xadd(key, {"frame": "data: a\n\n"}, id="1900000000000-0")
    client.xadd(key, {"frame": "data: b\n\n", "once": "b"}, id="1900000000000-1")
    assert ["a", "b"] == next_datas(subscription, 2)
    with client.pipeline() as pipeline:
        pipeline.delete(key)
        pipeline.xadd(key, {"frame": "data: c\n\n", "once": "c"}, id=id)
        pipeline.execute()
    gap, c = next_events(subscription, 2)
    assert ("gap", Event("c", id=id)) == (gap.type, c)
    client.xadd(key, {"frame": "data: d\n\n", "once": "d"})  # its id may be what b's was
    bouncer.broadcast("e")
    assert ["d", "e"] == next_datas(subscription, 2)
    resumed = bouncer.subscribe(last_event_id=gap.id)
    assert (["c", "d", "e"], False) == (held(resumed), resumed.gap)


def test_relay_redis_restarted_from_an_older_copy(bouncers: Bouncers) -> None:
    """What was delivered is not delivered again; that something may be missing is told."""
    with redis_server() as redis:
        bouncer = bouncers(redis.relay())
        subscription = bouncer.subscribe()
        for number in range(10):
            bouncer.broadcast(number)
        assert [str(number) for number in range(10)] == next_datas(subscription, 10)
        redis.client().save()
        bouncer.broadcast("only in memory")
        assert ["only in memory"] == next_datas(subscription, 1)
        redis.kill()
        redis.start()
        (gap,) = next_events(subscription, 1)
        assert ("gap", "") == (gap.type, gap.data)
        publish_when_back(bouncer, "new")
        assert ["new"] == next_datas(subscription, 1)
        bouncers.close()


def test_relay_redis_resumes_after_the_stream_was_deleted(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """Nobody can say whether something went with it that no process had read: that is a gap, at
    open streams, and for who comes to a process just started."""
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key))
    subscription = bouncer.subscribe()
    bouncer.broadcast("a")
    bouncer.broadcast("b")
    first, _ = next_events(subscription, 2)
    client.delete(key)
    bouncer.broadcast("c")
    gap, after = next_events(subscription, 2)
    assert [("gap", ""), ("message", "c")] == [(e.type, e.data) for e in (gap, after)]
    started = bouncers(shared_redis.relay(key))
    resumed = started.subscribe(last_event_id=first.id)
    assert (["c"], True) == (held(resumed), resumed.gap)


# Fields of entries that someone else has added to the stream.
FOREIGN: list[dict[bytes, bytes]] = [
    {b"something": b"else"},
    {b"frame": b""},
    {b"frame": b"no blank line"},
    {b"frame": b"data: no blank line\n"},
    {b"frame": b"data: \xff\n\n"},
    {b"frame": b"id: 7\ndata: an id of its own\n\n"},
    {b"frame": b"data: x\n\n", b"channel": b""},
    {b"data": b"x", b"\xff": b"\xff"},
]


@pytest.mark.parametrize("options", REDIS_OPTIONS[:5], ids=str)
@pytest.mark.parametrize("fields", FOREIGN, ids=str)
def test_relay_redis_skips_foreign_entries(
    fields: dict[bytes, bytes],
    options: dict[str, Any],
    shared_redis: Redis,
    key: str,
    bouncers: Bouncers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one line in the log for each, where the reader meets it: live, or when it starts."""
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key, **options))
    start = bouncer.last_event_id
    subscription = bouncer.subscribe()
    client.xadd(key, fields)
    bouncer.broadcast("next")
    assert ["next"] == next_datas(subscription, 1)
    assert 1 == sum("skipped an entry" in message for message in caplog.messages)
    started = bouncers(shared_redis.relay(key, **options))
    assert ["next"] == held(started.subscribe(last_event_id=start))
    assert 2 == sum("skipped an entry" in message for message in caplog.messages)
    assert not [message for message in caplog.messages if "cannot be read" in message]


def test_relay_redis_fuzz_foreign_entries(
    shared_redis: Redis, key: str, bouncers: Bouncers, rng: random.Random
) -> None:
    """Whatever anyone adds to the stream, the reader goes on, and so does one that starts."""
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key, decode_responses=True), maxsize=10_000)
    subscription = bouncer.subscribe("x")
    values = [b"", b"x", b"\xff", b"data: x\n\n", b"id: 1\n\n", b"\r\r", b"data: \xed\xa0\x80\n\n"]
    for _ in range(200 * FUZZ):
        names = rng.sample([b"frame", b"channel", b"once", b"", b"\xff"], rng.randrange(1, 5))
        fields = {n: rng.choice([*values, rng.randbytes(9), rng.randbytes(99)]) for n in names}
        client.xadd(key, fields)
    bouncer.broadcast("last")
    wait_until(lambda: next_datas(subscription, 1) == ["last"], "the last one")
    client.xadd(key, {"frame": "data: end\n\n"})  # the first and the last are always read
    client.xtrim(key, maxlen=100, approximate=False)
    started = bouncers(shared_redis.relay(key)).subscribe("x", last_event_id="0-1")
    assert ["last", "end"] == held(started)[-2:]


class SuspendedRelay(RedisRelay):
    """That of a process which can be stopped wherever it reads."""

    def __init__(self, client: Any, key: str) -> None:
        super().__init__(client, key)
        self.running = threading.Event()
        self.running.set()

    def read(self, after: str, timeout: float) -> tuple[bool, list[Entry]]:
        self.running.wait(TIMEOUT)
        found = super().read(after, timeout)
        self.running.wait(TIMEOUT)
        return found


def hop(
    rng: random.Random, processes: list[EventBouncer], channels: Sequence[str], start: str
) -> list[str]:
    """Read until "end", now here and now there; return the data seen, and "gap" where one is."""
    seen, last = [""], start
    while seen[-1] != "end":
        try:
            subscription = rng.choice(processes).subscribe(*channels, last_event_id=last)
        except EventBouncer.Refused:
            continue
        with subscription, contextlib.suppress(queue.Empty, Subscription.Ended):
            seen += ["gap"] * subscription.gap
            for _ in range(rng.choice([0, 1, 3, 20, 1000])):
                (event,) = parse(subscription.get(timeout=0.05).encode())
                seen.append("gap" if event.type == "gap" else event.data)
                last = event.id or last
    return seen[1:]


def test_relay_redis_fuzz_faults(
    shared_redis: Redis, key: str, bouncers: Bouncers, rng: random.Random
) -> None:
    """Clients hop between processes that are suspended and restarted, while someone deletes the
    stream, or trims it. Each gets what is for it, once and in order; or a gap, where one is."""
    client = shared_redis.client()

    def process() -> EventBouncer:
        relay = SuspendedRelay(shared_redis.client(socket_timeout=2), key)
        relays.append(relay)
        return bouncers(relay, history=rng.choice([5, 50, 1000]), maxsize=rng.choice([2, 16]))

    def suspend() -> None:
        for relay in relays:
            relay.running.set()
        rng.choice(relays).running.clear()

    def restart() -> None:
        place = rng.randrange(3)
        processes[place].close()
        processes[place] = process()

    def trim() -> None:
        client.xtrim(key, maxlen=rng.choice([0, 3, 20]), approximate=False)

    def delete() -> None:
        client.delete(key)
        # Within this millisecond Redis may give an id again that a client has: nobody could tell.
        now = time.time_ns() // 1_000_000
        wait_until(lambda: time.time_ns() // 1_000_000 > now, "a millisecond")

    relays: list[SuspendedRelay] = []
    processes = [process() for _ in range(3)]
    start = processes[0].last_event_id or ""
    kinds: list[list[str]] = [[], ["a"], ["b"], ["a", "b"]] * 2
    clients = [Task(hop, random.Random(rng.random()), processes, kind, start) for kind in kinds]
    published: list[tuple[str, str | None]] = []
    faults = [suspend, restart, trim, delete]
    pace = threading.Event()  # never set
    for number in range(500 * FUZZ):
        published.append((str(number), rng.choice([None, None, "a", "b"])))
        rng.choice(processes).broadcast(number, channel=published[-1][1])
        if rng.random() < 0.03:
            rng.choice(faults)()
        pace.wait(rng.random() * 0.004)
    for relay in relays:
        relay.running.set()
    processes[0].broadcast("end")
    for kind, task in zip(kinds, clients, strict=True):
        due = [data for data, channel in published if channel is None or channel in kind] + ["end"]
        place, gap = 0, False
        for data in task.result():
            if data == "gap":
                gap = True
                continue
            found = due.index(data)
            assert found >= place if gap else found == place
            place, gap = found + 1, False
        assert len(due) == place


def test_relay_redis_a_retried_xadd_is_delivered_once(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """A client that lost the answer sends the same again; the same text sent twice is another
    matter."""
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key))
    start = bouncer.last_event_id
    subscription = bouncer.subscribe()
    bouncer.broadcast("once")
    client.xadd(key, client.xrange(key)[-1][1])
    bouncer.broadcast("twice")
    bouncer.broadcast("twice")
    assert ["once", "twice", "twice"] == next_datas(subscription, 3)
    started = bouncers(shared_redis.relay(key))
    client.xadd(key, client.xrange(key)[0][1])
    started.broadcast("last")
    late = started.subscribe(last_event_id=start)
    assert ["once", "twice", "twice", "last"] == next_datas(late, 4)


def test_relay_redis_idle_after_a_retried_xadd(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """The second entry is behind the reader, too: it does not find it again and again."""
    client = shared_redis.client()
    bouncer = bouncers(shared_redis.relay(key, socket_timeout=0.2))
    subscription = bouncer.subscribe()
    bouncer.broadcast("once")
    client.xadd(key, client.xrange(key)[-1][1])
    assert ["once"] == next_datas(subscription, 1)
    wait_for_idle_reader(shared_redis)
    assert subscription.empty()


ONLY_PUBLISHES = """
import sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
import redis
from sse_bouncer import EventBouncer, RedisRelay
bouncer = EventBouncer(relay=RedisRelay(redis.Redis.from_url(sys.argv[1]), key=sys.argv[2]))
bouncer.broadcast("from a cron job", channel="x")
print(threading.enumerate() == [threading.main_thread()])
"""


def test_relay_redis_a_process_that_only_publishes(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """It starts no thread, and needs no Flask."""
    subscription = bouncers(shared_redis.relay(key)).subscribe("x")
    finished = run_python(ONLY_PUBLISHES, shared_redis.url, key)
    assert ("True\n", "") == (finished.stdout, finished.stderr)
    assert ["from a cron job"] == next_datas(subscription, 1)


def test_relay_redis_one_connection_however_many_subscribers(
    shared_redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """One that reads, and one for as many as publish at a time."""
    bouncer = bouncers(shared_redis.relay(key, client_name="counted"))
    subscriptions = [bouncer.subscribe() for _ in range(100)]
    for number in range(5):
        bouncer.broadcast(number)
    assert [[*"01234"]] * 100 == [next_datas(s, 5) for s in subscriptions]
    names = [client["name"] for client in shared_redis.client().client_list()]
    assert 1 <= names.count("counted") <= 2


def wait_for_idle_reader(redis: Redis) -> None:
    """Wait until a reader has found nothing a few times, and see that it waits in between."""
    client = redis.client()

    def calls() -> tuple[int, int]:
        stats: dict[str, Any] = client.info("commandstats")
        waits, looks = (stats.get(f"cmdstat_{name}", {}) for name in ("xread", "xrange"))
        return int(waits.get("calls", 0)), int(looks.get("calls", 0))

    before = calls()
    wait_until(lambda: calls()[0] >= before[0] + 3, "it waits for something, and finds nothing")
    waits, looks = (now - then for now, then in zip(calls(), before, strict=True))
    assert looks <= 3 * waits


def test_relay_redis_idle_with_a_short_timeout_of_its_own(
    shared_redis: Redis, key: str, bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that soon takes a silent connection for a broken one does not do so here."""
    bouncer = bouncers(shared_redis.relay(key, socket_timeout=0.2))
    bouncer.subscribe()
    wait_for_idle_reader(shared_redis)
    bouncer.broadcast("a")
    assert not [message for message in caplog.messages if "cannot be read" in message]


def test_relay_redis_that_hangs_when_a_process_starts(bouncers: Bouncers) -> None:
    """What a client missed cannot be told yet: it is told to come back, and then gets it."""
    with redis_server() as redis:
        publisher = bouncers(redis.relay())
        publisher.broadcast("seen")
        publisher.broadcast("missed")
        (first, _), _ = redis.client(decode_responses=True).xrange("sse")
        started = bouncers(redis.relay())
        redis.signal(signal.SIGSTOP)
        with pytest.raises(EventBouncer.Refused, match="waiting for its relay"):
            started.subscribe(last_event_id=first)
        redis.signal(signal.SIGCONT)
        resumed: list[Subscription] = []

        def is_let_in() -> bool:
            with contextlib.suppress(EventBouncer.Refused):
                resumed.append(started.subscribe(last_event_id=first))
            return bool(resumed)

        wait_until(is_let_in, "it is let in")
        assert (["missed"], False) == (held(resumed[0]), resumed[0].gap)
        bouncers.close()


def test_relay_redis_that_hangs(bouncers: Bouncers) -> None:
    """The publisher hears of it from the client, by its timeout; streams go on afterwards."""
    need("redis")
    import redis as package

    with redis_server() as redis:
        bouncer = bouncers(redis.relay(socket_timeout=0.5))
        subscription = bouncer.subscribe()
        redis.signal(signal.SIGSTOP)
        with pytest.raises(package.TimeoutError):
            bouncer.broadcast("nobody knows")  # Redis may find it when it goes on
        redis.signal(signal.SIGCONT)
        publish_when_back(bouncer, "back")
        wait_until(lambda: next_datas(subscription, 1) == ["back"], "it is back")
        bouncers.close()


def publish_when_back(bouncer: EventBouncer, message: str) -> None:
    """Broadcast once Redis takes it: connections of before it went are still to be found dead."""

    def accepted() -> bool:
        with contextlib.suppress(ConnectionError, *redis_errors()):
            bouncer.broadcast(message)
            return True
        return False

    wait_until(accepted, "Redis is back")


def redis_errors() -> tuple[type[Exception], ...]:
    import redis

    return (redis.RedisError,)


def test_relay_redis_with_a_full_disk(
    bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes nothing, of which the publisher hears; streams stay, and go on when there is room.

    What it did take arrives.
    """
    with redis_server("--appendonly", "yes") as redis:
        import redis as package

        bouncer = bouncers(redis.relay(), maxsize=10_000)
        subscription = bouncer.subscribe()
        accepted = ["before"]
        bouncer.broadcast("before")
        redis.limit_files(1)
        with pytest.raises(package.ResponseError, match="MISCONF"):
            for number in itertools.count():
                bouncer.broadcast(number)
                accepted.append(str(number))
        redis.limit_files(-1)
        publish_when_back(bouncer, "after")
        assert [*accepted, "after"] == next_datas(subscription, len(accepted) + 1)
        assert [] == caplog.messages
        bouncers.close()


def test_relay_redis_restarted_empty_is_a_gap(bouncers: Bouncers) -> None:
    with redis_server() as redis:
        bouncer = bouncers(redis.relay())
        subscription = bouncer.subscribe()
        bouncer.broadcast("before")
        (before,) = next_events(subscription, 1)
        redis.kill()
        redis.start()
        publish_when_back(bouncer, "after")
        gap, after = next_events(subscription, 2)
        assert [("gap", ""), ("message", "after")] == [(e.type, e.data) for e in (gap, after)]
        assert are_increasing([before.id, after.id])
        bouncers.close()


@pytest.mark.parametrize("noticed", [False, True])
def test_relay_redis_restarted_empty_with_a_clock_that_is_behind(
    noticed: bool, bouncers: Bouncers
) -> None:
    """Ids begin lower than they were, whether the readers have seen it empty or not."""
    with redis_server() as redis:
        bouncer = bouncers(redis.relay())
        subscription = bouncer.subscribe()
        bouncer.broadcast("before")
        next_events(subscription, 1)
        redis.kill()
        redis.start()
        received = next_events(subscription, 1) if noticed else []
        redis.client().xadd("sse", {"frame": "data: after\n\n"}, id="1000-1")
        redis.client().xadd("sse", {"frame": "data: last\n\n"}, id="1000-2")
        while not received or received[-1].data != "last":
            received += next_events(subscription, 1)
        gap, *_, after, last = received
        assert ("gap", "") == (gap.type, gap.data)
        assert [Event("after", id="1000-1"), Event("last", id="1000-2")] == [after, last]
        bouncers.close()


def test_relay_redis_away_when_the_process_starts(bouncers: Bouncers) -> None:
    """A stream opens all the same and goes live with Redis, without what was before; a client that
    resumes is told to come back, and then gets what it missed."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as redis:
        publisher = bouncers(redis.relay())
        publisher.broadcast("old")
        publisher.broadcast("missed")
        (first, _), _ = redis.client(decode_responses=True).xrange("sse")
        redis.kill()
        bouncer = bouncers(redis.relay())
        app = app_of(bouncer.stream)
        told = app.test_client().get("/", headers={"Last-Event-ID": first})
        assert (200, []) == (told.status_code, parse(told.data))
        assert re.fullmatch(rb"retry: [0-9]+\n: [^\n]+\n", told.data)
        with app.test_client().get("/") as response:
            body = response.iter_encoded()
            assert b":\n" == next(body)
            redis.start()
            publish_when_back(publisher, "new")
            assert ["new"] == [event.data for event in parse(next(body))]
        resumed = bouncer.subscribe(last_event_id=first)
        assert (["missed", "new"], False) == (held(resumed), resumed.gap)
        bouncers.close()


def test_relay_redis_cluster(bouncers: Bouncers) -> None:
    """redis.RedisCluster does as well as redis.Redis, also with a short timeout of its own: it does
    not look for another cluster each time that nothing has come."""
    with held_port() as bus, redis_server(
        "--cluster-enabled", "yes", "--cluster-port", str(bus)
    ) as redis:
        from redis import RedisCluster

        node = redis.client(decode_responses=True)
        node.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(
            lambda: node.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster"
        )
        options: dict[str, Any] = {"host": "127.0.0.1", "port": redis.port, "socket_timeout": 0.5}
        clients: list[Any] = [RedisCluster(**options) for _ in range(2)]
        one, two = (bouncers(RedisRelay(client)) for client in clients)
        start = one.last_event_id
        subscription = two.subscribe("x")
        one.broadcast("a", channel="x")
        node.xadd("sse", {"frame": b"\xff"})
        one.broadcast("b")
        assert ["a", "b"] == next_datas(subscription, 2)
        assert ["a", "b"] == next_datas(one.subscribe("x", last_event_id=start), 2)

        def times_asked() -> list[Any]:
            stats = node.info("commandstats")
            return [stats[name]["calls"] for name in stats if name.startswith("cmdstat_cluster|")]

        before = times_asked()
        wait_for_idle_reader(redis)
        assert before == times_asked()
        bouncers.close()
        for client in clients:
            client.close()


# Servers of several processes, with Redis between them, or without.
PROCESSES = '''
import os
import redis
from flask import Flask, request
from redis.backoff import NoBackoff
from redis.retry import Retry
from sse_bouncer import EventBouncer, RedisRelay

app = Flask(__name__)
relay = None
if url := os.environ.get("REDIS_URL"):
    client = redis.Redis.from_url(
        url, retry=Retry(NoBackoff(), 0), client_name=f"process-{os.getpid()}"
    )
    relay = RedisRelay(client, maxlen=int(os.environ.get("MAXLEN", 10_000)))
bouncer = EventBouncer(history=10_000, heartbeat=0.1, relay=relay)
start = bouncer.last_event_id  # read at import: with --preload before the fork

@app.after_request
def sign(response):
    response.headers["X-Process"] = str(os.getpid())
    return response

@app.get("/subscribe")
def subscribe():
    return bouncer.stream(*request.args.getlist("channel"))

@app.post("/publish")
def publish():
    bouncer.broadcast(request.get_data(), channel=request.args.get("channel"))
    return {}

@app.post("/logout/<user>")
def logout(user):
    bouncer.close(f"user-{user}")
    return {}

@app.errorhandler(redis.RedisError)
def away(error):
    return type(error).__name__, 503
'''


@contextlib.contextmanager
def serve_processes(
    kind: str, redis: Redis | None, *options: str, app: str = PROCESSES
) -> Iterator[Server]:
    url = redis.url if redis else ""
    with serve(kind, app, "--env", f"REDIS_URL={url}", *options) as server:
        yield server


@pytest.fixture(scope="module")
def fleet_redis() -> Iterator[Redis]:
    with redis_server() as redis:
        yield redis


@pytest.fixture(scope="module")
def both_servers(fleet_redis: Redis) -> Iterator[tuple[Server, Server]]:
    """Two servers of different kinds, with two processes each, and one Redis."""
    with (
        serve_processes("sync", fleet_redis, "--workers", "2") as one,
        serve_processes("gthread", fleet_redis, "--workers", "2") as two,
    ):
        yield one, two


@pytest.fixture
def fleet(both_servers: tuple[Server, Server]) -> Iterator[tuple[Server, Server]]:
    yield both_servers
    for server in both_servers:
        server.close_clients()
        assert "" == server.complaints()


def process_of(client: Client) -> str:
    return dict(client.headers)["x-process"]


def spread(
    servers: Sequence[Server], least: int, processes: int, query: str = ""
) -> list[Client]:
    """Open streams until there are at least so many at each process."""
    clients: dict[str, list[Client]] = defaultdict(list)

    def enough() -> bool:
        for server in servers:
            client = server.subscribe(f"/subscribe{query}")
            clients[process_of(client)].append(client)
        return len(clients) == processes and all(len(c) >= least for c in clients.values())

    wait_until(enough, f"streams at {processes} processes")
    return [client for own in clients.values() for client in own]


def test_processes_all_agree(fleet: tuple[Server, Server]) -> None:
    """Two servers of two processes each: every client gets every event once, and all of them the
    same ids in the same order, whoever published."""
    clients = spread(fleet, least=6, processes=4)
    readers = [Task(client.events, 200) for client in clients]

    def publish(who: int) -> None:
        for number in range(50):
            fleet[who % 2].post("/publish", f"{who} {number}".encode())

    for publisher in [Task(publish, who) for who in range(4)]:
        publisher.result()
    order, *others = [reader.result() for reader in readers]
    assert {tuple(order)} == {tuple(other) for other in others}
    assert are_increasing([event.id for event in order])
    for n in range(4):
        own = [event.data for event in order if event.data.startswith(f"{n} ")]
        assert [f"{n} {k}" for k in range(50)] == own


def test_processes_resume_anywhere(
    fleet: tuple[Server, Server], fleet_redis: Redis
) -> None:
    """At another process, another server, one that has just started, one that preloads its app:
    wherever a client comes back to, it gets what it missed, from the same ids."""
    client = fleet[0].subscribe("/subscribe?channel=x")
    fleet[0].post("/publish", b"seen")
    last = client.event()
    client.close()
    for number in range(20):
        fleet[number % 2].post(f"/publish?channel={'xy'[number % 2]}", str(number).encode())
    expected = [str(number) for number in range(0, 20, 2)]
    with serve_processes("gthread", fleet_redis, "--workers", "2", "--preload") as started:
        for server in (*fleet, *fleet, started, started):
            path = "/subscribe?channel=x"
            resumed = server.client(path, headers={"Last-Event-ID": last.id})
            assert expected == [event.data for event in resumed.events(10)]


def test_processes_random_cuts(
    fleet: tuple[Server, Server], rng: random.Random
) -> None:
    """Dozens of clients that hop between servers and processes, while events flow, miss nothing
    and get nothing twice."""
    settled = threading.Event()
    ports = [server.port for server in fleet]
    followers = [
        Task(follow, random.Random(rng.random()), ports, "/subscribe", settled) for _ in range(24)
    ]
    for number in range(200):
        rng.choice(fleet).post("/publish", str(number).encode())
    settled.set()
    fleet[0].post("/publish", b"end")
    for follower in followers:
        check_followed(follower.result(), 200)


def test_processes_hold_few_connections_to_redis(
    fleet: tuple[Server, Server], fleet_redis: Redis
) -> None:
    """Each one that reads, and as many as it has ever published by at a time: no more with sixty
    streams than with four."""

    def connections() -> list[str]:
        listed = fleet_redis.client().client_list()
        return sorted(c["name"] for c in listed if c["name"].startswith("process-"))

    spread(fleet, least=1, processes=4)
    before = connections()
    assert 4 == len(set(before))
    clients = [server.subscribe("/subscribe") for server in fleet for _ in range(30)]
    fleet[0].post("/publish", b"x")
    assert {"x"} == {client.event().data for client in clients}
    assert len(connections()) <= len(before) + 1  # one may have published for the first time


def test_processes_logout_ends_a_users_streams_at_all(fleet: tuple[Server, Server]) -> None:
    tabs = spread(fleet, least=1, processes=4, query="?channel=user-ada")
    bob = fleet[0].subscribe("/subscribe?channel=user-bob")
    fleet[1].post("/logout/ada")
    assert [[]] * len(tabs) == [tab.wait_end() for tab in tabs]
    fleet[0].post("/publish?channel=user-bob", b"still here")
    assert "still here" == bob.event().data


def test_processes_with_a_relay_are_not_warned(fleet: tuple[Server, Server]) -> None:
    spread(fleet, least=1, processes=4)
    assert not [server.kind for server in fleet if "several processes" in server.log()]


def test_processes_without_a_relay_are_warned_once() -> None:
    """One line for each, with the cure in it."""
    with serve_processes("gthread", None, "--workers", "2") as server:
        spread([server], least=3, processes=2)
        warnings = [line for line in server.log().splitlines() if "several processes" in line]
        assert 2 == len(warnings)
        assert all("EventBouncer(relay=RedisRelay(redis.Redis" in line for line in warnings)


def test_processes_of_one_are_not_warned() -> None:
    with serve_processes("gthread", None) as server:
        spread([server], least=2, processes=1)
        assert "several processes" not in server.log()


def test_processes_while_redis_dies_twice() -> None:
    """Streams stay open; who publishes is told; what was accepted arrives once and in order."""
    with (
        redis_server("--appendonly", "yes", "--appendfsync", "always") as redis,
        serve_processes("gthread", redis, "--workers", "2") as server,
    ):
        clients = spread([server], least=4, processes=2)
        accepted: list[int] = []
        refused: list[tuple[int, str]] = []
        stop = threading.Event()

        def publish() -> int:
            for number in itertools.count():
                if stop.is_set():
                    break
                try:
                    server.post("/publish", str(number).encode())
                    accepted.append(number)
                except RefusedRequest as error:
                    refused.append((error.args[0], error.args[1]))
            return number

        publisher = Task(publish)
        wait_for_more(accepted, 50)
        for _ in range(2):
            redis.kill()
            dead = len(refused)
            wait_for_more(refused, 6)
            assert {(503, "ConnectionError")} == set(refused[dead + 1 :])
            for client in clients:
                client.wait_for_body(b":\n" * 3)
            redis.start()
            wait_for_more(accepted, 50)
        stop.set()
        total = publisher.result()
        wait_until(lambda: published(server, b"end"), "the last one is accepted")
        received = []
        for client in clients:
            client.wait_for_body(b"data: end\n\n")
            received.append(tuple(e.data for e in client.events(client.body.count(b"\ndata:"))))
        assert 1 == len(set(received))
        numbers = [int(data) for data in received[0][:-1]]
        assert sorted(set(numbers)) == numbers
        # What was on its way when Redis died may have been kept or not.
        assert set(accepted) <= set(numbers) <= set(range(total))
        assert set(numbers) - set(accepted) <= unsure(accepted, total)
        assert 1 <= server.log().count("the relay cannot be read") <= 4


def wait_for_more(items: list[Any], count: int) -> None:
    """Wait until a list has so many items more."""
    enough = len(items) + count
    wait_until(lambda: len(items) >= enough, f"{count} more")


def published(server: Server, body: bytes) -> bool:
    with contextlib.suppress(RefusedRequest):
        server.post("/publish", body)
        return True
    return False


def unsure(accepted: list[int], total: int) -> set[int]:
    """The numbers that were refused right after one that was accepted."""
    return {number + 1 for number in accepted} - set(accepted)


def test_processes_suspended_while_redis_trims(fleet_redis: Redis) -> None:
    """One that wakes up to find what it should have sent trimmed says so, to all and to who comes
    back, and goes on with what is left."""
    fleet_redis.client().delete("sse")
    maxlen = ("--env", "MAXLEN=100")
    with serve_processes("gthread", fleet_redis, *maxlen) as server:
        client = server.subscribe("/subscribe")
        server.post("/publish", b"before")
        before = client.event()
        process = Path(f"/proc/{process_of(client)}/stat")
        if not process.exists():
            pytest.skip("this platform has no /proc")
        os.killpg(server.process.pid, signal.SIGSTOP)
        wait_until(lambda: ") T " in process.read_text(), "it is suspended")
        relay = fleet_redis.relay(maxlen=100)
        for number in range(1000):
            relay.publish(None, format_sse(number))
        os.killpg(server.process.pid, signal.SIGCONT)
        gap, first = client.events(2)
        assert ("gap", "") == (gap.type, gap.data)
        numbers = range(int(first.data) + 1, 1000)
        assert [*map(str, numbers)] == [event.data for event in client.events(len(numbers))]
        resumed = server.client("/subscribe", headers={"Last-Event-ID": before.id})
        again, *rest = resumed.events(2 + len(numbers))
        assert ("gap", first) == (again.type, rest[0])
        resumed = server.client("/subscribe", headers={"Last-Event-ID": gap.id})
        assert first == resumed.event()


def test_example_shares_a_feed_by_redis(shared_redis: Redis) -> None:
    """With REDIS_URL two servers of the example are one room."""
    need("redis")
    url = ("--env", f"REDIS_URL={shared_redis.url}")
    with (
        serve("gthread", EXAMPLE, *url, app="example_app") as one,
        serve("gthread", EXAMPLE, *url, app="example_app") as two,
    ):
        clients = [server.subscribe("/subscribe") for server in (one, two)]
        one.post("/publish", b"Hey!")
        two.post("/publish", b"Ho!")
        first, second = [client.events(2) for client in clients]
        assert ["Hey!", "Ho!"] == [event.data for event in first]
        assert first == second


# =================================================================================================
# CLIENTS
#
# Those that no one here wrote, straight at a server and through a real proxy: what was broadcast is
# what they get, and nothing else. And those that say and send anything.
# =================================================================================================

# What is broadcast, and as what event.
TRICKY: list[tuple[str, str]] = [
    ("plain", "message"),
    ("two\nlines", "message"),
    ("a\r\nb\rc", "message"),
    ("", "message"),
    ("\n", "message"),
    ("x\n", "message"),
    ("\nx", "message"),
    ("a\n\nb", "message"),
    (" leading", "message"),
    ("  two  ", "message"),
    ("\ttab", "message"),
    (":colon", "message"),
    ("data: x", "message"),
    ("data", "message"),
    ("a\nevent: evil\nid: 9\nretry: 1\n\n: b", "message"),
    ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "message"),
    ("grüß 😀 \U0010ffff", "message"),
    ("\ufeffmark", "message"),
    ("nul \0 nul", "message"),
    ('{"json": "a\\nb"}', "message"),
    ("named", "greet"),
    ("", "greet"),
    ("x" * 100_000, "message"),
    ("", "done"),
]

NGINX = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    gzip on;
    gzip_types text/event-stream;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(upstream: int) -> Iterator[int]:
    """Run a real nginx before a server, with its defaults and gzip on; give its port."""
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        Path(folder, "conf").write_text(NGINX.format(port=port, upstream=upstream), "utf-8")
        command = [need_program("nginx"), "-p", folder, "-c", "conf", "-e", "stderr"]
        server = Server("nginx", command, Path(folder), environment())
        try:

            def listens() -> bool:
                assert server.process.poll() is None, server.log()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_until(listens, "nginx listens")
            yield port
        finally:
            server.kill()


@pytest.fixture(scope="module", params=["gthread", "waitress", "nginx"])
def reached(request: pytest.FixtureRequest) -> Iterator[tuple[Server, int]]:
    """A server, and the port where clients reach it: its own, or that of nginx before it."""
    kind = "gthread" if request.param == "nginx" else request.param
    with serve(kind, APP) as server, contextlib.ExitStack() as stack:
        proxied = request.param == "nginx"
        yield server, stack.enter_context(nginx(server.port)) if proxied else server.port


def chromium_reads(browser: Browser, url: str) -> list[Event]:
    """Read by Chromium's EventSource, from a page of the same origin."""
    browser.go(url.replace("/subscribe/", "/stats/"))
    browser.run(
        """
        window.read = [];
        const source = new EventSource(arguments[0]);
        for (const name of ["message", "greet", "gap", "done", ""])
            source.addEventListener(name, (event) => {
                read.push([event.data, event.type, event.lastEventId]);
                if (name === "done") source.close();
            });
        """,
        url,
    )
    browser.wait_until("read.length && read[read.length - 1][1] === 'done'")
    return [Event(*fields) for fields in browser.run("return read")]


EVENTSOURCE = """
import { EventSource } from "eventsource";
const source = new EventSource(process.argv[2]);
for (const name of ["message", "greet", "gap", "done", ""])
    source.addEventListener(name, (event) => {
        console.log(JSON.stringify([event.data, event.type, event.lastEventId]));
        if (name === "done") source.close();
    });
"""


@pytest.fixture(scope="module")
def eventsource(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script that reads with the npm package ``eventsource``."""
    folder = tmp_path_factory.mktemp("eventsource")
    # Version 3 is the newest for the Node.js of Debian stable.
    install = [need_program("npm"), "install", "--no-audit", "--no-fund", "eventsource@3"]
    finished = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        go_without(f"the npm package eventsource, of which npm said: {finished.stderr[-500:]}; it")
    script = folder / "read.mjs"
    script.write_text(EVENTSOURCE, "utf-8")
    return script


def eventsource_reads(script: Path, url: str) -> list[Event]:
    return [Event(*json.loads(line)) for line in run(need_program("node"), str(script), url)]


def run(*command: str) -> list[str]:
    """Run a program; return the lines of its output."""
    finished = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    assert (0, b"") == (finished.returncode, finished.stderr)
    return finished.stdout.decode().removesuffix("\n").split("\n")


def httpx_reads(url: str) -> list[Event]:
    import httpx
    from httpx_sse import connect_sse

    read = []
    with httpx.Client(timeout=TIMEOUT) as client, connect_sse(client, "GET", url) as source:
        for event in source.iter_sse():
            read.append(Event(event.data, event.event, event.id))
    return read


def curl_reads(url: str) -> list[Event]:
    """Read what ``curl -N`` prints."""
    command = [need_program("curl"), "-sS", "-N", "--compressed", url]
    finished = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    return parse(finished.stdout)


@pytest.fixture(params=["chromium", "eventsource", "httpx-sse", "curl"])
def reads(request: pytest.FixtureRequest) -> Callable[[str], list[Event]]:
    """A client that reads the stream at a URL."""
    if request.param == "chromium":
        browser: Browser = request.getfixturevalue("browser")
        return lambda url: chromium_reads(browser, url)
    if request.param == "eventsource":
        script: Path = request.getfixturevalue("eventsource")
        return lambda url: eventsource_reads(script, url)
    if request.param == "httpx-sse":
        need("httpx_sse")
        return httpx_reads
    need_program("curl")
    return curl_reads


@pytest.mark.parametrize("history", [0, 100])
def test_client_reads_exactly_what_was_broadcast(
    reached: tuple[Server, int], reads: Callable[[str], list[Event]], history: int
) -> None:
    """Whatever the text, to the character; and no event that nobody sent, for all the heartbeats,
    the retry and the id at the start."""
    server, port = reached
    bouncer = Remote(server, history=history, heartbeat=0.02, retry=1000)
    client = Task(lambda: reads(f"http://127.0.0.1:{port}/subscribe/{bouncer.name}"))
    bouncer.wait_for(subscribers=1)
    beats = bouncer.client()
    for number, (data, type_) in enumerate(TRICKY):
        bouncer.broadcast(data, event=type_)
        if number % 8 == 0:  # heartbeats come between events, and before them
            beats.wait_for_body(b":\n" * 3)
    bouncer.close()
    beats.close()
    read = client.result()
    expected = [(re.sub("\r\n?", "\n", data), type_) for data, type_ in TRICKY]
    assert expected == [(event.data, event.type) for event in read]
    if history:
        assert are_increasing([event.id for event in read])
    else:
        assert {""} == {event.id for event in read}


def test_client_behind_nginx_gets_each_event_when_it_is_sent() -> None:
    """Compressed, as the client asks and nginx is set up to, and held back by neither."""
    with serve("gthread", APP) as server, nginx(server.port) as port:
        bouncer = Remote(server, heartbeat=None)
        headers = {"Accept-Encoding": "gzip"}
        client = Client(port, f"/subscribe/{bouncer.name}", headers=headers)
        with contextlib.closing(client):
            assert ("content-encoding", "gzip") in client.headers
            curl = ["curl", "-sS", "-N", "--compressed", "--max-time", str(TIMEOUT)]
            curl += [f"http://127.0.0.1:{port}/subscribe/{bouncer.name}"]
            with subprocess.Popen(curl, stdout=subprocess.PIPE) as process:
                assert process.stdout
                assert b":\n" == process.stdout.readline()
                for number in range(3):
                    bouncer.broadcast(number)
                    lines = [process.stdout.readline() for _ in range(2)]
                    assert [f"data: {number}\n".encode(), b"\n"] == lines
                bouncer.close()


@pytest.mark.parametrize("remote", ["detached"], indirect=True)
def test_client_fuzz_says_anything(remote: Callable[..., Remote], rng: random.Random) -> None:
    """Clients that talk, reset, half-close or stall cost nobody an event, and leave nothing."""
    bouncer = remote(history=10, heartbeat=0.05)
    steady = bouncer.client()
    path = f"/subscribe/{bouncer.name}"
    rounds = 30 * FUZZ
    for number in range(rounds):
        headers = {"Last-Event-ID": f"{rng.randrange(10**13)}-{rng.randrange(9)}"}
        client = RestlessClient(bouncer.server.port, path, headers=headers, receive_buffer=4096)
        for _ in range(rng.randrange(3)):
            client.say(rng.randbytes(rng.choice([1, 100, 100_000])))
        if rng.random() < 0.5:
            client.read()
        client.leave(rng)
        bouncer.broadcast(number)
    events = steady.events(rounds)
    assert [str(number) for number in range(rounds)] == [event.data for event in events]
    steady.close()
    bouncer.wait_for(subscribers=0)


# =================================================================================================
# WAYS TO USE IT
#
# What people bring along from the blog posts, the example (push from a route, the progress of long
# work, named events, counting subscribers), and the other ways of the field.
# =================================================================================================

# The app of the blog posts, with its class and function imported, and below it what the test needs.
BLOG_POST = '''
import flask
from sse_bouncer import EventBouncer as MessageAnnouncer, format_sse

app = flask.Flask(__name__)
bouncer = MessageAnnouncer()

@app.route("/publish", methods=["POST"])
def publish():
    data = flask.request.get_data(as_text=True)
    bouncer.broadcast(msg=format_sse(data=data))
    return {}, 200

@app.route("/subscribe", methods=["GET"])
def subscribe():
    def stream():
        messages = bouncer.subscribe()
        while True:
            msg = messages.get()
            yield msg

    return flask.Response(stream(), mimetype="text/event-stream")

@app.route("/stats")
def stats():
    return bouncer.stats()

@app.route("/end", methods=["POST"])
def end():
    for subscription in bouncer.subscribers:
        bouncer.unsubscribe(subscription)
    return {}

if __name__ == "__main__":
    app.run(debug=True)
'''


@pytest.fixture(scope="module", params=["script", "development", "gthread"])
def blog_post(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The app from the blog posts: ``app.run(debug=True)``, ``flask run``, gunicorn."""
    with serve(request.param, BLOG_POST) as server:
        yield server


def blog_post_client(server: Server, **options: Any) -> Client:
    """Subscribe. The view does so when its generator starts, so wait for that."""
    before = server.get("/stats")["subscribers"]
    client = server.client("/subscribe", **options)
    wait_until(lambda: server.get("/stats")["subscribers"] > before, "the generator starts")
    return client


def test_blog_post_publishes(blog_post: Server) -> None:
    clients = [blog_post_client(blog_post) for _ in range(3)]
    blog_post.post("/publish", b"a\nb")
    assert [Event("a\nb")] * 3 == [client.event() for client in clients]
    assert ("content-type", "text/event-stream; charset=utf-8") in clients[0].headers


@pytest.mark.parametrize("leave", [Client.close, Client.reset])
def test_blog_post_client_leaves(blog_post: Server, leave: Callable[[Client], None]) -> None:
    """Nothing tells a plain generator that its client left but a write that fails: the second."""
    staying, leaving = blog_post_client(blog_post), blog_post_client(blog_post)
    before = blog_post.get("/stats")["subscribers"]
    leave(leaving)

    def left() -> bool:
        blog_post.post("/publish", b"x")
        return bool(blog_post.get("/stats")["subscribers"] < before)

    wait_until(left, "the leaver is noticed")
    assert Event("x") == staying.event()


def test_blog_post_streams_end(blog_post: Server) -> None:
    """A hand-written view's stream ends with what was held, and without a traceback."""
    client = blog_post_client(blog_post)
    blog_post.post("/publish", b"last")
    blog_post.post("/end")
    assert [Event("last")] == client.wait_end()
    forgive_debugger(blog_post, "ended: unsubscribed")


def test_blog_post_stream_ends_when_dropped(blog_post: Server) -> None:
    """A client that stopped reading gets what was held, and is not left with a silent stream."""
    dropped = blog_post.get("/stats")["dropped"]
    stalled = blog_post_client(blog_post, receive_buffer=4096)

    def was_dropped() -> bool:
        blog_post.post("/publish", b"x" * 2**18)
        return bool(blog_post.get("/stats")["dropped"] > dropped)

    wait_until(was_dropped, "the stalled client is dropped")
    assert {Event("x" * 2**18)} == set(stalled.wait_end())
    forgive_debugger(blog_post, "ended: dropped")


def forgive_debugger(server: Server, why: str) -> None:
    """``debug=True`` shows whatever a generator raises, also what servers take for a client that
    left. A plain generator cannot help that; the reason is the last line of what is shown."""
    if server.kind == "script":
        server.wait_for_log(f"Subscription.Ended: .* {why}.*\n")
        server.complaints()


# One app with each way of the field in it.
WAYS = '''
import functools, itertools, time
from flask import Flask, Response, abort, g, request
from sse_bouncer import EventBouncer, format_sse, sse_response

app = Flask(__name__)
bouncer = EventBouncer()

@app.get("/clock")
def clock():
    def ticks():
        for tick in itertools.count():
            yield {"tick": tick}
            time.sleep(0.01)
    return sse_response(ticks())

@app.get("/square/<int:number>")
def square(number):
    def results():
        yield number * number
    return sse_response(results())

@app.get("/orders")
def orders():
    return bouncer.stream("orders")

@app.post("/orders")
def order():
    bouncer.broadcast({"id": 7, "items": ["tea"]}, "order", channel="orders", id=7)
    return {}

TOKENS = {"a": "ada", "b": "bob"}

def logged_in(view):
    @functools.wraps(view)
    def checked(*args, **kwargs):
        g.user = TOKENS.get(request.headers.get("Token")) or abort(403)
        return view(*args, **kwargs)
    return checked

@app.get("/inbox")
@logged_in
def inbox():
    return bouncer.stream(f"user-{g.user}")

@app.post("/inbox/<user>")
@logged_in
def send(user):
    text = request.get_data(as_text=True)
    bouncer.broadcast({"from": g.user, "text": text}, channel=f"user-{user}")
    return {}

@app.post("/logout")
@logged_in
def logout():
    bouncer.close(f"user-{g.user}")
    return {}

@app.get("/chat/<room>")
@logged_in
def chat(room):
    bouncer.broadcast({"user": g.user}, "join", channel=f"room-{room}")
    return bouncer.stream(f"room-{room}")

@app.post("/chat/<room>")
@logged_in
def say(room):
    text = request.get_data(as_text=True)
    bouncer.broadcast({"user": g.user, "text": text}, channel=f"room-{room}")
    return {}

PAGE = """
<script>
  let events = [], ends = 0;
  const source = new EventSource(location.hash.slice(1));
  source.onmessage = (event) => events.push(event.data);
  source.onerror = () => ends += 1;
  source.addEventListener("done", (event) => source.close());
</script>
"""

@app.get("/")
def page():
    return PAGE

@app.get("/ends")
def ends():
    return sse_response([format_sse("again", retry=1)])

@app.get("/ends-with-done")
def ends_with_done():
    return sse_response([format_sse("once", retry=1), format_sse("", "done")])

served = set()

@app.get("/ends-with-204")
def ends_with_204():
    if "204" in served:
        return "", 204
    served.add("204")
    return sse_response([format_sse("once", retry=1)])
'''


@pytest.fixture(scope="module")
def ways() -> Iterator[Server]:
    with serve("development", WAYS) as server:
        yield server


def test_way_clock(ways: Server) -> None:
    client = ways.client("/clock")
    assert [Event(f'{{"tick": {tick}}}') for tick in range(3)] == client.events(3)


def test_way_result_of_a_function(ways: Server) -> None:
    assert [Event("144")] == ways.client("/square/12").wait_end()


def test_way_named_event_of_json(ways: Server) -> None:
    client = ways.subscribe("/orders")
    ways.post("/orders")
    data, type_, id = client.event()
    assert ("order", "7", {"id": 7, "items": ["tea"]}) == (type_, id, json.loads(data))


def test_way_channels_by_the_routes_own_decorators(ways: Server) -> None:
    """Who is let in is the route's business: a stranger gets no stream, and others' no message."""
    ada, bob = ways.subscribe("/inbox", Token="a"), ways.subscribe("/inbox", Token="b")
    assert 403 == ways.client("/inbox").status
    ways.post("/inbox/ada", b"hi", Token="b")
    ways.post("/inbox/bob", b"hello", Token="a")
    assert [{"from": "bob", "text": "hi"}] == [json.loads(ada.event().data)]
    assert [{"from": "ada", "text": "hello"}] == [json.loads(bob.event().data)]


def test_way_logout_ends_the_users_streams(ways: Server) -> None:
    tabs = [ways.subscribe("/inbox", Token="a") for _ in range(2)]
    other = ways.subscribe("/inbox", Token="b")
    ways.post("/logout", Token="a")
    assert [[], []] == [tab.wait_end() for tab in tabs]
    ways.post("/inbox/bob", b"still here", Token="b")
    assert "still here" == json.loads(other.event().data)["text"]


def test_way_chat(ways: Server) -> None:
    """Joins and messages with the user's name, to those in the room."""
    ada = ways.subscribe("/chat/lobby", Token="a")
    bob = ways.subscribe("/chat/lobby", Token="b")
    assert Event('{"user": "bob"}', "join") == ada.event()
    ways.post("/chat/elsewhere", b"not for you", Token="b")
    ways.post("/chat/lobby", b"hi", Token="b")
    assert [{"user": "bob", "text": "hi"}] * 2 == [json.loads(c.event().data) for c in (ada, bob)]


def test_browser_reconnects_when_a_stream_ends(ways: Server, browser: Browser) -> None:
    browser.go(f"http://127.0.0.1:{ways.port}/#ends")
    browser.wait_until("events.length >= 3")


@pytest.mark.parametrize("path", ["ends-with-done", "ends-with-204"])
def test_browser_is_told_that_a_stream_ended_for_good(
    ways: Server, browser: Browser, path: str
) -> None:
    """The two cures: an event at which the page closes, or 204 to the reconnect."""
    browser.go(f"http://127.0.0.1:{ways.port}/?{path}#{path}")
    browser.wait_until("source.readyState === EventSource.CLOSED")
    assert ["once"] == browser.run("return events")


@pytest.fixture(scope="module", params=["script", "development", "gthread"])
def example(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The example by ``python example_app.py``, ``flask run`` and gunicorn."""
    with serve(request.param, EXAMPLE, app="example_app") as server:
        yield server


def test_example_publishes(example: Server) -> None:
    """What the second terminal of its docstring posts, the first one shows."""
    client = example.subscribe("/subscribe")
    example.post("/publish", b"Hey!")
    example.post("/publish?event=cheer", b"Ada")
    received = [(event.data, event.type) for event in client.events(2)]
    assert [("Hey!", "message"), ("Ada", "cheer")] == received


@pytest.mark.parametrize(("path", "body"), [("", b""), ("", b"\xff"), ("?event=a%0Ab", b"x")])
def test_example_refuses_bad_input(example: Server, path: str, body: bytes) -> None:
    with pytest.raises(RefusedRequest, match="400.*expected"):
        example.post("/publish" + path, body)


def test_example_progress(example: Server) -> None:
    steps = [json.loads(event.data) for event in example.client("/progress").events(3)]
    assert [{"stamped": step, "total": 40} for step in range(3)] == steps


def test_example_stats(example: Server) -> None:
    before = example.get("/stats")["subscribers"]
    example.subscribe("/subscribe")
    assert before + 1 == example.get("/stats")["subscribers"]


@pytest.mark.parametrize("example", ["script"], indirect=True)
def test_example_page(example: Server, browser: Browser) -> None:
    """The page goes live, publishes by its form, shows it in the feed, and runs the long work."""
    browser.go(f"http://127.0.0.1:{example.port}/")
    browser.wait_until("document.getElementById('state').textContent === 'Live'")
    browser.run(
        "document.getElementById('who').value = 'Ada';"
        "document.getElementById('text').value = arguments[0];"
        "document.getElementById('form').requestSubmit();",
        "<b>tea</b> & cake 😀",
    )
    feed = "document.getElementById('feed').innerText"
    browser.wait_until(f"{feed}.includes('<b>tea</b> & cake 😀') && {feed}.includes('Ada')")
    example.post("/publish", b"from a terminal")
    browser.wait_until(f"{feed}.includes('from a terminal')")
    browser.run("document.getElementById('cheer').click()")
    browser.wait_until(f"{feed}.includes('Ada cheers')")
    browser.run("document.getElementById('work').click()")
    browser.wait_until("document.getElementById('outcome').textContent === 'All stamped.'")
    assert 40 == browser.run("return document.getElementById('bar').value")
    browser.go("about:blank")


# =================================================================================================
# PROMISES
#
# About the package as a whole.
# =================================================================================================


def test_promise_every_public_name_exists() -> None:
    classes = {"EventBouncer", "Frame", "RedisRelay", "Subscription"}
    names = classes | {"format_sse", "sse_response"}
    assert names == set(sse_bouncer.__all__)
    assert all(hasattr(sse_bouncer, name) and getattr(sse_bouncer, name).__doc__ for name in names)
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", sse_bouncer.__version__)


WITHOUT_FLASK = """
import sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
before = set(sys.modules)
from sse_bouncer import *
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - {"sse_bouncer"}
assert loaded <= sys.stdlib_module_names, loaded
bouncer = EventBouncer()
subscription = bouncer.subscribe("a")
bouncer.broadcast({"n": 1}, "greet", channel="a")
print(repr(str(subscription.get(timeout=10))))
print(threading.enumerate() == [threading.main_thread()])
"""


def test_promise_works_without_flask_and_without_a_thread() -> None:
    finished = run_python(WITHOUT_FLASK)
    expected = r"""'event: greet\ndata: {"n": 1}\n\n'"""
    assert (f"{expected}\nTrue\n", "") == (finished.stdout, finished.stderr)


IMPORT_ONLY = """
import logging, os, signal, sys, threading, warnings
def state():
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    descriptors = sorted(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else []
    return handlers, descriptors, logging.root.handlers, threading.enumerate(), sys.excepthook
before = state()
import sse_bouncer
print(before == state(), "flask" in sys.modules)
"""


def test_promise_import_has_no_side_effect() -> None:
    finished = run_python(IMPORT_ONLY)
    assert ("True False\n", "") == (finished.stdout, finished.stderr)


USER = """\
from flask import Response
from sse_bouncer import EventBouncer, Frame, Subscription, format_sse, sse_response

bouncer = EventBouncer(heartbeat=None, retry=(1_000, 5_000))
subscription: Subscription = bouncer.subscribe("news")
frame: Frame = format_sse({"n": 1}, "greet", id=7)
bouncer.broadcast(frame, channel="news")
count: int = bouncer.stats()["subscribers"]
responses: list[Response] = [bouncer.stream(), sse_response(str(n) for n in range(3))]
reveal_type(subscription.get())
bouncer.broadcast(frame, channel=5)
"""


def test_promise_types_reach_users_of_the_wheel(tmp_path: Path) -> None:
    """mypy --strict sees the installed wheel's types: right code passes, wrong code does not."""
    need("mypy")
    need("hatchling")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path)]
    run_tool(*pip, *build, str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run_tool(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    installed = {path.name for path in (site / "sse_bouncer").iterdir()} - {"__pycache__"}
    assert {"__init__.py", "py.typed"} == installed
    user = tmp_path / "user.py"
    user.write_text(USER, "utf-8")
    finished = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
        check=False,
    )
    revealed, wrong, _ = finished.stdout.splitlines()
    assert 'user.py:10: note: Revealed type is "sse_bouncer.Frame"' == revealed
    assert wrong.startswith('user.py:11: error: Argument "channel" to "broadcast"')


def run_tool(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert 0 == finished.returncode, finished.stdout + finished.stderr
