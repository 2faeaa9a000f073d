"""Tests of sse_bouncer: real servers, real sockets, a real browser, and no part of ours replaced.

    pytest -n auto               everything, in as many processes as there are cores
    pytest                       the same, in one
    pytest -k "wire or fan_out"  the rooms that need no server
    pytest -k gthread            one server
    FUZZ=20 pytest -k fuzz       the random tests, twenty times as long
    TIMEOUT=300 pytest           on a slow machine

The rooms are those of the module, in its order; then come STOPPING, CLIENTS, WAYS TO USE IT and
PROMISES. Flask and pytest are enough to run the file: a test whose server, client or tool is
missing skips and says so. Under ``CI=true`` nothing may be skipped, so there it fails.

Nothing here asserts how long something takes, and nothing sleeps to let something else happen: a
test waits for what it wants to see, and fails after TIMEOUT seconds.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import datetime
import decimal
import functools
import gc
import http.client
import importlib.util
import inspect
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
import textwrap
import threading
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlencode

import flask
import pytest
from werkzeug.test import create_environ

import sse_bouncer
from sse_bouncer import EventBouncer, Frame, RedisRelay, Subscription, format_sse, sse_response

TIMEOUT = int(os.environ.get("TIMEOUT", 60))  # seconds: far beyond what anything here takes
FUZZ = int(os.environ.get("FUZZ", 1))  # how many times as long the random tests run
ROOT = Path(__file__).resolve().parent
T = TypeVar("T")


# =================================================================================================
# HARNESS: waiting, an event stream parser, one client, one app, one kind of server
# =================================================================================================


def need(*modules: str) -> None:
    """Skip the test, or fail it under CI, if a package that it drives is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            go_without(module)


def need_program(name: str) -> str:
    return shutil.which(name) or go_without(name)


def go_without(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI skips nothing")
    pytest.skip(f"{what} is missing")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition`` holds. The pause leaves the processor to those it waits for."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {TIMEOUT} s: {what}")
        time.sleep(0.005)


class Task(Generic[T]):
    """A function running in a daemon thread: one that hangs fails its own test, not the run."""

    def __init__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> None:
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

    def wait_until_blocked(self) -> Task[T]:
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


def run_python(code: str, *arguments: str) -> tuple[str, str]:
    """Run ``code`` in a fresh interpreter; return what it prints, and its errors."""
    finished = run(sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments)
    return finished.stdout, finished.stderr


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


def parse(stream: bytes) -> list[Event]:
    return Parser().feed(stream)


GAP = "(gap)"


def data_of(event: Event) -> str:
    return GAP if (event.type, event.data) == ("gap", "") else event.data


def datas(frames: Iterable[Frame]) -> list[str]:
    """The data of each event in ``frames``; of all that there will be, if it is a subscription."""
    return [data_of(event) for event in parse("".join(frames).encode())]


def held(subscription: Subscription) -> list[str]:
    """Take what the subscription holds; return its data."""
    return datas([subscription.get_nowait() for _ in range(subscription.qsize())])


def next_events(subscription: Subscription, count: int) -> list[Event]:
    return parse("".join(subscription.get(timeout=TIMEOUT) for _ in range(count)).encode())


def next_datas(subscription: Subscription, count: int) -> list[str]:
    return [data_of(event) for event in next_events(subscription, count)]


def id_value(id: str) -> tuple[int, ...]:
    return tuple(map(int, id.split("-")))


def are_increasing(ids: list[str]) -> bool:
    return all(id_value(one) < id_value(two) for one, two in itertools.pairwise(ids))


class Client:
    """One HTTP request on a socket of its own, with its body read as an event stream.

    It reads only when it is asked to, so the test decides when a client is slow, leaves or resets.
    """

    def __init__(
        self,
        port: int,
        path: str,
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
        self.unread: deque[Event] = deque()
        self.socket = connection or socket.socket()
        self.socket.settimeout(TIMEOUT)
        if receive_buffer:  # bounded before the connection opens: the window never grows past it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if connection is None:
            self.socket.connect(("127.0.0.1", port))
        lines = [f"{method} {path} {protocol}", f"Host: 127.0.0.1:{port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + more)
        self._response = http.client.HTTPResponse(self.socket, method=method)

    @functools.cached_property
    def head(self) -> http.client.HTTPResponse:
        self._response.begin()
        return self._response

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The response's headers: names in lower case, in the order sent, repeats as they are."""
        return [(name.lower(), value) for name, value in self.head.getheaders()]

    def read(self) -> None:
        """Take in what one read brings, or the end."""
        try:
            part = self.head.read1(65536)
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionError):
            self.ended = True
            return
        self.ended = self.whole = not part
        self.body += part
        self.unread += self.parser.feed(part)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Read until ``condition`` holds; a heartbeat must not keep a test waiting for ever."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if self.ended or time.monotonic() > deadline:
                pytest.fail(f"no {what}, but {bytes(self.body[-500:])!r}")
            self.read()

    def wait_opening(self) -> Client:
        """Read what a stream opens with: from then on it misses nothing."""
        self.wait_until(lambda: self.body, "opening")
        return self

    def wait_for_body(self, end: bytes) -> None:
        """Read until what has been read since the call has this in it."""
        start = len(self.body)
        self.wait_until(lambda: self.body.find(end, start) >= 0, repr(end))

    def events(self, count: int) -> list[Event]:
        self.wait_until(lambda: len(self.unread) >= count, f"{count} events")
        return [self.unread.popleft() for _ in range(count)]

    def datas(self, count: int) -> list[str]:
        return [data_of(event) for event in self.events(count)]

    def wait_end(self) -> list[str]:
        """Read until the server ends the stream; return the data of events not yet asked for."""
        self.wait_until(lambda: self.ended, "end of the stream")
        return [data_of(event) for event in self.unread]

    def say(self, something: bytes) -> None:
        """Send what no server has asked for. It may hang up on who says too much."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(something)

    def close(self) -> None:
        """Leave politely, with a FIN."""
        self._response.close()
        self.socket.close()

    def half_close(self) -> None:
        """Send a FIN, but go on listening."""
        with contextlib.suppress(OSError):  # the server was first
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leave as a crashed program does, with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


# The one app. A request says which bouncer it is about by a parameter that holds the options to
# make it with, so that any process can; and what is to be done, in Python. Extensions are there if
# they are installed.
APP = '''
import contextlib, importlib, itertools, json, multiprocessing, os, resource, socket, sys
import threading, time, warnings, zlib
from collections import defaultdict
from urllib.parse import parse_qs
from flask import Flask, jsonify, request, session
from werkzeug.middleware.proxy_fix import ProxyFix
from sse_bouncer import EventBouncer, RedisRelay, format_sse, sse_response

warnings.simplefilter("ignore")  # of forks beside threads
app = Flask(__name__)
app.config.update(SECRET_KEY="secret", COMPRESS_MIMETYPES=["text/event-stream"])
for module, extension in ("flask_compress", "Compress"), ("flask_cors", "CORS"):
    with contextlib.suppress(ImportError):
        getattr(importlib.import_module(module), extension)(app)
with contextlib.suppress(ImportError):
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    app.register_error_handler(redis.RedisError, lambda error: (type(error).__name__, 503))
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
                client = redis.Redis.from_url(options["relay"][0], retry=Retry(NoBackoff(), 0))
                options["relay"] = RedisRelay(client, options["relay"][1])
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
        how, sight = query.get("middleware", [""])[0], seen[query.get("bouncer", [""])[0]]
        if how != "flask-compress":
            environ.pop("HTTP_ACCEPT_ENCODING", None)
        def start(status, headers, exc_info=None):
            more = [("Content-Encoding", "deflate")] if how == "compresses" else []
            return start_response(status, [*headers, ("X-Middleware", how), *more], exc_info)
        def passed_on(body, held):
            compressor = zlib.compressobj()
            sight.update(bytes=0, closed=False)
            try:
                for chunk in body:
                    if held:  # start_response only when there is something, as is allowed
                        start(held.pop(0), held.pop(0))
                    sight["bytes"] += len(chunk)
                    if how == "compresses" and chunk:
                        chunk = compressor.compress(chunk) + compressor.flush(zlib.Z_SYNC_FLUSH)
                    yield chunk
                if how == "compresses":
                    yield compressor.flush()
            finally:
                body.close()
                sight["closed"] = True
        held = []
        if how == "late":
            return passed_on(wsgi(environ, lambda *status: held.extend(status[:2])), held)
        body = wsgi(environ, start)
        return passed_on(body, []) if how in ("watches", "compresses") else body
    return call

app.wsgi_app = middleware(ProxyFix(app.wsgi_app))

def numbers(start, sight):
    try:
        start.get()
        for number in itertools.count():
            yield number
            time.sleep(0.02)
    finally:
        sight["ended"] = True

def my_socket(port):
    """Return the descriptor of the process's connection to a port, and a socket object for it."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError, IndexError):
            copy = socket.socket(fileno=os.dup(fd))
            if copy.getpeername()[1] == port:
                return fd, copy

def child(bouncer):
    """What a forked child does: it begins with nothing, and can do everything."""
    before = bouncer.stats()["subscribers"]
    with bouncer.subscribe() as subscription:
        if not bouncer.relay:
            bouncer.broadcast("of the child")
            subscription.get(timeout=10)
        time.sleep(0.3)  # greenlets, if any survived, run now
    os._exit(7 if before == 0 else 8)

def fork(bouncer, how):
    """Run a child to its end, and return its exit status; or leave it running."""
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child, args=[bouncer])
        process.start()
        process.join()
        return process.exitcode
    pid = os.fork()
    if pid == 0:
        time.sleep(60 if how == "linger" else 0)
        child(bouncer)
    return pid if how == "linger" else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if os.environ.get("APM"):
    import newrelic.agent
    newrelic.agent.initialize(os.environ["APM"])
    app = newrelic.agent.WSGIApplicationWrapper(app)
'''

WAITRESS = """
import waitress.server
from app import app
server = waitress.server.create_server(app, host="127.0.0.1", port=0, threads=32)
print("Running on http://127.0.0.1:%s" % server.effective_port, flush=True)
server.run()
"""
# A script as `python app.py` runs it, but for the port, which its `app.run()` leaves at 5000.
SCRIPT = """
import functools, runpy, sys
from flask import Flask
Flask.run = functools.partialmethod(Flask.run, port=0)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
GUNICORN = [sys.executable, "-m", "gunicorn", "app:app", "--bind", "127.0.0.1:0"]
GUNICORN += ["--access-logfile", "-", "--worker-class"]
# How each kind of server is started, so that it finds a free port by itself and prints it. Workers
# are as small as can be, so that a stream which holds one shows.
COMMANDS = {
    "development": [sys.executable, "-m", "flask", "--app", "app", "run", "--port", "0"],
    "sync": [*GUNICORN, "sync"],
    "gthread": [*GUNICORN, "gthread", "--threads", "1"],
    "gevent": [*GUNICORN, "gevent"],
    "gthread-served": [*GUNICORN, "gthread", "--threads", "32"],
    "waitress": [sys.executable, "-c", WAITRESS],
    "sync-2": [*GUNICORN, "sync", "--workers", "2"],
    "gthread-2": [*GUNICORN, "gthread", "--workers", "2"],
    "script": [sys.executable, "-c", SCRIPT, "app.py"],
}
WORKERS = ["sync", "gthread", "gevent"]
DETACHING = ["development", *WORKERS]  # these hand out their connections
ADDRESS = re.compile(r"(?:Running on|Listening at:) https?://127\.0\.0\.1:(\d+)")
# What no log may hold, whatever clients do.
COMPLAINTS = re.compile("Traceback|Exception ignored|Error (on|handling) request|WORKER TIMEOUT")


class Process:
    """A program in a group of its own (workers, reloader), with its output in a file."""

    def __init__(self, command: list[str], folder: Path, **environ: str) -> None:
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group that can be killed whole
            )

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def wait_for_log(self, pattern: str | re.Pattern[str], times: int = 1) -> re.Match[str]:
        """Wait until something like ``pattern`` is in the log, so many times; return the last."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            running = self.process.poll() is None
            found[:] = re.finditer(pattern, self.log())
            if len(found) < times and not running:
                pytest.fail(f"it ended with {self.process.returncode}:\n{self.log()}")
            return len(found) >= times

        wait_until(look, f"{pattern} in the log")
        return found[-1]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, wait until it has ended, and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(TIMEOUT)

    def signal_all(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait(TIMEOUT)


class Refusal(Exception):
    """A request was answered with a status of 400 or more."""


class Server(Process):
    """A server that runs an app, with the clients and bouncers that a test has there."""

    def __init__(self, kind: str, command: list[str], folder: Path, **environ: str) -> None:
        super().__init__(command, folder, **environ)
        self.kind = kind
        self.detaches = kind not in ("gthread-served", "waitress")
        self.clients: list[Client] = []
        self.bouncers: list[Remote] = []
        self.port = 0  # found by who starts it
        self._looked_through = 0  # how much of the log

    def clear(self) -> None:
        """End what a test has here, and look at the log."""
        while self.clients:
            self.clients.pop().close()
        while self.bouncers:
            self.bouncers.pop().close()
        assert "" == self.complaints()

    def complaints(self) -> str:
        """Return the log since the last call, from a traceback or the like on."""
        log = self.log()
        new, self._looked_through = log[self._looked_through :], len(log)
        found = COMPLAINTS.search(new)
        return new[found.start() :] if found else ""

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

    def client(self, path: str, port: int = 0, **options: Any) -> Client:
        """Send a request for a stream; its client leaves with the test."""
        self.clients.append(Client(port or self.port, path, **options))
        return self.clients[-1]

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        """Make an ordinary request, ``bytes`` as they are, all else as JSON; return its JSON, or
        its text if it is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
        if response.status >= 400:
            raise Refusal(response.status, text)
        is_json = response.getheader("Content-Type") == "application/json"
        return json.loads(text) if is_json else text

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def post(self, path: str, body: object = None, **headers: str) -> Any:
        return self.request("POST", path, body, **headers)


class Remote:
    """A bouncer of one test's own, in a server that tests share."""

    _numbers = itertools.count()

    def __init__(self, server: Server, port: int = 0, **options: Any) -> None:
        """Detached streams get no heartbeats: what is noticed there is noticed by itself."""
        self.server, self.port = server, port
        defaults: dict[str, Any] = {
            "name": next(self._numbers),
            "heartbeat": None if server.detaches else 0.1,
        }
        if server.kind == "gthread-served":
            defaults["detach"] = False
        self.name = json.dumps({**defaults, **options})
        server.bouncers.append(self)

    def url(self, path: str, **query: object) -> str:
        return f"{path}?{urlencode({'bouncer': self.name, **query}, doseq=True)}"

    def do(self, code: str, **names: object) -> Any:
        """Return what a Python expression comes to in the server."""
        return self.server.post(self.url("/do"), [code, names])

    def request(self, *channels: str, query: Any = None, **options: Any) -> Client:
        """Send a request for a stream, and wait for nothing."""
        url = self.url("/subscribe", **{"channel": channels, **(query or {})})
        return self.server.client(url, self.port, **options)

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

    def burst(self, count: int, size: int = 0, first: int = 0) -> None:
        """Broadcast numbers in a loop, each of so many characters."""
        code = "[bouncer.broadcast(str(number).rjust(size)) for number in range(first, end)]"
        self.do(code, first=first, end=first + count, size=size)

    def disconnect(self, *channels: str) -> None:
        self.do("bouncer.disconnect(*channels)", channels=channels)

    def close(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server has ended
            self.do("bouncer.close()")

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = self.do("bouncer.stats()")
        return stats

    def wait_for(self, **counts: int) -> None:
        """Wait until the bouncer's stats have these in them."""
        wait_until(lambda: counts.items() <= self.stats().items(), f"{counts} in its stats")


@contextlib.contextmanager
def serve(kind: str, folder: Path, *options: str, app: str = APP, **env: str) -> Iterator[Server]:
    """Run a server with ``app`` as its module. A traceback in its log fails the test."""
    command = [*COMMANDS[kind], *options]
    need(*{"gunicorn", "gevent", "packaging", "waitress"} & {*command, kind})
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(app, "utf-8")
    if "gunicorn" in command and tuple(map(int, version("gunicorn").split(".")[:2])) >= (25, 1):
        command.append("--no-control-socket")  # one in the home folder, that servers would share
    server = Server(kind, command, folder, **env)
    try:
        server.port = int(server.wait_for_log(ADDRESS)[1])
        yield server
        server.clear()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server of each kind, with each app, once in a run."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:  # what MANY streams take, here and in a server
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3 * MANY)), hard))
    with contextlib.ExitStack() as stack:
        yield functools.cache(
            lambda kind, app=APP: stack.enter_context(
                serve(kind, tmp_path_factory.mktemp(kind), app=app)
            )
        )


@pytest.fixture(params=[*DETACHING, "gthread-served", "waitress"])
def server(request: pytest.FixtureRequest, servers: Callable[..., Server]) -> Iterator[Server]:
    """A server of each kind, which other tests use too: what a test has there ends with it."""
    server = servers(request.param)
    yield server
    server.clear()


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run the test on these kinds of server only."""
    return pytest.mark.parametrize("server", kinds, indirect=True)


detaching = on(*DETACHING)
development = on("development")
MANY = 1_000  # streams


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Keep a port for a server that cannot find one by itself: bound, but not listened at.

    Nobody else is given it, while a server that sets SO_REUSEADDR, as all do, can have it.
    """
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


def answer(view: Callable[[], Any], **request: Any) -> bytes:
    """Return the whole body that the test client is sent."""
    with app_of(view).test_client().get("/", **request) as response:
        data: bytes = response.data
        return data


# =================================================================================================
# WIRE FORMAT
# =================================================================================================

NO_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029"  # str.splitlines() thinks otherwise
# What is given to format_sse, what is sent, and what a browser makes of it.
FRAMES: list[tuple[dict[str, Any], str, list[Event]]] = [
    # fields
    ({"data": "hi"}, "data: hi\n\n", [Event("hi")]),
    ({"data": "hi", "event": "greet"}, "event: greet\ndata: hi\n\n", [Event("hi", "greet")]),
    ({"data": "hi", "id": "7"}, "id: 7\ndata: hi\n\n", [Event("hi", id="7")]),
    ({"data": "hi", "id": 0}, "id: 0\ndata: hi\n\n", [Event("hi", id="0")]),
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
    ({"retry": 1500}, "retry: 1500\n\n", []),
    ({"event": "greet"}, "event: greet\n\n", []),
    # line ends
    ({"data": "a\rb\r\nc"}, "data: a\ndata: b\ndata: c\n\n", [Event("a\nb\nc")]),
    ({"data": "a\n\rb"}, "data: a\ndata: \ndata: b\n\n", [Event("a\n\nb")]),
    ({"data": ""}, "data: \n\n", [Event("")]),
    ({"data": "\nx\n\n"}, "data: \ndata: x\ndata: \ndata: \n\n", [Event("\nx\n\n")]),
    ({"comment": "a\nb\r\nc\rdata: d"}, ": a\n: b\n: c\n: data: d\n\n", []),
    ({"data": NO_ENDS}, f"data: {NO_ENDS}\n\n", [Event(NO_ENDS)]),
    # what a client strips, and what only looks like it
    ({"data": "  x "}, "data:   x \n\n", [Event("  x ")]),
    ({"data": "\tx"}, "data: \tx\n\n", [Event("\tx")]),
    ({"data": "\ufeffx\0"}, "data: \ufeffx\0\n\n", [Event("\ufeffx\0")]),
    ({"data": "grüß 😀"}, "data: grüß 😀\n\n", [Event("grüß 😀")]),
    # text that looks like protocol is text
    ({"data": ":x"}, "data: :x\n\n", [Event(":x")]),
    ({"data": "a\nevent: evil"}, "data: a\ndata: event: evil\n\n", [Event("a\nevent: evil")]),
    ({"data": "data: x\n\n"}, "data: data: x\ndata: \ndata: \n\n", [Event("data: x\n\n")]),
    ({"data": "x", "id": " 7"}, "id:  7\ndata: x\n\n", [Event("x", id=" 7")]),
    # what is not text
    ({"data": b"gr\xc3\xbc\xc3\x9f\r\n"}, "data: grüß\ndata: \n\n", [Event("grüß\n")]),
    ({"data": bytearray(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": memoryview(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": {"n": "a\nb"}}, 'data: {"n": "a\\nb"}\n\n', [Event('{"n": "a\\nb"}')]),
    ({"data": 0}, "data: 0\n\n", [Event("0")]),
    ({"data": False}, "data: false\n\n", [Event("false")]),
]


@pytest.mark.parametrize(("given", "sent", "read"), FRAMES)
def test_wire_to_the_byte_and_read_back(given: Any, sent: str, read: list[Event]) -> None:
    """A client reads the same whether the frame comes whole or byte by byte."""
    frame, bytewise = format_sse(**given), Parser()
    assert (sent, Frame) == (str(frame), type(frame))
    by_bytes = [event for n in frame.encode() for event in bytewise.feed(bytes([n]))]
    assert [read, read] == [parse(frame.encode()), by_bytes]


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


DAY = datetime.date(2030, 1, 2)


def test_wire_json_is_the_same_in_and_out_of_a_request() -> None:
    """Dates, UUIDs and decimals are written as in jsonify, and by the app's own provider."""

    class Provider(flask.json.provider.DefaultJSONProvider):
        def dumps(self, obj: Any, **kwargs: Any) -> str:
            return '"by the app"'

    given = {"date": DAY, "uuid": uuid.UUID(int=7), "price": decimal.Decimal("1.10")}
    outside = json.loads(datas([format_sse(given)])[0])
    app = flask.Flask("test")
    with app.app_context():
        assert outside == json.loads(datas([format_sse(given)])[0])
        assert outside == flask.json.loads(flask.jsonify(given).data)
        app.json = Provider(app)
        assert 'data: "by the app"\n\n' == format_sse(given)


@pytest.mark.parametrize("text", ["data: x\n\n", "data: x\r\n\r\n", "data: x\r\r", ": x\n\r\n"])
def test_wire_frame_passes_unchanged(text: str) -> None:
    """Also one that somebody wrote by hand."""
    frame = Frame(text)
    assert format_sse(frame) is frame
    assert text == frame


def circular() -> list[object]:
    """A list that holds itself, which JSON cannot say."""
    items: list[object] = []
    items.append(items)
    return items


BOUNCER: Any = EventBouncer()
FRAME = format_sse("x")
with_data, broadcast_x = (functools.partial(f, "x") for f in (format_sse, BOUNCER.broadcast))
# Everything the public API refuses: a function, an argument of it (by its name in the function, or
# after a space by that in the message), the error, and values.
REFUSED: list[tuple[Any, str, type[Exception], list[Any]]] = [
    (format_sse, "data", ValueError, [None, b"\xff", "\ud800", math.nan, [math.inf], circular()]),
    (format_sse, "data", TypeError, [{1, 2}, object()]),
    (with_data, "event", ValueError, ["a\nb", "a\rdata: x", "\0", "\ud800"]),
    (with_data, "event", TypeError, [5, b"a"]),
    (with_data, "id", ValueError, ["1\n\nx", "1\r", "1\0", "\udfff"]),
    (with_data, "id", TypeError, [1.5, True]),
    (with_data, "retry", ValueError, [-1]),
    (with_data, "retry", TypeError, [True, "9", 1.5]),
    (with_data, "comment", ValueError, ["\ud800"]),
    (with_data, "comment", TypeError, [5]),
    (functools.partial(format_sse, event="x"), "data", ValueError, [FRAME]),
    (functools.partial(format_sse, id=1), "data", ValueError, [FRAME]),
    (functools.partial(format_sse, retry=1), "data", ValueError, [FRAME]),
    (functools.partial(format_sse, comment="x"), "data", ValueError, [FRAME]),
    (Frame, "text frame", ValueError, ["data: x\n", "data: x\r\n", "", "data: \ud800\n\n"]),
    (Frame, "text frame", TypeError, [b"data: x\n\n"]),
    (EventBouncer, "maxsize", ValueError, [0, -1]),
    (EventBouncer, "maxsize", TypeError, [True, None, 1.5]),
    (EventBouncer, "history", ValueError, [-1]),
    (EventBouncer, "history", TypeError, [True, None]),
    (EventBouncer, "heartbeat", ValueError, [0, -1, math.nan, math.inf, 86_401, 1e9]),
    (EventBouncer, "heartbeat", TypeError, [True, "1"]),
    (EventBouncer, "retry", ValueError, [-1, (2, 1), (1,)]),
    (EventBouncer, "retry", TypeError, [True, 1.5]),
    (EventBouncer, "max_subscribers", ValueError, [0]),
    (EventBouncer, "max_subscribers", TypeError, [True]),
    (EventBouncer, "relay", TypeError, ["redis://localhost"]),
    (BOUNCER.subscribe, " channel", ValueError, ["", "\ud800"]),
    (BOUNCER.subscribe, " channel", TypeError, [5, ["a"]]),
    (BOUNCER.subscribe, "last_event_id", TypeError, [5]),
    (BOUNCER.broadcast, "msg data", ValueError, [None, math.nan]),
    (broadcast_x, "event", ValueError, ["a\nb"]),
    (broadcast_x, "id", ValueError, ["\n"]),
    (broadcast_x, "retry", ValueError, [-1]),
    (broadcast_x, "channel", ValueError, [""]),
    (broadcast_x, "channel", TypeError, [5, ["a", "b"]]),
    (functools.partial(BOUNCER.broadcast, event="x"), "msg data", ValueError, [FRAME]),
    (BOUNCER.disconnect, " channel", ValueError, [""]),
    (BOUNCER.disconnect, " channel", TypeError, [5]),
    (BOUNCER.unsubscribe, "subscription", TypeError, ["x"]),
    (BOUNCER.unsubscribe, "subscription", ValueError, [EventBouncer().subscribe()]),
    (BOUNCER.subscribe().get, "timeout", ValueError, [-1, math.nan]),
    (sse_response, "source", TypeError, ["data", b"data", {"n": 1}, 5, None]),
    (functools.partial(sse_response, []), "status", TypeError, [True]),
    (functools.partial(sse_response, []), "status", ValueError, [100]),
    (RedisRelay, "client", TypeError, ["redis://localhost", None]),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_input_is_refused(number: int) -> None:
    """The message names the argument, states what was expected and shows what was given."""
    function, names, error, values = REFUSED[number]
    name, shown = names.split(" ") if " " in names else (names, names)
    for value in values:
        with pytest.raises(error) as caught:
            function(**{name: value}) if name else function(value)
        assert error is type(caught.value)
        given = re.escape(repr(value)[:40])
        assert re.match(f"{shown}: expected .+ got .*{given}", str(caught.value))


@pytest.mark.parametrize("header", ["connection", "Content-Length", "Transfer-Encoding", "Upgrade"])
def test_bad_input_of_headers_that_are_the_servers_own(header: str) -> None:
    for headers in ({header: "x"}, {"Content-Type": "text/html"}):
        with pytest.raises(ValueError, match="headers: expected .* got"):
            sse_response([], headers=headers)


def test_bad_input_of_several_channels_is_told_that_a_broadcast_goes_to_one() -> None:
    with pytest.raises(TypeError, match="one channel") as caught:
        BOUNCER.broadcast("x", channel=["a", "b"])
    assert "str(" not in str(caught.value)


def test_bad_input_reaches_nobody_and_is_shown_in_short() -> None:
    """A broadcast that is refused loses nothing of what others send, and ends nobody's stream."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe()
    bouncer.broadcast("before")
    for bad in (math.nan, "\ud800", None, {"key": ["x" * 10**6, object()]}):
        with pytest.raises((ValueError, TypeError)) as caught:
            bouncer.broadcast(bad)
        assert len(str(caught.value)) < 500
    bouncer.broadcast("after")
    assert ["before", "after"] == held(subscription)


# Streams as the standard's own examples and the web platform tests have them, and what is read:
# the tests' parser is tested too, since everything else believes it.
STREAMS: list[tuple[str, list[Event]]] = [
    ("data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
    (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third\n\n",
        [Event("first event", id="1"), Event("second event"), Event(" third")],
    ),
    ("data\n\ndata\ndata\n\ndata:", [Event(""), Event("\n")]),
    ("\ufeffdata: 1\n\n\ufeffdata: 2\n\ndata: 3\n\n", [Event("1"), Event("3")]),
    ("\ufeff\ufeffdata: 1\n\ndata: 2\n\n", [Event("2")]),
    ("data: a\rdata: b\r\ndata: c\n\r\ndata: d\r\r", [Event("a\nb\nc"), Event("d")]),
    ("Data: a\ndata : b\n data: c\nxdata: d\n\n", []),
    ("data: a\nid: 1\n\nid: 2\n\ndata: b\n\n", [Event("a", id="1"), Event("b", id="2")]),
    ("id: 1\n\nid: 2\0\ndata: a\n\n", [Event("a", id="1")]),
    ("event: x\n\ndata: a\n\n", [Event("a")]),
    ("event: x\ndata: a\n\nevent: x\nevent\ndata: b\n\n", [Event("a", "x"), Event("b")]),
    ("data: a\n\ndata: b\n", [Event("a")]),
]


@pytest.mark.parametrize(("stream", "expected"), STREAMS)
def test_parser_reads_as_the_standard_says(stream: str, expected: list[Event]) -> None:
    wire = stream.encode()
    for size in (1, 2, 3, 1000):
        parser = Parser()
        pieces = [wire[start : start + size] for start in range(0, len(wire), size)]
        assert expected == [event for piece in pieces for event in parser.feed(piece)]


# =================================================================================================
# RELAY: RedisRelay with a real Redis that is lost, trimmed, emptied and restored; and servers of
# several processes around it
# =================================================================================================


class Suspended:
    """A relay at a process that can be stopped before it reads."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self.publish, self.recent = relay.publish, relay.recent
        self.running = threading.Event()
        self.running.set()
        self._waits = False

    def read(self, after: str, timeout: float) -> Any:
        if not self.running.is_set():
            self._waits = True
            self.running.wait(TIMEOUT)
            self._waits = False
        return self._relay.read(after, 0.05)

    def suspend(self) -> None:
        self.running.clear()
        wait_until(lambda: self._waits, "it is suspended")


def relay_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "sse_bouncer relay"}


Bouncers = Callable[..., EventBouncer]


@pytest.fixture
def bouncers() -> Iterator[Bouncers]:
    """Makes bouncers with a relay, each as if in a process of its own; they end with the test."""
    made: list[EventBouncer] = []
    others = relay_threads()

    def make(relay: Any, **options: Any) -> EventBouncer:
        made.append(EventBouncer(**{"history": 100, "relay": relay, **options}))
        return made[-1]

    yield make
    for bouncer in made:
        bouncer.close()
        with contextlib.suppress(Exception):
            bouncer.broadcast("closed")  # wakes the reader, which then sees that it is over
    # Or what they log would be found in the next test.
    wait_until(lambda: relay_threads() <= others, "the readers end")


class Redis(Process):
    """A redis-server of our own that can be killed and started again."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.folder, self.port = folder, port
        self.url = f"redis://127.0.0.1:{port}"
        # A file over its limit shall be an error to Redis, as on a full disk, and not its end.
        self._command = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]
        self._command += [need_program("redis-server"), "--port", str(port), "--save", ""]
        self._command += ["--bind", "127.0.0.1", "--dir", str(folder), *options]
        self._clients: list[Any] = []
        self.start()

    def start(self) -> None:
        super().__init__(self._command, self.folder)
        self.wait_for_log("Ready to accept connections")

    def client(self, **options: Any) -> Any:
        """Return a client that does not try again by itself: its errors come promptly."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = {"port": self.port, "retry": Retry(NoBackoff(), 0), **options}
        self._clients.append(redis.Redis(**options))
        return self._clients[-1]

    def relay(self, key: str = "sse", maxlen: int = 10_000, **options: Any) -> RedisRelay:
        return RedisRelay(self.client(**options), key, maxlen)

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


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    name: str = request.node.name
    return name


ACL = "--user app on >secret ~* resetchannels -@all +eval +xadd +xrange +xrevrange +xread"
# What users pass to redis.Redis, and what the server is started with.
REDIS_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"decode_responses": True}, ""),
    ({"protocol": 2}, ""),
    ({"protocol": 3, "decode_responses": True}, ""),
    ({"password": "secret"}, "--requirepass secret"),
    ({"username": "app", "password": "secret"}, ACL),
]


@pytest.mark.parametrize(("options", "started_with"), REDIS_OPTIONS)
def test_redis_carries_anything_for_any_client(
    options: dict[str, Any], started_with: str, bouncers: Bouncers, new_redis: Any
) -> None:
    """Text of any kind, on channels of any name: live, and to who comes later."""
    redis = new_redis(*started_with.split())
    texts = ["a\nb", "", " x", "grüß 😀", "\0", "x\u2028y", "id: 7", "last"]
    one, two = (bouncers(redis.relay(**options)) for _ in range(2))
    start = one.last_event_id
    subscription, of_none = two.subscribe("grüß 😀"), two.subscribe()
    for text in texts:
        one.broadcast(text, channel="grüß 😀")
    one.broadcast("to all")
    live = next_events(subscription, len(texts) + 1)
    assert [*texts, "to all"] == [event.data for event in live]
    assert ["to all"] == next_datas(of_none, 1)
    late = bouncers(redis.relay(**options)).subscribe("grüß 😀", last_event_id=start)
    assert live == next_events(late, len(live))
    two.disconnect("grüß 😀")
    assert [] == datas(subscription)


def test_redis_wrong_key_type_and_password_are_said_in_its_own_words(
    bouncers: Bouncers, new_redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """To the publisher, and in the log of who reads."""
    redis = new_redis("--requirepass", "secret")
    import redis as package

    redis.client(password="secret").set("text", "a string")
    bouncer = bouncers(redis.relay("text", password="secret"))
    with pytest.raises(package.ResponseError, match="WRONGTYPE"):
        bouncer.broadcast("x")
    with pytest.raises(package.AuthenticationError):
        bouncers(redis.relay(password="wrong")).broadcast("x")
    bouncer.subscribe()
    (line,) = [message for message in caplog.messages if "cannot be read" in message]
    assert re.search("ResponseError.*WRONGTYPE", line)


def publish_when_back(bouncer: EventBouncer, message: str) -> None:
    """Broadcast once Redis takes it: connections of before it went are still to be found dead."""
    import redis

    def accepted() -> bool:
        with contextlib.suppress(redis.RedisError):
            bouncer.broadcast(message)
            return True
        return False

    wait_until(accepted, "Redis is back")


@pytest.mark.parametrize("fault", ["is killed", "hangs", "has a full disk"])
def test_redis_that_fails_raises_and_streams_go_on(
    fault: str, bouncers: Bouncers, new_redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: who publishes gets the client's own error, and what was accepted arrives once and in
    order, and nothing else but what was on its way. Streams of a process that starts meanwhile
    open, and are told of a gap. The log says once that the relay cannot be read, and why."""
    fsync = "always" if fault == "is killed" else "everysec"
    redis = new_redis("--appendonly", "yes", "--appendfsync", fsync)
    import resource

    publisher, process, *late = (bouncers(redis.relay(socket_timeout=0.5)) for _ in range(4))
    errors = {"is killed": "ConnectionError", "hangs": "TimeoutError"}
    ada, bob = process.subscribe("ada"), process.subscribe("bob")
    sent: list[str] = []
    for number in range(2):
        publisher.broadcast(f"before {number}", channel="bob")
        wait_until(lambda: bob.qsize(), "it arrives")
        if fault == "is killed":
            redis.kill()
        elif fault == "hangs":
            redis.signal_all(signal.SIGSTOP)
        else:
            limits = (1, resource.RLIM_INFINITY)
            resource.prlimit(redis.process.pid, resource.RLIMIT_FSIZE, limits)
        with pytest.raises(Exception, match=".") as caught:
            for count in itertools.count():
                publisher.broadcast(f"during {number}: {count}")
                sent.append(f"during {number}: {count}")
        assert errors.get(fault, "ResponseError") in [c.__name__ for c in type(caught.value).mro()]
        came = late[number].subscribe(last_event_id="1-1")
        if fault == "is killed":
            with pytest.raises(Exception, match="."):
                process.disconnect("ada")  # ends its streams here all the same
            assert (bob,) == process.subscribers
            wait_until(lambda: "cannot be read" in caplog.text, "the log says so")
            redis.start()
        elif fault == "hangs":
            redis.signal_all(signal.SIGCONT)
        else:
            limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(redis.process.pid, resource.RLIMIT_FSIZE, limits)
        publish_when_back(publisher, f"back {number}")
        received = [""]
        while received[-1] != f"back {number}":
            received += next_datas(bob, 1)
        unsure = f"during {number}: {len([t for t in sent if f'during {number}' in t])}"
        due = [t for t in sent if f"during {number}" in t] + [f"back {number}"]
        assert [f"before {number}", *due] == [t for t in received[1:] if t != unsure]
        assert fault == "has a full disk" or GAP in next_datas(came, 1)
    expected = 2 if fault == "is killed" else 0
    assert fault == "hangs" or expected <= caplog.text.count("cannot be read") <= 4 * expected
    assert fault != "is killed" or (datas(ada) == [] and "ConnectionError" in caplog.text)


def test_redis_client_that_is_ahead_of_its_process_waits(
    redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """It has seen at another process what this one has yet to read: no gap, and nothing twice."""
    relay = Suspended(redis.relay(key))
    behind, ahead = bouncers(relay), bouncers(redis.relay(key))
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


# What happens to the stream, and which events a process still gets that was suspended meanwhile.
LOSSES = {"trimmed": ["3"], "deleted": [], "flushed": [], "restarted empty": []}
# Or, of a process that has read everything before.
LOSSES |= {"restarted from an older copy": ["1", "2", "3"]}


@pytest.mark.parametrize("history", [0, 9])
def test_redis_disconnect_is_an_entry_that_all_processes_know(
    history: int, redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """Also one that has just started: who goes from one to another is told of no gap."""
    one = bouncers(redis.relay(key), history=history)
    subscription = one.subscribe("x")
    one.broadcast("a")
    one.disconnect("x")
    assert ["a"] == datas(subscription)
    other = bouncers(redis.relay(key), history=history)
    ids = one.last_event_id, other.last_event_id
    assert ids[0] == ids[1]
    gaps = [each.subscribe("x", last_event_id=ids[0]).gap for each in (one, other)]
    assert [False, False] == gaps


@pytest.mark.parametrize("loss", LOSSES)
def test_redis_loss_is_announced_by_exactly_one_gap(
    loss: str, bouncers: Bouncers, new_redis: Any
) -> None:
    """To every stream, and to who comes back from before it; what is left is delivered, once."""
    redis = new_redis()
    relay, client, left = Suspended(redis.relay()), redis.client(), LOSSES[loss]
    bouncer, publisher = bouncers(relay), bouncers(redis.relay())
    subscription, other = bouncer.subscribe(), bouncer.subscribe("x")
    publisher.broadcast("seen")
    (seen,) = next_events(subscription, 1)
    is_restarted = loss.startswith("restarted")
    if loss == "restarted from an older copy":
        client.save()
    else:
        relay.suspend()
    for number in (1, 2, 3):
        publisher.broadcast(number)
    received = next_events(subscription, 3) if relay.running.is_set() else []
    if is_restarted:
        redis.kill()
        redis.start()
    elif loss == "trimmed":
        client.xtrim("sse", maxlen=1, approximate=False)
    else:
        client.execute_command(*(["DEL", "sse"] if loss == "deleted" else ["FLUSHALL"]))
    relay.running.set()
    publish_when_back(publisher, "b")
    publisher.broadcast("c")
    expected = [*left, GAP, "b", "c"] if received else [GAP, *left, "b", "c"]
    received += next_events(subscription, len(expected) - len(received))
    assert expected == [data_of(event) for event in received]
    assert ["seen", *expected] == next_datas(other, len(expected) + 1)
    gap = expected.index(GAP)
    assert expected[gap + 1 :] == held(bouncer.subscribe(last_event_id=received[gap].id))
    # Who has been away since before the loss is told so too, though an older copy may have its id.
    assert expected[gap:] == held(bouncer.subscribe(last_event_id=seen.id))


def test_redis_keeps_about_maxlen_and_what_it_trimmed_is_a_gap(
    redis: Redis, key: str, bouncers: Bouncers
) -> None:
    client = redis.client(decode_responses=True)
    publisher = bouncers(redis.relay(key, maxlen=10))
    publisher.broadcast(0)
    first = client.xrange(key)[0][0]
    for number in range(1, 300):
        publisher.broadcast(number)
    kept = [id for id, _ in client.xrange(key)]
    assert 10 <= len(kept) < 300
    started = bouncers(redis.relay(key), history=1000)
    numbers = [str(number) for number in range(300 - len(kept), 300)]
    found = [held(started.subscribe(last_event_id=id)) for id in (first, kept[0], "earliest")]
    assert [[GAP, *numbers], numbers[1:], numbers] == found


# Fields of entries that someone else has added to the stream.
FOREIGN: list[dict[Any, Any]] = [{b"\xff": b"\xfe"}, {"frame": b"data: \xff\n\n"}]
FOREIGN += [{"frame": "data: no blank line"}, {"frame": "data: x\n\n", "after": "text"}]
FOREIGN += [{"channel": "", "frame": "data: x\n\n"}, {"frame": "x" * 100_000}]


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}])
def test_redis_skips_foreign_entries(
    options: Any, redis: Redis, key: str, bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """They are no events and no gap, live and in what a new process finds, and a line in the log
    each."""
    bouncer = bouncers(redis.relay(key, **options))
    start, subscription = bouncer.last_event_id, bouncer.subscribe()
    bouncer.broadcast("first")
    for fields in FOREIGN:
        redis.client().xadd(key, fields)
    bouncer.broadcast("last")
    assert ["first", "last"] == next_datas(subscription, 2)
    skipped = [message for message in caplog.messages if "not an event" in message]
    assert len(FOREIGN) == len(skipped)
    assert max(map(len, skipped)) < 500
    late = bouncers(redis.relay(key, **options)).subscribe(last_event_id=start)
    assert ["first", "last"] == held(late)


def hop(seed: int, processes: list[EventBouncer], channels: list[str], start: str) -> list[str]:
    """Read until "end", now here and now there; return the data seen, and gaps."""
    seen, last, rng = [""], start, random.Random(seed)
    while seen[-1] != "end":
        with contextlib.suppress(queue.Empty, Subscription.Ended):
            with rng.choice(processes).subscribe(*channels, last_event_id=last) as subscription:
                for _ in range(rng.choice([0, 1, 3, 20, 1000])):
                    (event,) = parse(subscription.get(timeout=0.05).encode())
                    seen.append(data_of(event))
                    last = event.id
    return seen[1:]


def test_redis_fuzz_clients_that_hop_between_processes(
    redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """While events flow each gets what is for it, once and in order, and no gap."""
    processes = [bouncers(redis.relay(key), history=1000 * FUZZ) for _ in range(3)]
    start, rng = processes[0].last_event_id or "", random.Random(7)
    kinds: list[list[str]] = [[], ["a"], ["b"], ["a", "b"]] * 2
    clients = [Task(hop, number, processes, kind, start) for number, kind in enumerate(kinds)]
    published: list[tuple[str, str | None]] = []
    for number in range(400 * FUZZ):
        published.append((str(number), rng.choice([None, None, "a", "b"])))
        rng.choice(processes).broadcast(number, channel=published[-1][1])
    processes[0].broadcast("end")
    for kind, task in zip(kinds, clients, strict=True):
        due = [data for data, channel in published if channel is None or channel in kind]
        assert [*due, "end"] == task.result()


def test_redis_idle_reader_waits_and_reads_nothing_again(
    new_redis: Any, bouncers: Bouncers, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even if the last entry has a megabyte, and not if its client takes silence for death."""
    redis = new_redis()
    bouncer, client = bouncers(redis.relay(socket_timeout=0.2)), redis.client()
    subscription = bouncer.subscribe()
    bouncer.broadcast("x" * 2**20)
    next_events(subscription, 1)

    def figures() -> tuple[int, int]:
        calls = client.info("commandstats")["cmdstat_xread"]["calls"]
        return int(calls), int(client.info("stats")["total_net_output_bytes"])

    calls, output = figures()
    wait_until(lambda: figures()[0] >= calls + 5, "it waits for something, and finds nothing")
    assert figures()[1] - output < 2**20
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


def test_redis_holds_one_connection_to_read_and_none_for_a_cron_job(
    redis: Redis, key: str, bouncers: Bouncers
) -> None:
    """However many subscribers; and that one publishes without Flask and without a thread."""
    bouncer = bouncers(redis.relay(key, client_name="counted"))
    subscriptions = [bouncer.subscribe("x") for _ in range(100)]
    bouncer.broadcast("a")
    assert ("True\n", "") == run_python(ONLY_PUBLISHES, redis.url, key)
    assert [["a", "from a cron job"]] * 100 == [next_datas(s, 2) for s in subscriptions]
    names = [client["name"] for client in redis.client().client_list()]
    assert 1 <= names.count("counted") <= 2


def test_redis_replica_that_lags_is_no_loss(bouncers: Bouncers, new_redis: Any) -> None:
    """Reads may go to one, as a cluster's do: there is just less to read, until it has all."""
    primary = new_redis("--repl-diskless-sync-delay", "0")
    replica = new_redis("--replicaof", f"127.0.0.1 {primary.port}")
    primary.wait_for_log("Synchronization with replica .* succeeded|Streamed replica")
    client = replica.client()

    class Divided:
        eval = primary.client().eval

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    bouncer = bouncers(RedisRelay(Divided()))
    subscription = bouncer.subscribe()
    bouncer.broadcast("a")
    (a,) = next_events(subscription, 1)
    replica.client().execute_command("REPLICAOF", "NO", "ONE")  # nothing reaches it now
    bouncer.broadcast("b")
    assert [] == held(bouncer.subscribe(last_event_id=a.id))
    replica.client().execute_command("REPLICAOF", "127.0.0.1", primary.port)
    assert ["b"] == next_datas(subscription, 1)


def test_redis_cluster_by_its_own_client(bouncers: Bouncers, new_redis: Any) -> None:
    with held_port() as bus:
        redis = new_redis("--cluster-enabled", "yes", "--cluster-port", str(bus))
    from redis import RedisCluster

    node = redis.client(decode_responses=True)
    node.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: node.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "a cluster")
    options: Any = {"host": "127.0.0.1", "port": redis.port, "socket_timeout": 0.5}
    with contextlib.ExitStack() as stack:
        clients: list[Any] = [RedisCluster(**options) for _ in range(3)]
        for client in clients:
            stack.callback(client.close)
        one, two, three = (bouncers(RedisRelay(client)) for client in clients)
        start = one.last_event_id
        subscription = two.subscribe("x")
        one.broadcast("a", channel="x")
        node.xadd("sse", {"frame": b"\xff"})
        one.broadcast("b")
        assert ["a", "b"] == next_datas(subscription, 2)
        assert ["a", "b"] == held(three.subscribe("x", last_event_id=start))
        for bouncer in (one, two, three):
            bouncer.close()


# -- Servers of several processes, with Redis between them, or without ----------------------------


class Fleet:
    """Two servers with two processes each, and one feed for all."""

    def __init__(self, servers: Callable[..., Server], redis: Redis, key: str) -> None:
        self.servers = [servers("sync-2"), servers("gthread-2")]
        options: Any = {"relay": [redis.url, key], "history": 10_000, "heartbeat": 0.1}
        self.bouncers = [Remote(server, **options) for server in self.servers]

    def spread(self, least: int, *channels: str) -> list[Client]:
        """Open streams until there are at least so many at each process."""
        clients: dict[str, list[Client]] = collections.defaultdict(list)

        def enough() -> bool:
            for bouncer in self.bouncers:
                client = bouncer.request(*channels).wait_opening()
                clients[dict(client.headers)["x-pid"]].append(client)
            processes = 2 * len(self.bouncers)
            return len(clients) == processes and all(len(c) >= least for c in clients.values())

        wait_until(enough, "streams at all processes")
        return list(itertools.chain.from_iterable(clients.values()))


@pytest.fixture
def fleet(servers: Callable[..., Server], redis: Redis, key: str) -> Iterator[Fleet]:
    fleet = Fleet(servers, redis, key)
    yield fleet
    for server in fleet.servers:
        server.clear()


def test_processes_all_agree_and_a_logout_is_for_all(fleet: Fleet) -> None:
    """Every client gets every event once, all the same ids in the same order, whoever published."""
    clients, (one, two) = fleet.spread(3, "user-ada"), fleet.bouncers
    bob = one.request("user-bob").wait_opening()
    readers = [Task(client.events, 100) for client in clients]

    def publish(bouncer: Remote) -> None:
        for number in range(50):
            bouncer.broadcast(number)

    for publisher in [Task(publish, bouncer) for bouncer in (one, two)]:
        publisher.result()
    order, *others = [reader.result() for reader in readers]
    assert [order] * len(others) == others
    assert are_increasing([event.id for event in order])
    assert Counter(str(number) for number in range(50) for _ in "ab") == Counter(
        e.data for e in order
    )
    two.disconnect("user-ada")
    assert [[]] * len(clients) == [client.wait_end() for client in clients]
    two.broadcast("still here", channel="user-bob")
    assert ["still here"] == bob.datas(101)[100:]


def test_processes_without_a_relay_are_warned_of_once_each(fleet: Fleet) -> None:
    """With the cure; those with a relay are not."""
    server = fleet.servers[1]
    before = server.log().count("several processes")
    fleet.spread(2)
    assert before == server.log().count("several processes")
    fleet.bouncers = [Remote(server)]
    fleet.spread(2)
    assert 2 == len(re.findall("several processes.*RedisRelay", server.log()))


def test_processes_serve_clients_that_hop_between_them(fleet: Fleet) -> None:
    """They miss nothing, get nothing twice and see no gap while events flow."""
    check_followed(fleet.bouncers, 16)


# =================================================================================================
# FAN-OUT: every event to every subscriber, in one order; and what one gets that comes back
# =================================================================================================


def test_fan_out_gives_all_subscribers_the_same_frame() -> None:
    """It is formatted once, however many they are; what came before they did is not there."""
    bouncer = EventBouncer()
    bouncer.broadcast("before")
    first, second = bouncer.subscribe(), bouncer.subscribe()
    bouncer.broadcast({"n": 1}, "greet", id=5, retry=7)
    frame = first.get_nowait()
    assert second.get_nowait() is frame
    assert format_sse({"n": 1}, "greet", id=5, retry=7) == frame
    bouncer.broadcast(msg=frame)
    assert first.get_nowait() is frame


def test_fan_out_full_is_dropped_at_once_and_ends_with_what_it_holds() -> None:
    """Also one that nobody will ever read: of a view that failed, and whose traceback is kept."""
    bouncer, kept = EventBouncer(maxsize=2), list[Any]()

    def view() -> Any:
        kept.append(bouncer.subscribe())
        raise LookupError

    assert 500 == app_of(view).test_client().get("/").status_code
    slow, quick, read = bouncer.subscribe(), bouncer.subscribe(), []
    for number in range(5):
        bouncer.broadcast(number)
        read.append(quick.get_nowait())
        assert {quick, *([slow, kept[0]] if number < 2 else [])} == set(bouncer.subscribers)
    assert [["0", "1"], [*"01234"]] == [datas(slow), datas(read)]
    expected = {"subscribers": 1, "detached": 0, "broadcasts": 5, "dropped": 2, "refused": 0}
    assert expected == bouncer.stats()


def test_fan_out_a_burst_drops_nobody_who_keeps_up() -> None:
    """A thousand broadcasts in a loop at the default maxsize reach twenty reading threads."""
    bouncer = EventBouncer()
    readers = [Task(datas, bouncer.subscribe()) for _ in range(20)]
    for number in range(1000):
        bouncer.broadcast(number)
    bouncer.close()
    assert [list(map(str, range(1000)))] * 20 == [reader.result() for reader in readers]


@pytest.mark.parametrize(("publishers", "maxsize"), [(8, 16), (16, 4)])
def test_fan_out_racing_publishers_drop_nobody_who_keeps_up(publishers: int, maxsize: int) -> None:
    """A queue that was emptied has kept up, though another publisher has filled it since."""
    bouncer = EventBouncer(maxsize)
    readers = [Task(datas, bouncer.subscribe()) for _ in range(20)]

    def publish() -> None:
        for number in range(100):
            bouncer.broadcast(number)

    for publisher in [Task(publish) for _ in range(publishers)]:
        publisher.result()
    bouncer.close()
    assert [100 * publishers] * 20 == [len(reader.result()) for reader in readers]
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

    reader = Task(read)
    while not bouncer.stats()["dropped"]:
        bouncer.broadcast("x")
    reader.result()


@pytest.mark.parametrize("maxsize", [2, 100_000])
def test_fan_out_one_order_for_racing_publishers_and_subscribers(maxsize: int) -> None:
    """Each sees every publisher's events in order, and all, if it is not dropped; passers-by see
    an unbroken piece of that order, to the last frame that they hold."""
    bouncer, start = EventBouncer(maxsize), threading.Barrier(20)

    def publish(who: int) -> None:
        start.wait(TIMEOUT)
        for number in range(100):
            bouncer.broadcast([who, number])

    def pass_by() -> list[str]:
        start.wait(TIMEOUT)
        try:
            subscription = bouncer.subscribe()
        except EventBouncer.Refused:  # on a busy machine all is over before it comes
            return []
        with subscription:
            frames = list(itertools.islice(subscription, 7))
        return datas(frames + list(subscription))

    readers = [Task(datas, bouncer.subscribe()) for _ in range(10)]
    passers_by = [Task(pass_by) for _ in range(10)]
    for publisher in [Task(publish, who) for who in range(10)]:
        publisher.result()
    bouncer.close()
    orders = sorted((reader.result() for reader in readers), key=len)
    longest = orders[-1]
    assert [longest[: len(order)] for order in orders] == orders
    for who in range(10):
        own = [data for data in longest if data.startswith(f"[{who},")]
        assert [f"[{who}, {number}]" for number in range(len(own))] == own
    visits = [task.result() for task in passers_by]
    if maxsize > 2:
        assert 1000 == len(longest) == len(orders[0])
        position = {data: index for index, data in enumerate(longest)}
        for visit in filter(None, visits):
            first = position[visit[0]]
            assert longest[first : first + len(visit)] == visit
    assert ((), 0) == (bouncer.subscribers, bouncer.stats()["subscribers"])


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


CLOSED_BY_A_SIGNAL = """
import signal, sys
from sse_bouncer import EventBouncer
for _ in range(100):
    bouncer = EventBouncer(history=5, maxsize=100)
    subscriptions = [bouncer.subscribe() for _ in range(20)]
    signal.signal(signal.SIGALRM, lambda *_: bouncer.close())
    signal.setitimer(signal.ITIMER_REAL, 0.0005)
    while bouncer.subscribers:
        bouncer.broadcast("x")
        for subscription in subscriptions:
            subscription.qsize() and subscription.get_nowait()
    try:
        bouncer.subscribe()
    except EventBouncer.Refused:
        continue
    sys.exit("not closed")
print("closed")
"""


def test_fan_out_a_signal_handler_may_close_in_the_middle_of_anything() -> None:
    assert ("closed\n", "") == run_python(CLOSED_BY_A_SIGNAL)


def test_subscription_is_the_reading_half_of_a_queue() -> None:
    """It leaves with its block, and keeps what it holds."""
    bouncer = EventBouncer(maxsize=2)
    with bouncer.subscribe("a", "b") as subscription:

        def state() -> tuple[object, ...]:
            return subscription.qsize(), subscription.empty(), subscription.full()

        assert (0, True, False) == state()
        for block, timeout in ((False, None), (True, 0), (True, 0.001)):
            with pytest.raises(queue.Empty):
                subscription.get(block, timeout)
        bouncer.broadcast("x")
        assert (1, False, False) == state()
        bouncer.broadcast("y")
        assert (2, False, True) == state()
        assert (2, ("a", "b")) == (subscription.maxsize, subscription.channels)
        assert "data: x\n\n" == subscription.get(timeout=1)
    assert ((), ["y"]) == (bouncer.subscribers, datas(subscription))


def test_subscription_that_nobody_refers_to_is_gone() -> None:
    """As in a view's own ``while True: yield messages.get()`` that is closed in the middle."""
    bouncer = EventBouncer()

    def stream() -> collections.abc.Generator[Frame]:
        messages = bouncer.subscribe()
        while True:
            yield messages.get()

    generator = stream()
    reader = Task(next, generator).wait_until_blocked()
    bouncer.broadcast("hi")
    assert "data: hi\n\n" == reader.result()
    del reader
    generator.close()
    gc.collect()
    assert ((), 0) == (bouncer.subscribers, bouncer.stats()["subscribers"])


def test_fan_out_fuzz_does_what_a_small_model_does() -> None:
    """Whatever is done in whatever order, against a model that keeps everything in lists."""
    need("hypothesis")
    from hypothesis import stateful
    from hypothesis import strategies as st

    class Reader:
        def __init__(self, real: Subscription, channels: list[str]) -> None:
            self.real, self.channels = real, channels
            self.held: list[tuple[str, str]] = []  # data and id
            self.replayed = 0  # how many of them do not count
            self.last: str | None = None
            self.is_open = True

        def wants(self, channel: str | None) -> bool:
            return channel is None or channel in self.channels

    channels = st.lists(st.sampled_from("ab"), max_size=2)
    lasts = st.sampled_from([None, None, "earliest", "1-1", f"{10**19}-0"])

    class Machine(stateful.RuleBasedStateMachine):
        readers: Any = stateful.Bundle("readers")

        def __init__(self) -> None:
            super().__init__()
            self.size, self.kept, self.is_closed = 2, 3, False
            self.bouncer = EventBouncer(self.size, history=self.kept)
            self.start = self.bouncer.last_event_id or ""
            self.events: list[tuple[str, str, str | None]] = []  # data, id, channel: all there were
            self.model: list[Reader] = []

        @stateful.rule(target=readers, channels=channels, last=lasts)
        def come(self, channels: list[str], last: str | None) -> Any:
            if self.is_closed:
                with pytest.raises(EventBouncer.Refused):
                    self.bouncer.subscribe(*channels, last_event_id=last)
                return stateful.multiple()
            reader = Reader(self.bouncer.subscribe(*channels, last_event_id=last), channels)
            ids = [self.start, *(id for _, id, _ in self.events)]
            mine = [place for place, event in enumerate(self.events) if reader.wants(event[2])]
            oldest = max(0, len(self.events) - self.kept)  # the first place that is kept
            missed = [place for place in mine if place >= oldest]
            gap = last not in (None, "earliest", *ids)
            if last is None:
                missed = []
            elif last in ids:
                seen = ids.index(last)  # how many events it has seen
                gap = any(seen <= place < oldest for place in mine)
                missed = missed if gap else [place for place in missed if place >= seen]
            assert gap == reader.real.gap
            if gap:
                before = [ids[place + 1] for place in mine if place < oldest]
                reader.held.append((GAP, before[-1] if before else self.start))
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
            id = self.bouncer.last_event_id or ""
            self.events.append((data, id, channel))
            for reader in self.model:
                if reader.is_open and reader.wants(channel):
                    reader.is_open = len(reader.held) - reader.replayed < self.size
                    reader.held += [(data, id)] * reader.is_open

        @stateful.rule(reader=readers)
        def read(self, reader: Reader) -> None:
            if not reader.held:
                with pytest.raises(queue.Empty if reader.is_open else Subscription.Ended):
                    reader.real.get_nowait()
                return
            (event,) = parse(reader.real.get_nowait().encode())
            assert reader.held.pop(0) == (data_of(event), event.id)
            reader.replayed = max(0, reader.replayed - 1)
            reader.last = event.id

        @stateful.rule(reader=readers)
        def unsubscribe(self, reader: Reader) -> None:
            self.bouncer.unsubscribe(reader.real)
            reader.is_open = False

        @stateful.rule(channel=st.sampled_from("ab"))
        def disconnect(self, channel: str) -> None:
            self.bouncer.disconnect(channel)
            for reader in self.model:
                reader.is_open = reader.is_open and channel not in reader.channels

        @stateful.rule(rarely=st.integers(0, 9))
        def close(self, rarely: int) -> None:
            if rarely == 0:
                self.bouncer.close()
                self.is_closed = True
                for reader in self.model:
                    reader.is_open = False

        @stateful.invariant()
        def agree(self) -> None:
            live = {reader.real for reader in self.model if reader.is_open}
            assert live == set(self.bouncer.subscribers)
            for reader in self.model:
                assert len(reader.held) == reader.real.qsize()

    stateful.run_state_machine_as_test(Machine, settings=fuzz(60, stateful_step_count=30))


@pytest.fixture(params=["memory", "redis"])
def feed(request: pytest.FixtureRequest, bouncers: Bouncers, key: str) -> Bouncers:
    """Makes a bouncer that keeps its events by itself, or a process with a relay."""
    if request.param == "memory":
        return functools.partial(bouncers, None)
    return functools.partial(bouncers, request.getfixturevalue("redis").relay(key))


def ids_of(bouncer: EventBouncer, *messages: object) -> list[str]:
    """Broadcast; return the events' ids."""
    ids = []
    with bouncer.subscribe() as subscription:
        for message in messages:
            bouncer.broadcast(message)
            ids.append(next_events(subscription, 1)[0].id)
    return ids


def test_history_numbers_events(feed: Bouncers) -> None:
    """Ids increase from the bouncer's first; nothing else of an event is changed."""
    bouncer = feed(history=1)
    start, subscription = bouncer.last_event_id or "", bouncer.subscribe()
    bouncer.broadcast("a\nb", "greet", retry=7)
    frame = subscription.get(timeout=TIMEOUT)
    id = bouncer.last_event_id or ""
    assert f"id: {id}\n" + format_sse("a\nb", "greet", retry=7) == frame
    assert are_increasing([start, id, *ids_of(bouncer, "c", "d")])


def test_history_ids_increase_across_restarts_and_are_none_without_it() -> None:
    ids = ids_of(EventBouncer(history=1), *range(3000))
    restarted, without = EventBouncer(history=1), EventBouncer()
    assert are_increasing([ids[-1], restarted.last_event_id or "", *ids_of(restarted, "a")])
    without.broadcast("missed")
    subscription = without.subscribe(last_event_id="1-1")
    without.broadcast("a")
    assert (None, False) == (without.last_event_id, subscription.gap)
    assert "data: a\n\n" == subscription.get()


# How many events are kept, how many there were, after which of them a client comes back (0 is
# before the first), which of them it gets, and whether it has to be told of a gap: exactly when
# one that it has not seen is kept no more.
RESUMES: list[tuple[int, int, int, list[int], bool]] = [
    (3, 0, 0, [], False),
    (3, 2, 0, [1, 2], False),
    (3, 2, 2, [], False),
    (3, 3, 0, [1, 2, 3], False),
    (3, 4, 0, [2, 3, 4], True),
    (3, 4, 1, [2, 3, 4], False),
    (3, 9, 6, [7, 8, 9], False),
    (3, 9, 5, [7, 8, 9], True),
    (1, 2, 1, [2], False),
    (1, 2, 0, [2], True),
]


@pytest.mark.parametrize(("history", "count", "after", "missed", "gap"), RESUMES)
def test_history_replays_what_was_missed(
    feed: Bouncers, history: int, count: int, after: int, missed: list[int], gap: bool
) -> None:
    """In order, then the live stream; from memory, and at a process just started with a relay."""
    bouncer = feed(history=history)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(1, count + 1))]
    started = feed(history=history) if bouncer.relay else bouncer
    subscription = started.subscribe(last_event_id=ids[after])
    started.broadcast("live")
    expected = [*[GAP] * gap, *map(str, missed), "live"]
    assert (expected, gap) == (next_datas(subscription, len(expected)), subscription.gap)


def test_history_id_of_another_process_is_a_gap(feed: Bouncers) -> None:
    """An id of the past, or of a future that never was: the client gets all there is."""
    bouncer = feed(history=3)
    ids_of(bouncer, *range(5))
    for id in ("0-1", "1-1", "99999999999999-0"):
        assert [GAP, "2", "3", "4"] == held(bouncer.subscribe(last_event_id=id))


def test_history_of_more_channels_than_it_remembers_errs_on_the_side_of_a_gap() -> None:
    bouncer = EventBouncer(history=1)
    start = bouncer.last_event_id
    for number in range(10_100):
        bouncer.broadcast("x", channel=str(number))
    assert bouncer.subscribe("another", last_event_id=start).gap
    assert not bouncer.subscribe("another", last_event_id=bouncer.last_event_id).gap


# Whoever gives the bouncer ids of their own would break those that clients come back with.
OWN_IDS = [format_sse("x", id="7"), Frame("id\ndata: x\n\n"), Frame("data: x\r\nid:7\r\n\r\n")]


def test_history_refuses_ids_that_are_not_its_own(feed: Bouncers) -> None:
    """They reach nobody, now or later; text that only looks like one does."""
    bouncer = feed(history=9)
    start = bouncer.last_event_id
    for message in [*OWN_IDS, "x"]:
        with pytest.raises(ValueError, match="id: expected none .* got .*; leave"):
            bouncer.broadcast(message, id=None if message in OWN_IDS else "")
    ids_of(bouncer, "x\nid: 7", "id: 7")
    assert ["x\nid: 7", "id: 7"] == held(bouncer.subscribe(last_event_id=start))


def test_history_fuzz_any_last_event_id() -> None:
    """Random texts, many of them nearly ids: what is one by hand's reckoning is replayed from."""
    need("hypothesis")
    from hypothesis import example, given
    from hypothesis import strategies as st

    bouncer = EventBouncer(history=20)
    ids = [bouncer.last_event_id or "", *ids_of(bouncer, *range(50))]
    values, digits = [id_value(id) for id in ids], set("0123456789")
    pieces = st.sampled_from(["-", "0", "٣", "１", "²", " ", "\n", "+", "\ud800", "_"])
    garbled = st.tuples(st.sampled_from(ids), st.integers(0, 30), pieces, st.integers(0, 1)).map(
        lambda it: it[0][: it[1]] + it[2] + it[0][it[1] + it[3] :]
    )
    numbers = st.tuples(st.integers(0, 10**22), st.integers(0, 99)).map("{0[0]}-{0[1]}".format)

    @example("1" * 100_000)
    @example("1-" * 50_000)
    @example("9" * 21 + "-1")
    @given(st.sampled_from(ids) | garbled | numbers | st.text())
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
# =================================================================================================


def test_hub_sends_events_in_order_and_to_the_byte(server: Server) -> None:
    """In any server the headers come at once, heartbeats while nothing happens, a proper end."""
    bouncer = Remote(server, retry=1234)
    beats = Remote(server, heartbeat=0.05).client().wait_opening()
    client = bouncer.client("ada").wait_opening()
    assert HEADERS.items() <= dict(client.headers).items()
    names = [name for name, _ in client.headers if name != "set-cookie"]
    assert (200, sorted(set(names))) == (client.head.status, sorted(names))
    rows = [row for row in FRAMES if {"data"} == set(row[0]) and isinstance(row[0]["data"], str)]
    bouncer.broadcast(*[given["data"] for given, _, _ in rows][:16])
    bouncer.disconnect("ada")
    assert [event.data for _, _, read in rows[:16] for event in read] == client.wait_end()
    sent = "".join(["retry: 1234\n", *[sent for _, sent, _ in rows[:16]]]).encode()
    assert (True, sent) == (client.whole, bytes(client.body.replace(b":\n", b""))) or b":\n" in sent
    beats.wait_for_body(b":\n" * 3)


LEAVES: dict[str, Callable[[Client], None]]
LEAVES = {"close": Client.close, "reset": Client.reset, "half-close": Client.half_close}


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_hub_notices_who_left_and_keeps_no_descriptor(server: Server, leave: str) -> None:
    """At the next heartbeat at the latest, whether it had read anything or not."""
    bouncer, before = Remote(server, heartbeat=0.05), list[int]()
    for number in range(4):
        client = bouncer.client()
        if number % 2:
            client.wait_opening()
        LEAVES[leave](client)
        bouncer.wait_for(subscribers=0)
        before = before or [server.count("fd")]  # with what the first stream ever has set up
    wait_until(lambda: server.count("fd") <= before[0], "the descriptors are closed")


@detaching
@pytest.mark.parametrize("leave", LEAVES)
def test_hub_sees_a_client_leave_at_once(server: Server, leave: str) -> None:
    """There is no heartbeat, and no event, that would find out. One that hears still is told."""
    bouncer = Remote(server)
    client, other = bouncer.client(), bouncer.client()
    LEAVES[leave](client)
    bouncer.wait_for(subscribers=1)
    bouncer.broadcast("hi")
    assert ["hi"] == other.datas(1)
    assert leave != "half-close" or [] == client.wait_end()


@detaching
def test_hub_many_streams_hold_no_worker_and_leave_nothing(server: Server) -> None:
    """Beside 1,000 streams the only worker answers, and there is no thread more than with one.

    When they have left, there is nothing left of them; the access log has ordinary requests.
    """
    bouncer = Remote(server)
    bouncer.client().close()  # with what the first stream ever has set up
    bouncer.wait_for(subscribers=0)
    log, descriptors, threads = server.log(), server.count("fd"), server.count("task")
    clients = bouncer.streams(MANY)
    wait_until(lambda: server.count("task") <= threads, "the requests' threads end")
    bouncer.broadcast("hi")
    for client in clients:
        assert ["hi"] == client.datas(1)
        client.close()
    bouncer.wait_for(subscribers=0)
    wait_until(lambda: server.count("fd") <= descriptors, "the descriptors are closed")
    odd = re.compile(r'^(?!127\.0\.0\.1 - - \[[^]]*\] "(GET|POST) /\S* HTTP/1.1" 200 ).+\n', re.M)
    assert [] == odd.findall(server.log().removeprefix(log))


def test_hub_burst_drops_nobody_who_keeps_up(server: Server) -> None:
    """A route that broadcasts a thousand events in a loop loses no reader."""
    bouncer = Remote(server)
    readers = [Task(client.datas, 1000) for client in [bouncer.client() for _ in range(10)]]
    bouncer.burst(1000)
    assert [list(map(str, range(1000)))] * 10 == [reader.result() for reader in readers]
    assert 0 == bouncer.stats()["dropped"]


def test_hub_stalled_client_is_dropped_and_resumes(server: Server) -> None:
    """It gets what was held for it, then the end, and what it missed when it comes back; others
    lose nothing meanwhile."""
    bouncer = Remote(server, history=10_000)
    stalled, total = bouncer.client(receive_buffer=4096), 0
    others = [bouncer.client() for _ in range(2)]
    while not bouncer.stats()["dropped"]:
        bouncer.burst(15, size=65536, first=total)  # fewer than maxsize, so that others keep up
        for other in others:
            assert list(range(total, total + 15)) == list(map(int, other.datas(15)))
        total += 15
    bouncer.broadcast("last")
    assert [["last"], ["last"]] == [other.datas(1) for other in others]
    stalled.wait_until(lambda: stalled.ended, "end")
    events = list(stalled.unread)
    assert (True, True) == (stalled.whole, len(events) >= 16)
    resumed = bouncer.client(headers={"Last-Event-ID": events[-1].id})
    events += resumed.events(total + 1 - len(events))
    assert [*range(total), "last"] == [*(int(e.data) for e in events[:-1]), events[-1].data]


@detaching
def test_hub_takes_no_notice_of_what_a_client_says(server: Server) -> None:
    """Neither of what came along with the request, nor of what comes later, until it is too much;
    then it is cut off, and nobody else."""
    bouncer = Remote(server)
    client, other = bouncer.client(), bouncer.client().wait_opening()
    request = b"POST /do HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    for saying in (b"\x00\xff" * 1000, request):
        for early, late in ((saying, b""), (b"", saying)):
            harmless = bouncer.client("x", more=early)
            harmless.say(late)
            bouncer.broadcast("hi", channel="x")
            assert ["hi"] == harmless.datas(1)
            harmless.close()
            bouncer.wait_for(detached=2)

    def is_cut_off() -> bool:
        client.say(b"blah" * 256)
        return bouncer.stats()["subscribers"] == 1

    wait_until(is_cut_off, "the talker is cut off")
    bouncer.broadcast("hi")
    assert ["hi"] == other.datas(1)


@development
@pytest.mark.parametrize(("size", "count"), [(2**23, 1), (64, 20_000), (2**16, 999)])
def test_hub_bounds_what_a_publisher_takes_of_the_memory(
    server: Server, size: int, count: int
) -> None:
    """One copy of a big event for all clients; and one in a loop waits for the hub, loses nothing.

    The clients only count, and may fall behind: they are not what it waits for.
    """
    bouncer, peak = Remote(server, maxsize=count), "resource.getrusage(0).ru_maxrss"  # KiB
    burst = "[bouncer.broadcast(frame) for frame in [format_sse('x' * size)] * count] and 0"
    bouncer.do(burst, count=1, size=size)  # what it takes to make one
    before = bouncer.do(peak)
    clients = [bouncer.client(receive_buffer=65536).wait_opening().socket for _ in range(10)]

    def count_bytes(connection: socket.socket) -> int:
        chunk, total = bytearray(2**20), 0
        while received := connection.recv_into(chunk):
            total += received
        return total

    readers = [Task(count_bytes, connection) for connection in clients]
    bouncer.do(burst, count=count, size=size)
    bouncer.close()
    assert {count * (size + 8)} == {reader.result() for reader in readers}
    assert bouncer.do(peak) - before < 32 * 1024
    assert 0 == bouncer.stats()["dropped"]


# A network of its own that can be taken down, and the kernel's patience set from 30 s to 1 s.
VANISHED = """
import fcntl, socket, struct, threading, time
from werkzeug.serving import make_server
from app import app, my_socket

def loopback(flags):  # SIOCSIFFLAGS; 1 is up
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags))
def stats():
    return app.test_client().post(f"/do?bouncer={name}", json=["bouncer.stats()", {}]).json

loopback(1)
server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = socket.create_connection(("127.0.0.1", server.port))
name = '{"name":1,"heartbeat":0.2}'
client.sendall(b"GET /subscribe?bouncer=%s HTTP/1.1\\r\\n\\r\\n" % name.encode())
client.recv(1)
while not stats()["detached"]:
    time.sleep(0.01)
connection = my_socket(client.getsockname()[1])[1]
option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
print(connection.getsockopt(*option))
connection.setsockopt(*option, 1000)
loopback(0)
while stats()["subscribers"]:
    time.sleep(0.01)
print("reaped")
"""


def test_hub_reaps_a_peer_that_has_vanished(tmp_path: Path) -> None:
    """Its machine has lost power, or its network: no FIN, no RST, no answer for 30 seconds."""
    unshare = [need_program("unshare"), "--map-root-user", "--net"]
    if run(*unshare, "true").returncode:
        go_without("the right to a network of one's own")
    (tmp_path / "app.py").write_text(APP, "utf-8")
    finished = run(*unshare, sys.executable, "-c", VANISHED, cwd=tmp_path)
    assert "30000\nreaped\n" == finished.stdout, finished.stderr


@detaching
def test_hub_at_the_limit_of_descriptors(server: Server) -> None:
    """Those beyond it are told to come back, in the log once; the others lose nothing; some are
    left for ordinary requests, also beside idle connections; and there is room again."""
    bouncer = Remote(server, retry=4321)
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (%s, 4096))"
    told = server.log().count("come back later")

    def come() -> Client | None:
        """Return a client that was let in, or None."""
        client = bouncer.request().wait_opening()
        if client.body == b"retry: 4321\n":
            return client
        assert (200, []) == (client.head.status, client.wait_end())
        assert re.fullmatch(rb"retry: 4321\n: .*\n", client.body)
        client.close()
        return None

    bouncer.do(limit % "len(os.listdir('/proc/self/fd')) + 60")
    try:
        clients, refused = list[Client](), 0
        while refused < 3:  # one may be let in yet: other connections have just been closed
            client = come()
            refused += client is None
            clients += [client] if client else []
        count = 2 * (server.kind in ("development", "gevent"))  # workers wait for who says nothing
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
        bouncer.wait_for(detached=len(clients), subscribers=len(clients))
        assert told + 1 == server.log().count("come back later")
        for connection in idle:
            connection.close()
        for client in clients[:5]:
            client.close()
        bouncer.wait_for(detached=len(clients) - 5)
        wait_until(come, "somebody is let in")
        bouncer.broadcast("hi")
        assert [["hi"]] * len(clients[5:]) == [client.datas(1) for client in clients[5:]]
    finally:
        for client in server.clients:
            client.close()
        bouncer.do(limit % "4096")


@on("development", "sync", "gthread")
def test_hub_in_a_busy_process(server: Server) -> None:
    """With a thread that never pauses, nothing is lost, and that thread goes on too."""
    bouncer = Remote(server)
    clients = bouncer.streams(50)
    busy = "while sight.get('busy'): sight['turns'] += 1"
    bouncer.do("sight.update(busy=1, turns=0)")
    bouncer.do(f"threading.Thread(target=exec, args=[{busy!r}, {{'sight': sight}}]).start()")
    try:
        before = bouncer.do("sight['turns']")
        bouncer.burst(300)
        assert [list(map(str, range(300)))] * 50 == [client.datas(300) for client in clients]
        assert bouncer.do("sight['turns']") > before
    finally:
        bouncer.do("sight.update(busy=0)")
    assert 0 == bouncer.stats()["dropped"]


@detaching
@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
@pytest.mark.parametrize("relayed", [False, True])
def test_hub_child_begins_with_nothing_and_harms_nothing(
    server: Server, how: str, relayed: bool, request: pytest.FixtureRequest, key: str
) -> None:
    """A forked child ends normally; its parent's streams go on, and get nothing twice."""
    relay: Any = {"relay": [request.getfixturevalue("redis").url, key]} if relayed else {}
    bouncer = Remote(server, history=9, **relay)
    clients = [bouncer.client() for _ in range(3)]
    for number in range(2):
        bouncer.broadcast(f"before {number}")
        # gunicorn's own greenlets survive in the child as well, and may end it, with 0.
        assert bouncer.do("fork(bouncer, how)", how=how) in [7, 0][: 1 + (server.kind == "gevent")]
        bouncer.broadcast(f"after {number}")
    bouncer.broadcast("last")
    expected = ["before 0", "after 0", "before 1", "after 1", "last"]
    assert [expected] * 3 == [client.datas(5) for client in clients]
    bouncer.wait_for(subscribers=3, detached=3)


def test_hub_child_holds_no_connection_of_its_parent(tmp_path: Path) -> None:
    """The parent is killed, its child lives on: the parent's clients see the end."""
    with serve("development", tmp_path) as server:
        client = Remote(server).client()
        child = server.bouncers[0].do("fork(bouncer, 'linger')")
        os.kill(server.process.pid, signal.SIGKILL)
        assert [] == client.wait_end()
        os.kill(child, 0)  # it is there still
        server.bouncers.clear()


@detaching
def test_hub_survives_what_nobody_has_thought_of(server: Server) -> None:
    """Someone else puts another file in the place of a stream's: that costs no other stream."""
    bouncer = Remote(server)
    unlucky, other = bouncer.client(), bouncer.client()
    code = "os.dup2(os.open(os.devnull, os.O_RDONLY), my_socket(port)[0])"
    bouncer.do(code, port=unlucky.socket.getsockname()[1])
    bouncer.broadcast("a")
    bouncer.broadcast("b")
    assert (["a", "b"], []) == (other.datas(2), unlucky.wait_end())
    bouncer.wait_for(subscribers=1)


@detaching
def test_hub_close_delivers_what_a_slow_client_has_still_to_get(server: Server) -> None:
    """Also to one that has said something since; and who has seen the end gets no reset for it."""
    bouncer = Remote(server)
    client = bouncer.client(receive_buffer=4096)
    bouncer.burst(16, size=65536)
    bouncer.close()
    bouncer.wait_for(subscribers=0)
    client.say(b"blah")
    assert list(range(16)) == [int(data) for data in client.wait_end()]
    assert client.whole
    for _ in range(10):
        client.socket.sendall(b"blah")


def test_hub_sends_without_ctypes(tmp_path: Path) -> None:
    """Where Python is built without it, the same arrives, and who stalls is dropped."""
    app = "import sys; sys.modules['ctypes'] = None\n" + APP
    with serve("development", tmp_path, app=app) as server:
        test_hub_stalled_client_is_dropped_and_resumes(server)


def follow(seed: int, bouncers: list[Remote], settled: threading.Event) -> list[str]:
    """Read over connections that are cut at random, until "end" has come."""
    rng, last, seen = random.Random(seed), "", [""]
    channels = [*"ab"][: seed % 3]
    while seen[-1] != "end":
        bouncer = rng.choice(bouncers)
        url = bouncer.url("/subscribe", channel=channels)
        headers = {"Last-Event-ID": last} if last else {}
        client, looks = Client(bouncer.server.port, url, headers=headers), rng.choice([0, 1, 2, 9])
        while not client.ended and (looks > 0 or settled.is_set()) and "end" not in seen[-1:]:
            client.read()
            looks -= 1
            seen += [data_of(client.unread.popleft()) for _ in range(len(client.unread))]
        last = client.parser.last_event_id or last
        if rng.random() < 0.2:
            client.say(rng.randbytes(rng.randrange(10_000)))
        rng.choice([client.close, client.reset, client.half_close])()
        client.close()
    return seen[1:]


def check_followed(bouncers: list[Remote], followers: int) -> None:
    """Clients of several channels that are cut at random while events flow each get what is for
    them, once, in order, from the first that they saw."""
    settled, rng = threading.Event(), random.Random(1)
    tasks = [Task(follow, seed, bouncers, settled) for seed in range(followers)]
    published: list[tuple[str, str | None]] = []
    for _ in range(40 * FUZZ):
        channel = rng.choice([None, "a", "b"])
        texts = [str(len(published) + i) for i in range(rng.choice([1, 1, 3, 15]))]
        rng.choice(bouncers).broadcast(*texts, channel=channel)
        published += [(text, channel) for text in texts]
    settled.set()
    bouncers[0].broadcast("end")
    for seed, task in enumerate(tasks):
        mine = [None, *"ab"][: 1 + seed % 3]
        due = [text for text, channel in [*published, ("end", None)] if channel in mine]
        seen = task.result()
        assert due[due.index(seen[0]) :] == seen


def test_hub_clients_cut_at_random_miss_nothing(server: Server) -> None:
    """And get nothing of other channels, though descriptors are reused all the time. Detached
    without heartbeats, which would wake a hub that overslept."""
    bouncer = Remote(server, history=10_000, maxsize=100)
    bouncer.client().close()
    check_followed([bouncer], 12)
    if server.detaches:
        bouncer.wait_for(subscribers=0)


# =================================================================================================
# RESPONSE
# =================================================================================================

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-store, no-transform",
    "x-accel-buffering": "no",
}


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def test_response_headers_status_and_class() -> None:
    """It is of the app's own class, also if that sets a mimetype; headers may be changed."""

    class Page(flask.Response):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.mimetype = "application/json"

    bouncer, own = EventBouncer(), {"X-Mine": "1", "cache-control": "private"}
    app = app_of(bouncer.stream)
    with app.test_client().get("/") as response:
        assert (200, HEADERS) == (response.status_code, lower(response.headers))
    app.response_class = Page
    with app.test_request_context():
        response = app.make_response(app.dispatch_request())
        assert (Page, HEADERS) == (type(response), lower(response.headers))
        response.close()
    response = app_of(lambda: sse_response(["x"], status=202, headers=own)).test_client().get("/")
    assert (202, {**HEADERS, **lower(own)}) == (response.status_code, lower(response.headers))
    assert {"X-Mine": "1", "cache-control": "private"} == own


def test_response_does_not_hang_the_test_client() -> None:
    """It returns before the first event, each can be had when it is sent, and the end comes."""
    bouncer = EventBouncer()
    with app_of(lambda: bouncer.stream("a", "b")).test_client().get("/") as response:
        body = response.iter_encoded()
        assert b":\n" == next(body)
        bouncer.broadcast("hi", "greet", channel="b")
        bouncer.broadcast("not for it", channel="c")
        assert b"event: greet\ndata: hi\n\n" == next(body)
        assert [1, 0] == [bouncer.stats()[name] for name in ("subscribers", "detached")]
        bouncer.broadcast("last")
        bouncer.close()
        assert [b"data: last\n\n"] == list(body)


@pytest.mark.parametrize(("retry", "opening"), [(None, ":"), (0, "retry: 0"), ((7, 7), "retry: 7")])
def test_response_opening_is_one_line_and_no_block(retry: Any, opening: str) -> None:
    """Several client libraries would make an empty event of a block without data. A client that
    comes back from an unknown id, or from too long ago, gets an event named gap; cut off after
    it, it misses nothing."""
    bouncer = EventBouncer(retry=retry, history=2)
    ids = ids_of(bouncer, *"abcd")

    def sent(last: str) -> str:
        subscription = bouncer.subscribe(last_event_id=last)
        bouncer.unsubscribe(subscription)
        return answer(lambda: sse_response(subscription)).decode()

    kept = f"id: {ids[2]}\ndata: c\n\nid: {ids[3]}\ndata: d\n\n"
    assert f"{opening}\n{kept}" == sent("earliest") == sent(ids[1])
    for last in (ids[0], "1-1"):
        assert f"{opening}\nid: {ids[1]}\nevent: gap\ndata: \n\n{kept}" == sent(last)


def test_response_retry_is_spread_over_its_range() -> None:
    bouncer = EventBouncer(retry=(10**6, 10**9))

    def retry() -> int:
        with app_of(bouncer.stream).test_client().get("/") as response:
            return int(next(response.iter_encoded()).removeprefix(b"retry: "))

    values = {retry() for _ in range(20)}
    assert len(values) > 10
    assert 10**6 <= min(values) <= max(values) <= 10**9


@pytest.mark.parametrize("retry", [None, 700])
@pytest.mark.parametrize("why", ["full", "closed"])
def test_response_refused_is_told_to_come_back(retry: Any, why: str) -> None:
    """The answer is 200, a retry and the end: no event, and no 503, at which browsers give up."""
    bouncer = EventBouncer(max_subscribers=1, retry=retry)
    with bouncer.subscribe():
        if why == "closed":
            bouncer.close()
        response = app_of(bouncer.stream).test_client().get("/")
    assert HEADERS.items() <= lower(response.headers).items()
    match = re.fullmatch(rb"retry: ([0-9]+)\n: [^\n]+\n", response.data)
    assert match
    assert int(match[1]) in ([700] if retry else range(5000, 15001))


@pytest.mark.parametrize(
    ("header", "query", "argument", "goes_on_from"),
    [(0, 1, 2, 0), (None, 1, 2, 1), (None, None, 2, 2), (2, None, 0, 2), (None, None, None, 9)],
)
def test_response_header_beats_query_beats_argument(
    header: int | None, query: int | None, argument: int | None, goes_on_from: int
) -> None:
    """The browser's own id, event-source-polyfill's lastEventId, what the page was rendered at."""
    bouncer = EventBouncer(history=9)
    ids = ids_of(bouncer, *"abc")
    app = app_of(lambda: bouncer.stream(last_event_id=None if argument is None else ids[argument]))
    url = "/" if query is None else f"/?lastEventId={ids[query]}"
    headers = {} if header is None else {"Last-Event-ID": ids[header]}
    with app.test_client().get(url, headers=headers) as response:
        bouncer.close()
        assert [*"abc"[goes_on_from + 1 :]] == [event.data for event in parse(response.data)]


def test_response_of_items_is_these_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """By the app's own JSON, though its context has ended when a generator runs. What cannot be
    formatted is logged and left out."""

    def items() -> Iterator[object]:
        yield from ("a\nb", format_sse("c", "greet"), math.nan, None, {"n": DAY}, b"bytes", "")

    expected = "data: a\ndata: b\n\nevent: greet\ndata: c\n\n"
    expected += f"data: {flask.json.dumps({'n': DAY})}\n\ndata: bytes\n\ndata: \n\n"
    assert expected.encode() == answer(lambda: sse_response(items()))
    assert [("sse_bouncer", logging.ERROR)] * 2 == [(r.name, r.levelno) for r in caplog.records]
    assert "nan" in caplog.messages[0]
    sources: list[Any] = [["a", "b"], ("a", "b"), map(str, ["a", "b"]), deque("ab")]
    for source in sources:
        assert b"data: a\n\ndata: b\n\n" == answer(functools.partial(sse_response, source))
    assert b"" == answer(lambda: sse_response([]))


def test_response_raises_what_the_generator_raises() -> None:
    """The server hears of it as of any view's error, and the generator has cleaned up."""
    done: list[object] = []

    def items() -> Iterator[str]:
        try:
            yield "a"
            raise LookupError("broken")
        finally:
            done.append("cleaned up")

    with app_of(lambda: sse_response(items())).test_client().get("/") as response:
        with pytest.raises(LookupError, match="broken"):
            done.extend(part for part in response.iter_encoded() if part)
    assert [b"data: a\n\n", "cleaned up"] == done


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_response_closes_its_source_once(method: str) -> None:
    """However far the body was read, or not at all. HEAD subscribes nobody."""
    for items in range(4):
        closed: list[bool] = []

        class Source(list[str]):
            def close(self) -> None:
                closed.append(True)  # noqa: B023

        source = Source("ab")
        body = call(app_of(lambda source=source: sse_response(source)), method)  # type: ignore[misc]
        list(itertools.islice(body, items))
        assert [] == closed
        body.close()
        assert [True] == closed
    bouncer = EventBouncer()
    body = call(app_of(bouncer.stream), method)
    assert (method == "GET") == len(bouncer.subscribers)
    body.close()


@pytest.mark.parametrize("items", [0, 1, 2])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
def test_response_releases_its_subscription(items: int, closes: bool) -> None:
    """Never iterated, or left in the middle, closed or just forgotten: nothing is left."""
    bouncer = EventBouncer()
    body = call(app_of(bouncer.stream))
    bouncer.broadcast("hi")
    list(itertools.islice(body, items))
    assert 1 == len(bouncer.subscribers)
    if closes:
        body.close()
    del body
    gc.collect()
    assert not bouncer.subscribers


def test_response_thrown_away_or_to_head_holds_nothing(server: Server) -> None:
    bouncer = Remote(server, max_subscribers=1)
    for _ in range(3):
        bouncer.do("bouncer.stream() and 0")
    bouncer.wait_for(subscribers=0)
    client = bouncer.request(method="HEAD")
    assert HEADERS.items() <= dict(client.headers).items()
    client.close()
    bouncer.wait_for(subscribers=0, refused=0)


@on("development", "gthread-served", "gevent", "waitress")
@pytest.mark.parametrize("leave", ["close", "reset"])
def test_response_runs_a_generators_finally_when_its_client_leaves(
    server: Server, leave: str
) -> None:
    """Its headers come before its first item, but from waitress."""
    bouncer = Remote(server)
    client = bouncer.request(query={"do": "sse_response(numbers(bouncer.subscribe(), sight))"})
    bouncer.wait_for(subscribers=1)
    if server.kind != "waitress":
        assert 200 == client.head.status
    bouncer.broadcast("start")
    assert ["0", "1", "2"] == client.datas(3)
    assert not bouncer.do("sight.get('ended')")
    LEAVES[leave](client)
    wait_until(lambda: bouncer.do("sight.get('ended')"), "finally")


# -- The head that the server writes --------------------------------------------------------------

OF_BLOG_POSTS = {"Connection": "keep-alive", "Transfer-Encoding": "chunked"}
# What the request asks for, and whether the hub goes on from what the server makes of it.
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "cookies and CORS": ({}, True),
    "session and ProxyFix": ({"change": "session.update(user=request.remote_addr)"}, True),
    "wrapped by middleware": ({"middleware": "watches"}, True),
    "headers of the server's own": ({"change": f"response.headers.update({OF_BLOG_POSTS})"}, True),
    "start_response delayed": ({"middleware": "late"}, True),
    "compressed by middleware": ({"middleware": "compresses"}, False),
    "compressed by flask-compress": ({"middleware": "flask-compress"}, False),
    "another status": ({"change": "setattr(response, 'status_code', 201)"}, False),
}


@detaching
@pytest.mark.parametrize("what", HEADS)
def test_head_is_what_the_server_would_send(server: Server, what: str) -> None:
    """Less how the server frames the body; the bytes of the body are the same, and nothing is
    left, whether the stream is taken over or left to the server."""
    need("flask_cors", "flask_compress")
    if "flask" in what and server.kind in ("sync", "gthread"):
        return  # it would hold back the little that is sent, and their only thread, for minutes
    query, taken_over = HEADS[what]
    headers = {"Origin": "http://x", "X-Forwarded-For": "192.0.2.7", "Accept-Encoding": "deflate"}
    framing, heads = {"connection", "transfer-encoding", "keep-alive"}, []
    for detach in (True, False):
        bouncer = Remote(server, detach=detach, heartbeat=0.05)
        client = bouncer.request(query=query, headers=headers)
        kept = [pair for pair in client.headers if pair[0] not in framing | {"date"}]
        heads.append((client.head.status, kept))
        if server.kind in ("development", "gevent") or detach and taken_over:
            bouncer.wait_for(subscribers=1, detached=int(detach and taken_over))
            bouncer.broadcast("hi")
            bouncer.close()
            client.wait_until(lambda: client.ended, "end")  # noqa: B023
            compressed = "compressed" in what
            body = zlib.decompress(client.body) if compressed else bytes(client.body)
            assert (True, b":data: hi") == (client.whole, body.replace(b"\n", b"")[-9:])
        if detach and taken_over:
            assert [("connection", "close")] == [p for p in client.headers if p[0] in framing]
        client.close()
        bouncer.wait_for(subscribers=0)
    assert heads[1] == heads[0]
    names = Counter(name for name, _ in heads[0][1])
    assert {"x-middleware", "access-control-allow-origin", "x-pid"} <= set(names)
    assert 2 + ("session" in what) == names["set-cookie"]


@detaching
def test_takeover_leaves_a_short_and_normal_request(server: Server) -> None:
    """Middleware, teardown functions and the access log see one, while the stream goes on. A stream
    begins with what its subscriber holds, and one that has ended already ends."""
    bouncer, code = Remote(server), "[sse_response(bouncer.subscribe('x')), bouncer.broadcast('a')"
    client = bouncer.request(query={"middleware": "watches", "do": f"{code}][0]"})
    expected = {"bytes": 2, "closed": True, "teardown": "None"}
    bouncer.wait_for(detached=1)
    server.wait_for_log(r"GET /subscribe.*middleware=watches.* 200 ")
    wait_until(lambda: bouncer.do("{**sight, 'teardown': 'None'}") == expected, "it has ended")
    ended = bouncer.request(query={"do": f"{code}, bouncer.disconnect('x')][0]"})
    assert ["a"] == ended.wait_end()
    assert ["a", "a"] == client.wait_end()


@detaching
def test_takeover_of_http_1_0_and_of_post(server: Server) -> None:
    bouncer = Remote(server, heartbeat=0.05)
    for options in ({"protocol": "HTTP/1.0"}, {"method": "POST"}):
        client = bouncer.request("x", **options).wait_opening()
        bouncer.broadcast("hi")
        assert ["hi"] == client.datas(1)
        client.close()
        bouncer.wait_for(subscribers=0)


@pytest.mark.parametrize("kind", WORKERS)
def test_takeover_of_a_unix_socket_and_beside_an_agent(kind: str, tmp_path: Path) -> None:
    """New Relic's wraps start_response and the body; streams hold no worker all the same."""
    need("newrelic")
    config, path = tmp_path / "newrelic.ini", str(tmp_path / "socket")
    config.write_text("[newrelic]\ndeveloper_mode = true\nlicense_key = x\n", "utf-8")
    bind = ("--bind", f"unix:{path}")
    with serve(kind, tmp_path / "app", *bind, APM=str(config)) as server:
        bouncer = Remote(server)
        clients = [bouncer.client()]
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        clients += [server.client(bouncer.url("/subscribe"), connection=connection)]
        bouncer.wait_for(subscribers=2, detached=2)
        bouncer.broadcast("hi")
        assert [["hi"]] * 2 == [client.datas(1) for client in clients]


@pytest.mark.parametrize("kind", ["development", "gthread-served", "gevent"])
def test_takeover_leaves_tls_to_the_server(kind: str, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    made = run(
        *[need_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2"],
        *["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"],
        *["-keyout", key, "-out", certificate],
    )
    assert 0 == made.returncode, made.stderr
    names = ["--cert", "--key"] if kind == "development" else ["--certfile", "--keyfile"]
    with serve(kind, tmp_path / "app", names[0], certificate, names[1], key) as server:
        context = ssl.create_default_context(cafile=certificate)
        url = Remote(server, detach=True, heartbeat=0.05).url
        server.bouncers.clear()  # they are closed by plain HTTP

        def client(path: str, method: str = "GET", body: bytes = b"") -> Client:
            plain = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
            tls = context.wrap_socket(plain, server_hostname="127.0.0.1")
            headers = {"Connection": "close", "Content-Type": "application/json"}
            headers["Content-Length"] = str(len(body))
            return server.client(path, method=method, headers=headers, connection=tls, more=body)

        def do(code: str) -> Any:
            asked = client(url("/do"), "POST", json.dumps([code, {}]).encode())
            asked.wait_until(lambda: asked.body.endswith(b"\n"), "answer")
            return json.loads(asked.body)

        stream = client(url("/subscribe")).wait_opening()
        assert [1, 0] == do("[bouncer.stats()[name] for name in ('subscribers', 'detached')]")
        do("[bouncer.broadcast('hi'), bouncer.close()]")
        assert ["hi"] == stream.wait_end()
        assert "WARNING" not in server.log().replace("WARNING: This is a development", "")


FORKS_FOR_EACH_REQUEST = """
from flask import Flask
from sse_bouncer import EventBouncer
app = Flask(__name__)
app.add_url_rule("/", view_func=EventBouncer(heartbeat=0.05).stream)
app.run(processes=4, threaded=False)
"""


def test_takeover_leaves_alone_a_server_that_forks_for_each_request(tmp_path: Path) -> None:
    """Its process would end with the request, and the hub with it."""
    with serve("script", tmp_path, app=FORKS_FOR_EACH_REQUEST) as server:
        server.client("/").wait_for_body(b":\n" * 5)


def test_takeover_that_cannot_be_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A socket is offered, but what the server writes does not go there: one line says why."""
    bouncer = EventBouncer()
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            body = call(app_of(bouncer.stream), offered=ours)
            parts = iter(body)
            assert b":\n" == next(parts)  # and nobody writes it anywhere
            bouncer.broadcast("hi")
            assert b"data: hi\n\n" == next(parts)
            assert (1, 0) == (bouncer.stats()["subscribers"], bouncer.stats()["detached"])
            body.close()
    assert ((), 1) == (bouncer.subscribers, len(caplog.messages))


def test_takeover_ends_if_all_is_closed_at_any_line_of_it() -> None:
    """As a signal handler may: no stream is forgotten."""
    lines: list[int] = []
    for number in range(20):
        bouncer, seen = EventBouncer(heartbeat=None), list[int]()
        ours, theirs = socket.socketpair()

        def trace(
            frame: Any, event: str, _: object, seen: Any = seen, bouncer: Any = bouncer
        ) -> Any:
            if event == "line" and frame.f_code.co_name == "_hand_over":
                seen.append(frame.f_lineno)
                if len(seen) == number + 1:  # noqa: B023
                    bouncer.close()
            return trace  # noqa: B023

        with ours, theirs:
            theirs.settimeout(TIMEOUT)
            body = call(app_of(bouncer.stream), offered=ours)
            ours.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + next(body))
            sys.settrace(trace)
            try:
                assert [] == list(body)
            finally:
                sys.settrace(None)
            if number < len(seen):
                received = b"".join(iter(functools.partial(theirs.recv, 4096), b""))
                assert received.endswith(b"\r\n\r\n:\n")
                assert () == bouncer.subscribers
        lines = seen
    assert 0 < len(lines) < 20


@pytest.mark.parametrize("items", [0, 1])
def test_takeover_that_the_server_breaks_off_leaves_nothing(items: int) -> None:
    """It fails before it asks for the first item, or between the first and the second, or some
    middleware takes no more: the server has its connection back, and answers as it likes."""
    bouncer, descriptors = EventBouncer(), list[int]()
    for _ in range(5):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.settimeout(TIMEOUT)
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
# STOPPING
# =================================================================================================


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("kind", WORKERS)
@pytest.mark.usefixtures("servers")  # for the limit of descriptors
def test_stopping_ends_a_thousand_streams(kind: str, how: str, tmp_path: Path) -> None:
    """gunicorn is told to wait longer than a test does for open requests: there are none."""
    with serve(kind, tmp_path, "--graceful-timeout", str(4 * TIMEOUT)) as server:
        count = MANY if how == "SIGTERM" else 100
        clients = Remote(server).streams(count)
        server.process.send_signal(getattr(signal, how))
        assert [[]] * count == [client.wait_end() for client in clients]
        if how == "SIGHUP":
            server.wait_for_log("Booting worker", times=2)
            assert server.bouncers[0].client()
        else:
            assert 0 == server.process.wait(TIMEOUT)


@pytest.mark.parametrize("kind", DETACHING)
def test_stopping_by_ctrl_c(kind: str, tmp_path: Path) -> None:
    with serve(kind, tmp_path) as server:
        clients = Remote(server).streams(50)
        server.stop(signal.SIGINT)
        assert [[]] * 50 == [client.wait_end() for client in clients]
        server.complaints()  # gunicorn's own, if it was about to answer a last request


def test_stopping_by_the_reloader_of_flask_debug(tmp_path: Path) -> None:
    """A changed file restarts the app, ends its streams, and their clients can come back."""
    with serve("development", tmp_path, FLASK_DEBUG="1") as server:
        bouncer = Remote(server)
        client = bouncer.client()
        server.wait_for_log("Debugger PIN")
        (tmp_path / "app.py").write_text(APP + "\n# changed\n", "utf-8")
        assert [] == client.wait_end()
        server.wait_for_log("Debugger PIN", times=2)
        again = bouncer.client()
        bouncer.broadcast("hi")
        assert ["hi"] == again.datas(1)


@pytest.mark.parametrize("kind", WORKERS)
def test_stopping_a_recycled_worker_ends_its_streams(kind: str, tmp_path: Path) -> None:
    """By gunicorn's --max-requests: its clients see the end, and the next worker has room."""
    options = ("--max-requests", "50", "--graceful-timeout", str(4 * TIMEOUT))
    with serve(kind, tmp_path, *options) as server:
        bouncer = Remote(server)
        clients = bouncer.streams(5)

        def is_recycled() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                bouncer.stats()  # by the next one, or in between
            return "Autorestarting" in server.log()

        wait_until(is_recycled, "the worker is recycled")
        assert [[]] * 5 == [client.wait_end() for client in clients]
        server.wait_for_log("Booting worker", times=2)
        assert bouncer.client()


SERVED = "\nbouncer = EventBouncer(detach=False)\napp.add_url_rule('/', view_func=bouncer.stream)\n"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("kind", ["gthread-served", "gevent"])
def test_stopping_recipe_ends_streams_before_gunicorns_own_handler(
    kind: str, how: str, tmp_path: Path
) -> None:
    """The documented post_worker_init hook, as it stands, with streams that hold workers.

    gunicorn is told to wait longer than a test does for open requests, and is not waited for.
    """
    *_, hook = [block for block in documented_code() if "post_worker_init" in block]
    (tmp_path / "gunicorn.conf.py").write_text(hook, "utf-8")
    options = ("--graceful-timeout", str(4 * TIMEOUT))
    with serve(kind, tmp_path, *options, app=APP + SERVED) as server:
        clients = [server.client("/").wait_opening() for _ in range(5)]
        server.process.send_signal(getattr(signal, how))
        assert [[]] * 5 == [client.wait_end() for client in clients]
        if how == "SIGHUP":
            server.wait_for_log("Booting worker", times=2)
        else:
            server.process.wait(TIMEOUT)
        server.complaints()  # gunicorn's own, if it was about to answer a last request


SCRIPT_THAT_ENDS = """
import signal, threading
from flask import Flask
from werkzeug.serving import make_server
from sse_bouncer import EventBouncer
app, bouncer = Flask(__name__), EventBouncer()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # before any thread: for sigwait()
app.add_url_rule("/subscribe", view_func=bouncer.stream)
app.add_url_rule("/stats", view_func=bouncer.stats)
server = make_server("127.0.0.1", 0, app, threaded=True)
print(f"Running on http://127.0.0.1:{server.port}", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
signal.sigwait([signal.SIGTERM])
for number in range(100):
    bouncer.broadcast(number)
"""


def test_stopping_sends_what_was_broadcast_right_before_exit(tmp_path: Path) -> None:
    """All of it, to all; and nothing is printed as it goes."""
    with serve("script", tmp_path, app=SCRIPT_THAT_ENDS) as server:
        clients = [server.client("/subscribe") for _ in range(100)]
        wait_until(lambda: server.get("/stats")["detached"] == 100, "the streams are detached")
        readers = [Task(client.wait_end) for client in clients]
        assert 0 == server.stop()
        for reader in readers:
            assert list(range(100)) == [int(data) for data in reader.result()]
        assert [] == re.findall(r"^(?!Running on|127\.0\.0\.1 - - ).+\n", server.log(), re.M)


# =================================================================================================
# CLIENTS
#
# What clients that no one here wrote make of a stream, straight at a server and through nginx.
# =================================================================================================


class Browser:
    """Headless Chromium behind chromedriver, spoken to over WebDriver's HTTP."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        self._session = ""
        switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
        switches += ["disable-background-networking", "disable-component-update", "disable-sync"]
        switches += ["disable-dev-shm-usage", f"user-data-dir={profile}"]
        options = {"args": [f"--{switch}" for switch in switches]}
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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_program("chromium")
    folder = tmp_path_factory.mktemp("browser")
    driver = Process([need_program("chromedriver"), "--port=0"], folder)
    try:
        port = int(driver.wait_for_log(r"started successfully on port (\d+)")[1])
        browser = Browser(port, folder / "profile")
        yield browser
        browser.quit()
    finally:
        driver.kill()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    yield chromium
    chromium.go("about:blank")


NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    gzip on;
    gzip_types text/event-stream;
    server {
        listen 127.0.0.1:PORT;
        location / { proxy_pass http://127.0.0.1:UPSTREAM; }
        location = /subscribe {
            proxy_pass http://127.0.0.1:UPSTREAM;
            error_page 502 503 504 =200 @later;
        }
        location @later {
            default_type text/event-stream;
            return 200 "retry: 50\\n";
        }
    }
}
"""


@contextlib.contextmanager
def nginx(upstream: int, folder: Path) -> Iterator[int]:
    """Run a real nginx before a server, with its defaults and gzip on; give its port."""
    with held_port() as port:
        config = NGINX.replace("PORT", str(port)).replace("UPSTREAM", str(upstream))
        (folder / "conf").write_text(config, "utf-8")
        nginx = Process([need_program("nginx"), "-p", str(folder), "-c", "conf"], folder)

        def listens() -> bool:
            assert nginx.process.poll() is None, nginx.log()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(listens, "nginx listens")
            yield port
        finally:
            nginx.kill()


PACKAGES = ["eventsource@3", "@microsoft/fetch-event-source@2", "event-source-polyfill@1"]
SCRIPTS = {
    "eventsource": """
import { EventSource } from "eventsource";
const source = new EventSource(process.argv[2]);
for (const name of ["message", "greet", "gap", "done", ""])
    source.addEventListener(name, (event) => {
        console.log(JSON.stringify([event.data, event.type, event.lastEventId]));
        if (name === "done") source.close();
    });
""",
    "fetch-event-source": """
import library from "@microsoft/fetch-event-source";
globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
const controller = new AbortController();
await library.fetchEventSource(process.argv[2], {
    signal: controller.signal,
    onmessage(event) {
        console.log(JSON.stringify([event.data, event.event || "message", event.id]));
        if (event.event === "done") controller.abort();
    },
});
""",
}


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scripts that read by packages from npm."""
    folder = tmp_path_factory.mktemp("node")
    need_program("node")
    install = [need_program("npm"), "install", "--no-audit", "--no-fund", "--prefer-offline"]
    finished = run(*install, *PACKAGES, cwd=folder, env={**os.environ})
    if finished.returncode != 0:
        go_without(f"{PACKAGES} from npm, which said {finished.stderr[-500:]!r}: it")
    for name, script in SCRIPTS.items():
        (folder / f"{name}.mjs").write_text(script, "utf-8")
    return folder


def chromium_reads(browser: Browser, url: str) -> list[Event]:
    """Read by Chromium's EventSource, from a page of the same origin."""
    browser.go(url.replace("/subscribe?", "/stats?"))
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


def node_reads(folder: Path, name: str, url: str) -> list[Event]:
    finished = run(need_program("node"), f"{name}.mjs", url, cwd=folder)
    assert (0, "") == (finished.returncode, finished.stderr)
    return [Event(*json.loads(line)) for line in finished.stdout.split("\n")[:-1]]


def httpx_reads(url: str) -> list[Event]:
    import httpx
    from httpx_sse import connect_sse

    with httpx.Client(timeout=TIMEOUT) as client, connect_sse(client, "GET", url) as source:
        return [Event(event.data, event.event, event.id) for event in source.iter_sse()]


def curl_reads(url: str) -> list[Event]:
    command = [need_program("curl"), "-sS", "-N", "--compressed", url]
    return parse(subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True).stdout)


@pytest.fixture(params=["chromium", "eventsource", "fetch-event-source", "httpx-sse", "curl"])
def reads(request: pytest.FixtureRequest) -> Callable[[str], list[Event]]:
    """A client that reads the stream at a URL."""
    if request.param == "chromium":
        return functools.partial(chromium_reads, request.getfixturevalue("browser"))
    if request.param in SCRIPTS:
        folder: Path = request.getfixturevalue("node_folder")
        return functools.partial(node_reads, folder, request.param)
    if request.param == "httpx-sse":
        need("httpx", "httpx_sse")
        return httpx_reads
    need_program("curl")
    return curl_reads


# What is broadcast, and as what event.
TRICKY = [(text, "message") for text in ("plain", "a\r\nb\rc", "", "\n", "x\n", "\nx", "a\n\nb")]
TRICKY += [(text, "message") for text in ("  two  ", "\ttab", ":colon", "data: x", "data", "\0")]
TRICKY += [("a\nevent: evil\nid: 9\nretry: 1\n\n: b", "message"), ("\ufeffmark", "message")]
TRICKY += [("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "message"), ("grüß 😀 \U0010ffff", "message")]
TRICKY += [('{"json": "a\\nb"}', "message"), ("named", "greet"), ("", "greet")]
TRICKY += [("x" * 100_000, "message"), ("", "done")]


@on("development")
@pytest.mark.parametrize("way", ["direct", "nginx"])
def test_client_reads_exactly_what_was_broadcast(
    server: Server, way: str, reads: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whatever the text, to the character, with its id; and no event that nobody sent, for all the
    heartbeats and the retry."""
    with contextlib.ExitStack() as stack:
        port = server.port
        if way == "nginx":
            port = stack.enter_context(nginx(server.port, tmp_path))
        bouncer = Remote(server, history=100, heartbeat=0.02, retry=1000)
        client = Task(reads, f"http://127.0.0.1:{port}{bouncer.url('/subscribe')}")
        bouncer.wait_for(subscribers=1)
        beats = bouncer.client()
        for number, (data, type_) in enumerate(TRICKY):
            bouncer.broadcast(data, event=type_)
            if number % 8 == 0:  # heartbeats come between events, and before them
                beats.wait_for_body(b":\n" * 3)
        bouncer.close()
        read = client.result()
    expected = [(re.sub("\r\n?", "\n", data), type_) for data, type_ in TRICKY]
    if "fetch-event-source" in request.node.name:  # which loses these at the start
        expected = [(data.lstrip("\n\ufeff"), type_) for data, type_ in expected]
    assert expected == [(event.data, event.type) for event in read]
    assert are_increasing([event.id for event in read])


@development
def test_client_behind_nginx_gets_each_event_when_it_is_sent(
    server: Server, tmp_path: Path
) -> None:
    """Compressed, as it asks and nginx is set up to, and held back by neither; and when it leaves,
    that is seen at once."""
    curl = need_program("curl")
    with nginx(server.port, tmp_path) as port:
        bouncer = Remote(server)
        client = Client(port, bouncer.url("/subscribe"), headers={"Accept-Encoding": "gzip"})
        assert ("content-encoding", "gzip") in client.headers
        client.close()
        url = f"http://127.0.0.1:{port}{bouncer.url('/subscribe')}"
        with subprocess.Popen([curl, "-sSN", "--compressed", url], stdout=-1) as process:
            assert process.stdout
            assert b":\n" == process.stdout.readline()
            for number in range(3):
                bouncer.broadcast(number)
                lines = [process.stdout.readline() for _ in range(2)]
                assert [f"data: {number}\n".encode(), b"\n"] == lines
            process.kill()
        bouncer.wait_for(subscribers=0)


def test_client_behind_nginx_survives_a_restart_of_the_app(
    browser: Browser, tmp_path: Path
) -> None:
    """nginx's error_page answers meanwhile, so that EventSource does not give up for good."""
    with serve("gthread", tmp_path / "one") as server, nginx(server.port, tmp_path) as port:
        bouncer = Remote(server, port=port, retry=50)
        browser.go(f"http://127.0.0.1:{port}{bouncer.url('/stats')}")
        browser.run(
            """
            window.read = []; window.errors = 0;
            window.source = new EventSource(arguments[0]);
            source.onmessage = (event) => read.push(event.data);
            source.onerror = () => errors += 1;
            """,
            bouncer.url("/subscribe"),
        )
        bouncer.wait_for(detached=1)
        server.stop()
        browser.wait_until("errors >= 3")  # the end, and then answers by nginx
        assert browser.run("return source.readyState !== EventSource.CLOSED")
        bind = ("--bind", f"127.0.0.1:{server.port}")
        with serve("gthread", tmp_path / "two", *bind) as again:
            bouncer = Remote(again, **json.loads(bouncer.name))
            bouncer.wait_for(detached=1)
            bouncer.broadcast("back")
            browser.wait_until("read.includes('back')")


@development
def test_browser_with_event_source_polyfill_resumes(
    server: Server, browser: Browser, node_folder: Path
) -> None:
    """It sends the last id as the query parameter lastEventId."""
    polyfill = node_folder / "node_modules/event-source-polyfill/src/eventsource.js"
    bouncer = Remote(server, history=9, retry=1)
    browser.go(f"http://127.0.0.1:{server.port}{bouncer.url('/stats')}")
    browser.run("(0, eval)(arguments[0])", polyfill.read_text("utf-8"))
    browser.run(
        """
        window.read = [];
        window.source = new EventSourcePolyfill(arguments[0]);
        source.onmessage = (event) => read.push(event.data);
        """,
        bouncer.url("/subscribe", channel="x"),
    )
    bouncer.wait_for(detached=1)
    bouncer.broadcast("a")
    browser.wait_until("read.length === 1")
    bouncer.disconnect("x")
    bouncer.broadcast("b")
    bouncer.wait_for(detached=1)
    bouncer.broadcast("c")
    browser.wait_until("read.length >= 3")
    assert [*"abc"] == browser.run("return read")
    assert "lastEventId=" in server.log()


# =================================================================================================
# WAYS TO USE IT
#
# The README's own code, taken from it and run as it stands; the app of the blog posts with its
# import changed; and the example.
# =================================================================================================

README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""


def documented_code() -> list[str]:
    """The README's blocks of Python, then those in docstrings."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    for item in (sse_bouncer, EventBouncer, EventBouncer.close, RedisRelay, sse_response):
        doc = inspect.getdoc(item) or ""
        blocks += map(textwrap.dedent, re.findall(r"(?:^ {4}.*\n|^\n)+", doc + "\n", re.M))
    return [block for number, block in enumerate(blocks) if block.strip() not in blocks[:number]]


def readme_app(relay: str = "") -> str:
    """The README's app: its first block, and all that add to it; with a relay if one is given."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    others = re.compile("def test_|post_worker_init|sys.argv")
    blocks = [block for block in blocks if not others.search(block)]
    with_relay = re.compile(r"RedisRelay\(\s*redis")
    blocks = [block for block in blocks if relay or not with_relay.search(block)]
    return re.sub(r"redis://[\w.:]+", relay, "\n".join(blocks))


def check_subscribe(server: Server) -> None:
    client = server.client("/subscribe").wait_opening()
    server.post("/publish", b"a\nb")
    assert ["a\nb"] == client.datas(1)
    if '"/orders"' in README:
        server.post("/orders")
        ((data, name, _),) = client.events(1)
        assert ("order", {"id": 7, "items": ["tea"]}) == (name, json.loads(data))


def check_clock(server: Server) -> None:
    for event in server.client("/clock").events(2):
        assert re.fullmatch(r"\d\d:\d\d:\d\d", event.data)


def check_progress(server: Server) -> None:
    client = server.client("/progress")
    client.wait_end()
    *steps, last = client.unread
    total = len(steps)
    assert [{"done": n + 1, "of": total} for n in range(total)] == [json.loads(e[0]) for e in steps]
    assert "done" == last.type


def check_report(server: Server) -> None:
    assert ["working", "ready"] == server.client("/report").wait_end()
    assert 204 == server.client("/report", headers={"Last-Event-ID": "end"}).head.status


def check_inbox(server: Server) -> None:
    """Strangers get no stream, and a logout ends all of one's own."""
    assert 401 == server.client("/inbox").head.status
    cookies = {}
    for user in ("ada", "bob"):
        form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": "8"}
        login = server.client("/login", method="POST", headers=form, more=f"user={user}".encode())
        cookies[user] = dict(login.headers)["set-cookie"].partition(";")[0]
    tabs = [
        server.client("/inbox", headers={"Cookie": cookies["ada"]}).wait_opening() for _ in range(2)
    ]
    bob = server.client("/inbox", headers={"Cookie": cookies["bob"]}).wait_opening()
    server.post("/logout", Cookie=cookies["ada"])
    assert [[], []] == [tab.wait_end() for tab in tabs]
    server.post("/publish", b"to all")
    assert ["to all"] == bob.datas(1)


def check_chat(server: Server) -> None:
    ada = server.client("/chat/tea", headers={"User": "ada"}).wait_opening()
    bob = server.client("/chat/tea", headers={"User": "bob"}).wait_opening()
    say = {"User": "bob", "Content-Type": "application/x-www-form-urlencoded"}
    server.post("/chat/elsewhere", b"text=not+for+you", **say)
    server.post("/chat/tea", b"text=hi", **say)
    hello = {"user": "bob", "text": "hi"}
    for client in (ada, bob):  # with a relay one may hear of one's own joining, too
        heard: list[Any] = []
        while hello not in heard:
            heard += [json.loads(data) for data in client.datas(1)]
        assert client is bob or {"user": "bob"} in heard


def check_stats(server: Server) -> None:
    before = server.get("/stats")["subscribers"]
    server.client("/subscribe").wait_opening()
    wait_until(lambda: server.get("/stats")["subscribers"] > before, "one more subscriber")


def check_page(server: Server) -> None:
    """The first visit shows something, and what it loads is a stream."""
    assert '"/subscribe"' in server.get("/")


def check_todos(server: Server) -> None:
    """What comes after a state has been read, and before a page connects, is not missed."""
    since = server.get("/todos")["since"]
    server.post("/publish", b"between")
    assert ["between"] == server.client(f"/feed?since={since}").datas(1)


def check_feed(server: Server) -> None:
    """A page that is new gets what was kept, without a gap."""
    server.post("/publish", b"kept")
    client = server.client("/feed").wait_opening()
    while "kept" not in client.datas(1):
        pass


def check_stream_opens(server: Server, route: str) -> None:
    client = server.client(re.sub("<.*?>", "x", route), headers={"User": "ada"})
    assert 200 == client.head.status
    assert dict(client.headers)["content-type"].startswith("text/event-stream")


WAYS: dict[str, Callable[[Server], None]] = {
    "/subscribe": check_subscribe,
    "/clock": check_clock,
    "/progress": check_progress,
    "/report": check_report,
    "/inbox": check_inbox,
    "/chat/<room>": check_chat,
    "/stats": check_stats,
    "/": check_page,
    "/todos": check_todos,
    "/feed": check_feed,
}
ROUTES = re.findall(r'^@app\.get\("([^"]+)"\)', "\n".join(documented_code()), re.M)


@pytest.fixture(scope="session")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Runs the README's app once under each server, with a relay and without."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(
            lambda kind, relay: stack.enter_context(
                serve(kind, tmp_path_factory.mktemp("ways"), app=readme_app(relay))
            )
        )


@pytest.mark.parametrize(("kind", "relayed"), [("development", False), ("gthread-served", True)])
@pytest.mark.parametrize("route", ROUTES)
def test_readme_route_does_what_it_says(
    ways: Callable[..., Server],
    kind: str,
    relayed: bool,
    route: str,
    request: pytest.FixtureRequest,
) -> None:
    """Under the development server, and under gunicorn with the README's relay."""
    server = ways(kind, request.getfixturevalue("redis").url if relayed else "")
    if route in WAYS:
        WAYS[route](server)
    else:
        check_stream_opens(server, route)
    server.clear()


def test_readme_tests_pass(tmp_path: Path) -> None:
    """Those that it shows for an app's streams."""
    tests = [block for block in documented_code() if "def test_" in block]
    (tmp_path / "app.py").write_text(readme_app(), "utf-8")
    (tmp_path / "test_app.py").write_text("\n".join(tests), "utf-8")
    finished = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert 0 == finished.returncode, finished.stdout
    count = "".join(tests).count("def test_")
    assert f"{count} passed" in finished.stdout


# The app of the blog posts, with its class and function imported, and below it what the test needs.
BLOG_POST = """
import flask
from sse_bouncer import EventBouncer as MessageAnnouncer, format_sse

app = flask.Flask(__name__)
announcer = MessageAnnouncer()

@app.route("/publish", methods=["POST"])
def publish():
    data = flask.request.get_data(as_text=True)
    announcer.broadcast(msg=format_sse(data=data))
    return {}, 200

@app.route("/subscribe", methods=["GET"])
def subscribe():
    def stream():
        messages = announcer.subscribe()
        while True:
            msg = messages.get()
            yield msg

    return flask.Response(stream(), mimetype="text/event-stream")

app.add_url_rule("/stats", view_func=announcer.stats)

@app.route("/end", methods=["POST"])
def end():
    for subscription in announcer.subscribers:
        announcer.unsubscribe(subscription)
    return {}

if __name__ == "__main__":
    app.run(debug=True)
"""


@pytest.mark.parametrize("kind", ["script", "gthread-served"])
def test_blog_post(kind: str, tmp_path: Path) -> None:
    """It publishes; leavers are noticed when it does; streams end."""
    with serve(kind, tmp_path, app=BLOG_POST) as server:

        def stats() -> dict[str, int]:
            found: dict[str, int] = server.get("/stats")
            return found

        def come(**options: Any) -> Client:
            """The view subscribes when its generator starts, so wait for that."""
            before = stats()["subscribers"]
            client = server.client("/subscribe", **options)
            wait_until(lambda: stats()["subscribers"] > before, "the generator starts")
            return client

        clients = [come() for _ in range(3)]
        server.post("/publish", b"a\nb")
        assert [["a\nb"]] * 3 == [client.datas(1) for client in clients]
        LEAVES["close"](clients.pop()), LEAVES["reset"](clients.pop())

        def are_noticed() -> bool:
            server.post("/publish", b"x")
            return stats()["subscribers"] == 1

        wait_until(are_noticed, "the leavers are noticed")
        server.post("/publish", b"last")
        server.post("/end")
        assert "last" == clients[0].wait_end()[-1]
        if kind == "script":  # its debugger shows whatever a generator raises
            server.wait_for_log("Subscription.Ended: .* unsubscribed.*\n")
            server.complaints()


@pytest.mark.parametrize("kind", ["script", "gthread"])
def test_example(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By ``python example_app.py``, and by gunicorn with a Redis that two of it share."""
    source = (ROOT / "example_app.py").read_text("utf-8")
    url = "" if kind == "script" else request.getfixturevalue("redis").url
    with (
        serve(kind, tmp_path / "one", app=source, REDIS_URL=url) as one,
        serve(kind, tmp_path / "two", app=source, REDIS_URL=url) as two,
    ):
        servers = [one, two] if url else [one]
        before = one.get("/stats")["subscribers"]
        clients = [server.client("/subscribe").wait_opening() for server in servers]
        wait_until(lambda: one.get("/stats")["subscribers"] == before + 1, "stats count it")
        servers[-1].post("/publish", b"Hey!")
        assert [["Hey!"]] * len(clients) == [client.datas(1) for client in clients]
        for bad in (b"", b"\xff"):
            with pytest.raises(Refusal, match="400"):
                one.post("/publish", bad)
        assert 3 == len(one.client("/progress").events(3))


def test_example_page(browser: Browser, tmp_path: Path) -> None:
    """It goes live, and shows what anyone publishes as the text that it is."""
    source = (ROOT / "example_app.py").read_text("utf-8")
    with serve("development", tmp_path, app=source) as server:
        browser.go(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: server.get("/stats")["subscribers"], "the page's stream")
        server.post("/publish", "<b>tea</b> & cake 😀".encode())
        browser.wait_until("document.body.innerText.includes('<b>tea</b> & cake 😀')")


# =================================================================================================
# PROMISES
#
# About the package as a whole.
# =================================================================================================


def test_promise_every_public_name_exists() -> None:
    names = {"EventBouncer", "Frame", "RedisRelay", "Subscription", "format_sse", "sse_response"}
    assert names == set(sse_bouncer.__all__)
    assert all(getattr(sse_bouncer, name).__doc__ for name in names)
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", sse_bouncer.__version__)


WITHOUT_FLASK = """
import logging, os, signal, sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
def state():
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    descriptors = sorted(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else []
    return handlers, descriptors, logging.root.handlers, threading.enumerate(), sys.excepthook
before, modules = state(), set(sys.modules)
from sse_bouncer import *
loaded = {name.partition(".")[0] for name in set(sys.modules) - modules} - {"sse_bouncer"}
assert loaded <= sys.stdlib_module_names, loaded
assert before == state()
bouncer = EventBouncer()
subscription = bouncer.subscribe("a")
bouncer.broadcast({"n": 1}, "greet", channel="a")
print(repr(str(subscription.get(timeout=10))))
assert before == state()
"""


def test_promise_import_starts_nothing_and_needs_no_flask() -> None:
    """Nor does broadcasting, of JSON too."""
    assert (r"""'event: greet\ndata: {"n": 1}\n\n'""" + "\n", "") == run_python(WITHOUT_FLASK)


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
    need("mypy", "hatchling")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path)]
    built = run(*pip, *build, str(ROOT))
    assert 0 == built.returncode, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    installed = {path.name for path in (site / "sse_bouncer").iterdir()} - {"__pycache__"}
    assert {"__init__.py", "py.typed"} == installed
    (tmp_path / "user.py").write_text(USER, "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "user.py"]
    finished = run(*mypy, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(site)})
    revealed, wrong, _ = finished.stdout.splitlines()
    assert 'user.py:10: note: Revealed type is "sse_bouncer.Frame"' == revealed
    assert wrong.startswith('user.py:11: error: Argument "channel" to "broadcast"')
