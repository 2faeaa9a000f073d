"""Tests of sse_bouncer: real servers, real sockets, a real browser, and no part of ours replaced.

    pytest -n auto               everything, in as many processes as there are cores
    pytest -k "wire or fan_out"  the rooms that need no server
    pytest -k gthread            one server
    FUZZ=20 pytest -k fuzz       the random tests, twenty times as long
    TIMEOUT=300 pytest           on a slow machine

The rooms are the module's, in its order; then come STOPPING, CLIENTS, WAYS TO USE IT and PROMISES.
A test whose package or program is missing skips and says so; under ``CI=true`` it fails. Nothing
asserts how long something takes, or sleeps to let something else happen: a test waits for what it
wants to see, and fails after TIMEOUT seconds.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import functools
import gc
import http.client
import importlib.util
import io
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
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import flask
import pytest
from werkzeug.test import create_environ

from sse_bouncer import EventBouncer, Frame, RedisRelay, Subscription, format_sse, sse_response

TIMEOUT = int(os.environ.get("TIMEOUT", 60))  # seconds: far beyond what anything here takes
FUZZ = int(os.environ.get("FUZZ", 1))  # how many times as long the random tests run
ROOT = Path(__file__).resolve().parent
PROGRAMS = ("redis-server", "nginx", "chromium", "chromedriver", "curl", "openssl")
os.environ["NO_PROXY"] = "127.0.0.1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore


# =================================================================================================
# HARNESS: waiting, an event stream parser, one client, one app, one kind of server


def need(*names: str) -> None:
    """Skip the test if a package or a program that it uses is missing; under CI it fails."""
    for name in names:
        if (shutil.which if name in PROGRAMS else importlib.util.find_spec)(name) is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} is missing")


PAUSE = functools.partial(time.sleep, 0.01)  # leaves the processor to what is waited for


def wait_until(condition: Callable[[], object], what: str, step: Any = PAUSE) -> None:
    """Take step after step until ``condition`` holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what}"
        step()


class Task(Future[Any]):
    """A function in a daemon thread: if it hangs, its own test fails, and the run goes on."""

    def __init__(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()

        def run() -> None:
            try:
                self.set_result(do(*args, **kwargs))
            except BaseException as error:  # also pytest.fail's
                self.set_exception(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self, timeout: float | None = TIMEOUT) -> Any:
        return super().result(timeout)

    def wait_until_blocked(self) -> Task:
        """Wait until the thread waits for another: its innermost frame is a Condition's wait."""

        def is_blocked() -> bool:
            frame = sys._current_frames().get(self.thread.ident or 0)
            return frame is not None and frame.f_code is threading.Condition.wait.__code__

        wait_until(is_blocked, "the thread waits")
        return self


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for a subprocess: it imports from here, and uses no other Redis."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "REDIS_URL": "", **extra}


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    options = {"env": environment(), "timeout": 2 * TIMEOUT, "check": False, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)


GAP = "(gap)"


class Event(NamedTuple):
    """What a browser would dispatch. As text it is its data, or says that it is a gap."""

    data: str
    type: str = "message"
    id: str = ""

    def __str__(self) -> str:
        return GAP if (self.type, self.data) == ("gap", "") else self.data


class Parser:
    """An event stream read as WHATWG HTML, sections 9.2.5 and 9.2.6, says, and written from these
    alone, so that it and ``format_sse`` cannot share a misunderstanding."""

    def __init__(self) -> None:
        self.last_event_id = self._line = self._data = self._type = self._id = ""
        decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes and return the events that they complete."""
        *lines, self._line = (self._line + self._decoder.decode(chunk)).split("\n")
        return [event for line in lines if (event := self._take(line))]

    def _take(self, line: str) -> Event | None:
        if not line:
            self.last_event_id = self._id
            data, type_ = self._data, self._type
            self._data = self._type = ""
            return Event(data[:-1], type_ or "message", self._id) if data else None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._type = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id" and "\0" not in value:
            self._id = value
        return None


def parse(*frames: str) -> list[Event]:
    return Parser().feed("".join(frames).encode())


def datas(frames: Iterable[Frame]) -> list[str]:
    """The data of each event in ``frames``; of all that there will be, if it is a subscription."""
    return list(map(str, parse(*frames)))


def held(subscription: Subscription) -> list[str]:
    """Take what the subscription holds; return its data."""
    return datas([subscription.get_nowait() for _ in range(subscription.qsize())])


def next_events(subscription: Subscription, count: int) -> list[Event]:
    return parse(*(subscription.get(timeout=TIMEOUT) for _ in range(count)))


def next_datas(subscription: Subscription, count: int) -> list[str]:
    return list(map(str, next_events(subscription, count)))


def id_value(id: str | None) -> tuple[int, ...]:
    return tuple(map(int, (id or "").split("-")))


def are_increasing(ids: Iterable[str | None]) -> bool:
    return all(one < two for one, two in itertools.pairwise(map(id_value, ids)))


class Client:
    """One HTTP request on a socket of its own, with its body read as an event stream. It reads only
    when it is asked to, so the test decides when a client is slow, leaves or resets."""

    def __init__(self, address: int | str, path: str, method: str = "GET", **options: Any) -> None:
        """Send a request, and ``more`` along with its head: its body, or what is none."""
        self.body, self.parser, self.unread = bytearray(), Parser(), deque[Event]()
        self.ended = False  # the server has ended the body, or closed the connection
        self.whole = False  # ... and had sent all of it
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(TIMEOUT)
        if size := options.get("receive_buffer"):  # before it connects: it never grows past it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self.socket.connect(address if isinstance(address, str) else ("127.0.0.1", address))
        lines = [f"{method} {path} {options.get('protocol', 'HTTP/1.1')}", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in options.get("headers", {}).items()]
        more: bytes = options.get("more", b"")
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + more)
        self._response = http.client.HTTPResponse(self.socket, method=method)

    @functools.cached_property
    def head(self) -> http.client.HTTPResponse:
        self._response.begin()
        return self._response

    def read(self) -> None:
        """Take in what one read brings, or the end."""
        assert not self.ended, f"ended after {bytes(self.body[-500:])!r}"
        try:
            part = self.head.read1(65536)
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionError):
            self.ended = True
            return
        self.ended = self.whole = not part
        self.body += part
        self.unread += self.parser.feed(part)

    def wait_until(self, condition: Callable[[], object], what: str) -> Client:
        """Read until ``condition`` holds."""
        wait_until(condition, what, self.read)
        return self

    def wait_opening(self) -> Client:
        """Read what a stream opens with: from then on it misses nothing."""
        return self.wait_until(lambda: self.body, "opening")

    def wait_for_beats(self, count: int) -> None:
        """Read until so many heartbeats in a row have come since the call."""
        start, beats = len(self.body), b":\n" * count
        self.wait_until(lambda: self.body.find(beats, start) >= 0, "heartbeats")

    def events(self, count: int) -> list[Event]:
        self.wait_until(lambda: len(self.unread) >= count, f"{count} events")
        return [self.unread.popleft() for _ in range(count)]

    def datas(self, count: int) -> list[str]:
        return list(map(str, self.events(count)))

    def wait_end(self) -> list[str]:
        """Read until the server ends the stream; return the data of events not yet asked for."""
        self.wait_until(lambda: self.ended, "end of the stream")
        return list(map(str, self.unread))

    def say(self, something: bytes) -> None:
        """Send what no server has asked for. It may hang up on a client that says too much."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(something)

    def leave(self, how: str = "close") -> None:
        """Leave with a FIN; as a crashed program does, with a RST; or with a FIN, but listen on."""
        if how == "half-close":
            with contextlib.suppress(OSError):  # the server was first
                return self.socket.shutdown(socket.SHUT_WR)
        if how == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._response.close()
        self.socket.close()


# The one app. A request says which bouncer it is about by a parameter that holds the options to
# make it with, so that any process can; and what is to be done, in Python.
APP = '''
import contextlib, json, multiprocessing, os, resource, signal, socket, threading, warnings
from collections import defaultdict
from urllib.parse import parse_qs
from flask import Flask, jsonify, request, session
from werkzeug.middleware.proxy_fix import ProxyFix
from sse_bouncer import EventBouncer, RedisRelay, format_sse, sse_response

warnings.simplefilter("ignore")  # of forks beside threads
app = Flask(__name__)
app.config.update(SECRET_KEY="secret", COMPRESS_MIMETYPES=["text/event-stream"])
with contextlib.suppress(ImportError):
    from flask_compress import Compress
    Compress(app)
bouncers, making = {}, threading.Lock()
seen = defaultdict(dict)  # what middleware and teardown functions saw of a bouncer's last stream

def do(code, **names):
    """Return what an expression comes to that a test has sent."""
    with making:
        name = request.args["bouncer"]
        if name not in bouncers:
            options = json.loads(name)
            del options["name"]
            if "relay" in options:
                import redis
                options["relay"] = RedisRelay(redis.Redis.from_url(options["relay"]), name)
            bouncers[name] = EventBouncer(**options)
    names |= {"bouncer": bouncers[name], "sight": seen[name]}
    return eval(code, {**globals(), **names})

@app.post("/do")
def view():
    return jsonify(do(request.json[0], **request.json[1]))

@app.route("/subscribe", methods=["GET", "POST"])
def subscribe():
    return do(request.args.get("do", "bouncer.stream(*request.args.getlist('channel'))"))

@app.after_request
def after(response):
    response.headers["X-Pid"] = str(os.getpid())
    response.set_cookie("first", "1")
    response.set_cookie("second", "2")
    if "change" in request.args:
        do(request.args["change"], response=response)
    return response

@app.teardown_request
def teardown(error):
    seen[request.args.get("bouncer")]["teardown"] = repr(error)

def middleware(wsgi):
    def call(environ, start_response):
        query = parse_qs(environ["QUERY_STRING"])
        if "compressed" not in query:
            environ.pop("HTTP_ACCEPT_ENCODING", None)
        def start(status, headers, exc_info=None):
            return start_response(status, [*headers, ("X-Middleware", "1")], exc_info)
        body = wsgi(environ, start)
        return watched(body, seen[query["bouncer"][0]]) if "watched" in query else body
    return call

def watched(body, sight):
    sight.update(bytes=0, closed=False)
    try:
        for chunk in body:
            sight["bytes"] += len(chunk)
            yield chunk
    finally:
        body.close()
        sight["closed"] = True

app.wsgi_app = middleware(ProxyFix(app.wsgi_app))

def generator(subscription, sight):
    try:
        yield from subscription
    finally:
        sight["ended"] = True

def my_socket(port):
    """Return the descriptor of the process's connection to a port, and a socket object for it."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError, IndexError):
            if "socket" in os.readlink(f"/proc/self/fd/{fd}"):
                copy = socket.socket(fileno=os.dup(fd))
                if copy.getpeername()[1] == port:
                    return fd, copy

def child(bouncer):
    """What a forked child does: it begins with nothing, and can do everything."""
    before = bouncer.stats()["subscribers"]
    with bouncer.subscribe() as subscription:
        bouncer.broadcast("of the child")
        while "of the child" not in subscription.get(timeout=30):
            pass
    os._exit(7 if before == 0 else 8)

def fork(run, *args):
    """Return the exit status of a child that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=run, args=args)
    process.start()
    process.join()
    return process.exitcode

if os.environ.get("APM"):
    import newrelic.agent
    newrelic.agent.initialize(os.environ["APM"])
    app = newrelic.agent.WSGIApplicationWrapper(app)
'''

GUNICORN = [sys.executable, "-m", "gunicorn", "app:app", "--bind", "127.0.0.1:0"]
# The control socket would be one in the home folder, that servers would share.
GUNICORN += ["--access-logfile", "-", "--no-control-socket", "--worker-class"]
# How each kind of server is started, so that it finds a free port by itself and prints it. Workers
# are as small as can be, so that a stream which holds one shows.
COMMANDS = {
    "development": [sys.executable, "-m", "flask", "--app", "app", "run", "--port", "0"],
    "sync": [*GUNICORN, "sync"],
    "gthread": [*GUNICORN, "gthread", "--threads", "1"],
    "gevent": [*GUNICORN, "gevent"],
    "gthread-served": [*GUNICORN, "gthread", "--threads", "32"],
    "waitress": [sys.executable, *"-m waitress --listen 127.0.0.1:0 --threads 32 app:app".split()],
    "gthread-2": [*GUNICORN, "gthread", "--workers", "2"],
    "script": [sys.executable, "app.py"],
}
WORKERS = ["sync", "gthread", "gevent"]
DETACHING = ["development", *WORKERS]  # these hand out their connections
KINDS = [*DETACHING, "gthread-served", "waitress"]
SINGLE = ["sync", "gthread"]  # these have one thread
ADDRESS = re.compile(r"(?:Running on|Listening at:|Serving on) https?://127\.0\.0\.1:(\d+)")
# What no log may hold, whatever clients do.
COMPLAINTS = re.compile("Traceback|Exception ignored|Error (on|handling) request|WORKER TIMEOUT")


class Process:
    """A program in a group of its own (workers, reloader), with its output in a file."""

    def __init__(self, command: list[str], folder: Path, **environ: str) -> None:
        self._log = folder / "log"
        options: Any = {"cwd": folder, "env": environment(**environ), "stdin": subprocess.DEVNULL}
        with self._log.open("wb") as log:
            options |= {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(command, **options)

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def wait_for_log(self, pattern: str | re.Pattern[str], times: int = 1) -> re.Match[str]:
        """Wait until something like ``pattern`` is in the log, so many times; return the last."""
        found = list[re.Match[str]]()

        def look() -> None:
            PAUSE()
            ended = self.process.poll() is not None
            found[:] = re.finditer(pattern, self.log())
            assert len(found) >= times or not ended, f"it has ended: {self.log()}"

        wait_until(lambda: len(found) >= times, f"{pattern} in the log", look)
        return found[-1]

    def signal(self, how: str) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, getattr(signal, how))

    def kill(self) -> None:
        self.signal("SIGKILL")
        self.process.wait(TIMEOUT)


class Server(Process):
    """A server that runs an app, with the clients and bouncers that a test has there."""

    def __init__(self, kind: str, command: list[str], folder: Path, **environ: str) -> None:
        super().__init__(command, folder, **environ)
        self.kind, self.port = kind, 0
        self.detaches = kind not in ("gthread-served", "waitress")
        self.clients, self.bouncers = list[Client](), list[Remote]()
        self._looked_through = 0  # how much of the log

    def clear(self) -> None:
        """End what a test has here, and look at the log."""
        while self.clients:
            self.clients.pop().leave()
        while self.bouncers:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server has ended
                self.bouncers.pop().do("bouncer.close()")
        log = self.log()
        new, self._looked_through = log[self._looked_through :], len(log)
        complaint = COMPLAINTS.search(new)
        assert complaint is None, new

    def count(self, what: str) -> int:
        """Return how many threads ("task") or descriptors ("fd") all its processes have."""
        pids, total = [self.process.pid], 0
        while pids:
            process = Path(f"/proc/{pids.pop()}")
            with contextlib.suppress(OSError):  # it ended meanwhile
                total += len(list((process / what).iterdir()))
                for children in process.glob("task/*/children"):
                    pids += map(int, children.read_text().split())
        return total

    def client(self, path: str, address: int | str = 0, **options: Any) -> Client:
        """Send a request for a stream; its client leaves with the test."""
        self.clients.append(Client(address or self.port, path, **options))
        return self.clients[-1]

    def ask(self, path: str, body: object = None, **headers: str) -> Any:
        """Make an ordinary request, a POST if there is a body; return its JSON, or its text."""
        if body is not None and not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            is_json = response.headers.get_content_type() == "application/json"
            return json.load(response) if is_json else response.read().decode()


class Remote:
    """A bouncer of one test's own, in a server that tests share."""

    _numbers = itertools.count()

    def __init__(self, server: Server, **options: Any) -> None:
        """Detached streams get no heartbeats: what is noticed there is noticed by itself."""
        self.server = server
        defaults: dict[str, Any] = {"name": next(self._numbers)}
        defaults["heartbeat"] = None if server.detaches else 0.1
        if server.kind == "gthread-served":
            defaults["detach"] = False
        self.name = json.dumps({**defaults, **options})
        server.bouncers.append(self)

    def url(self, path: str, **query: object) -> str:
        return f"{path}?{urlencode({'bouncer': self.name, **query}, doseq=True)}"

    def do(self, code: str, **names: object) -> Any:
        """Return what a Python expression comes to in the server."""
        return self.server.ask(self.url("/do"), [code, names])

    def request(self, *channels: str, query: Any = None, **options: Any) -> Client:
        """Send a request for a stream, and wait for nothing."""
        url = self.url("/subscribe", **{"channel": channels, **(query or {})})
        return self.server.client(url, **options)

    def client(self, *channels: str, **options: Any) -> Client:
        """Open a stream, and wait until it is as it will be: detached, where that can be."""
        before, count = self.stats(), "detached" if self.server.detaches else "subscribers"
        client = self.request(*channels, **options)
        wait_until(lambda: self.stats()[count] > before[count], f"one more {count}")
        return client

    def streams(self, count: int) -> list[Client]:
        """Open many, no more at once than wait for the server to accept them."""
        clients: list[Client] = []
        while len(clients) < count:
            clients += [self.request() for _ in range(min(count - len(clients), 100))]
            self.wait_for(detached=len(clients))
        return clients

    def broadcast(self, *messages: object, **fields: object) -> None:
        code = "[bouncer.broadcast(message, **fields) for message in messages]"
        self.do(code, messages=messages, fields=fields)

    def stats(self) -> Any:
        return self.do("bouncer.stats()")

    def wait_for(self, **counts: int) -> None:
        wait_until(lambda: counts.items() <= self.stats().items(), f"{counts} in its stats")


@contextlib.contextmanager
def serve(kind: str, folder: Path, *options: str, app: str = APP, **env: str) -> Iterator[Server]:
    """Run a server with ``app`` as its module. A traceback in its log fails the test."""
    command = [*COMMANDS[kind], *options]
    need(*{"gunicorn", "gevent", "packaging", "waitress"} & {*command, kind})
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(app, "utf-8")
    server = Server(kind, command, folder, **env)
    try:
        server.port = int(server.wait_for_log(ADDRESS)[1])
        yield server
        server.clear()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Starts a server of each kind, once in a run."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:  # what a thousand streams take, here and in a server
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3_000)), hard))
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp
        yield functools.cache(lambda kind: stack.enter_context(serve(kind, folder(kind))))


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Iterator[Server]:
    """A server of each kind, which other tests use too: what a test has there ends with it."""
    server = servers(request.param)
    yield server
    server.clear()


def on(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", kinds, indirect=True)


detaching, development = on(*DETACHING), on("development")


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Keep a port for a server that finds none by itself: with SO_REUSEADDR it can have it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def app_of(view: Callable[[], Any]) -> flask.Flask:
    app = flask.Flask("test")
    app.add_url_rule("/", "view", view)
    return app


def call(app: flask.Flask, method: str = "GET", offered: socket.socket | None = None) -> Any:
    """Call the app as a server does, and return the body: not iterated, not closed."""
    environ = {**create_environ("/", method=method), "werkzeug.socket": offered}
    return app(environ, lambda status, headers, exc_info=None: lambda data: None)


def answer(view: Callable[[], Any]) -> str:
    with app_of(view).test_client().get("/") as response:
        return bytes(response.data).decode()


# =================================================================================================
# WIRE FORMAT

DAY = datetime.date(2030, 1, 2)
NO_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029"  # str.splitlines() thinks otherwise
# What is given to format_sse, what is sent, and what a browser makes of it.
FRAMES: list[tuple[dict[str, Any], str, list[Event]]] = [
    ({"data": "hi"}, "data: hi\n\n", [Event("hi")]),
    ({"data": "hi", "event": "greet"}, "event: greet\ndata: hi\n\n", [Event("hi", "greet")]),
    ({"data": "hi", "event": ""}, "data: hi\n\n", [Event("hi")]),
    ({"data": "hi", "id": 0}, "id: 0\ndata: hi\n\n", [Event("hi", id="0")]),
    ({"data": "d", "id": "i", "retry": 0}, "id: i\nretry: 0\ndata: d\n\n", [Event("d", id="i")]),
    ({"data": "d", "event": "e", "comment": "c"}, ": c\nevent: e\ndata: d\n\n", [Event("d", "e")]),
    ({"comment": ""}, ": \n\n", []),
    ({"retry": 1500}, "retry: 1500\n\n", []),
    ({"event": "greet"}, "event: greet\n\n", []),
    ({"data": "a\rb\r\nc"}, "data: a\ndata: b\ndata: c\n\n", [Event("a\nb\nc")]),
    ({"data": "a\n\rb"}, "data: a\ndata: \ndata: b\n\n", [Event("a\n\nb")]),
    ({"data": ""}, "data: \n\n", [Event("")]),
    ({"data": "\nx\n\n"}, "data: \ndata: x\ndata: \ndata: \n\n", [Event("\nx\n\n")]),
    ({"comment": "a\nb\r\nc\rdata: d"}, ": a\n: b\n: c\n: data: d\n\n", []),
    ({"data": NO_ENDS}, f"data: {NO_ENDS}\n\n", [Event(NO_ENDS)]),
    ({"data": "  x "}, "data:   x \n\n", [Event("  x ")]),
    ({"data": "x", "id": " 7"}, "id:  7\ndata: x\n\n", [Event("x", id=" 7")]),
    ({"data": "\ufeffx\0"}, "data: \ufeffx\0\n\n", [Event("\ufeffx\0")]),
    ({"data": "grüß 😀"}, "data: grüß 😀\n\n", [Event("grüß 😀")]),
    ({"data": "a\nevent: evil"}, "data: a\ndata: event: evil\n\n", [Event("a\nevent: evil")]),
    ({"data": ": x\n\n"}, "data: : x\ndata: \ndata: \n\n", [Event(": x\n\n")]),
    ({"data": b"gr\xc3\xbc\xc3\x9f\r\n"}, "data: grüß\ndata: \n\n", [Event("grüß\n")]),
    ({"data": bytearray(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": memoryview(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": {"n": "a\nb"}}, 'data: {"n": "a\\nb"}\n\n', [Event('{"n": "a\\nb"}')]),
    ({"data": 0}, "data: 0\n\n", [Event("0")]),
    ({"data": False}, "data: false\n\n", [Event("false")]),
    ({"data": Frame("data: x\r\n\r\n")}, "data: x\r\n\r\n", [Event("x")]),
    ({"data": Frame(": x\n\r\n")}, ": x\n\r\n", []),
    ({"data": Frame("data: x\r\r\n")}, "data: x\r\r\n", [Event("x")]),
]


@pytest.mark.parametrize(("given", "sent", "read"), FRAMES)
def test_wire_to_the_byte_and_read_back(given: Any, sent: str, read: list[Event]) -> None:
    """A client reads the same whether the frame comes whole or byte by byte."""
    frame, bytewise = format_sse(**given), Parser()
    assert (sent, Frame) == (str(frame), type(frame))
    by_bytes = [event for n in frame.encode() for event in bytewise.feed(bytes([n]))]
    assert [read, read] == [parse(frame), by_bytes]


def fuzz(examples: int, **options: Any) -> Any:
    """Settings of hypothesis: the same examples in each run, FUZZ times as many as asked for."""
    from hypothesis import HealthCheck, settings

    options |= {"derandomize": True, "database": None, "deadline": None}
    checks = list(HealthCheck)
    return settings(max_examples=examples * FUZZ, suppress_health_check=checks, **options)


def test_wire_fuzz_any_text_is_read_back_in_any_cut() -> None:
    """Whatever is sent arrives as it was, and nothing else, however the network cuts the stream."""
    need("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st

    pieces = ["\n", "\r", "\r\n", ":", " ", "\0", "\ufeff", "data: ", "id: 1", "\nid:2\n\n", "é😀"]
    text = st.lists(st.sampled_from([*pieces, NO_ENDS]) | st.text(max_size=3)).map("".join)
    line = text.map(lambda value: re.sub("[\r\n\0]", "", value))
    more = {"event": line, "id": line, "retry": st.integers(0, 10**6), "comment": text}
    frames = st.lists(st.fixed_dictionaries({"data": text}, optional=more), max_size=8)

    @given(frames, st.randoms(use_true_random=False))
    def check(frames: list[dict[str, Any]], rng: random.Random) -> None:
        expected, last_id = [], ""
        for frame in frames:
            last_id = frame.get("id", last_id)
            data = re.sub("\r\n?", "\n", frame["data"])
            expected.append(Event(data, frame.get("event") or "message", last_id))
        sent = "".join(format_sse(**frame) for frame in frames).encode()
        parser, read = Parser(), []
        while sent:
            cut = rng.randrange(1, rng.choice([2, 4, 100]))
            read += parser.feed(sent[:cut])
            sent = sent[cut:]
        assert expected == read

    fuzz(100)(check)()


def test_wire_json_is_the_same_in_and_out_of_a_request() -> None:
    """Dates are written as in jsonify, and by the app's own provider."""

    class Provider(flask.json.provider.DefaultJSONProvider):
        def dumps(self, obj: Any, **kwargs: Any) -> str:
            return '"by the app"'

    outside, app = format_sse([DAY]), flask.Flask("test")
    with app.app_context():
        assert outside == format_sse([DAY])
        assert json.loads(datas([outside])[0]) == flask.json.loads(flask.jsonify([DAY]).data)
        app.json = Provider(app)
        assert 'data: "by the app"\n\n' == format_sse([DAY])


BOUNCER: Any = EventBouncer()
# A bouncer with a history takes no ids that are not its own: clients come back with them.
OWN_IDS = [format_sse("x", id="7"), Frame("id\ndata: x\n\n"), Frame("data: x\r\nid:7\r\n\r\n")]
FRAME, CLIENT = format_sse("x"), type("Client", (), {"eval": None})
with_data, broadcast_x = (functools.partial(f, "x") for f in (format_sse, BOUNCER.broadcast))
# Everything the public API refuses: a function, an argument of it (by its name in the function, or
# after a space by that in the message), values that raise a ValueError, and a TypeError.
REFUSED: list[tuple[Any, str, list[Any], list[Any]]] = [
    (format_sse, "data", [None, b"\xff", "\ud800", math.nan, [math.inf]], [{1, 2}, object()]),
    (with_data, "event", ["a\nb", "a\rdata: x", "\0", "\ud800"], [5, b"a"]),
    (with_data, "id", ["1\n\nx", "1\r", "1\0", "\udfff"], [1.5, True]),
    (with_data, "retry", [-1], [True, "9", 1.5]),
    (with_data, "comment", ["\ud800"], [5]),
    (functools.partial(format_sse, event="x"), "data", [FRAME], []),
    (functools.partial(format_sse, comment="x"), "data", [FRAME], []),
    (Frame, "text frame", ["data: x\n", "data: x\r\n", "", "data: \ud800\n\n"], [b"data: x\n\n"]),
    (EventBouncer, "maxsize", [0, -1], [True, None, 1.5]),
    (EventBouncer, "history", [-1], [True, None]),
    (EventBouncer, "heartbeat", [0, -1, math.nan, math.inf, 86_401, 1e9], [True, "1"]),
    (EventBouncer, "retry", [-1, (2, 1), (1,)], [True, 1.5]),
    (EventBouncer, "max_subscribers", [0], [True]),
    (EventBouncer, "relay", [], ["redis://localhost"]),
    (EventBouncer, "detach", [], [1, None]),
    (BOUNCER.subscribe, " channel", ["", "\ud800"], [5, ["a"]]),
    (BOUNCER.subscribe, "last_event_id", [], [5]),
    (BOUNCER.broadcast, "msg data", [None, math.nan], []),
    (broadcast_x, "event", ["a\nb"], [5]),
    (broadcast_x, "channel", [""], [5, ["a", "b"]]),
    (functools.partial(BOUNCER.broadcast, event="x"), "msg data", [FRAME], []),
    (EventBouncer(history=1).broadcast, "msg id", OWN_IDS, []),
    (BOUNCER.disconnect, " channel", [""], [5]),
    (BOUNCER.unsubscribe, "subscription", [EventBouncer().subscribe()], ["x"]),
    (BOUNCER.subscribe().get, "timeout", [-1, math.nan], []),
    (sse_response, "source", [], ["data", b"data", {"n": 1}, 5, None]),
    (functools.partial(sse_response, []), "status", [100], [True]),
    (RedisRelay, "client", [], ["redis://localhost", None]),
    (functools.partial(RedisRelay, CLIENT), "key", ["\ud800"], [b"sse"]),
    (functools.partial(RedisRelay, CLIENT), "maxlen", [0], [1.5]),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_input_is_refused(number: int) -> None:
    """The message names the argument, states what was expected and shows what was given."""
    function, names, *errors = REFUSED[number]
    name, _, shown = names.partition(" ")
    for error, values in zip((ValueError, TypeError), errors, strict=True):
        for value in values:
            with pytest.raises(error) as caught:
                function(**{name: value}) if name else function(value)
            given = re.escape(repr(value)[:40])
            assert re.match(f"{shown or name}: expected .+ got .*{given}.*; ", str(caught.value))
    for header in ("connection", "Content-Length", "Transfer-Encoding", "Content-Type"):
        with pytest.raises(ValueError, match="headers: expected .* got"):
            sse_response([], headers={header: "x"})


def test_bad_input_reaches_nobody_and_is_shown_in_short() -> None:
    """A broadcast that is refused loses nothing of what others send, and ends nobody's stream."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.broadcast("before")
    for bad in (math.nan, "\ud800", None, {"key": ["x" * 10**6, object()]}):
        with pytest.raises((ValueError, TypeError)) as caught:
            bouncer.broadcast(bad)
        assert len(str(caught.value)) < 500
    with pytest.raises(TypeError, match="a broadcast goes to one channel"):
        bouncer.broadcast("x", channel=["a", "b"])  # type: ignore[arg-type]
    bouncer.broadcast("after")
    assert ["before", "after"] == held(subscription)


# =================================================================================================
# RELAY: RedisRelay with a real Redis that is lost, trimmed, emptied and restored; and a server of
# several processes around it


class Suspended:
    """A relay at a process that can be stopped before it reads."""

    def __init__(self, relay: Any) -> None:
        self._relay, self.publish, self.recent = relay, relay.publish, relay.recent
        self.running, self._waits = threading.Event(), False
        self.running.set()

    def read(self, after: str, timeout: float) -> Any:
        self._waits = not self.running.is_set()
        self.running.wait(TIMEOUT)
        return self._relay.read(after, 0.05)

    def suspend(self) -> None:
        self.running.clear()
        wait_until(lambda: self._waits, "it is suspended")


class Redis(Process):
    """A redis-server of our own that can be killed and started again."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        need("redis-server")
        self.folder, self.port, self.url = folder, port, f"redis://127.0.0.1:{port}"
        self._command = ["redis-server", "--save", "", "--bind", "127.0.0.1", "--port", str(port)]
        self._command += options
        self._clients: list[Any] = []
        self.start()

    def start(self) -> None:
        super().__init__(self._command, self.folder)
        self.wait_for_log("Ready to accept connections")

    def client(self, **options: Any) -> Any:
        """Return a client that does not try again by itself: its errors come promptly."""
        import redis
        from redis.backoff import NoBackoff

        make: Any = redis.RedisCluster if options.pop("cluster", False) else redis.Redis
        options = {"port": self.port, "retry": redis.retry.Retry(NoBackoff(), 0), **options}
        self._clients.append(make(host="127.0.0.1", **options))
        return self._clients[-1]

    def relay(self, key: str, maxlen: int = 10_000, **options: Any) -> RedisRelay:
        return RedisRelay(self.client(**options), key, maxlen)

    def limit(self, memory: int) -> None:
        self.client().config_set("maxmemory", memory)

    def close(self) -> None:
        self.kill()
        for client in self._clients:
            client.close()


@pytest.fixture(scope="session")
def new_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Redis]]:
    """Starts Redis servers, which end with the run."""
    need("redis")
    with contextlib.ExitStack() as stack:

        def new(*options: str) -> Redis:
            port = stack.enter_context(held_port())
            redis = Redis(tmp_path_factory.mktemp("redis"), port, *options)
            stack.callback(redis.close)
            return redis

        yield new


@pytest.fixture(scope="session")
def redis(new_redis: Callable[..., Redis]) -> Redis:
    """A Redis that tests share, each with a key of its own."""
    return new_redis()


class Processes:
    """Makes bouncers, each as if in a process of its own, that share a stream of Redis."""

    def __init__(self, redis: Redis, key: str) -> None:
        self.redis, self.key, self.made = redis, key, list[EventBouncer]()

    def __call__(self, relay: Any = None, history: int = 100, **options: Any) -> EventBouncer:
        """Make one; the options are those of its Redis client."""
        relay = relay or self.redis.relay(self.key, **options)
        self.made.append(EventBouncer(history=history, relay=relay))
        return self.made[-1]


@pytest.fixture
def processes(request: pytest.FixtureRequest, redis: Redis) -> Iterator[Processes]:
    """Their stream is the test's own, and they end with it."""
    others, processes = {*threading.enumerate()}, Processes(redis, request.node.name)
    yield processes
    for bouncer in processes.made:
        bouncer.close()
        with contextlib.suppress(Exception):
            bouncer.broadcast("closed")  # wakes the reader, which then sees that it is over
    # Or what they log would be found in the next test.
    wait_until(lambda: {*threading.enumerate()} <= others, "the readers end")


ACL = "--user app on >secret ~* resetchannels -@all +eval +xadd +xrange +xrevrange +xread"
# What users pass to redis.Redis, and what the server is started with.
REDIS_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"protocol": 2, "decode_responses": True}, ""),
    ({"protocol": 3, "decode_responses": True}, ""),
    ({"username": "app", "password": "secret"}, ACL),
]


@pytest.mark.parametrize(("options", "args"), REDIS_OPTIONS)
def test_redis_carries_anything(options: Any, args: str, processes: Any, new_redis: Any) -> None:
    """Text of any kind, on channels of any name: live, and to a client that comes later."""
    processes.redis = new_redis(*args.split())
    texts = ["a\nb", "", " x", "grüß 😀", "\0", "x\u2028y", "id: 7", "last"]
    one, two = (processes(**options) for _ in range(2))
    start = one.last_event_id
    subscription, of_none = two.subscribe("grüß 😀"), two.subscribe()
    for text in texts:
        one.broadcast(text, channel="grüß 😀")
    one.broadcast("to all")
    live = next_events(subscription, len(texts) + 1)
    assert [*texts, "to all"] == [event.data for event in live]
    assert ["to all"] == next_datas(of_none, 1)
    late = processes(**options).subscribe("grüß 😀", last_event_id=start)
    assert live == next_events(late, len(live))


def publish_when_back(bouncer: EventBouncer, message: str) -> None:
    """Broadcast once Redis takes it: connections of before it went are still to be found dead."""
    wait_until(lambda: not Task(bouncer.broadcast, message).exception(TIMEOUT), "Redis is back")


# How Redis fails, what its client raises then, and how Redis comes back.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "is killed": (Redis.kill, "ConnectionError", Redis.start),
    "hangs": (lambda r: r.signal("SIGSTOP"), "TimeoutError", lambda r: r.signal("SIGCONT")),
    "is full": (lambda r: r.limit(1), "ResponseError", lambda r: r.limit(0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_redis_that_fails(fault: str, processes: Processes, new_redis: Any, caplog: Any) -> None:
    """Twice: publishers get the client's error, streams stay open, what was accepted arrives once,
    in order, and streams of a process that starts meanwhile are told of a gap. The log says why."""
    fails, error, comes_back = FAULTS[fault]
    processes.redis = new_redis("--appendonly", "yes", "--appendfsync", "always")
    publisher, process, *late = (processes(socket_timeout=1.0) for _ in range(4))
    ada, bob = process.subscribe("ada"), process.subscribe("bob")
    for number in range(2):
        publisher.broadcast("before", channel="bob")
        wait_until(lambda: bob.qsize(), "it arrives")
        fails(processes.redis)
        accepted = 0
        with pytest.raises(Exception, match=".") as caught:
            while True:
                publisher.broadcast(f"{accepted}")
                accepted += 1
        assert error in [kind.__name__ for kind in type(caught.value).mro()]
        came = late[number].subscribe(last_event_id="1-1")
        if fault == "is killed":
            with pytest.raises(Exception, match="."):
                process.disconnect("ada")  # ends its streams here all the same
            assert (bob,) == process.subscribers
            wait_until(lambda: "cannot be read" in caplog.text, "the log says so")
        comes_back(processes.redis)
        publish_when_back(publisher, f"back {number}")
        received = next_datas(bob, 1)
        while received[-1] != f"back {number}":
            received += next_datas(bob, 1)
        due = ["before", *map(str, range(accepted)), f"back {number}"]
        assert due == [text for text in received if text != str(accepted)]
        assert fault == "is full" or GAP in next_datas(came, 1)
    if fault == "is killed":
        assert 2 <= caplog.text.count("cannot be read") <= 8
        assert (datas(ada), True) == ([], "ConnectionError" in caplog.text)


def test_redis_client_that_is_ahead_of_its_process_waits(processes: Processes) -> None:
    """It has seen at another process what this one has yet to read: no gap, and nothing twice."""
    relay = Suspended(processes.redis.relay(processes.key))
    behind, ahead = processes(relay), processes()
    behind.subscribe()
    relay.suspend()
    live = ahead.subscribe()
    ahead.broadcast("a")
    ahead.broadcast("b")
    last = next_events(live, 2)[1].id
    arrival = Task(behind.subscribe, last_event_id=last).wait_until_blocked()
    relay.running.set()
    ahead.broadcast("c")
    assert (["c"], False) == (next_datas(arrival.result(), 1), arrival.result().gap)


@pytest.mark.parametrize("history", [0, 9])
def test_redis_disconnect_is_known_to_all_processes(history: int, processes: Processes) -> None:
    """Also to a new one: a client that goes from one to another is told of no gap."""
    one = processes(history=history)
    subscription = one.subscribe("x")
    one.broadcast("a")
    one.disconnect("x")
    assert ["a"] == datas(subscription)
    both, id = [one, processes(history=history)], one.last_event_id
    found = [(each.last_event_id, each.subscribe("x", last_event_id=id).gap) for each in both]
    assert [(id, False)] * 2 == found


# What happens to the stream, and which events a process still gets that was suspended meanwhile, or
# in the last case, that has read everything before.
LOSSES = {"trimmed": ["3"], "deleted": [], "emptied": [], "restarted as of before": ["1", "2", "3"]}


@pytest.mark.parametrize("loss", LOSSES)
def test_redis_loss_is_one_gap(loss: str, processes: Processes, new_redis: Any) -> None:
    """To every stream, and to clients from before it; what is left is delivered, once."""
    redis, key = new_redis(), processes.key
    relay, client, left = Suspended(redis.relay(key)), redis.client(), LOSSES[loss]
    bouncer, publisher = processes(relay), processes(redis.relay(key))
    subscription, other = bouncer.subscribe(), bouncer.subscribe("x")
    publisher.broadcast("seen")
    (seen,) = next_events(subscription, 1)
    is_restarted = loss.startswith("restarted")
    client.save() if is_restarted else relay.suspend()
    for number in (1, 2, 3):
        publisher.broadcast(number)
    received = next_events(subscription, 3) if is_restarted else []
    if is_restarted:
        redis.kill()
        redis.start()
    elif loss == "trimmed":
        client.xtrim(key, maxlen=1, approximate=False)
    else:
        client.execute_command(*(["DEL", key] if loss == "deleted" else ["FLUSHALL"]))
    relay.running.set()
    publish_when_back(publisher, "b")
    publisher.broadcast("c")
    expected = [*left, GAP, "b", "c"] if is_restarted else [GAP, *left, "b", "c"]
    received += next_events(subscription, len(expected) - len(received))
    assert expected == list(map(str, received))
    assert ["seen", *expected] == next_datas(other, len(expected) + 1)
    gap = expected.index(GAP)
    assert expected[gap + 1 :] == held(bouncer.subscribe(last_event_id=received[gap].id))
    # One that has been away since before the loss, too, though an older copy may have its id.
    assert expected[gap:] == held(bouncer.subscribe(last_event_id=seen.id))


def test_redis_keeps_about_maxlen(processes: Processes) -> None:
    ids = ids_of(processes(maxlen=10), *range(300))
    kept = processes.redis.client().xlen(processes.key)
    late = processes(history=1000).subscribe(last_event_id=ids[0])
    assert [GAP, *map(str, range(300 - kept, 300))] == held(late)
    assert 10 <= kept < 300


# Fields of entries that someone else has added to the stream.
FOREIGN: list[dict[Any, Any]] = [{b"\xff": b"\xfe"}, {"frame": b"data: \xff\n\n"}]
FOREIGN += [{"frame": "data: no blank line"}, {"frame": "data: x\n\n", "after": "text"}]
FOREIGN += [{"channel": "", "frame": "data: x\n\n"}, {"frame": "x" * 100_000}]


@pytest.mark.parametrize("decode", [False, True])
def test_redis_skips_foreign_entries(decode: bool, processes: Processes, caplog: Any) -> None:
    """They are no events and no gap, live and for a new process; the log has a line for each."""
    bouncer = processes(decode_responses=decode)
    start, subscription = bouncer.last_event_id, bouncer.subscribe()
    bouncer.broadcast("first")
    for fields in FOREIGN:
        processes.redis.client().xadd(processes.key, fields)
    bouncer.broadcast("last")
    assert ["first", "last"] == next_datas(subscription, 2)
    skipped = [message for message in caplog.messages if "not an event" in message]
    assert len(FOREIGN) == len(skipped)
    assert max(map(len, skipped)) < 500
    late = processes(decode_responses=decode).subscribe(last_event_id=start)
    assert ["first", "last"] == held(late)


@pytest.mark.parametrize("cluster", [False, True])
def test_redis_idle_reader(
    cluster: bool, processes: Processes, new_redis: Any, caplog: Any
) -> None:
    """It reads nothing again, also a megabyte; and its client does not take silence for death."""
    with held_port() as bus:
        options = ["--cluster-enabled", "yes", "--cluster-port", str(bus)][: 4 * cluster]
        redis = processes.redis = new_redis(*options)
    client = redis.client(decode_responses=True)
    if cluster:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "a cluster")
    bouncer = processes(socket_timeout=0.2, cluster=cluster)
    subscription = bouncer.subscribe()
    bouncer.broadcast("x" * 2**20)
    next_events(subscription, 1)
    before = client.info("all")
    reads = before["cmdstat_xread"]["calls"] + 5
    wait_until(lambda: client.info("all")["cmdstat_xread"]["calls"] >= reads, "it waits, and again")
    assert client.info()["total_net_output_bytes"] - before["total_net_output_bytes"] < 2**20
    assert [] == caplog.messages


ONLY_PUBLISHES = """
import sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
import redis
from sse_bouncer import EventBouncer, RedisRelay
bouncer = EventBouncer(relay=RedisRelay(redis.Redis.from_url(sys.argv[1]), key=sys.argv[2]))
bouncer.broadcast("from a cron job", channel="x")
print(threading.enumerate() == [threading.main_thread()])
"""


def test_redis_holds_one_connection_and_none_for_a_cron_job(processes: Processes) -> None:
    """However many subscribers; and a cron job publishes without Flask and without a thread."""
    redis, bouncer = processes.redis, processes(client_name="counted")
    subscriptions = [bouncer.subscribe("x") for _ in range(100)]
    bouncer.broadcast("a")
    published = run(sys.executable, "-c", ONLY_PUBLISHES, redis.url, processes.key)
    assert ("True\n", "") == (published.stdout, published.stderr)
    assert [["a", "from a cron job"]] * 100 == [next_datas(s, 2) for s in subscriptions]
    names = [client["name"] for client in redis.client().client_list()]
    assert 1 <= names.count("counted") <= 2


def spread(bouncer: Remote, *channels: str) -> list[Client]:
    """Open streams until there are three at both processes."""
    clients, processes = list[Client](), Counter[Any]()

    def enough() -> bool:
        clients.append(bouncer.request(*channels).wait_opening())
        processes[clients[-1].head.getheader("X-Pid")] += 1
        return len(processes) == 2 and min(processes.values()) >= 3

    wait_until(enough, "streams at both processes")
    return clients


@pytest.fixture
def fleet(servers: Callable[[str], Server], redis: Redis) -> Iterator[Remote]:
    """A feed that the two processes of one server share by Redis."""
    server = servers("gthread-2")
    yield Remote(server, relay=redis.url, history=10_000, heartbeat=0.1)
    server.clear()


def test_processes_all_agree_and_a_logout_is_for_all(fleet: Remote) -> None:
    """Every client gets every event once, all the same ids in the same order, whoever published."""
    clients, bob = spread(fleet, "user-ada"), fleet.request("user-bob").wait_opening()
    for publisher in [Task(lambda: list(map(fleet.broadcast, range(50)))) for _ in range(2)]:
        publisher.result()
    order, *others = [client.events(100) for client in clients]
    assert [order] * len(others) == others
    assert are_increasing(event.id for event in order)
    assert Counter(map(str, [*range(50)] * 2)) == Counter(event.data for event in order)
    fleet.do("bouncer.disconnect('user-ada')")
    assert [[]] * len(clients) == [client.wait_end() for client in clients]
    fleet.broadcast("still here", channel="user-bob")
    assert ["still here"] == bob.datas(101)[100:]


def test_processes_without_a_relay_are_warned_of_once_each(fleet: Remote) -> None:
    """With the cure; those with a relay are not."""
    before = fleet.server.log().count("several processes")
    spread(fleet)
    assert before == fleet.server.log().count("several processes")
    spread(Remote(fleet.server))
    assert 2 == len(re.findall("several processes.*RedisRelay", fleet.server.log()))


def test_processes_serve_clients_that_hop_between_them(fleet: Remote) -> None:
    """They miss nothing, get nothing twice and see no gap while events flow."""
    check_followed(fleet)


# =================================================================================================
# FAN-OUT: every event to every subscriber, in one order; and what one gets that comes back


@pytest.mark.parametrize(("publishers", "maxsize"), [(1, 16), (8, 16), (16, 16)])
def test_fan_out_a_burst_drops_nobody_who_keeps_up(publishers: int, maxsize: int) -> None:
    """A queue that was emptied has kept up, though another publisher has filled it since."""
    bouncer, numbers = EventBouncer(maxsize), range(1600 // publishers)
    readers = [Task(datas, bouncer.subscribe()) for _ in range(20)]
    for loop in [Task(lambda: list(map(bouncer.broadcast, numbers))) for _ in range(publishers)]:
        loop.result()
    bouncer.close()
    read = [reader.result() for reader in readers]
    assert ({1600}, 0) == ({len(each) for each in read}, bouncer.stats()["dropped"])
    assert publishers > 1 or [list(map(str, numbers))] * 20 == read


def test_fan_out_a_reader_that_never_catches_up_is_dropped_in_the_end() -> None:
    """One that makes room each time, but no more than that, would slow publishers down for ever."""
    bouncer = EventBouncer(maxsize=2)
    subscription = bouncer.subscribe()

    def read() -> None:
        with contextlib.suppress(Subscription.Ended):
            while True:
                wait_until(lambda: subscription.full() or not bouncer.subscribers, "it is full")
                subscription.get()

    reader = Task(read)
    while not bouncer.stats()["dropped"]:
        bouncer.broadcast("x")
    reader.result()


@pytest.mark.parametrize("maxsize", [2, 100_000])
def test_fan_out_one_order_for_racing_publishers(maxsize: int) -> None:
    """Each sees every publisher's events in order, and all, if it is not dropped; all the same."""
    bouncer, start = EventBouncer(maxsize), threading.Barrier(10)

    def publish(publisher: int) -> None:
        start.wait(TIMEOUT)
        for number in range(100):
            bouncer.broadcast([publisher, number])

    readers = [Task(datas, bouncer.subscribe()) for _ in range(10)]
    for task in [Task(publish, publisher) for publisher in range(10)]:
        task.result()
    bouncer.close()
    *orders, longest = sorted((reader.result() for reader in readers), key=len)
    assert [longest[: len(order)] for order in orders] == orders
    for publisher in range(10):
        own = [data for data in longest if data.startswith(f"[{publisher},")]
        assert [f"[{publisher}, {number}]" for number in range(len(own))] == own
    assert maxsize == 2 or 1000 == len(orders[0])


@pytest.mark.parametrize("how", ["close", "disconnect", "unsubscribe"])
def test_fan_out_an_end_wakes_a_reader_and_twice_is_harmless(how: str) -> None:
    """Then get raises what servers take for a client that left, now and each time."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe("a")
    reader = Task(datas, subscription).wait_until_blocked()
    arguments: Any = {"close": [], "disconnect": ["x", "a"], "unsubscribe": [subscription]}
    for _ in range(2):
        getattr(bouncer, how)(*arguments[how])
    assert ([], ()) == (reader.result(), bouncer.subscribers)
    for get in (subscription.get, subscription.get_nowait):
        with pytest.raises(Subscription.Ended) as caught:
            get()
        assert (True, 32) == (isinstance(caught.value, BrokenPipeError), caught.value.errno)


@pytest.fixture
def alarm() -> Iterator[Callable[..., None]]:
    """Has something done by a signal handler, so many seconds from now."""

    def set_alarm(seconds: float, do: Callable[[], None]) -> None:
        signal.signal(signal.SIGALRM, lambda *_: do())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_fan_out_a_signal_handler_may_close_in_the_middle_of_anything(alarm: Any) -> None:
    for _ in range(100):
        bouncer = EventBouncer(history=5, maxsize=100)
        subscriptions = [bouncer.subscribe() for _ in range(20)]
        alarm(0.0005, bouncer.close)
        while bouncer.subscribers:
            bouncer.broadcast("x")
            for subscription in subscriptions:
                held(subscription)
        with pytest.raises(EventBouncer.Refused):
            bouncer.subscribe()


def test_subscription_is_the_reading_half_of_a_queue() -> None:
    """It leaves with its block, and keeps what it holds."""
    bouncer = EventBouncer(maxsize=2)
    with bouncer.subscribe("a", "b") as subscription:
        states = []
        for _ in range(3):
            states.append((subscription.qsize(), subscription.empty(), subscription.full()))
            bouncer.broadcast("x", channel="b") if len(states) < 3 else None
        assert [(0, True, False), (1, False, False), (2, False, True)] == states
        assert (2, ("a", "b")) == (subscription.maxsize, subscription.channels)
        assert ["data: x\n\n"] * 2 == [subscription.get(timeout=1), next(subscription)]
        for block, timeout in ((False, None), (True, 0), (True, 0.001)):
            with pytest.raises(queue.Empty):
                subscription.get(block, timeout)
    assert ((), []) == (bouncer.subscribers, list(subscription))


def test_fan_out_fuzz_does_what_a_small_model_does() -> None:
    """Whatever is done in whatever order, against a model that keeps everything in lists."""
    need("hypothesis")
    from hypothesis import stateful
    from hypothesis import strategies as st

    channels = st.lists(st.sampled_from("ab"), max_size=2)
    lasts = st.sampled_from([None, None, "earliest", "1-1", f"{10**19}-0"])

    @dataclasses.dataclass(eq=False)
    class Reader:
        real: Subscription
        channels: list[str]
        held: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # data and id
        replayed: int = 0  # how many of them do not count
        last: str | None = None
        is_open: bool = True

        def wants(self, channel: str | None) -> bool:
            return channel is None or channel in self.channels

    class Machine(stateful.RuleBasedStateMachine):
        readers: Any = stateful.Bundle("readers")

        def __init__(self) -> None:
            super().__init__()
            self.size, self.kept, self.is_closed = 2, 3, False
            self.bouncer = EventBouncer(self.size, history=self.kept)
            self.start = self.bouncer.last_event_id or ""
            self.events: list[tuple[str, str, str | None]] = []  # data, id, channel: all there were
            self.model: list[Reader] = []
            self.dropped = self.refused = 0

        @stateful.rule(target=readers, channels=channels, last=lasts)
        def come(self, channels: list[str], last: str | None) -> Any:
            try:
                reader = Reader(self.bouncer.subscribe(*channels, last_event_id=last), channels)
            except EventBouncer.Refused:
                assert self.is_closed
                self.refused += 1
                return stateful.multiple()
            ids = [self.start, *(id for _, id, _ in self.events)]
            mine = [place for place, event in enumerate(self.events) if reader.wants(event[2])]
            oldest = max(0, len(self.events) - self.kept)  # the first place that is kept
            seen = ids.index(last) if last in ids else 0  # how many events it has seen
            if last is None:
                seen = len(self.events)
            elif last != "earliest":
                lost = [place for place in mine if place < oldest]
                if last not in ids or lost and lost[-1] >= seen:
                    reader.held.append((GAP, ids[lost[-1] + 1] if lost else self.start))
                    seen = 0
            missed = [place for place in mine if place >= max(oldest, seen)]
            assert reader.real.gap == bool(reader.held)
            reader.held += [self.events[place][:2] for place in missed]
            reader.replayed = len(reader.held)
            self.model.append(reader)
            return reader

        @stateful.rule(target=readers, reader=stateful.consumes(readers))
        def come_back(self, reader: Reader) -> Any:
            self.unsubscribe(reader)
            return self.come(reader.channels, reader.last or self.start)

        @stateful.rule(channel=st.none() | st.sampled_from("ab"))
        def broadcast(self, channel: str | None) -> None:
            data = str(len(self.events))
            self.bouncer.broadcast(data, channel=channel)
            self.events.append((data, self.bouncer.last_event_id or "", channel))
            for reader in self.model:
                if reader.is_open and reader.wants(channel):
                    reader.is_open = len(reader.held) - reader.replayed < self.size
                    reader.held += [self.events[-1][:2]] * reader.is_open
                    self.dropped += not reader.is_open

        @stateful.rule(reader=readers)
        def read(self, reader: Reader) -> None:
            if not reader.held:
                with pytest.raises(queue.Empty if reader.is_open else Subscription.Ended):
                    reader.real.get_nowait()
                return
            (event,) = parse(reader.real.get_nowait())
            assert reader.held.pop(0) == (str(event), event.id)
            reader.replayed, reader.last = max(0, reader.replayed - 1), event.id

        @stateful.rule(reader=readers)
        def unsubscribe(self, reader: Reader) -> None:
            self.bouncer.unsubscribe(reader.real)
            reader.is_open = False

        @stateful.rule(channel=st.sampled_from("ab"))
        def disconnect(self, channel: str) -> None:
            self.bouncer.disconnect(channel)
            for reader in self.model:
                reader.is_open = reader.is_open and channel not in reader.channels

        @stateful.precondition(lambda self: len(self.events) > 9)
        @stateful.rule()
        def close(self) -> None:
            self.bouncer.close()
            self.is_closed = True
            for reader in self.model:
                reader.is_open = False

        @stateful.invariant()
        def agree(self) -> None:
            live = {reader.real for reader in self.model if reader.is_open}
            assert live == set(self.bouncer.subscribers)
            counts = len(live), 0, len(self.events), self.dropped, self.refused
            names = ("subscribers", "detached", "broadcasts", "dropped", "refused")
            assert dict(zip(names, counts, strict=True)) == self.bouncer.stats()
            for reader in self.model:
                assert len(reader.held) == reader.real.qsize()

    stateful.run_state_machine_as_test(Machine, settings=fuzz(60, stateful_step_count=30))


@pytest.fixture(params=["memory", "redis"])
def feed(request: pytest.FixtureRequest) -> Any:
    """Makes a bouncer that keeps its events by itself, or a process with a relay."""
    return EventBouncer if request.param == "memory" else request.getfixturevalue("processes")


def ids_of(bouncer: EventBouncer, *messages: object) -> list[str]:
    """Broadcast; return the events' ids."""
    ids = []
    with bouncer.subscribe() as subscription:
        for message in messages:
            bouncer.broadcast(message)
            ids.append(next_events(subscription, 1)[0].id)
    return ids


def test_history_numbers_events(feed: Any) -> None:
    """Ids increase from the bouncer's first, across restarts too; nothing else is changed."""
    bouncer = feed(history=1)
    start, subscription = bouncer.last_event_id, bouncer.subscribe()
    bouncer.broadcast("a\nb", "greet", retry=7)
    frame, id = subscription.get(timeout=TIMEOUT), bouncer.last_event_id
    assert f"id: {id}\n" + format_sse("a\nb", "greet", retry=7) == frame
    ids = ids_of(bouncer, *range(300))
    restarted = feed(history=1)
    assert are_increasing([start, id, *ids, *ids_of(restarted, "a")])
    without = EventBouncer()
    assert (None, False) == (without.last_event_id, without.subscribe(last_event_id=start).gap)


# How many events are kept, how many there were, after which of them a client comes back (0: before
# the first), which of them it gets, and whether there is a gap: if one it has not seen is not kept.
RESUMES: list[tuple[int, int, int, list[int], bool]] = [
    (3, 0, 0, [], False),
    (3, 2, 2, [], False),
    (3, 3, 0, [1, 2, 3], False),
    (3, 4, 0, [2, 3, 4], True),
    (3, 9, 6, [7, 8, 9], False),
    (3, 9, 5, [7, 8, 9], True),
    (1, 2, 1, [2], False),
]


@pytest.mark.parametrize("row", RESUMES)
def test_history_replays_what_was_missed(feed: Any, row: tuple[Any, ...]) -> None:
    """In order, then the live stream; from memory, and at a process just started with a relay."""
    history, count, after, missed, gap = row
    bouncer = feed(history=history)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(1, count + 1))]
    started = feed(history=history) if bouncer.relay else bouncer
    subscription = started.subscribe(last_event_id=ids[after])
    started.broadcast("live")
    expected = [*[GAP] * gap, *map(str, missed), "live"]
    assert (expected, gap) == (next_datas(subscription, len(expected)), subscription.gap)


def test_history_of_more_channels_than_it_remembers_errs_on_the_side_of_a_gap() -> None:
    bouncer = EventBouncer(history=1)
    start = bouncer.last_event_id
    for number in range(10_100):
        bouncer.broadcast("x", channel=str(number))
    assert bouncer.subscribe("another", last_event_id=start).gap
    assert not bouncer.subscribe("another", last_event_id=bouncer.last_event_id).gap


def test_history_fuzz_any_last_event_id() -> None:
    """Random texts, many of them nearly ids: what is one by hand's reckoning is replayed from."""
    need("hypothesis")
    from hypothesis import example, given
    from hypothesis import strategies as st

    bouncer = EventBouncer(history=20)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(50))]
    values, digits = [id_value(id) for id in ids], set("0123456789")
    nearly = st.tuples(st.sampled_from(ids), st.text("-0٣１² \n+_"), st.integers(0, 30)).map(
        lambda it: it[0][: it[2]] + it[1] + it[0][it[2] + 1 :]
    )
    numbers = st.tuples(st.integers(0, 10**22), st.integers(0, 99)).map("{0[0]}-{0[1]}".format)

    @example("1-" * 50_000)
    @example("9" * 21 + "-1")
    @given(st.sampled_from(ids) | nearly | numbers | st.text())
    def check(text: str) -> None:
        halves, missed = text.split("-"), list[Any]()
        if len(halves) == 2 and all(set(h) <= digits and 1 <= len(h) <= 20 for h in halves):
            place = values.index(id_value(text)) if id_value(text) in values else -1
            missed = [*[GAP] * (place < 30), *range(max(30, place), 50)]
        with bouncer.subscribe(last_event_id=text) as subscription:
            assert [str(number) for number in missed] == held(subscription)

    fuzz(300)(check)()


# =================================================================================================
# HUB: the same stream under every server; and where one hands out its connections, thousands of
# streams hold no worker and cost one thread, and no client costs another anything


def test_hub_sends_events_in_order_and_to_the_byte(server: Server) -> None:
    """In any server the headers come at once, heartbeats while nothing happens, a proper end."""
    bouncer = Remote(server, retry=1234)
    beats = Remote(server, heartbeat=0.05).client().wait_opening()
    client = bouncer.client("ada").wait_opening()
    assert HEADERS.items() <= dict(client.head.getheaders()).items()
    names = [name for name, _ in client.head.getheaders() if name != "Set-Cookie"]
    assert (200, sorted(set(names))) == (client.head.status, sorted(names))
    rows = [row for row in FRAMES if {"data"} == set(row[0]) and type(row[0]["data"]) is str]
    bouncer.broadcast(*[given["data"] for given, _, _ in rows])
    bouncer.do("bouncer.disconnect('ada')")
    assert [event.data for _, _, read in rows for event in read] == client.wait_end()
    sent = "".join(["retry: 1234\n", *[sent for _, sent, _ in rows]]).encode()
    received = bytes(client.body) if server.detaches else client.body.replace(b"\n:\n", b"\n")
    assert (True, sent) == (client.whole, received)
    beats.wait_for_beats(3)


LEAVES = [(kind, leave) for kind in KINDS for leave in ("close", "reset")]
LEAVES += [(kind, "half-close") for kind in DETACHING]


@pytest.mark.parametrize(("server", "leave"), LEAVES, indirect=["server"])
def test_hub_notices_a_client_that_leaves(server: Server, leave: str) -> None:
    """At once if it is detached, as there is no heartbeat; else at the next one. Nothing stays."""
    bouncer, before = Remote(server), list[int]()
    other = bouncer.client()
    for number in range(3):
        client = bouncer.client()
        if number % 2:
            client.wait_opening()
        client.leave(leave)
        bouncer.wait_for(subscribers=1)
        assert leave != "half-close" or [] == client.wait_end()
        client.leave()
        before = before or [server.count("fd")]  # with what the first stream ever has set up
    wait_until(lambda: server.count("fd") <= before[0], "the descriptors are closed")
    bouncer.broadcast("hi")
    assert ["hi"] == other.datas(1)


@detaching
def test_hub_reaps_a_peer_that_has_vanished(server: Server) -> None:
    """Without a FIN or RST: the kernel gives it up after 30 s without an answer."""
    bouncer, code = Remote(server), "getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)"
    port = bouncer.client().socket.getsockname()[1]
    assert 30_000 == bouncer.do(f"my_socket({port})[1].{code}")


@detaching
def test_hub_many_streams_hold_no_worker_and_leave_nothing(server: Server) -> None:
    """The only worker answers, there is no thread more than with one, and the log is ordinary."""
    bouncer = Remote(server)
    bouncer.client().leave()  # with what the first stream ever has set up
    bouncer.wait_for(subscribers=0)
    log, descriptors, threads = server.log(), server.count("fd"), server.count("task")
    clients = bouncer.streams(300)
    wait_until(lambda: server.count("task") <= threads, "the requests' threads end")
    bouncer.broadcast("hi")
    for client in clients:
        assert ["hi"] == client.datas(1)
        client.leave()
    bouncer.wait_for(subscribers=0)
    wait_until(lambda: server.count("fd") <= descriptors, "the descriptors are closed")
    odd = re.compile(r'^(?!127\.0\.0\.1 - - \[[^]]*\] "(GET|POST) /\S* HTTP/1.1" 200 ).+\n', re.M)
    assert [] == odd.findall(server.log().removeprefix(log))


def test_hub_burst_drops_nobody_who_keeps_up(server: Server) -> None:
    """A thousand events of a loop reach all; if detached, also beside a thread that is busy."""
    bouncer = Remote(server)
    readers = [Task(client.datas, 1000) for client in [bouncer.client() for _ in range(10)]]
    busy = "import time\nuntil = time.monotonic() + 1\nwhile time.monotonic() < until: pass"
    if server.kind in ("development", *SINGLE):
        bouncer.do(f"threading.Thread(target=exec, args=[{busy!r}]).start()")
    bouncer.broadcast(*range(1000))
    assert [list(map(str, range(1000)))] * 10 == [reader.result() for reader in readers]
    assert 0 == bouncer.stats()["dropped"]


def test_hub_stalled_client_is_dropped_and_resumes(server: Server) -> None:
    """It gets what was held for it, the end, and later what it missed; others lose nothing."""
    bouncer = Remote(server, history=10_000)
    stalled, total = bouncer.client(receive_buffer=4096), 0
    others = [bouncer.client() for _ in range(2)]
    while not bouncer.stats()["dropped"]:
        bouncer.broadcast(*(str(n).rjust(65536) for n in range(total, total + 15)))
        for other in others:
            assert list(range(total, total + 15)) == list(map(int, other.datas(15)))
        total += 15
    stalled.wait_until(lambda: stalled.ended, "end")
    events = list(stalled.unread)
    assert (True, True) == (stalled.whole, len(events) >= 16)
    resumed = bouncer.client(headers={"Last-Event-ID": events[-1].id})
    events += resumed.events(total - len(events))
    assert list(range(total)) == [int(event.data) for event in events]


@detaching
def test_hub_takes_no_notice_of_what_a_client_says(server: Server) -> None:
    """With its request or later, until it is too much; then it is cut off, and nobody else."""
    bouncer, saying = Remote(server), b"POST /do HTTP/1.1\r\nHost: x\r\n\r\n" + b"\0\xff" * 1000
    for early, late in (saying, b""), (b"", saying):
        client = bouncer.client("x", more=early)
        client.say(late)
        bouncer.broadcast("hi", channel="x")
        assert ["hi"] == client.datas(1)
    other = bouncer.client()
    talk = functools.partial(client.say, b"blah" * 256)
    wait_until(lambda: bouncer.stats()["subscribers"] == 2, "the talker is cut off", talk)
    bouncer.broadcast("bye")
    assert ["bye"] == other.datas(1)


def test_hub_bounds_how_far_a_publisher_runs_ahead() -> None:
    """A broadcast waits for a hub that is 64 KiB behind; here it gets time only if one does."""
    bouncer, (ours, theirs) = EventBouncer(), socket.socketpair()
    with ours, theirs:
        body = call(app_of(bouncer.stream), offered=ours)
        ours.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + next(iter(body)))
        assert [] == list(body)
        wait_until(lambda: theirs.recv(4096).endswith(b"\n:\n"), "opening")
        sys.setswitchinterval(60)  # seconds
        try:
            for _ in range(1_200):
                bouncer.broadcast("x" * 92)  # 100 bytes
            received = theirs.recv(2**20, socket.MSG_DONTWAIT)
        finally:
            sys.setswitchinterval(0.005)  # the default
            bouncer.close()
        assert len(received) >= 120_000 - 65_536
        body.close()


@detaching
def test_hub_at_the_limit_of_descriptors(server: Server) -> None:
    """Clients beyond it are told to come back, in the log once; the others lose nothing."""
    bouncer, told = Remote(server, retry=4321), server.log().count("come back later")
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (%s, 4096))"

    def is_refused() -> bool:
        client = bouncer.request().wait_opening()
        if refused := client.body != b"retry: 4321\n":
            assert (200, []) == (client.head.status, client.wait_end())
            assert re.fullmatch(rb"retry: 4321\n: .*\n", client.body)
            server.clients.pop().leave()
        return refused

    bouncer.do(limit % "len(os.listdir('/proc/self/fd')) + 60")
    try:
        # One may be let in yet, while connections of other requests are being closed.
        wait_until(lambda: all([is_refused() for _ in range(3)]), "clients are refused")
        bouncer.wait_for(detached=len(server.clients), subscribers=len(server.clients))
        assert told + 1 == server.log().count("come back later")
        for _ in range(5):
            server.clients.pop().leave()
        wait_until(lambda: not is_refused(), "somebody is let in")
        bouncer.broadcast("hi")
        assert {"hi"} == {client.datas(1)[0] for client in server.clients}
    finally:
        bouncer.do(limit % "4096")


@detaching
@pytest.mark.parametrize("relayed", [False, True])
def test_hub_child_begins_with_nothing(server: Server, relayed: bool, request: Any) -> None:
    """A forked child ends normally; its parent's streams go on, and get nothing twice."""
    relay: Any = {"relay": request.getfixturevalue("redis").url} if relayed else {}
    bouncer = Remote(server, history=9, **relay)
    clients = [bouncer.client("x") for _ in range(3)]
    bouncer.broadcast("before")
    of_gevent = server.kind == "gevent"  # gunicorn's own greenlets may end the child, with 0
    assert {bouncer.do("fork(child, bouncer)") for _ in range(2)} <= {7, 0 if of_gevent else 7}
    bouncer.broadcast("after")
    bouncer.do("bouncer.disconnect('x')")
    for received in [client.wait_end() for client in clients]:
        assert ["before", "after"] == [text for text in received if text != "of the child"]
        assert of_gevent or 2 * relayed == received.count("of the child")


FORKS_UNDER_GEVENT = """
import gevent.monkey; gevent.monkey.patch_all()
import os, sys, time, redis
from sse_bouncer import EventBouncer, RedisRelay
bouncer = EventBouncer(relay=RedisRelay(redis.Redis.from_url(sys.argv[1]), "gevent"))
subscription = bouncer.subscribe()
for number in range(20):
    if os.fork() == 0:
        os._exit(time.sleep(1) or 0)  # while its parent's greenlets would run
    bouncer.broadcast(number)
    print(subscription.get(timeout=20).split()[-1])
"""


def test_hub_child_under_gevent_ends_its_parents_greenlets(redis: Redis) -> None:
    """One that reads on would take Redis's answers away from the parent."""
    need("gevent")
    finished = run(sys.executable, "-W", "ignore", "-c", FORKS_UNDER_GEVENT, redis.url)
    assert ([str(n) for n in range(20)], "") == (finished.stdout.split(), finished.stderr)


def test_hub_child_holds_no_connection_of_its_parent(tmp_path: Path) -> None:
    """The parent is killed, its child lives on: the parent's clients see the end."""
    with serve("development", tmp_path) as server:
        bouncer = Remote(server)
        client = bouncer.client()
        bouncer.do("threading.Thread(target=fork, args=[signal.pause]).start()")
        children = Path(f"/proc/{server.process.pid}/task")
        wait_until(lambda: any(f.read_text() for f in children.glob("*/children")), "a child")
        server.process.kill()
        assert [] == client.wait_end()
        server.bouncers.clear()


@detaching
def test_hub_survives_what_nobody_has_thought_of(server: Server) -> None:
    """Someone else puts another file in the place of a stream's: that costs no other stream."""
    bouncer = Remote(server)
    unlucky, other = bouncer.client(), bouncer.client()
    port = unlucky.socket.getsockname()[1]
    bouncer.do(f"os.dup2(os.open(os.devnull, os.O_RDONLY), my_socket({port})[0])")
    bouncer.broadcast("a", "b")
    assert (["a", "b"], []) == (other.datas(2), unlucky.wait_end())
    bouncer.wait_for(subscribers=1)


@development
def test_hub_close_delivers_what_slow_clients_have_still_to_get(server: Server) -> None:
    """Also to one that has said something since, and then it is no reset that it sees. One that
    takes nothing, or stays when it has all, is cut off after 5 s: no descriptor stays."""
    bouncer = Remote(server)
    slow, stalled, stays = (bouncer.client(receive_buffer=4096) for _ in range(3))
    bouncer.broadcast(*(str(n).rjust(65536) for n in range(16)))
    bouncer.do("bouncer.close()")
    bouncer.wait_for(subscribers=0)
    slow.say(b"blah")
    assert [list(range(16))] * 2 == [list(map(int, each.wait_end())) for each in (slow, stays)]
    assert slow.whole
    for _ in range(10):
        slow.socket.sendall(b"blah")
    for port in [client.socket.getsockname()[1] for client in (stalled, stays)]:
        wait_until(lambda: not bouncer.do(f"bool(my_socket({port}))"), "it is cut off")  # noqa: B023
    assert len(stalled.wait_end()) < 16


def follow(seed: int, bouncer: Remote, settled: threading.Event) -> list[str]:
    """Read over connections that are cut at random, until "end" has come."""
    rng, last, seen = random.Random(seed), "", [""]
    url = bouncer.url("/subscribe", channel=[*"ab"][: seed % 3])
    while seen[-1] != "end":
        headers = {"Last-Event-ID": last} if last else {}
        client, looks = Client(bouncer.server.port, url, headers=headers), rng.choice([0, 1, 2, 9])
        while not client.ended and (looks > 0 or settled.is_set()) and "end" not in seen[-1:]:
            client.read()
            looks -= 1
            seen += [str(client.unread.popleft()) for _ in range(len(client.unread))]
        last = client.parser.last_event_id or last
        if rng.random() < 0.2:
            client.say(rng.randbytes(rng.randrange(10_000)))
        client.leave(rng.choice(["close", "reset", "half-close"]))
        client.leave()
    return seen[1:]


def check_followed(bouncer: Remote) -> None:
    """Clients that are cut at random get what is for them, once, from the first that they saw."""
    settled, rng = threading.Event(), random.Random(1)
    tasks = [Task(follow, seed, bouncer, settled) for seed in range(12)]
    published: list[tuple[str, str | None]] = []
    for _ in range(40 * FUZZ):
        channel = rng.choice([None, "a", "b"])
        texts = [str(len(published) + i) for i in range(rng.choice([1, 1, 3, 15]))]
        bouncer.broadcast(*texts, channel=channel)
        published += [(text, channel) for text in texts]
    settled.set()
    bouncer.broadcast("end")
    for seed, task in enumerate(tasks):
        mine = [None, *"ab"][: 1 + seed % 3]
        due = [text for text, channel in [*published, ("end", None)] if channel in mine]
        seen = task.result()
        assert due[due.index(seen[0]) :] == seen


def test_hub_fuzz_clients_cut_at_random_miss_nothing(server: Server) -> None:
    """Without heartbeats if detached, as these would wake a hub that overslept."""
    bouncer = Remote(server, history=10_000, maxsize=100)
    bouncer.client().leave()
    check_followed(bouncer)
    if server.detaches:
        bouncer.wait_for(subscribers=0)


# =================================================================================================
# RESPONSE: a stream as Flask and the server see it

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",
}


def test_response_headers_status_and_class() -> None:
    """It is of the app's own class, also if that sets a mimetype; headers may be changed."""

    class Page(flask.Response):
        default_mimetype = "application/json"

    own = {"X-Mine": "1", "Cache-Control": "private"}
    app = app_of(lambda: sse_response(["x"], status=202, headers=own))
    app.response_class = Page
    with app.test_request_context():
        made = app.make_response(app.dispatch_request())
    assert (Page, 202, {**HEADERS, **own}) == (type(made), made.status_code, dict(made.headers))
    with app_of(EventBouncer().stream).test_client().get("/") as response:
        assert (200, HEADERS) == (response.status_code, dict(response.headers))


@pytest.mark.parametrize(("retry", "opening"), [(None, ":"), (0, "retry: 0"), ((7, 7), "retry: 7")])
def test_response_opening_is_one_line_and_no_block(retry: Any, opening: str) -> None:
    """Several client libraries would make an empty event of a block. A gap is an event, whose id
    lets a client that is cut off after it miss nothing."""
    bouncer = EventBouncer(retry=retry, history=2)
    ids = ids_of(bouncer, *"abcd")

    def sent(last: str) -> str:
        subscription = bouncer.subscribe(last_event_id=last)
        bouncer.unsubscribe(subscription)
        return answer(lambda: sse_response(subscription))

    kept = f"id: {ids[2]}\ndata: c\n\nid: {ids[3]}\ndata: d\n\n"
    assert f"{opening}\n{kept}" == sent("earliest") == sent(ids[1])
    for last in (ids[0], "1-1"):
        assert f"{opening}\nid: {ids[1]}\nevent: gap\ndata: \n\n{kept}" == sent(last)


@pytest.mark.parametrize("retry", [None, (700, 900)])
@pytest.mark.parametrize("why", ["full", "closed"])
def test_response_refused_is_told_to_come_back(retry: Any, why: str) -> None:
    """By a 200, a retry somewhere in its range and the end; browsers would give up at a 503."""
    bouncer = EventBouncer(max_subscribers=1, retry=retry)
    with bouncer.subscribe():
        if why == "closed":
            bouncer.close()
        responses = [app_of(bouncer.stream).test_client().get("/") for _ in range(20)]
    assert {200} == {response.status_code for response in responses}
    assert HEADERS.items() <= dict(responses[0].headers).items()
    found = [re.fullmatch(rb"retry: ([0-9]+)\n: [^\n]+\n", r.data) for r in responses]
    retries, (low, high) = {int(match[1]) for match in found if match}, retry or (5000, 15_000)
    assert len(retries) > 5
    assert low <= min(retries) <= max(retries) <= high
    assert 20 == bouncer.stats()["refused"]


# Which event's id a request has in its header, its query and the view's argument; which counts.
PRECEDENCE = [(0, 1, 2, 0), (None, 1, 2, 1), (None, None, 2, 2), (2, None, 0, 2)]


@pytest.mark.parametrize(("header", "query", "argument", "counts"), PRECEDENCE)
def test_response_begins_after(header: Any, query: Any, argument: Any, counts: int) -> None:
    """The browser's own id, event-source-polyfill's lastEventId, what the page was rendered at."""
    bouncer = EventBouncer(history=9)
    ids = ids_of(bouncer, *"abc")
    app = app_of(lambda: bouncer.stream(last_event_id=None if argument is None else ids[argument]))
    url = "/" if query is None else f"/?lastEventId={ids[query]}"
    headers = {} if header is None else {"Last-Event-ID": ids[header]}
    with app.test_client().get(url, headers=headers) as response:
        bouncer.close()
        assert "abc"[counts + 1 :] == "".join(map(str, parse(response.data.decode())))


def test_response_of_items_is_these_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """By the app's own JSON, though its context has ended when a generator runs. What cannot be
    formatted is logged and left out; what the generator raises is the server's to report."""
    items = ["a\nb", format_sse("c", "greet"), math.nan, None, {"n": DAY}, b"bytes", ""]
    expected = "data: a\ndata: b\n\nevent: greet\ndata: c\n\n"
    expected += f"data: {flask.json.dumps({'n': DAY})}\n\ndata: bytes\n\ndata: \n\n"
    assert expected == answer(lambda: sse_response(item for item in items))
    assert [("sse_bouncer", logging.ERROR)] * 2 == [(r.name, r.levelno) for r in caplog.records]
    assert "nan" in caplog.messages[0]
    for source in (["a", "b"], ("a", "b"), map(str, ["a", "b"]), deque("ab")):
        assert "data: a\n\ndata: b\n\n" == answer(functools.partial(sse_response, source))
    assert "" == answer(lambda: sse_response([]))
    with pytest.raises(ZeroDivisionError):
        answer(lambda: sse_response(1 / number for number in (1, 0)))


@pytest.mark.parametrize("items", range(4))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_response_closes_its_source_once(method: str, items: int) -> None:
    """However far the body was read, or not at all."""
    closed: list[bool] = []

    class Source(list[str]):
        def close(self) -> None:
            closed.append(True)

    body = call(app_of(lambda: sse_response(Source("ab"))), method)
    list(itertools.islice(body, items))
    assert [] == closed
    body.close()
    assert [True] == closed


@pytest.mark.parametrize("items", range(3))
@pytest.mark.parametrize("end", ["closed", "forgotten"])
def test_response_releases_its_subscription(items: int, end: str) -> None:
    """Never iterated, or left in the middle, closed or just forgotten: nothing is left."""
    bouncer = EventBouncer()
    body = call(app_of(bouncer.stream))
    bouncer.broadcast("hi")
    assert [b":\n", b"data: hi\n\n"][:items] == list(itertools.islice(body, items))
    assert 1 == len(bouncer.subscribers)
    if end == "closed":
        body.close()
    del body
    gc.collect()
    assert not bouncer.subscribers


def test_response_thrown_away_or_to_head_holds_nothing(server: Server) -> None:
    bouncer = Remote(server, max_subscribers=1)
    bouncer.do("bouncer.stream() and 0")
    bouncer.wait_for(subscribers=0)
    client = bouncer.request(method="HEAD")
    assert HEADERS.items() <= dict(client.head.getheaders()).items()
    client.leave()
    bouncer.wait_for(subscribers=0, refused=0)


@on("development", "gthread-served", "gevent", "waitress")
@pytest.mark.parametrize("leave", ["close", "reset"])
def test_response_runs_finally_when_the_client_leaves(server: Server, leave: str) -> None:
    """Of a generator whose headers come before its first item, but from waitress."""
    bouncer = Remote(server)
    client = bouncer.request(query={"do": "sse_response(generator(bouncer.subscribe(), sight))"})
    bouncer.wait_for(subscribers=1)
    assert server.kind == "waitress" or 200 == client.head.status
    bouncer.broadcast("a")
    assert (["a"], None) == (client.datas(1), bouncer.do("sight.get('ended')"))
    client.leave(leave)
    wait_until(lambda: bouncer.do("bouncer.broadcast('b') or sight.get('ended')"), "finally")


OF_BLOG_POSTS = "{'Connection': 'keep-alive', 'Transfer-Encoding': 'chunked'}"
# What the request is and asks for, and whether the hub goes on from what the server makes of it.
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "cookies": ({}, True),
    "session and ProxyFix": ({"change": "session.update(user=request.remote_addr)"}, True),
    "wrapped by middleware": ({"watched": 1}, True),
    "headers of the server's own": ({"change": f"response.headers.update({OF_BLOG_POSTS})"}, True),
    "POST": ({}, True),
    "HTTP/1.0": ({}, True),
    "another status": ({"change": "setattr(response, 'status_code', 201)"}, False),
    "compressed": ({"compressed": 1}, False),  # and held back, so not where it holds the worker
}
HEADS_OF = [(k, w) for k in DETACHING for w in HEADS if w != "compressed" or k not in SINGLE]


@pytest.mark.parametrize(("server", "what"), HEADS_OF, indirect=["server"])
def test_takeover_keeps_the_head_that_the_server_would_send(server: Server, what: str) -> None:
    """Less how it frames the body, whose bytes are the same taken over or not; nothing is left."""
    need("flask_compress")
    query, taken_over = HEADS[what]
    framing, heads = {"Connection", "Transfer-Encoding", "Keep-Alive", "Date"}, []
    options = {"POST": {"method": "POST"}, "HTTP/1.0": {"protocol": what}}.get(what, {})
    headers = {"X-Forwarded-For": "192.0.2.7", "Accept-Encoding": "deflate"}
    for detach in (True, False):
        bouncer = Remote(server, detach=detach, heartbeat=0.05)
        client = bouncer.request(query=query, headers=headers, **options)
        got = client.head.getheaders()  # after a dot, a session's cookie has the time
        kept = [(n, re.sub(r"\..*?;", ";", v)) for n, v in got if n not in framing]
        heads.append((client.head.status, kept))
        if detach and taken_over or server.kind not in SINGLE:
            bouncer.wait_for(subscribers=1, detached=int(detach and taken_over))
            bouncer.broadcast("hi")
            bouncer.do("bouncer.close()")
            client.wait_end()
            body = zlib.decompress(client.body) if what == "compressed" else bytes(client.body)
            assert client.whole
            assert body.replace(b"\n", b"").rstrip(b":").endswith(b":data: hi")
        if detach and taken_over:
            assert [("Connection", "close")] == [p for p in got if p[0] in framing - {"Date"}]
        client.leave()
        bouncer.wait_for(subscribers=0)
    assert heads[1] == heads[0]
    assert what != "another status" or 1 == server.log().count("goes through the server")
    names = Counter(name for name, _ in heads[0][1])
    assert {"X-Middleware", "X-Pid"} <= set(names)
    assert 2 + ("session" in what) == names["Set-Cookie"]


@detaching
def test_takeover_leaves_a_short_and_normal_request(server: Server) -> None:
    """As middleware, teardown functions and the log see it. A stream begins with what is held."""
    bouncer, code = Remote(server), "[sse_response(bouncer.subscribe('x')), bouncer.broadcast('a')"
    client = bouncer.request(query={"watched": 1, "do": f"{code}][0]"})
    expected = {"bytes": 2, "closed": True, "teardown": "None"}
    bouncer.wait_for(detached=1)
    server.wait_for_log(r"GET /subscribe.*watched=1.* 200 ")
    wait_until(lambda: bouncer.do("{**sight, 'teardown': 'None'}") == expected, "it has ended")
    ended = bouncer.request(query={"do": f"{code}, bouncer.disconnect('x')][0]"})
    assert ["a"] == ended.wait_end()
    assert ["a", "a"] == client.wait_end()


@pytest.mark.parametrize("kind", WORKERS)
def test_takeover_of_a_unix_socket_and_beside_an_agent(kind: str, tmp_path: Path) -> None:
    """New Relic's wraps start_response and the body; streams hold no worker all the same."""
    need("newrelic")
    config, path = tmp_path / "newrelic.ini", str(tmp_path / "socket")
    config.write_text("[newrelic]\ndeveloper_mode = true\nlicense_key = x\n", "utf-8")
    with serve(kind, tmp_path / "app", "--bind", f"unix:{path}", APM=str(config)) as server:
        bouncer = Remote(server)
        clients = [bouncer.client(), bouncer.client(address=path)]
        bouncer.wait_for(subscribers=2, detached=2)
        bouncer.broadcast("hi")
        assert [["hi"]] * 2 == [client.datas(1) for client in clients]


@pytest.mark.parametrize("kind", ["development", "gthread-served", "gevent"])
def test_takeover_leaves_tls_to_the_server(kind: str, tmp_path: Path) -> None:
    need("openssl")
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    request = "openssl req -x509 -newkey rsa:2048 -noenc -subj /CN=x -addext".split()
    made = run(*request, "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate)
    assert 0 == made.returncode, made.stderr
    names = ["--cert", "--key"] if kind == "development" else ["--certfile", "--keyfile"]
    with serve(kind, tmp_path / "app", names[0], certificate, names[1], key) as server:
        context = ssl.create_default_context(cafile=certificate)
        url = Remote(server, detach=True).url
        server.bouncers.clear()  # they are closed by plain HTTP

        def ask(path: str, *code: str) -> Any:
            body, headers = json.dumps([*code, {}]).encode(), {"Content-Type": "application/json"}
            url = f"https://127.0.0.1:{server.port}{path}"
            asked = urllib.request.Request(url, body if code else None, headers)
            return urllib.request.urlopen(asked, context=context, timeout=TIMEOUT)

        stream = ask(url("/subscribe"))
        assert b":\n" == stream.readline()
        code = "[bouncer.stats()['detached'], bouncer.broadcast('hi'), bouncer.close()]"
        with ask(url("/do"), code) as done, stream:
            assert (b"[0,null,null]\n", b"data: hi\n\n") == (done.read(), stream.read())


def test_takeover_ends_if_a_signal_handler_closes_in_the_middle_of_it(alarm: Any) -> None:
    """At any moment of it: no stream is forgotten."""
    for number in range(300):
        bouncer, (ours, theirs) = EventBouncer(heartbeat=None), socket.socketpair()
        with ours, theirs:
            body = call(app_of(bouncer.stream), offered=ours)
            ours.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + next(iter(body)))
            alarm(1e-6 * number, bouncer.close)
            assert [] == list(body)
            bouncer.close()
            theirs.settimeout(TIMEOUT)
            received = b"".join(iter(functools.partial(theirs.recv, 4096), b""))
            assert received.endswith(b"\r\n\r\n:\n")
            assert () == bouncer.subscribers
            body.close()


@pytest.mark.parametrize("items", [0, 1])
def test_takeover_that_the_server_breaks_off_leaves_nothing(items: int) -> None:
    """Before it asks for the first item or the second: it has its connection back, and answers."""
    bouncer, descriptors = EventBouncer(), list[int]()
    for _ in range(5):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            body = call(app_of(bouncer.stream), offered=ours)
            list(itertools.islice(body, items))
            body.close()
            ours.sendall(b"an error page")
            assert b"an error page" == theirs.recv(100)
        gc.collect()
        descriptors.append(len(os.listdir("/dev/fd")))
        assert () == bouncer.subscribers
    assert descriptors[-1] <= descriptors[0]


# =================================================================================================
# STOPPING: the server's own ways to stop, reload and recycle, with open streams


def wait_until_idle(client: Client) -> None:
    """Wait until the worker that serves it has accepted all: gunicorn 27's gthread worker can hang
    in its own lock at a signal that comes in the moment of an accept."""
    stat = Path(f"/proc/{client.head.getheader('X-Pid')}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "it sleeps")


STOPS = [(kind, how) for kind in WORKERS for how in ("SIGTERM", "SIGHUP")]
STOPS += [("sync", "recycled"), ("gevent", "recycled"), ("gthread", "SIGINT")]
STOPS += [("development", "SIGINT"), ("development", "reloaded")]


@pytest.mark.parametrize(("kind", "how"), STOPS)
@pytest.mark.usefixtures("servers")  # for the limit of descriptors
def test_stopping_ends_all_streams(kind: str, how: str, tmp_path: Path) -> None:
    """gunicorn is told to wait longer than a test does for open requests: there are none."""
    options = [] if kind == "development" else ["--graceful-timeout", str(4 * TIMEOUT)]
    options += ["--debug"] * (how == "reloaded") + ["--max-requests", "60"] * (how == "recycled")
    with serve(kind, tmp_path, *options) as server:
        bouncer, count = Remote(server), 1_000 if (kind, how) == ("sync", "SIGTERM") else 20
        clients = bouncer.streams(count)
        wait_until_idle(clients[-1])
        if how == "reloaded":
            (tmp_path / "app.py").write_text(APP + "\n# changed\n", "utf-8")
        elif how == "recycled":
            with contextlib.suppress(OSError, http.client.HTTPException):
                wait_until(lambda: bouncer.stats()["subscribers"] == 0, "another worker answers")
        else:
            server.process.send_signal(getattr(signal, how))
        assert [[]] * count == [client.wait_end() for client in clients]
        if how in ("SIGTERM", "SIGINT"):
            server.process.wait(TIMEOUT)
        else:
            server.wait_for_log("Booting worker|Debugger PIN", times=2)
            assert bouncer.client()


RECIPES = [("gthread-served", how) for how in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")]
SERVED = "\nbouncer = EventBouncer(detach=False)\napp.add_url_rule('/', view_func=bouncer.stream)\n"


@pytest.mark.parametrize(("kind", "how"), [*RECIPES, ("gevent", "SIGTERM")])
def test_stopping_recipe_ends_streams_first(kind: str, how: str, tmp_path: Path) -> None:
    """The documented hook, as it stands: before gunicorn waits for streams that hold workers."""
    hook = "".join(re.findall(r"^ {12}(.*\n)", EventBouncer.close.__doc__ or "", re.M))
    (tmp_path / "gunicorn.conf.py").write_text(hook, "utf-8")
    options = ("--graceful-timeout", str(4 * TIMEOUT))
    with serve(kind, tmp_path, *options, app=APP + SERVED) as server:
        clients = [server.client("/").wait_opening() for _ in range(5)]
        wait_until_idle(clients[-1])
        server.process.send_signal(getattr(signal, how))
        assert [[]] * 5 == [client.wait_end() for client in clients]
        if how != "SIGHUP":
            server.process.wait(TIMEOUT)


@pytest.mark.parametrize("kind", ["development", "gthread"])
def test_stopping_sends_what_was_broadcast_right_before_exit(kind: str, tmp_path: Path) -> None:
    with serve(kind, tmp_path) as server:
        bouncer = Remote(server)
        clients = bouncer.streams(100)
        readers = [Task(client.wait_end) for client in clients]
        how = "SIGINT" if kind == "development" else "SIGTERM"
        code = "[bouncer.broadcast(n) for n in range(100)] and os.kill(os.getpid(), signal.%s)"
        Task(bouncer.do, code % how)  # which is not answered by a server that ends at once
        assert [list(map(str, range(100)))] * 100 == [reader.result() for reader in readers]


# =================================================================================================
# CLIENTS: what clients that no one here wrote make of a stream, directly and through nginx


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    need("selenium", "chromium", "chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for switch in "headless no-sandbox disable-gpu disable-dev-shm-usage disable-sync".split():
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


# Reads what the URL streams into `read`, until an event named "done".
READ = """
window.read = []; window.errors = 0;
window.source = new EventSource(arguments[0]);
source.onerror = () => errors += 1;
for (const name of ["message", "greet", "gap", "done", ""])
    source.addEventListener(name, (event) => {
        read.push([event.data, event.type, event.lastEventId]);
        if (name === "done") source.close();
    });
"""


def wait_in_page(browser: Any, condition: str) -> None:
    wait_until(lambda: browser.execute_script(f"return {condition}"), f"in the page: {condition}")


def chromium_reads(browser: Any, url: str) -> list[Event]:
    """Read by Chromium's EventSource, from a page of the same origin."""
    browser.get(url.replace("/subscribe?", "/nothing?"))
    browser.execute_script(READ, url)
    wait_in_page(browser, "read.length && read[read.length - 1][1] === 'done'")
    return [Event(*fields) for fields in browser.execute_script("return read")]


def httpx_reads(url: str) -> list[Event]:
    import httpx
    from httpx_sse import connect_sse

    with httpx.Client(timeout=TIMEOUT) as client, connect_sse(client, "GET", url) as source:
        return [Event(event.data, event.event, event.id) for event in source.iter_sse()]


@pytest.fixture(params=["chromium", "httpx_sse"])
def reads(request: pytest.FixtureRequest) -> Callable[[str], list[Event]]:
    """A client that reads the stream at a URL."""
    if request.param == "chromium":
        return functools.partial(chromium_reads, request.getfixturevalue("browser"))
    need("httpx", "httpx_sse")
    return httpx_reads


@contextlib.contextmanager
def nginx(upstream: int, folder: Path) -> Iterator[int]:
    """Run a real nginx before a server, as in the README but for TLS, with gzip; give its port."""
    need("nginx")
    (site,) = re.findall(r"^```nginx\n(.*?)^```", README, re.M | re.S)
    with held_port() as port:
        site = re.sub(r"listen .*;\n.*;\n", f"listen 127.0.0.1:{port};\n", site)
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{upstream}").replace("5000", "50")
        begin = "daemon off; master_process off; pid pid; error_log stderr notice; events {} http {"
        begin += "access_log off; gzip on; gzip_types text/event-stream;"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            begin += f"{name}_temp_path {name};"
        (folder / "conf").write_text(f"{begin} {site} }}", "utf-8")
        process = Process(["nginx", "-p", str(folder), "-c", "conf"], folder)
        try:
            process.wait_for_log("using the .* event method")  # it listens by then
            yield port
        finally:
            process.kill()


# What is broadcast, and what is to be read.
TEXTS = [(row[0], row[2]) for row in FRAMES if type(row[0].get("data")) is str]
TEXTS = [pair for pair in TEXTS if {*pair[0]} <= {"data", "event"}]
TEXTS += [({"data": "x" * 100_000}, [Event("x" * 100_000)])]
TEXTS += [({"data": "", "event": "done"}, [Event("", "done")])]


@on("development")
@pytest.mark.parametrize("way", ["direct", "nginx"])
def test_client_reads_what_was_broadcast(
    server: Server, way: str, reads: Any, tmp_path: Path
) -> None:
    """To the character, with its id; and no event that nobody sent, for all the heartbeats."""
    direct = contextlib.nullcontext(server.port)
    with nginx(server.port, tmp_path) if way == "nginx" else direct as port:
        bouncer = Remote(server, history=100, heartbeat=0.02, retry=1000)
        client = Task(reads, f"http://127.0.0.1:{port}{bouncer.url('/subscribe')}")
        bouncer.wait_for(subscribers=1)
        beats = bouncer.client()
        for number, (fields, _) in enumerate(TEXTS):
            bouncer.broadcast(fields["data"], event=fields.get("event"))
            if number % 8 == 0:  # heartbeats come between events, and before them
                beats.wait_for_beats(3)
        bouncer.do("bouncer.close()")
        read = client.result()
    expected = [(event.data, event.type) for _, events in TEXTS for event in events]
    assert expected == [(event.data, event.type) for event in read]
    assert are_increasing(event.id for event in read)


@development
def test_client_behind_nginx_gets_events_at_once(server: Server, tmp_path: Path) -> None:
    """Compressed, as it asks, and held back by neither; that it leaves is seen at once."""
    need("curl")
    with nginx(server.port, tmp_path) as port:
        bouncer = Remote(server)
        client = bouncer.request(address=port, headers={"Accept-Encoding": "gzip"})
        assert "gzip" == client.head.getheader("Content-Encoding")
        client.leave()
        url = f"http://127.0.0.1:{port}{bouncer.url('/subscribe')}"
        with subprocess.Popen(["curl", "-sSN", "--compressed", url], stdout=-1) as process:
            assert process.stdout
            assert b":\n" == process.stdout.readline()
            for number in range(3):
                bouncer.broadcast(number)
                lines = [process.stdout.readline() for _ in range(2)]
                assert [f"data: {number}\n".encode(), b"\n"] == lines
            process.kill()
        bouncer.wait_for(subscribers=0)


def test_client_behind_nginx_survives_a_restart_of_the_app(browser: Any, tmp_path: Path) -> None:
    """nginx's error_page answers meanwhile, so that EventSource gives up at a 204 only."""
    with serve("gthread", tmp_path / "one") as server, nginx(server.port, tmp_path) as port:
        bouncer = Remote(server, retry=50)
        browser.get(f"http://127.0.0.1:{port}/nothing")
        browser.execute_script(READ, bouncer.url("/subscribe"))
        bouncer.wait_for(detached=1)
        server.process.terminate()
        wait_in_page(browser, "errors >= 3")  # the end, and then answers by nginx
        server.process.wait(TIMEOUT)
        bind = ("--bind", f"127.0.0.1:{server.port}")
        with serve("gthread", tmp_path / "two", *bind) as again:
            bouncer = Remote(again, **json.loads(bouncer.name))
            bouncer.wait_for(detached=1)
            bouncer.broadcast("back")
            wait_in_page(browser, "read.length && read[0][0] === 'back'")
            browser.execute_script(READ, bouncer.url("/subscribe", do="('', 204)"))
            wait_in_page(browser, "source.readyState === EventSource.CLOSED")


# =================================================================================================
# WAYS TO USE IT: the README's own code, as it stands; a blog post's; and the example

README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
README_TESTS = "\n".join(block for block in BLOCKS if "def test_" in block)


def readme_app(relay: str) -> str:
    """The README's app: all its blocks but its tests; with a relay if one is given."""
    blocks = [b for b in BLOCKS if b not in README_TESTS and (relay or "RedisRelay(" not in b)]
    return re.sub(r"redis://[\w.:]+", relay, "\n".join(blocks))


@pytest.fixture(scope="session", params=["development", "gthread-served"])
def readme(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The README's app, under the development server, and under gunicorn with its relay."""
    relay = "" if request.param == "development" else request.getfixturevalue("redis").url
    with serve(request.param, tmp_path_factory.mktemp("readme"), app=readme_app(relay)) as server:
        yield server


def test_readme_publishes_text_and_json(readme: Server) -> None:
    assert '"/subscribe"' in readme.ask("/")
    client = readme.client("/subscribe").wait_opening()
    readme.ask("/publish", b"a\nb")
    readme.ask("/orders", b"")
    text, order = client.events(2)
    assert ("a\nb", "order") == (text.data, order.type)
    assert {"id": 7, "items": ["tea"]} == json.loads(order.data)


def test_readme_inbox_is_for_its_user_until_logout(readme: Server) -> None:
    """Strangers get no stream, and a logout ends all of one's own."""
    assert 401 == readme.client("/inbox").head.status
    cookies = {}
    for user in ("ada", "bob"):
        form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": "8"}
        login = readme.client("/login", method="POST", headers=form, more=f"user={user}".encode())
        cookies[user] = {"Cookie": str(login.head.getheader("Set-Cookie")).partition(";")[0]}
    tabs = [readme.client("/inbox", headers=cookies["ada"]).wait_opening() for _ in range(2)]
    bob = readme.client("/inbox", headers=cookies["bob"]).wait_opening()
    readme.ask("/logout", b"", **cookies["ada"])
    assert [[], []] == [tab.wait_end() for tab in tabs]
    readme.ask("/publish", b"to all")
    assert ["to all"] == bob.datas(1)


@pytest.mark.parametrize("readme", ["gthread-served"], indirect=True)
def test_readme_progress_ends_for_good(readme: Server) -> None:
    client = readme.client("/progress")
    *steps, _ = client.wait_end()
    assert [{"done": n + 1, "of": 20} for n in range(20)] == [json.loads(step) for step in steps]
    last = client.unread[-1]
    assert ("done", "end") == (last.type, last.id)
    assert 204 == readme.client("/progress", headers={"Last-Event-ID": last.id}).head.status


def test_readme_feed_shows_what_was_kept_and_what_came_since(readme: Server) -> None:
    since = readme.ask("/todos")["since"]
    readme.ask("/publish", b"between")
    assert ["between"] == readme.client(f"/feed?since={since}").datas(1)
    client = readme.client("/feed")
    client.wait_until(lambda: "between" in map(str, client.unread), "what was kept")


def test_readme_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(readme_app(""), "utf-8")
    (tmp_path / "test_app.py").write_text(README_TESTS, "utf-8")
    finished = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed", finished.stdout, re.M), finished.stdout


# The view of the blog posts, with their class imported from here.
BLOG_POST = """
from sse_bouncer import EventBouncer as MessageAnnouncer
import flask
announcer = MessageAnnouncer()

@app.route("/ping", methods=["POST"])
def ping():
    announcer.broadcast(msg=format_sse(data=flask.request.get_data(as_text=True)))
    return {}, 200

@app.route("/listen", methods=["GET"])
def listen():
    def stream():
        messages = announcer.subscribe()
        while True:
            msg = messages.get()
            yield msg

    return flask.Response(stream(), mimetype="text/event-stream")

app.add_url_rule("/stats", view_func=announcer.stats)
"""


def test_blog_post_with_its_import_changed(tmp_path: Path) -> None:
    """It publishes, and clients that left are noticed when it does."""
    with serve("gthread-served", tmp_path, app=APP + BLOG_POST) as server:
        clients = [server.client("/listen") for _ in range(3)]
        wait_until(lambda: server.ask("/stats")["subscribers"] == 3, "all generators have started")
        server.ask("/ping", b"a\nb")
        assert [["a\nb"]] * 3 == [client.datas(1) for client in clients]
        clients[0].leave("close")
        clients[1].leave("reset")

        publish = functools.partial(server.ask, "/ping", b"x")
        wait_until(lambda: server.ask("/stats")["subscribers"] == 1, "they are noticed", publish)
        assert ["x"] == clients[2].datas(1)


def test_example_page(browser: Any, tmp_path: Path) -> None:
    """By ``python example_app.py``: it shows what anyone publishes as the text that it is."""
    example = (ROOT / "example_app.py").read_text("utf-8").replace("app.run(", "app.run(port=0, ")
    with serve("script", tmp_path, app=example) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: server.ask("/stats")["subscribers"], "the page's stream")
        server.ask("/publish", "<b>tea</b> & cake 😀".encode())
        wait_in_page(browser, "document.body.innerText.includes('<b>tea</b> & cake 😀')")
        assert server.client("/progress").events(1)
        with pytest.raises(OSError, match="400") as refusal:
            server.ask("/publish", b"\xff")
        refusal.value.close()  # type: ignore[attr-defined]


# =================================================================================================
# PROMISES about the package as a whole


WITHOUT_FLASK = """
import logging, os, signal, sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
def state():
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    return handlers, os.listdir("/dev/fd"), logging.root.handlers, threading.enumerate()
before, modules = state(), set(sys.modules)
from sse_bouncer import *
loaded = {name.partition(".")[0] for name in set(sys.modules) - modules} - {"sse_bouncer"}
assert loaded <= sys.stdlib_module_names, loaded
assert before == state()
bouncer = EventBouncer()
subscription = bouncer.subscribe("a")
bouncer.broadcast({"n": 1}, "greet", channel="a")
assert 'event: greet\\ndata: {"n": 1}\\n\\n' == subscription.get(timeout=10)
assert before == state()
print("done")
"""


def test_promise_import_starts_nothing_and_needs_no_flask() -> None:
    """Nor does broadcasting, of JSON too."""
    finished = run(sys.executable, "-c", WITHOUT_FLASK)
    assert ("done\n", "") == (finished.stdout, finished.stderr)


USER = """\
from flask import Response
from sse_bouncer import EventBouncer, Frame, Subscription, format_sse, sse_response
bouncer = EventBouncer(heartbeat=None, retry=(1_000, 5_000))
subscription: Subscription = bouncer.subscribe("news")
frame: Frame = format_sse({"n": 1}, "greet", id=7)
count: int = bouncer.stats()["subscribers"]
responses: list[Response] = [bouncer.stream(), sse_response(str(n) for n in range(3))]
reveal_type(subscription.get())
bouncer.broadcast(frame, channel=5)
"""


def test_promise_types_reach_users_of_the_wheel(tmp_path: Path) -> None:
    """mypy --strict sees the installed wheel's types: right code passes, wrong code does not."""
    need("mypy", "hatchling")
    site, pip = tmp_path / "site", [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    assert "Successfully installed" in run(*pip, "install", *options, str(ROOT)).stdout
    (tmp_path / "user.py").write_text(USER, "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "user.py"]
    finished = run(*mypy, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(site)})
    revealed, wrong, _ = finished.stdout.splitlines()
    assert 'user.py:8: note: Revealed type is "sse_bouncer.Frame"' == revealed
    assert wrong.startswith('user.py:9: error: Argument "channel" to "broadcast"')
