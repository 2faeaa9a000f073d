"""Tests of sse_bouncer: real servers, real sockets, a real browser, and no part of ours replaced.

    pytest -n auto               everything, in as many processes as there are cores
    pytest -k "wire or fan_out"  the rooms that need no server
    pytest -k gthread            one server
    FUZZ=20 pytest -k fuzz       the random tests, twenty times as long
    TIMEOUT=300 pytest           on a slow machine

The rooms are the module's, in its order; then come STOPPING, CLIENTS, WAYS TO USE IT and PROMISES.
A test whose package or program is missing skips and says so; under ``CI=true`` it fails. No test
asserts how long something takes, or sleeps to let something else happen: it waits for what it wants
to see, and fails after TIMEOUT seconds. To have a server do something new, add a function to THE
APP UNDER TEST, and call it by ``bouncer.do(function, ...)``; for a new server, a line to SERVERS.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import dataclasses
import datetime
import decimal
import functools
import gc
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import resource
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
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from unittest.mock import Mock
from urllib.parse import parse_qs, urlencode
from wsgiref.types import StartResponse, WSGIEnvironment

import flask
import pytest
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import create_environ

import sse_bouncer
from sse_bouncer import EventBouncer, Frame, RedisRelay, Subscription, format_sse, sse_response

with contextlib.suppress(ImportError):  # the tests that need it skip
    import hypothesis.stateful
    import hypothesis.strategies as st

TIMEOUT = int(os.environ.get("TIMEOUT", 60))  # seconds: far beyond what anything here takes
FUZZ = int(os.environ.get("FUZZ", 1))  # how many times as long the random tests run
PYTHON = sys.executable
ROOT = Path(__file__).resolve().parent
PROGRAMS = ("redis-server", "nginx", "chromium", "chromedriver", "openssl")


# =================================================================================================
# THE APP UNDER TEST, which servers import. A test has one of its functions called in the server.

app = flask.Flask(__name__)
app.config.update(SECRET_KEY="secret")
bouncers: dict[str, EventBouncer] = {}
making = threading.Lock()
# What middleware, generators and teardown functions saw of a bouncer's last stream.
seen = defaultdict[str, dict[str, Any]](dict)


def bouncer_of(name: str) -> EventBouncer:
    """Return the bouncer of a name, which holds its options: so any process can make it."""
    with making:
        if name not in bouncers:
            options = json.loads(name)
            del options["number"]
            if options.get("relay"):
                options["relay"] = RedisRelay.from_url(options["relay"], name)
            bouncers[name] = EventBouncer(**options)
        return bouncers[name]


if "EARLY_BOUNCER" in os.environ:  # made when the app is imported, as most are
    bouncer_of(os.environ["EARLY_BOUNCER"])


@app.route("/<function>", methods=["GET", "POST"])
def view(function: str) -> flask.Response:
    """Call a function or a method with the request's bouncer, and with arguments in JSON."""
    functions = {**vars(EventBouncer), **globals()}
    if function not in functions:
        flask.abort(404)
    args, kwargs = flask.request.get_json(silent=True) or ([], {})
    returned = functions[function](bouncer_of(flask.request.args["bouncer"]), *args, **kwargs)
    return returned if isinstance(returned, flask.Response) else flask.jsonify(returned)


def broadcast(bouncer: EventBouncer, messages: Iterable[object], fields: Any) -> None:
    for message in messages:
        bouncer.broadcast(message, **fields)


def broadcast_and_end(bouncer: EventBouncer, how: str) -> None:
    """Broadcast numbers, and have the process end at once."""
    broadcast(bouncer, range(100), {})
    os.kill(os.getpid(), getattr(signal, how))


def subscribe(bouncer: EventBouncer) -> flask.Response:
    """Stream. The query says with what head, and what happens before the server begins it."""
    query = flask.request.args
    if "session" in query:
        flask.session["user"] = flask.request.remote_addr
    response = bouncer.stream(*query.getlist("channel"))
    for number in range(query.get("headers", 0, int)):
        response.headers[f"X-{number}"] = "x" * 50_000
    if {"held", "ended"} & query.keys():
        bouncer.broadcast("a")
    if "ended" in query:
        bouncer.disconnect("x")
    return response


def subscribe_with_state(bouncer: EventBouncer) -> flask.Response:
    """The state is a megabyte; while it is made, a thousand numbers are broadcast."""

    def load() -> str:
        broadcast(bouncer, range(1_000), {})
        return "state".ljust(2**20)

    return bouncer.stream(snapshot=load)


def subscribe_and_tell(bouncer: EventBouncer) -> flask.Response:
    """Tell who left: by the session, and the app's configuration."""
    flask.session["user"] = flask.request.args["channel"]

    def left() -> None:
        line = f"{flask.session['user']} left {flask.current_app.config['SECRET_KEY']}\n"
        os.write(1, line.encode())  # in one piece, though other threads print too
        what_was_seen(bouncer).setdefault("left", []).append(flask.session["user"])

    return bouncer.stream(flask.session["user"], on_close=left)


def items_of(source: Iterable[str]) -> Iterator[str]:
    """Yield what the context has, and then the items; note how many, and when it is closed."""
    sight = seen[flask.request.args["bouncer"]]
    try:
        yield f"{flask.session['user']}, {flask.current_app.config['SECRET_KEY']}"
        for item in source:
            sight["yielded"] = sight.get("yielded", 0) + 1
            yield item
    finally:
        sight["ended"] = sight.get("ended", 0) + 1
        os.write(1, b"finally\n")


def generate(bouncer: EventBouncer) -> flask.Response:
    """Yield what is broadcast; or, by the query, endless numbers, or with the context kept."""
    flask.session["user"], query = "ada", flask.request.args
    numbers = (str(number).rjust(1000) for number in itertools.count())
    items = items_of(numbers if "endless" in query else bouncer.subscribe("x"))
    items = flask.stream_with_context(items) if "kept" in query else items
    return sse_response(items, detach=bouncer.detach)


def generate_and_fail(bouncer: EventBouncer) -> flask.Response:
    """Yield some items, and fail by a connection of one's own, not the client's, or exit."""
    ports = [0] * int(flask.request.args["items"]) + [1]
    fail: Any = sys.exit if "exit" in flask.request.args else socket.create_connection
    items = (fail(("127.0.0.1", port)) if port else "x" for port in ports)
    return sse_response(items, detach=bouncer.detach)


def what_was_seen(bouncer: EventBouncer) -> dict[str, Any]:
    return seen[flask.request.args["bouncer"]]


def limit_descriptors(bouncer: EventBouncer, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))


def status_of_child(do: Callable[..., Any], *args: Any) -> int | None:
    """Return the exit status of a forked child that does something."""
    process = multiprocessing.get_context("fork").Process(target=do, args=args, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def fork(bouncer: EventBouncer) -> int | None:
    """Have a child that begins with nothing, and can do everything: then its status is 7."""

    def begin_anew() -> None:
        before = bouncer.stats()["subscribers"]
        with bouncer.subscribe() as subscription:
            bouncer.broadcast("of the child")
            while "of the child" not in subscription.get(timeout=30):
                pass
        atexit._run_exitfuncs()  # as a program does that ends
        os._exit(7 + before)

    return status_of_child(begin_anew)


def fork_and_stay(bouncer: EventBouncer) -> None:
    """Have a child that waits for a signal."""
    threading.Thread(target=status_of_child, args=[signal.pause]).start()


def fork_many(url: str) -> None:
    """Fork children that live on while their parent's greenlets would run, under gevent."""
    bouncer = EventBouncer(relay=RedisRelay.from_url(url, "gevent"))
    subscription = bouncer.subscribe()
    for number in range(20):
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        bouncer.broadcast(number)
        print(*next_datas(subscription, 1))


@app.after_request
def after(response: flask.Response) -> flask.Response:
    response.set_cookie("first", "1")
    response.set_cookie("second", "2")
    return response


@app.teardown_request
def teardown(error: BaseException | None) -> None:
    if flask.request.path.startswith("/subscribe"):
        seen[flask.request.args["bouncer"]]["teardown"] = repr(error)


def watched(body: Any, sight: dict[str, Any]) -> Iterator[bytes]:
    """Note how many bytes pass, and that the body is closed."""
    sight["bytes"] = 0
    with contextlib.closing(body):
        for chunk in body:
            sight["bytes"] += len(chunk)
            yield chunk
    sight["closed"] = True


def middleware(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Add a header. A query with ``watched`` has the body watched."""

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return start_response(status, [*headers, ("X-Middleware", "1")], exc_info)

    query = parse_qs(environ["QUERY_STRING"])
    body: Iterable[bytes] = inner(environ, start)
    flask.Request(environ)  # which puts itself into the environ, as in middleware that logs
    return watched(body, seen[query["bouncer"][0]]) if "watched" in query else body


inner = ProxyFix(app.wsgi_app)
app.wsgi_app = middleware  # type: ignore[method-assign]


def announce(announcer: EventBouncer) -> None:
    """Publish as the blog posts do."""
    announcer.broadcast(msg=format_sse(data="a\nb"))


def listen(announcer: EventBouncer) -> flask.Response:
    """Stream as the blog posts do."""

    def stream() -> Iterator[str]:
        messages = announcer.subscribe()
        while True:
            yield messages.get()

    return flask.Response(stream(), mimetype="text/event-stream")


def run_pywsgi() -> None:
    """Serve the app, by ``python -m gevent.monkey test_sse_bouncer.py run_pywsgi``."""
    from gevent import pywsgi  # type: ignore[import-untyped]

    server = pywsgi.WSGIServer(("127.0.0.1", 0), app)
    server.start()
    print(f"Listening at: http://127.0.0.1:{server.server_port}")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


# =================================================================================================
# HARNESS: waiting, an event stream parser, one client, servers of every kind


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """What the run needs of its process, and so of those that it starts."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 3,000 are for a thousand streams
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3_000)), hard))


def need(*names: str) -> None:
    """Skip the test if a package or a program that it uses is missing; under CI it fails."""
    for name in names:
        found = shutil.which(name) if name in PROGRAMS else importlib.util.find_spec(name)
        if found is None:
            assert os.environ.get("CI") != "true", f"{name} is missing"
            pytest.skip(f"{name} is missing")


Step = Callable[[], object]
pause = functools.partial(time.sleep, 0.01)  # leaves the processor to what is waited for


def wait_until(condition: Step, what: str, step: Step = pause) -> None:
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
        ident, wait = self.thread.ident or 0, threading.Condition.wait.__code__
        wait_until(lambda: getattr(sys._current_frames().get(ident), "f_code", 0) is wait, "waits")
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
    """Reads an event stream as WHATWG HTML, 9.2.5 and 9.2.6, says; it shares no code with ours."""

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


def are_increasing(ids: Iterable[str | None]) -> bool:
    values = [tuple(map(int, str(id).split("-"))) for id in ids]
    return values == sorted(set(values))


class Client:
    """One HTTP request, and its body as an event stream, which is read only when a test says so."""

    def __init__(self, address: int | str, path: str, method: str = "GET", **options: Any) -> None:
        """Send a request, and ``more`` along with its head: its body, or what is none."""
        self.body, self.parser, self.unread = bytearray(), Parser(), deque[Event]()
        self.ended = False  # the server has ended the body, or closed the connection
        self.whole = False  # ... and had sent all of it
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(TIMEOUT)
        if size := options.get("receive_buffer"):  # before it connects: it never grows past it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self.socket.connect(address if isinstance(address, str) else ("127.0.0.1", address))
        lines = [f"{method} {path} {options.get('protocol', 'HTTP/1.1')}", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in options.get("headers", {}).items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + options.get("more", b""))
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

    def wait_until(self, condition: Step, what: str) -> Client:
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


class Kind(NamedTuple):
    """A kind of server, with workers as small as can be: so a stream that holds one shows."""

    needs: str  # packages
    command: str  # its words, split before they are filled in
    detaches: bool = True  # whether a stream leaves the server
    has_log: bool = True  # with a line for each request
    shows_cut: bool = True  # whether a client can tell that the server has cut its stream off


# Servers would share one control socket. A stop that waits for a request outlasts the test.
GUNICORN = "{python} -m gunicorn {app} --bind 127.0.0.1:0 --access-logfile - --no-control-socket "
GUNICORN += f"--graceful-timeout {4 * TIMEOUT} -k "
WAITRESS = "{python} -m waitress --listen 127.0.0.1:0 "
UWSGI = "{uwsgi} --home {home} --module {app} --need-app --die-on-term --log-format {log} "
SERVERS = {
    "development": Kind("flask", "{python} -m flask --app {app} run --port 0"),
    "sync": Kind("gunicorn", GUNICORN + "sync"),
    "gthread": Kind("gunicorn", GUNICORN + "gthread --threads 1"),
    "gevent": Kind("gunicorn gevent packaging", GUNICORN + "gevent"),
    "waitress": Kind("waitress", WAITRESS + "--threads 2 {app}", has_log=False),
    "pywsgi": Kind("gevent", "{python} -m gevent.monkey {file} run_pywsgi"),
    # It sends no chunks.
    "uwsgi": Kind("pyuwsgi", UWSGI + "--http-socket 127.0.0.1:0 --threads 2", shows_cut=False),
    # Their bouncers are asked to let each stream go through the server.
    "gthread-served": Kind("gunicorn", GUNICORN + "gthread --threads 32", detaches=False),
    # It ends the body of a stream that fails as a whole one.
    "waitress-served": Kind("waitress", WAITRESS + "--threads 32 {app}", False, False, False),
}
KINDS = list(SERVERS)
DETACHING = [name for name, kind in SERVERS.items() if kind.detaches]
WORKERS = ["sync", "gthread", "gevent"]  # gunicorn's
SERVERS["gthread-2"] = Kind("gunicorn", GUNICORN + "gthread --workers 2")
SERVERS["uwsgi-3"] = Kind("pyuwsgi", UWSGI + "--http-socket 127.0.0.1:0 --master --processes 3")
SERVERS["uwsgi-single"] = Kind("pyuwsgi", UWSGI + "--http-socket 127.0.0.1:0")
SERVERS["script"] = Kind("flask", "{python} app.py")
SERVERS["gevent-late"] = Kind("gunicorn gevent packaging", GUNICORN + "gevent --preload")
FILLED_IN = {"python": PYTHON, "file": __file__, "home": sys.prefix}
FILLED_IN["uwsgi"] = str(Path(PYTHON).with_name("uwsgi"))
FILLED_IN["log"] = '%(addr) - - [%(ltime)] "%(method) %(uri) %(proto)" %(status) %(size)'
# What no log may hold, whatever clients do.
COMPLAINTS = re.compile("Traceback|Exception ignored|Error (on|handling) request|WORKER TIMEOUT")


class Process:
    """A program in a group of its own (workers, reloader), with its output in a file."""

    def __init__(self, command: list[str], folder: Path, **environ: str) -> None:
        self._log, env = folder / "log", environment(**environ)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def wait_for_log(self, pattern: str | re.Pattern[str], times: int = 1) -> re.Match[str]:
        """Wait until something like ``pattern`` is in the log, so many times; return the last."""

        def found() -> list[re.Match[str]]:
            has_ended = self.process.poll() is not None  # before the look at what it wrote
            matches = list(re.finditer(pattern, self.log()))
            assert len(matches) >= times or not has_ended, f"it has ended: {self.log()}"
            return matches[times - 1 :]

        wait_until(found, f"{pattern} in the log")
        return found()[-1]

    def signal(self, how: str) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, getattr(signal, how))

    def kill(self) -> None:
        self.signal("SIGKILL")
        self.process.wait(TIMEOUT)


class Server(Process):
    """A server that runs an app, with the clients and bouncers that a test has there."""

    def __init__(self, name: str, command: list[str], folder: Path, **environ: str) -> None:
        super().__init__(command, folder, **environ)
        self.name, self.kind, self.port = name, SERVERS[name], 0
        self.tls: ssl.SSLContext | None = None  # what it is asked with, if not in plain HTTP
        self.clients, self.bouncers = list[Client](), list[Remote]()
        self._looked_through = 0  # how much of the log

    def clear(self) -> None:
        """End what a test has here, and look at the log."""
        while self.clients:
            self.clients.pop().leave()
        while self.bouncers:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server has ended
                self.bouncers.pop().close()
        log = self.log()
        new, self._looked_through = log[self._looked_through :], len(log)
        assert COMPLAINTS.search(new) is None, new

    def processes(self) -> list[Path]:
        """Return what /proc has of its process and of all the children."""
        found = [Path(f"/proc/{self.process.pid}")]
        for process in found:
            with contextlib.suppress(OSError):  # it ended meanwhile
                for children in process.glob("task/*/children"):
                    found += [Path(f"/proc/{pid}") for pid in children.read_text().split()]
        return found

    def count(self, what: str) -> int:
        """Return how many threads ("task") or descriptors ("fd") all its processes have."""
        return sum(len([*process.glob(f"{what}/*")]) for process in self.processes())

    def client(self, path: str, address: int | str = 0, **options: Any) -> Client:
        """Send a request for a stream; its client leaves with the test."""
        self.clients.append(Client(address or self.port, path, **options))
        return self.clients[-1]

    def open(self, path: str, body: object = None) -> Any:
        """Make an ordinary request, a POST if there is a body, and return the response."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=TIMEOUT, context=self.tls)

    def ask(self, path: str, body: object = None) -> Any:
        """Make an ordinary request; return the JSON of the response, or its text."""
        with self.open(path, body) as response:
            is_json = response.headers.get_content_type() == "application/json"
            return json.load(response) if is_json else response.read().decode()


P = ParamSpec("P")
R = TypeVar("R")
Served = Callable[Concatenate[EventBouncer, P], R]


class Remote:
    """A bouncer of one test's own, in a server that tests share."""

    _numbers = itertools.count()

    def __init__(self, server: Server, **options: Any) -> None:
        """Detached streams get no heartbeats: what is noticed there is noticed by itself."""
        self.server = server
        own: dict[str, Any] = {"number": next(self._numbers), "detach": server.kind.detaches}
        own["heartbeat"] = None if server.kind.detaches else 0.1
        self.name = json.dumps({**own, **options})
        server.bouncers.append(self)

    def url(self, view: Callable[..., object] = subscribe, **query: object) -> str:
        query = {"bouncer": self.name, **query}
        return f"/{view.__name__}?{urlencode(query, doseq=True)}"

    def do(self, what: Served[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Have the server call a function of its app, or a method; return what that returns."""
        return self.server.ask(self.url(what), [args, kwargs])  # type: ignore[no-any-return]

    stats = functools.partialmethod(do, EventBouncer.stats)
    disconnect = functools.partialmethod(do, EventBouncer.disconnect)
    close = functools.partialmethod(do, EventBouncer.close)

    def broadcast(self, *messages: object, **fields: object) -> None:
        self.do(broadcast, messages, fields)

    def wait_for(self, **counts: int) -> None:
        wait_until(lambda: counts.items() <= self.stats().items(), f"{counts} in its stats")

    def request(self, *channels: str, view: Any = subscribe, **options: Any) -> Client:
        """Send a request for a stream, and wait for nothing."""
        query = {"channel": channels, **options.pop("query", {})}
        return self.server.client(self.url(view, **query), **options)

    def client(self, *channels: str, **options: Any) -> Client:
        """Open a stream, and wait until it is as it will be: detached, where that can be."""
        count = "detached" if self.server.kind.detaches else "subscribers"
        before = self.stats()[count]
        client = self.request(*channels, **options)
        wait_until(lambda: self.stats()[count] > before, f"one more {count}")
        return client

    def streams(self, count: int, **options: Any) -> list[Client]:
        """Open many, and wait until all are detached."""
        before = self.stats()["detached"]
        clients = [self.request(**options).wait_opening() for _ in range(count)]
        self.wait_for(detached=before + count)
        return clients


def write_app(folder: Path, text: str) -> str:
    """Write a module for servers to import, and return what they call its app."""
    (folder / "app.py").write_text(text, "utf-8")
    return "app:app"


@contextlib.contextmanager
def serve(
    name: str, folder: Path, *options: str, app: str = "test_sse_bouncer:app", **environ: str
) -> Iterator[Server]:
    """Run a server with an app that it imports. A traceback in its log fails the test."""
    kind = SERVERS[name]
    need(*kind.needs.split())
    folder.mkdir(exist_ok=True)
    command = [word.format(app=app, **FILLED_IN) for word in kind.command.split()]
    server = Server(name, [*command, *options], folder, **environ)
    try:
        server.port = int(server.wait_for_log(r"127\.0\.0\.1:([1-9]\d+)")[1])
        yield server
        server.clear()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Starts a server of each kind, once in a run."""
    with contextlib.ExitStack() as stack:
        new = tmp_path_factory.mktemp
        yield functools.cache(lambda kind: stack.enter_context(serve(kind, new(kind))))


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


def body_of(app: flask.Flask, method: str = "GET", offered: socket.socket | None = None) -> Any:
    """Call the app as a server does, and return the body: not iterated, not closed."""
    environ = {**create_environ("/", method=method), "werkzeug.socket": offered}
    return app(environ, lambda status, headers, exc_info=None: lambda data: None)


class Offer(NamedTuple):
    """A connection that a server offers, and the body of the response to its client."""

    body: Iterator[bytes]
    connection: socket.socket
    client: socket.socket

    def begin(self) -> None:
        """Send the head and the opening, as the server does."""
        self.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + next(self.body))

    def detach(self) -> None:
        self.begin()
        assert [] == list(self.body)


@contextlib.contextmanager
def offered(view: Callable[[], Any]) -> Iterator[Offer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), TIMEOUT)
        connection, _ = listener.accept()
    with client, connection, contextlib.closing(body_of(app_of(view), offered=connection)) as body:
        yield Offer(iter(body), connection, client)


def sent(bouncer: EventBouncer, last: str = "", **options: Any) -> list[Event]:
    """Return what a client gets at once that has seen ``last``."""
    app = app_of(lambda: bouncer.stream("sent", **options))
    with app.test_client().get("/", headers={"Last-Event-ID": last}) as response:
        bouncer.disconnect("sent")
        return parse(response.data.decode())


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


# =================================================================================================
# WIRE FORMAT

NO_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029"  # str.splitlines() thinks otherwise
# What is given to format_sse, what is sent, and what a browser makes of it.
FRAMES: list[tuple[dict[str, Any], str, list[Event]]] = [
    ({"data": "hi", "event": "greet"}, "event: greet\ndata: hi\n\n", [Event("hi", "greet")]),
    ({"data": "hi", "event": ""}, "data: hi\n\n", [Event("hi")]),
    ({"data": "d", "id": 0, "retry": 0}, "id: 0\nretry: 0\ndata: d\n\n", [Event("d", id="0")]),
    ({"data": "d", "event": "e", "comment": "c"}, ": c\nevent: e\ndata: d\n\n", [Event("d", "e")]),
    ({"retry": 1500}, "retry: 1500\n\n", []),
    ({"comment": ""}, ": \n\n", []),
    ({"comment": "a\nb\r\nc\rdata: d"}, ": a\n: b\n: c\n: data: d\n\n", []),
    ({"data": "a\rb\r\nc"}, "data: a\ndata: b\ndata: c\n\n", [Event("a\nb\nc")]),
    ({"data": "\nx\n\n"}, "data: \ndata: x\ndata: \ndata: \n\n", [Event("\nx\n\n")]),
    ({"data": ""}, "data: \n\n", [Event("")]),
    ({"data": NO_ENDS}, f"data: {NO_ENDS}\n\n", [Event(NO_ENDS)]),
    ({"data": "  x "}, "data:   x \n\n", [Event("  x ")]),
    ({"data": "x", "id": " 7"}, "id:  7\ndata: x\n\n", [Event("x", id=" 7")]),
    ({"data": "\ufeffgrüß 😀\0"}, "data: \ufeffgrüß 😀\0\n\n", [Event("\ufeffgrüß 😀\0")]),
    ({"data": "a\nevent: evil"}, "data: a\ndata: event: evil\n\n", [Event("a\nevent: evil")]),
    ({"data": b"gr\xc3\xbc\xc3\x9f\r\n"}, "data: grüß\ndata: \n\n", [Event("grüß\n")]),
    ({"data": memoryview(b"hi")}, "data: hi\n\n", [Event("hi")]),
    ({"data": {"n": "a\nb"}}, 'data: {"n": "a\\nb"}\n\n', [Event('{"n": "a\\nb"}')]),
    ({"data": Frame("data: x\r\r\n")}, "data: x\r\r\n", [Event("x")]),
]


@pytest.mark.parametrize(("given", "sent", "read"), FRAMES, ids=[sent for _, sent, _ in FRAMES])
def test_wire_to_the_byte_and_read_back(given: Any, sent: str, read: list[Event]) -> None:
    frame = format_sse(**given)
    assert sent == frame
    assert read == parse(frame)


def fuzz(examples: int, **options: Any) -> Any:
    """Settings of hypothesis: the same examples in each run, FUZZ times as many as asked for."""
    options |= {"derandomize": True, "database": None, "deadline": None}
    options |= {"suppress_health_check": list(hypothesis.HealthCheck)}
    return hypothesis.settings(max_examples=examples * FUZZ, **options)


def test_wire_fuzz_any_text_is_read_back() -> None:
    """Whatever is sent arrives as it was, and nothing else."""
    need("hypothesis")
    pieces = ["\n", "\r", "\r\n", ":", " ", "\0", "\ufeff", "data: ", "id: 1", "\nid:2\n\n", "é😀"]
    text = st.lists(st.sampled_from([*pieces, NO_ENDS]) | st.text(max_size=3)).map("".join)
    line = text.map(lambda value: re.sub("[\r\n\0]", "", value))
    fields = {"data": text, "event": line, "id": line}
    more = {"retry": st.integers(0, 10**6), "comment": text}

    @hypothesis.given(st.lists(st.fixed_dictionaries(fields, optional=more), max_size=8))
    def check(given: list[dict[str, Any]]) -> None:
        expected = [
            Event(re.sub("\r\n?", "\n", each["data"]), each["event"] or "message", each["id"])
            for each in given
        ]
        assert expected == parse(*(format_sse(**each) for each in given))

    fuzz(100)(check)()


def test_wire_json_is_by_the_apps_provider_in_threads_too() -> None:
    """It may return bytes and take no options, and init_app() is enough. NaN is refused."""

    class Provider(flask.json.provider.JSONProvider):
        def dumps(self, obj: Any) -> Any:  # type: ignore[override]
            return b"[%b]" % json.dumps(obj).encode()

    app, bouncer = flask.Flask("test"), EventBouncer()
    app.json = Provider(app)
    bouncer.init_app(app)
    with bouncer.subscribe() as subscription, app.app_context():
        Task(bouncer.broadcast, ["NaN"]).result()
        assert '[["NaN"]]' == datas([format_sse(["NaN"])])[0] == held(subscription)[0]
        with pytest.raises(ValueError, match="NaN"):
            format_sse(math.nan)


def test_wire_json_without_flask_is_what_flask_writes() -> None:
    """Dates, decimals and UUIDs too."""
    zone = datetime.timezone(datetime.timedelta(seconds=7200))
    special: list[Any] = [datetime.datetime(2030, 1, 2, 3, 4, 5, 6, zone), uuid.UUID(int=7)]
    special += [datetime.datetime(2030, 1, 2), datetime.date(2030, 1, 2)]
    special += [decimal.Decimal("1.10"), {"key": "grüß"}]
    program = "import datetime; from decimal import Decimal; from uuid import UUID\n"
    program += f"import sse_bouncer; print(sse_bouncer.format_sse({special}), end='')"
    assert format_sse(special) == run(PYTHON, "-c", program).stdout


def test_wire_data_that_is_framed_by_hand_is_warned_of_once() -> None:
    program = "import sse_bouncer as s; [s.format_sse(f'data: {n}\\n\\n') for n in 'ab']"
    assert 1 == run(PYTHON, "-c", program).stderr.count("looks like a frame")


async def generate_async() -> AsyncIterator[str]:
    yield "a"


FRAME, CLIENT = format_sse("x"), type("Client", (), {"get_connection_kwargs": None})
# A bouncer with a history takes no ids that are not its own: clients come back with them.
OWN_IDS = [format_sse("x", id="7"), Frame("id\ndata: x\n\n"), Frame("data: x\r\nid:7\r\n\r\n")]
NUMBERS = [0, -1, math.nan, math.inf, 86_401, 1e9]
# Everything that the public API refuses: a call, values that raise a ValueError, and a TypeError.
REFUSED: dict[str, tuple[Callable[[Any], object], list[Any], list[Any]]] = {
    "format_sse-data": (format_sse, [None, b"\xff", "\ud800", math.nan], [["x" * 999, {1, 2}]]),
    "format_sse-event-data": (lambda v: format_sse(v, event="x"), [FRAME], []),
    "format_sse-event": (lambda v: format_sse(1, v), ["a\nb", "a\rb", "\0", "\ud8ff"], [5]),
    "format_sse-id": (lambda v: format_sse(1, id=v), ["1\n\nx", "1\r", "\0"], [1.5, True]),
    "format_sse-retry": (lambda v: format_sse(1, retry=v), [-1], [True, "9", 1.5]),
    "format_sse-comment": (lambda v: format_sse(1, comment=v), ["\ud800"], [5]),
    "Frame-frame": (Frame, ["data: x\n", "data: x\r\n", "", "data: \ud800\n\n"], [b"\n\n"]),
    "EventBouncer-maxsize": (EventBouncer, [0, -1], [True, None, 1.5]),
    "EventBouncer-history": (lambda v: EventBouncer(history=v), [-1], [True, None]),
    "EventBouncer-heartbeat": (lambda v: EventBouncer(heartbeat=v), NUMBERS, ["1", True]),
    "heartbeat-event": (lambda v: EventBouncer(heartbeat_event=v), ["a\nb"], [5]),
    "EventBouncer-retry": (lambda v: EventBouncer(retry=v), [-1, (2, 1), (1,)], [True, 1.5]),
    "max_subscribers": (lambda v: EventBouncer(max_subscribers=v), [0], [True]),
    "EventBouncer-relay": (lambda v: EventBouncer(relay=v), [], ["redis://localhost"]),
    "subscribe-channel": (lambda v: EventBouncer().subscribe(v), ["", "\ud800"], [5, ["a"]]),
    "broadcast-event": (lambda v: EventBouncer().broadcast("x", v), ["a\nb", "gap"], [5]),
    "broadcast-channel": (lambda v: EventBouncer().broadcast(1, channel=v), [""], [5, ["a"]]),
    "broadcast-id": (lambda v: EventBouncer(history=1).broadcast(v), OWN_IDS, []),
    "disconnect-channel": (lambda v: EventBouncer().disconnect(v), [""], [5]),
    "get-timeout": (lambda v: EventBouncer().subscribe().get(timeout=v), [-1, math.nan], []),
    "sse_response-source": (sse_response, [], ["data", b"data", {"n": 1}, 5, None]),
    "sse_response-async-source": (sse_response, [], [generate_async()]),
    "RedisRelay-client": (RedisRelay, [], ["redis://localhost", None]),
    "RedisRelay-key": (lambda v: RedisRelay(CLIENT, v), ["\ud800"], [b"sse"]),
    "RedisRelay-maxlen": (lambda v: RedisRelay(CLIENT, maxlen=v), [0], [1.5]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str) -> None:
    """The message names the argument, says what was expected, and shows in short what was given."""
    do, values, types = REFUSED[name]
    argument = name.rpartition("-")[2]
    for error, bad in [(ValueError, values), (TypeError, types)]:
        for value in bad:
            with pytest.raises(error) as caught:
                do(value)
            given = re.escape(repr(value)[:40])
            assert re.match(f"{argument}: expected .+ got .*{given}.*; ", str(caught.value))
            assert len(str(caught.value)) < 500


# =================================================================================================
# RELAY: a real Redis that is lost, trimmed, deleted and restored; and a server of several processes


class Quiet(list[Any]):
    """A relay in memory, whose `read` does not wait."""

    reads = 0

    def publish(self, channel: str | None, frame: str | None) -> None:
        self.append((f"{len(self)}-1", "0-0", channel, frame))

    def recent(self, count: int) -> list[Any]:
        return self[-count:]

    def read(self, after: str, timeout: float) -> list[Any]:
        self.reads += 1
        return [entry for entry in self if str(entry[0]) > after]


class Redis(Process):
    """A redis-server of our own. When it is killed it loses nothing, and can be started again."""

    hang = functools.partialmethod(Process.signal, "SIGSTOP")
    go_on = functools.partialmethod(Process.signal, "SIGCONT")

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.folder, self.port, self.url = folder, port, f"redis://127.0.0.1:{port}"
        command = f"redis-server --bind 127.0.0.1 --port {port} --appendonly yes --appendfsync no"
        self._command = [*command.split(), *options]
        self.start()

    def start(self) -> None:
        super().__init__(self._command, self.folder)
        self.wait_for_log("Ready to accept connections")

    def client(self, kind: str = "Redis", **options: Any) -> Any:
        """Return a client that does not try again by itself: its errors come promptly."""
        import redis

        return getattr(redis, kind)(host="127.0.0.1", port=self.port, retry=None, **options)


@pytest.fixture(scope="session")
def new_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Redis]]:
    """Starts Redis servers, which end with the run."""
    need("redis", "redis-server")
    with contextlib.ExitStack() as stack:

        def new(*options: str) -> Redis:
            folder, port = tmp_path_factory.mktemp("redis"), stack.enter_context(held_port())
            redis = Redis(folder, port, *options)
            stack.callback(redis.kill)
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
        relay = relay or RedisRelay(self.redis.client(**options), self.key)
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


@pytest.mark.parametrize("resp", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
def test_redis_carries_anything(resp: int, decode: bool, processes: Any, new_redis: Any) -> None:
    """Any text, on channels of any name, live and later, with the documented rights alone."""
    rights = "--user app on >secret ~* resetchannels -@all +eval +xadd +xrange +xrevrange +xread"
    processes.redis, channel = new_redis(*rights.split()), "grüß 😀"
    options: dict[str, Any] = {"protocol": resp, "decode_responses": decode}
    options |= {"username": "app", "password": "secret"}
    one, two = processes(**options), processes(**options)
    start, subscription = one.latest_id(), two.subscribe(channel)
    texts = ["a\nb", "", " x", channel, "\0", "x\u2028y", "id: 7"]
    broadcast(one, texts, {"channel": channel})
    live = next_events(subscription, len(texts))
    assert texts == [event.data for event in live]
    late = processes(**options).subscribe(channel, last_event_id=start)
    assert live == next_events(late, len(live))


KILL, HANG = (Redis.kill, Redis.start, "ConnectionError"), (Redis.hang, Redis.go_on, "TimeoutError")


@pytest.mark.parametrize("fault", [KILL, HANG], ids=["is killed", "hangs"])
def test_redis_that_fails_costs_no_event(fault: Any, processes: Any, new_redis: Any) -> None:
    """Publishers get the client's error, and what was accepted arrives once, in order."""
    from redis import exceptions

    fail, mend, error = fault
    redis = processes.redis = new_redis()
    publisher, process = processes(socket_timeout=1.0), processes(socket_timeout=1.0)
    subscription, accepted = process.subscribe(), ["before"]
    publisher.broadcast("before")
    wait_until(subscription.qsize, "it arrives")
    fail(redis)
    with pytest.raises(getattr(exceptions, error)):
        while True:
            publisher.broadcast(str(len(accepted)))
            accepted.append(str(len(accepted)))
    mend(redis)
    wait_until(lambda: not Task(publisher.broadcast, "back").exception(TIMEOUT), "it is back")
    received = list(iter(lambda: next_datas(subscription, 1)[0], "back"))
    refused = str(len(accepted))  # which may have arrived all the same
    assert accepted == [text for text in received if text != refused]


def test_redis_that_is_away(processes: Processes, new_redis: Any, caplog: Any) -> None:
    """A logout ends streams here, and raises. A process that starts has a gap. Each logs it."""
    redis = processes.redis = new_redis()
    process, late = processes(), processes()
    ada, bob = process.subscribe("ada"), process.subscribe("bob")
    redis.kill()
    with pytest.raises(Exception, match="(?i)connect"):
        process.disconnect("ada")
    assert [] == datas(ada)
    of_late = late.subscribe(last_event_id="1-1")
    wait_until(lambda: caplog.text.count("cannot be read") == 2, "the log says so, for both")
    redis.start()
    wait_until(lambda: not Task(process.broadcast, "back").exception(TIMEOUT), "it is back")
    assert ["back"] == next_datas(bob, 1)
    assert [GAP] == next_datas(of_late, 1)
    assert 2 == len(re.findall("cannot be read.*ConnectionError", caplog.text))


def test_redis_client_that_is_ahead_of_its_process_waits(processes: Any, monkeypatch: Any) -> None:
    """It has seen at another process what this one has yet to read: no gap, and nothing twice."""
    reading, late = threading.Event(), RedisRelay(processes.redis.client(), processes.key)
    read, behind, ahead = late.read, processes(late), processes()
    monkeypatch.setattr(late, "read", lambda *args: reading.wait(TIMEOUT) and read(*args))
    behind.subscribe()
    *_, last = ids_of(ahead, "a", "b")
    arrival = Task(behind.subscribe, last_event_id=last).wait_until_blocked()
    reading.set()
    ahead.broadcast("c")
    assert ["c"] == next_datas(arrival.result(), 1)
    assert not arrival.result().gap


LOSSES: list[Any] = [("XTRIM stream MAXLEN = 1", ["3"]), ("DEL stream", [])]
LOSSES += [("COPY copy stream REPLACE", [])]  # an older copy


@pytest.mark.parametrize(("loss", "left"), LOSSES, ids=["trimmed", "deleted", "restored"])
def test_redis_loss_is_one_gap(loss: str, left: Any, processes: Any, new_redis: Any) -> None:
    """Also to clients that come back from before it. What is left of three events comes, once."""
    processes.redis, processes.key = new_redis(), "stream"
    bouncer, publisher, client = processes(), processes(), processes.redis.client()
    subscription = bouncer.subscribe()
    publisher.broadcast("first")
    client.copy("stream", "copy")
    publisher.broadcast("second")
    received = next_events(subscription, 2)
    seconds, micros = client.time()
    wait_until(lambda: client.time() > (seconds, micros + 1000), "no id of Redis's comes again")
    step = client.pipeline()  # in which nobody can read
    broadcast(processes(RedisRelay(step, "stream")), "123", {})
    step.execute_command(*loss.split())
    step.execute()
    broadcast(publisher, "bc", {})
    rest = [*left, "b", "c"]
    received += next_events(subscription, 1 + len(rest))
    assert ["first", "second", GAP, *rest] == list(map(str, received))
    for event in received[:2]:
        assert [GAP, *rest] == held(bouncer.subscribe(last_event_id=event.id))
    assert rest == held(bouncer.subscribe(last_event_id=received[2].id))


# Fields of entries that someone else has added to the stream.
FOREIGN: list[dict[Any, Any]] = [{b"\xff": b"\xfe"}, {"frame": b"data: \xff\n\n"}]
FOREIGN += [{"frame": "data: no blank line"}, {"frame": "data: x\n\n", "after": "text"}]
FOREIGN += [{"channel": "", "frame": "data: x\n\n"}]


def test_redis_skips_foreign_entries(processes: Processes, caplog: Any) -> None:
    """They are no events and no gap, live and for a new process; the log has a line for each."""
    bouncer = processes(decode_responses=True)  # which would fail at what is not UTF-8
    start, subscription = bouncer.latest_id(), bouncer.subscribe()
    bouncer.broadcast("first")
    for fields in FOREIGN:
        processes.redis.client().xadd(processes.key, fields)
    bouncer.broadcast("last")
    assert ["first", "last"] == next_datas(subscription, 2)
    skipped = [message for message in caplog.messages if "not an event" in message]
    assert len(FOREIGN) == len(skipped)
    assert ["first", "last"] == held(processes().subscribe(last_event_id=start))


@pytest.mark.parametrize("has_relay", [False, True])
def test_redis_or_none_under_late_gevent(has_relay: bool, redis: Redis, tmp_path: Path) -> None:
    """Patched after the bouncer was made. The first 40 clients at once get everything, once."""
    name = json.dumps({"number": 0, "relay": redis.url if has_relay else None})
    with serve("gevent-late", tmp_path / "app", EARLY_BOUNCER=name) as server:
        bouncer = Remote(server)
        bouncer.name = name
        assert 404 == server.client("/nothing").head.status  # its worker is there
        server.signal("SIGSTOP")
        clients = [bouncer.request("x") for _ in range(40)]
        server.signal("SIGCONT")
        bouncer.wait_for(subscribers=40)
        bouncer.broadcast("a", "b")
        bouncer.disconnect("x")
        assert [["a", "b"]] * 40 == [client.wait_end() for client in clients]


@pytest.mark.parametrize("happens", ["client", "kill", "hang"])  # in the first it is well
def test_redis_is_not_waited_for_because_of_forged_ids(
    happens: str, processes: Processes, new_redis: Any, monkeypatch: Any
) -> None:
    """A worker waits only for what Redis has; if that hangs, once."""
    redis = processes.redis = new_redis()
    bouncer, in_vain, wait = processes(), list[object](), threading.Condition.wait
    forged = [f"{10**15 + number}-0" for number in range(20)]
    ids_of(bouncer, "known")
    getattr(redis, happens)()
    arrivals = [Task(bouncer.subscribe, last_event_id=id) for id in forged]
    assert all(arrival.result().gap for arrival in arrivals)

    def noted(self: threading.Condition, timeout: float | None = None) -> bool:
        is_notified = wait(self, timeout)
        if not is_notified and threading.current_thread() is threading.main_thread():
            in_vain.append(timeout)
        return is_notified

    monkeypatch.setattr(threading.Condition, "wait", noted)
    assert all(bouncer.subscribe(last_event_id=id).gap for id in forged)
    assert [] == in_vain
    redis.go_on()


@pytest.mark.parametrize("wrong", [[], [(), ("no id", "0-0", None, None)]], ids=["no", "some"])
def test_relay_that_returns_at_once_is_read_on_but_not_all_the_time(wrong: Any) -> None:
    relay = Quiet([*wrong, ("1-0", "0-0", None, "data: a\n\n")])
    bouncer = EventBouncer(history=9, relay=relay)
    assert "1-0" == bouncer.latest_id()
    with bouncer.subscribe() as subscription, pytest.raises(queue.Empty):
        relay.clear()
        while True:
            subscription.get(timeout=0.5)
    assert 1 <= relay.reads < 100


def test_redis_clients_that_would_deliver_nothing_are_refused(monkeypatch: Any) -> None:
    """Those for asyncio, and of a redis-py that cannot be told not to decode."""
    need("redis")
    import redis.asyncio

    with pytest.raises(TypeError, match="asyncio"):
        RedisRelay(redis.asyncio.Redis())
    monkeypatch.setattr(redis, "VERSION", (4, 3, 6))
    with pytest.raises(TypeError, match="4.4"):
        RedisRelay(redis.Redis())


def create_app(bouncer: EventBouncer, name: str = "shop", **config: object) -> flask.Flask:
    """Make an app as a factory does, with what the environment says too."""
    app = flask.Flask(name)
    app.config.from_prefixed_env()
    app.config.update(config)
    bouncer.init_app(app)
    return app


def test_redis_is_connected_by_init_app_each_event_once(redis: Redis) -> None:
    """Under the app's own key, also for a bouncer that had other apps with subscribers before."""
    bouncer, other = EventBouncer(), EventBouncer()
    create_app(other, "bank", SSE_REDIS_URL=redis.url)
    for _ in range(3):
        create_app(bouncer, SSE_REDIS_URL=redis.url)
        with bouncer.subscribe() as subscription:
            other.broadcast("by the bank")
            bouncer.broadcast("by the shop")
            RedisRelay.from_url(redis.url, "sse:shop").publish(None, format_sse("by a cron job"))
            assert ["by the shop", "by a cron job"] == next_datas(subscription, 2)
            assert subscription.empty()
    bouncer.close()


def test_processes_all_agree_and_a_logout_is_for_all(processes: Processes) -> None:
    """Every client gets every event once, with one id and in one order. A logout is no gap."""
    one, two = processes(), processes()
    adas = [Task(list, each.subscribe("ada")) for each in (one, two)]
    bobs = [Task(list, each.subscribe("bob")) for each in (one, two)]
    for publisher in [Task(broadcast, each, range(50), {}) for each in (one, two)]:
        publisher.result()
    one.disconnect("ada")
    one.broadcast("still here", channel="bob")
    one.disconnect("bob")
    order, other = (parse(*ada.result()) for ada in adas)
    assert order == other
    assert are_increasing(event.id for event in order)
    assert sorted([*range(50)] * 2) == sorted(int(event.data) for event in order)
    assert [[*map(str, order), "still here"]] * 2 == [datas(bob.result()) for bob in bobs]
    for each in (two, processes(), processes(history=0)):
        assert one.latest_id() == each.latest_id()
        assert not each.subscribe(last_event_id=one.latest_id()).gap


def test_processes_without_a_relay_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the cure; those with a relay are not."""
    for relay in (Quiet(), None, None):
        client = app_of(EventBouncer(relay=relay).stream).test_client()
        client.get("/", multiprocess=True).close()
        assert (relay is None) == ("several processes" in caplog.text)
    assert 1 == len(re.findall("several processes.*RedisRelay", caplog.text))


@on("gthread-2")
def test_processes_serve_clients_that_hop_between_them(server: Server, redis: Redis) -> None:
    """They miss nothing, get nothing twice and see no gap while events flow."""
    check_followed(Remote(server, relay=redis.url, history=10_000, heartbeat=0.1))


def test_redis_is_asked_little(processes: Any, new_redis: Any, caplog: Any) -> None:
    """By one connection of each process, and for nothing twice. Silence is not taken for death."""
    with held_port() as bus:
        redis = new_redis("--cluster-enabled", "yes", "--cluster-port", str(bus))
    client, processes.redis = redis.client(decode_responses=True), redis
    client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "a cluster")
    kinds, subscriptions = ["Redis", "RedisCluster"], list[Subscription]()
    for kind in kinds:
        bouncer = processes(kind=kind, socket_timeout=0.2, client_name=kind)
        subscriptions += [bouncer.subscribe() for _ in range(50)]
        bouncer.broadcast("x" * 2**20)
    assert [1] * 100 == [len(next_events(subscription, 1)) for subscription in subscriptions]
    before = client.info("all")
    reads = before["cmdstat_xread"]["calls"] + 10
    wait_until(lambda: client.info("commandstats")["cmdstat_xread"]["calls"] >= reads, "it reads")
    assert client.info()["total_net_output_bytes"] - before["total_net_output_bytes"] < 2**20
    names = [connection["name"] for connection in client.client_list()]
    assert all(1 <= names.count(kind) <= 2 for kind in kinds)
    assert [] == caplog.messages


def test_redis_keeps_about_maxlen(processes: Processes) -> None:
    relay = RedisRelay(processes.redis.client(), processes.key, maxlen=10)
    ids = ids_of(processes(relay), *range(300))
    kept = processes.redis.client().xlen(processes.key)
    assert 10 <= kept < 300
    late = processes(history=1000).subscribe(last_event_id=ids[0])
    assert [GAP, *map(str, range(300 - kept, 300))] == held(late)


# =================================================================================================
# FAN-OUT: every event to every subscriber, in one order; and what one gets that comes back


@pytest.mark.parametrize("publishers", [1, 8, 16])
def test_fan_out_all_see_one_order_and_a_burst_drops_nobody(publishers: int) -> None:
    """A queue that was emptied has kept up, though another publisher has filled it since."""
    bouncer = EventBouncer(maxsize=16)
    sent = [[[place, n] for n in range(1600 // publishers)] for place in range(publishers)]
    readers = [Task(datas, bouncer.subscribe()) for _ in range(20)]
    for loop in [Task(broadcast, bouncer, messages, {}) for messages in sent]:
        loop.result()
    bouncer.close()
    order, *others = [reader.result() for reader in readers]
    assert [order] * len(others) == others
    received = list(map(json.loads, order))
    assert sent == [[pair for pair in received if pair[0] == place] for place in range(publishers)]
    assert 0 == bouncer.stats()["dropped"]


def test_fan_out_burst_beside_busy_threads_drops_nobody() -> None:
    """By the clock, a reader's time would be up before it gets a chance to run."""
    bouncer, has_ended = EventBouncer(maxsize=16), threading.Event()
    for _ in range(8):
        Task(lambda: any(iter(has_ended.is_set, True)))
    reader = Task(next_datas, bouncer.subscribe(), 100)
    broadcast(bouncer, range(100), {})
    has_ended.set()
    assert 100 == len(reader.result())


def test_fan_out_a_reader_that_never_catches_up_is_dropped_in_the_end() -> None:
    """One that makes room each time, but no more than that, would slow publishers down for ever."""
    bouncer = EventBouncer(maxsize=2)
    subscription = bouncer.subscribe()

    def read() -> None:
        while bouncer.subscribers:
            wait_until(lambda: subscription.full() or not bouncer.subscribers, "it is full")
            subscription.get()

    reader = Task(read)
    wait_until(lambda: bouncer.stats()["dropped"], "dropped", lambda: bouncer.broadcast("x"))
    reader.result()


@pytest.mark.parametrize("how", ["unsubscribe", "close", "disconnect"])
def test_fan_out_an_end_wakes_a_reader_and_twice_is_harmless(how: str) -> None:
    """Then get raises what servers take for a client that left, now and each time."""
    bouncer = EventBouncer()
    subscription = bouncer.subscribe("a")
    reader = Task(datas, subscription).wait_until_blocked()
    arguments: Any = {"unsubscribe": [subscription], "close": [], "disconnect": ["x", "a"]}
    for _ in range(2):
        getattr(bouncer, how)(*arguments[how])
    assert [] == reader.result()
    assert () == bouncer.subscribers
    with pytest.raises(BrokenPipeError, match="Errno 32"):
        subscription.get()


def test_subscription_is_the_reading_half_of_a_queue() -> None:
    """It leaves with its block, and keeps what it holds."""
    bouncer = EventBouncer(maxsize=2)
    with bouncer.subscribe("a", "b") as subscription:
        assert subscription.empty()
        broadcast(bouncer, "xx", {"channel": "b"})
        assert 2 == subscription.qsize()
        assert subscription.full()
        assert "data: x\n\n" == subscription.get(timeout=1) == next(subscription)
        for block, timeout in ((False, None), (True, 0), (True, 0.001)):
            with pytest.raises(queue.Empty):
                subscription.get(block, timeout)
    assert () == bouncer.subscribers
    assert [] == list(subscription)


def test_fan_out_fuzz_does_what_a_small_model_does() -> None:
    """Whatever is done in whatever order, against a model that keeps everything in lists."""
    need("hypothesis")
    stateful = hypothesis.stateful
    channels = st.lists(st.sampled_from("ab"), max_size=2)
    foreign = ["1-1", f"{10**19}-0", f"{10**21}-0", "1_0-1", "١-1", "1-1\n", "x", "1-" * 50_000]
    lasts = st.sampled_from([None, None, "", "earliest", *foreign])

    @dataclasses.dataclass(eq=False)
    class Reader:
        real: Subscription
        channels: list[str]
        held: list[tuple[str, str]]  # data and id
        limit: int  # how many it may hold
        is_open: bool = True

    class Machine(stateful.RuleBasedStateMachine):
        ids: Any = stateful.Bundle("ids")
        readers: Any = stateful.Bundle("readers")

        @stateful.initialize(target=ids)
        def begin(self) -> str:
            self.bouncer = EventBouncer(maxsize=2, history=3)
            start = self.bouncer.latest_id() or ""
            # Data, id and channel of all that there was; to begin with, what nobody gets.
            self.events: list[tuple[str, str, str | None]] = [("", start, "nobody's")]
            self.model = list[Reader]()
            self.dropped = self.gaps = 0
            return start

        @stateful.rule(target=readers, channels=channels, last=ids | lasts)
        def come(self, channels: list[str], last: str | None) -> Reader:
            newest = len(self.events) - 1
            mine = [n for n, event in enumerate(self.events) if event[2] in (None, *channels)]
            lost = max([0, *(n for n in mine if n <= newest - 3)])  # the newest that is not kept
            seen: dict[Any, int] = {id: n for n, (_, id, _) in enumerate(self.events)}
            after = (seen | {None: newest, "": newest, "earliest": lost}).get(last, -1)
            held = [self.events[n][:2] for n in mine if n > max(after, lost)]
            if after < lost:
                self.gaps += 1
                held.insert(0, (GAP, self.events[lost][1]))
            real = self.bouncer.subscribe(*channels, last_event_id=last)
            assert real.gap == (after < lost)
            self.model.append(Reader(real, channels, held, len(held) + 2))
            return self.model[-1]

        @stateful.rule(target=ids, channel=st.none() | st.sampled_from("ab"))
        def broadcast(self, channel: str | None) -> str:
            data = str(len(self.events))
            with pytest.raises(ValueError, match="surrogates"):  # which nobody gets
                self.bouncer.broadcast("\ud800", channel=channel)
            self.bouncer.broadcast(data, channel=channel)
            self.events.append((data, self.bouncer.latest_id() or "", channel))
            for reader in self.model:
                if reader.is_open and channel in (None, *reader.channels):
                    if len(reader.held) < reader.limit:
                        reader.held.append(self.events[-1][:2])
                    else:
                        reader.is_open = False
                        self.dropped += 1
            return self.events[-1][1]

        @stateful.rule(reader=readers)
        def read(self, reader: Reader) -> None:
            if not reader.held:
                with pytest.raises(queue.Empty if reader.is_open else sse_bouncer.Ended):
                    reader.real.get_nowait()
                return
            (event,) = parse(reader.real.get_nowait())
            assert reader.held.pop(0) == (str(event), event.id)
            if not reader.held:
                reader.limit = 2

        @stateful.rule(channel=st.sampled_from("ab"))
        def disconnect(self, channel: str) -> None:
            self.bouncer.disconnect(channel)
            for reader in self.model:
                reader.is_open = reader.is_open and channel not in reader.channels

        @stateful.invariant()
        def agree(self) -> None:
            live = {reader.real for reader in self.model if reader.is_open}
            assert live == set(self.bouncer.subscribers)
            counts = {"events": len(self.events) - 1, "dropped": self.dropped, "gaps": self.gaps}
            assert counts.items() <= self.bouncer.stats().items()
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
    start, subscription = bouncer.latest_id(), bouncer.subscribe()
    bouncer.broadcast("a\nb", "greet", retry=7)
    frame, id = subscription.get(timeout=TIMEOUT), bouncer.latest_id()
    assert f"id: {id}\n" + format_sse("a\nb", "greet", retry=7) == frame
    assert are_increasing([start, id, *ids_of(bouncer, *range(300)), *ids_of(feed(history=1), 1)])
    assert EventBouncer().latest_id() is None


@pytest.mark.parametrize(("after", "missed"), [*enumerate([[GAP, *"234"], "234", "34", "4", ""])])
def test_history_replays_what_was_missed(feed: Any, after: int, missed: Iterable[str]) -> None:
    """From memory, and at a process just started with a relay. The first of four is not kept."""
    bouncer = feed(history=3)
    ids = [bouncer.latest_id(), *ids_of(bouncer, *range(1, 5))]
    started = feed(history=3) if bouncer.relay else bouncer
    subscription = started.subscribe(last_event_id=ids[after])
    started.broadcast("live")
    expected = [*missed, "live"]
    assert expected == next_datas(subscription, len(expected))
    assert subscription.gap is (after == 0)


def test_history_of_more_channels_than_it_remembers_errs_on_the_side_of_a_gap() -> None:
    bouncer = EventBouncer(history=1)
    start = bouncer.latest_id()
    for number in range(10_100):
        bouncer.broadcast("x", channel=str(number))
    assert bouncer.subscribe("another", last_event_id=start).gap
    assert not bouncer.subscribe("another", last_event_id=bouncer.latest_id()).gap


@pytest.mark.parametrize("history", [0, 3])
def test_fan_out_encodes_a_large_event_twice_at_most(history: int) -> None:
    """To check it, and to send it: an id costs no more."""
    encoded, data, bouncer = [], "x" * 10**6, EventBouncer(history=history)

    def note(frame: object, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "encode" and len(called.__self__) >= len(data):
            encoded.append(called)

    sys.setprofile(note)
    try:
        bouncer.broadcast(data)
    finally:
        sys.setprofile(None)
    assert len(encoded) <= 2


def test_fan_out_logs_nothing_under_its_lock(caplog: Any, monkeypatch: Any) -> None:
    """A log handler may wait for a thread that uses the bouncer."""
    bouncer, stats = EventBouncer(relay=Quiet([("1-0", "0-0", None, "no frame")])), list[Any]()

    def emit(record: logging.LogRecord) -> None:
        if "not an event" in record.getMessage():
            stats.append(Task(bouncer.stats).result())

    monkeypatch.setattr(caplog.handler, "emit", emit)
    with bouncer.subscribe():
        wait_until(lambda: stats, "it is logged, and answered")


def test_history_of_each_process_that_uwsgi_forks_has_ids_of_its_own(tmp_path: Path) -> None:
    """Its master has loaded the app, and forks without a word to Python."""
    name, ids = json.dumps({"number": 0, "history": 1}), set[Any]()
    with serve("uwsgi-3", tmp_path / "app", EARLY_BOUNCER=name) as server:
        bouncer = Remote(server)
        bouncer.name = name
        wait_until(lambda: len(ids) > 1, "two", lambda: ids.add(bouncer.do(EventBouncer.latest_id)))


def test_fan_out_one_warning_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    for most in (3, 4, 3):
        bouncer = EventBouncer(max_subscribers=most)
        kept = [bouncer.subscribe() for _ in range(most)]
        assert app_of(bouncer.stream).test_client().get("/").text.startswith("retry: ") and kept
    assert 2 == caplog.text.count("come back later")


def test_fan_out_subscription_that_is_streamed_cannot_be_read() -> None:
    """Nor be left by a with block before its stream begins: errors, and no wait for ever."""
    bouncer = EventBouncer()
    with pytest.raises(RuntimeError, match="sse_response"), bouncer.subscribe() as early:
        kept = sse_response(early)
    subscription = bouncer.subscribe()
    with offered(lambda: sse_response(subscription)) as offer:
        offer.detach()
        with pytest.raises(RuntimeError, match="get: "):
            Task(subscription.get).result()
    kept.close()


def test_fan_out_says_what_one_wants_to_see(caplog: Any) -> None:
    """By repr() and debug lines: how many, how far behind, dropped, a gap."""
    caplog.set_level("DEBUG", "sse_bouncer")
    bouncer = EventBouncer(1, history=1)
    first = bouncer.latest_id()
    reader, slow = bouncer.subscribe("a", "b"), bouncer.subscribe("c")
    for number in range(2):
        bouncer.broadcast(number, channel="c")
    assert bouncer.subscribe("c", last_event_id=first).gap
    listed = ", ".join(f"{name}={count}" for name, count in bouncer.stats().items())
    assert f"<EventBouncer {listed}>" == repr(bouncer)
    assert "<Subscription to 'a', 'b', 0 frames behind>" == repr(reader)
    assert "<Subscription to 'c', has ended: dropped>" == repr(slow)
    dropped, gap = caplog.messages
    assert re.search("dropped: .*'c'.* 1 .*behind", dropped)
    assert re.search("'c'.* missed something for good", gap)


@pytest.mark.parametrize("foreign", ["earliest", "17", "a-b", "1-1-1"])
def test_history_of_a_foreign_last_event_id_is_a_gap(foreign: str) -> None:
    """Or the state, by its own name if it is a frame. To mean "earliest" is for the view."""
    bouncer = EventBouncer(history=3)
    (id,) = ids_of(bouncer, "kept")
    assert [GAP, "kept"] == list(map(str, sent(bouncer, foreign)))
    state = sent(bouncer, foreign, snapshot=lambda: format_sse("state", "greet"))
    assert [Event("state", "greet", id)] == state
    assert ["kept"] == list(map(str, sent(bouncer, last_event_id="earliest")))
    assert [] == sent(EventBouncer(), foreign)


@pytest.mark.parametrize(("history", "text"), [(3, "0, 1, 2"), (2, "state 2"), (0, "state 2")])
def test_history_snapshot_is_for_whom_something_is_lost(feed: Any, history: int, text: str) -> None:
    """In the place of the gap and of what is kept. Others resume from the id of their own."""
    bouncer, states = feed(history=history), map("state {}".format, itertools.count(1))
    newest = bouncer.latest_id()
    (state,) = sent(bouncer, snapshot=lambda: next(states))
    assert Event("state 1", "snapshot", newest or "") == state
    ids_of(bouncer, *range(3))
    assert text == ", ".join(map(str, sent(bouncer, state.id, snapshot=lambda: next(states))))


@pytest.mark.parametrize("load, id", [(dict, "earliest"), (lambda: None, ""), (lambda: 1 / 0, "")])
def test_history_snapshot_that_is_refused_leaves_nothing(load: Any, id: str) -> None:
    """The view raises; no subscription stays."""
    bouncer = EventBouncer(history=1)
    with pytest.raises((ValueError, ZeroDivisionError)), app_of(load).test_request_context():
        bouncer.stream(snapshot=load, last_event_id=id)
    assert () == bouncer.subscribers


def settings(bouncer: EventBouncer) -> dict[str, Any]:
    return {name: getattr(bouncer, name) for name in inspect.signature(EventBouncer).parameters}


def test_init_app_takes_the_settings_of_the_environment(monkeypatch: Any) -> None:
    """And nothing else. Each app begins anew."""
    bouncer = EventBouncer(7, heartbeat=5, history=3)
    (id,), given = ids_of(bouncer, "a"), settings(bouncer)
    for name, value in {"HISTORY": "9", "HEARTBEAT": "null", "DETACH": "false"}.items():
        monkeypatch.setenv(f"FLASK_SSE_{name}", value)
    app = create_app(bouncer, SSE_MAX_SUBSCRIBERS=4, SSE_RETRY=[1, 2])
    configured = {"history": 9, "heartbeat": None, "detach": False, "max_subscribers": 4}
    assert given | configured | {"retry": [1, 2]} == settings(bouncer)
    assert app.extensions["sse_bouncer"] is bouncer
    assert bouncer.subscribe(last_event_id=id).gap
    for name, value in settings(bouncer).items():
        with pytest.raises(AttributeError, match=f"{name}: expected .*init_app"):
            setattr(bouncer, name, value)
    monkeypatch.undo()
    bouncer.close()
    create_app(bouncer)
    assert given == settings(bouncer)
    assert ids_of(bouncer, "it is open again")


def test_init_app_is_refused_while_somebody_subscribes_and_loses_nothing() -> None:
    """A reader may be about to wake."""
    bouncer = EventBouncer()
    for _ in range(20):
        reader = Task(datas, bouncer.subscribe()).wait_until_blocked()
        with pytest.raises(RuntimeError, match="no subscribers, got 1"):
            create_app(bouncer)
        bouncer.broadcast("last")
        bouncer.close()
        create_app(bouncer)
        assert ["last"] == reader.result()


@pytest.mark.parametrize("name", ["MAXSIZE", "HISTORY", "DETACH", "RETRY", "RELAY", "REDIS_URL"])
def test_init_app_with_what_is_wrong_changes_nothing(name: str) -> None:
    bouncer = EventBouncer(7, history=3)
    before, (id,) = settings(bouncer), ids_of(bouncer, "a")
    with pytest.raises((TypeError, ValueError)):
        create_app(bouncer, "shop", **{"SSE_HEARTBEAT": 9, f"SSE_{name}": "False"})
    assert before == settings(bouncer)
    assert id == bouncer.latest_id()


def test_on_close_of_thousands_that_end_at_once(caplog: Any) -> None:
    """By one thread, in order, closed or forgotten. If one blocks or raises, no other pays."""
    told, numbers, go_on = queue.SimpleQueue[int](), itertools.count(), threading.Event()
    bouncer = EventBouncer(max_subscribers=2_001)
    blocking = body_of(app_of(lambda: bouncer.stream(on_close=lambda: sys.exit(go_on.wait(60)))))
    app = app_of(lambda: bouncer.stream(on_close=functools.partial(told.put, next(numbers))))
    bodies = deque(body_of(app) for _ in range(2_000))
    body_of(app).close()  # refused
    bouncer.broadcast("x")
    assert [0, 1, 2] == [len([*itertools.islice(bodies[n], n)]) for n in range(3)]
    blocking.close()
    for _ in range(1_000):
        bodies.popleft().close()
    while bodies:
        bodies.popleft()
    assert told.empty()
    go_on.set()
    assert [*range(2_000)] == [told.get(timeout=TIMEOUT) for _ in range(2_000)]
    assert () == bouncer.subscribers
    assert 1 == [thread.name for thread in threading.enumerate()].count("sse_bouncer on_close")
    assert "SystemExit" in caplog.text


# =================================================================================================
# HUB: the same stream under every server; thousands hold no worker, and cost each other nothing


def test_hub_sends_events_in_order_and_to_the_byte(server: Server) -> None:
    """In any server the headers come at once, heartbeats while nothing happens, a proper end."""
    bouncer = Remote(server, retry=1234)
    beats = Remote(server, heartbeat=0.05).client().wait_opening()
    client = bouncer.client("ada").wait_opening()
    assert 200 == client.head.status
    assert "text/event-stream; charset=utf-8" == client.head.getheader("Content-Type")
    assert "no-cache, no-store, no-transform" == client.head.getheader("Cache-Control")
    assert "no" == client.head.getheader("X-Accel-Buffering")
    rows = [row for row in FRAMES if {"data"} == set(row[0]) and type(row[0]["data"]) is str]
    bouncer.broadcast(*[given["data"] for given, _, _ in rows])
    bouncer.disconnect("ada")
    assert [event.data for _, _, read in rows for event in read] == client.wait_end()
    sent = "".join(["retry: 1234\n", *[sent for _, sent, _ in rows]]).encode()
    received = bytes(client.body) if server.kind.detaches else client.body.replace(b"\n:\n", b"\n")
    assert client.whole
    assert sent == received
    beats.wait_for_beats(3)


def check_many(bouncer: Remote, **options: Any) -> None:
    server, first = bouncer.server, bouncer.client(**options)
    log, descriptors, threads = server.log(), server.count("fd"), server.count("task")
    clients = bouncer.streams(300, **options)
    wait_until(lambda: server.count("task") <= threads, "the requests' threads end")
    bouncer.broadcast("hi")
    for client, leave in zip(clients, ["close", "reset", "half-close"] * 100, strict=True):
        assert ["hi"] == client.datas(1)
        client.leave(leave)
    bouncer.wait_for(subscribers=1)
    wait_until(lambda: server.count("fd") <= descriptors, "the descriptors are closed")
    assert ["hi"] == first.datas(1)
    usual = r'127\.0\.0\.1 - - \[[^]]*\] "(?:GET|POST) /\S* HTTP/[12].[01]" 200 |.*Task queue depth'
    assert [] == re.findall(rf"^(?!{usual}).+\n", server.log().removeprefix(log), re.M)


@on(*DETACHING, "uwsgi-single")
def test_hub_many_streams_hold_no_worker_and_leave_nothing(server: Server) -> None:
    """The only worker answers, with no more threads than for one. Who leaves is noticed at once."""
    check_many(Remote(server))


def test_hub_many_streams_behind_nginx_by_uwsgi_pass(tmp_path: Path) -> None:
    """nginx passes the protocol of its own client on."""
    path = tmp_path / "socket"
    directives = "include /etc/nginx/uwsgi_params; uwsgi_param SERVER_PROTOCOL HTTP/2.0;"
    with serve("uwsgi-single", tmp_path / "app", "--socket", str(path)) as server:
        with nginx(f"{directives} uwsgi_pass unix:{path};", tmp_path) as port:
            check_many(Remote(server), address=port)


def test_hub_burst_drops_nobody_who_keeps_up(server: Server) -> None:
    """Three megabytes of a loop reach all. A publisher does not run ahead of the hub."""
    bouncer = Remote(server)

    def drain(client: Client) -> list[int]:  # and parse nothing, to keep up
        received = b"".join(iter(functools.partial(client.socket.recv, 2**20), b""))
        return list(map(int, re.findall(rb"^data: +(\d+)\n", received, re.M)))

    readers = [Task(drain, bouncer.client("x").wait_opening()) for _ in range(5)]
    bouncer.broadcast(*[str(number).rjust(1024) for number in range(3_000)], channel="x")
    bouncer.disconnect("x")
    assert [list(range(3_000))] * 5 == [reader.result() for reader in readers]
    assert 0 == bouncer.stats()["dropped"]


@development
def test_hub_client_that_catches_up_within_a_second_stays(server: Server) -> None:
    bouncer = Remote(server, maxsize=1, heartbeat=0.4)
    client = bouncer.client(receive_buffer=4096)
    bouncer.broadcast(*(str(number).rjust(65536) for number in range(20)))
    assert list(range(20)) == list(map(int, client.datas(20)))
    client.wait_for_beats(4)
    assert 0 == bouncer.stats()["dropped"]


def test_hub_stalled_client_is_dropped_and_resumes(server: Server) -> None:
    """It gets what was held for it, and later what it missed; another loses nothing."""
    bouncer, total = Remote(server, history=10_000), 0
    stalled, other = bouncer.client(receive_buffer=4096), bouncer.client()
    while not bouncer.stats()["dropped"]:
        bouncer.broadcast(*(str(n).rjust(65536) for n in range(total, total + 15)))
        assert list(range(total, total + 15)) == list(map(int, other.datas(15)))
        total += 15
    stalled.wait_end()
    events = list(stalled.unread)
    assert stalled.whole != server.kind.shows_cut
    assert len(events) >= 16
    resumed = bouncer.client(headers={"Last-Event-ID": events[-1].id})
    events += resumed.events(total - len(events))
    assert list(range(total)) == [int(event.data) for event in events]


@detaching
def test_hub_takes_no_notice_of_what_a_client_says(server: Server) -> None:
    """With its request or later, until it is too often; then it is cut off, and nobody else."""
    bouncer, saying = Remote(server), b"POST /do HTTP/1.1\r\nHost: x\r\n\r\n" + b"\0\xff" * 1000
    client, other = bouncer.client(more=saying), bouncer.client()
    client.say(saying * 100)
    bouncer.broadcast("hi")
    assert ["hi"] == client.datas(1)
    talk = [b"blah"] * 1_000
    wait_until(lambda: bouncer.stats()["subscribers"] < 2, "end", lambda: [*map(client.say, talk)])
    bouncer.broadcast("bye")
    assert ["hi", "bye"] == other.datas(2)


@pytest.mark.parametrize(("bouncers", "streams"), [(1, 50), (50, 1)])
def test_hub_and_reader_end_with_their_bouncers_streams(bouncers: int, streams: int) -> None:
    """50 apps of a factory leave no thread and no descriptor."""
    threads, before = {*threading.enumerate()}, descriptors()
    for bouncer in (EventBouncer(relay=Quiet()) for _ in range(bouncers)):
        for _ in range(streams):
            with offered(bouncer.stream) as offer:
                offer.detach()
    del bouncer, offer
    wait_until(lambda: {*threading.enumerate()} <= threads, "their threads end", gc.collect)
    wait_until(lambda: descriptors() <= before, "all is closed")


def test_hub_that_cannot_start_loses_no_event_and_leaves_nothing(monkeypatch: Any) -> None:
    """At the limit of threads a client gets what there is, and the relay is not asked."""
    bouncer, before = EventBouncer(relay=Quiet()), descriptors()
    with offered(bouncer.stream) as offer, monkeypatch.context() as patch:
        offer.begin()
        bouncer.broadcast("a")
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
        for wire in itertools.islice(offer.body, 1):  # what goes through the server
            offer.connection.sendall(wire)
        received = functools.partial(offer.client.recv, 4096, socket.MSG_PEEK)
        wait_until(lambda: received().endswith(b"data: a\n\n"), "it arrives")
        assert bouncer.subscribe(last_event_id="9-9").gap
    assert () == bouncer.subscribers
    assert before == descriptors()


def test_hub_leaves_patience_with_a_link_to_the_kernel() -> None:
    """A client whose link was away for a minute is still there."""
    with offered(EventBouncer().stream) as offer, offer.connection.dup() as kept:
        offer.detach()
        assert 0 == kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


@on("development", "gthread-served")
def test_hub_or_server_sends_heartbeats_that_a_page_sees(server: Server) -> None:
    """An event instead of the comment, without an id. The history does not keep it."""
    bouncer = Remote(server, heartbeat=0.05, heartbeat_event="ping", history=9)
    client = bouncer.client()
    assert [Event("", "ping")] * 3 == client.events(3)
    assert re.fullmatch(rb":\n(event: ping\ndata: \n\n)+", client.body)
    bouncer.broadcast("a")
    assert [GAP, "a"] == bouncer.client(query={"lastEventId": "1-1"}).datas(2)


def test_hub_is_not_waited_for_by_its_own_thread(caplog: Any, monkeypatch: Any) -> None:
    """What is logged there is broadcast, 20 MB of it: with a wait in each it would take minutes."""
    bouncer = EventBouncer(300)

    def emit(record: logging.LogRecord) -> None:  # the hub has dropped the slow client
        monkeypatch.undo()
        broadcast(bouncer, ["y" * 100_000] * 200, {})

    caplog.set_level("DEBUG", "sse_bouncer")
    monkeypatch.setattr(caplog.handler, "emit", emit)
    with offered(lambda: bouncer.stream("x")) as slow, offered(bouncer.stream) as fast:
        slow.detach()
        fast.detach()
        with fast.client.makefile("rb") as received:
            reader = Task(lambda: [len(received.readline()) for _ in range(404)])
            while not bouncer.stats()["dropped"]:
                bouncer.broadcast("x" * 1_000, channel="x")
            assert [100_007, 1] * 200 == reader.result()[4:]  # after its head and opening


def fill(bouncer: Remote, view: Any) -> list[Client]:
    """Have clients come until one is told to come back; return those that were let in."""
    clients = list[Client]()

    def come() -> None:
        clients.append(bouncer.request("x", view=view).wait_opening())

    wait_until(lambda: clients and b"retry: " in clients[-1].body, "a client is refused", come)
    clients.pop().leave()
    return clients


@detaching
@pytest.mark.parametrize(("view", "due"), [(subscribe, ["hi"]), (generate, ["ada, secret", "hi"])])
def test_hub_at_the_limit_of_descriptors(server: Server, view: Any, due: list[str]) -> None:
    """Its streams lose nothing, and who leaves makes room. A server can still accept."""
    bouncer = Remote(server)
    bouncer.do(limit_descriptors, server.count("fd") + 60)
    try:
        clients = fill(bouncer, view)
        for _ in range(5):
            clients.pop().leave()
        wait_until(lambda: fill(bouncer, view), "somebody is let in")
        bouncer.broadcast("hi", channel="x")
        assert [due] * len(clients) == [client.datas(len(due)) for client in clients]
    finally:
        bouncer.do(limit_descriptors, 4096)


def test_hub_survives_what_nobody_has_thought_of() -> None:
    """Another file comes in the place of a stream's: no other stream pays, no descriptor stays."""
    bouncer = EventBouncer()
    with offered(bouncer.stream) as other, offered(bouncer.stream) as unlucky:
        other.detach()
        before = descriptors()
        with open(os.devnull) as null:
            os.close(number := os.dup(null.fileno()))  # the lowest that is free: it is taken next
            unlucky.detach()
            os.dup2(null.fileno(), number)
        bouncer.broadcast("a")
        wait_until(lambda: other.client.recv(4096).endswith(b"data: a\n\n"), "it arrives")
        wait_until(lambda: len(bouncer.subscribers) == 1, "the other one has ended")
        wait_until(lambda: descriptors() <= before, "its descriptor is closed")


@on("waitress")
def test_hub_lets_in_no_more_than_select_takes(server: Server) -> None:
    """At a larger descriptor waitress would end, with all its streams."""
    bouncer = Remote(server)
    clients = fill(bouncer, subscribe)
    bouncer.broadcast("hi")
    assert [["hi"]] * len(clients) == [client.datas(1) for client in clients]


def check_children(bouncer: Remote) -> list[list[str]]:
    """Have two children; return what each of the parent's clients received."""
    clients = [*(bouncer.client("x") for _ in range(3)), *generating(bouncer, 1)]
    bouncer.broadcast("before")
    for _ in range(2):
        assert bouncer.do(fork) in (7, 0)  # 0 if gunicorn's own greenlets have ended it
    bouncer.broadcast("after")
    bouncer.disconnect("x")
    return [client.wait_end() for client in clients]


@detaching
def test_hub_child_begins_with_nothing(server: Server) -> None:
    """It ends normally. Its parent's streams and generators go on, and get nothing twice."""
    assert [["before", "after"]] * 4 == check_children(Remote(server, history=9))


@on("development", "sync", "gthread")
def test_hub_child_reaches_no_stream_of_its_parent(server: Server) -> None:
    """It is warned when it broadcasts; and a client that leaves is told of once, by the parent."""
    bouncer, before = Remote(server), server.log()
    ada = bouncer.client("ada", view=subscribe_and_tell)
    assert 7 == bouncer.do(fork)
    ada.leave()
    server.wait_for_log("ada left", before.count("ada left") + 1)
    assert 1 == server.log().removeprefix(before).count("ada left")
    assert 1 == server.log().removeprefix(before).count("no stream of its parent")


@on("development", "sync", "gthread")
def test_hub_child_has_a_relay_too(server: Server, redis: Redis) -> None:
    """Its own connection: the parent's clients get what it broadcasts, once."""
    received = check_children(Remote(server, history=9, relay=redis.url))
    assert [["before", "of the child", "of the child", "after"]] * 4 == received


def test_hub_child_gets_nothing_from_a_subscription_that_it_inherited() -> None:
    subscription = EventBouncer().subscribe()
    assert 0 == Task(status_of_child, list, subscription).result()


def test_hub_child_under_gevent_ends_its_parents_greenlets(redis: Redis) -> None:
    """One that reads on would take Redis's answers away from the parent."""
    need("gevent")
    finished = run(PYTHON, "-W", "ignore", "-m", "gevent.monkey", __file__, "fork_many", redis.url)
    assert "" == finished.stderr
    assert list(map(str, range(20))) == finished.stdout.split()


def test_hub_child_holds_no_connection_of_its_parent(tmp_path: Path) -> None:
    """The parent is killed, its child lives on: the parent's clients see the end."""
    with serve("development", tmp_path) as server:
        bouncer = Remote(server)
        client = bouncer.client()
        bouncer.do(fork_and_stay)
        wait_until(lambda: len(server.processes()) > 1, "a child")
        server.process.kill()
        assert [] == client.wait_end()
        server.bouncers.clear()


@development
def test_hub_disconnect_delivers_what_slow_clients_have_still_to_get(server: Server) -> None:
    """Also to one that has said something since. Who takes nothing, or stays, is cut off."""
    bouncer, descriptors = Remote(server), server.count("fd")
    slow, stalled, stays = (bouncer.client("x", receive_buffer=4096) for _ in range(3))
    bouncer.broadcast(*(str(n).rjust(65536) for n in range(16)))
    bouncer.disconnect("x")
    bouncer.wait_for(subscribers=0)
    slow.say(b"blah")
    assert [list(range(16))] * 2 == [list(map(int, each.wait_end())) for each in (slow, stays)]
    assert slow.whole
    for _ in range(10):
        slow.socket.sendall(b"blah")
    wait_until(lambda: server.count("fd") <= descriptors, "all are closed")
    assert len(stalled.wait_end()) < 16


def follow(seed: int, bouncer: Remote, last: str) -> list[str]:
    """Read over connections that are cut at random, until "end" has come."""
    rng, seen = random.Random(seed), list[str]()
    url = bouncer.url(channel=[*"ab"][: seed % 3])
    while "end" not in seen:
        client = Client(bouncer.server.port, url, headers={"Last-Event-ID": last})
        looks = rng.choice([0, 1, 2, 9])
        while looks > 0 and not client.ended and "end" not in seen:
            client.read()
            looks -= 1
            seen += [str(client.unread.popleft()) for _ in range(len(client.unread))]
        last = client.parser.last_event_id or last
        if rng.random() < 0.2:
            client.say(rng.randbytes(rng.randrange(10_000)))
        client.leave(rng.choice(["close", "reset", "half-close"]))
        client.leave()
    return seen


def check_followed(bouncer: Remote) -> None:
    """Clients that are cut at random get what is for them, once, from where they began."""
    rng, begin = random.Random(1), bouncer.do(EventBouncer.latest_id)
    tasks = [Task(follow, seed, bouncer, begin) for seed in range(12)]
    published: list[tuple[str, str | None]] = []
    for _ in range(40 * FUZZ):
        channel = rng.choice([None, "a", "b"])
        texts = [str(len(published) + i) for i in range(rng.choice([1, 1, 3, 15]))]
        bouncer.broadcast(*texts, channel=channel)
        published += [(text, channel) for text in texts]
    bouncer.broadcast("end")
    for seed, task in enumerate(tasks):
        mine = [None, *"ab"][: 1 + seed % 3]
        due = [text for text, channel in published if channel in mine]
        assert [*due, "end"] == task.result()


def test_hub_fuzz_clients_cut_at_random_miss_nothing(server: Server) -> None:
    """Without heartbeats if detached, as these would wake a hub that overslept."""
    bouncer = Remote(server, history=10_000, maxsize=100)
    bouncer.client().leave()
    check_followed(bouncer)
    if server.kind.detaches:
        bouncer.wait_for(subscribers=0)


# =================================================================================================
# RESPONSE: a stream as Flask and the server see it


@pytest.mark.parametrize("retry", [None, 0, (20_000, 30_000)])
def test_response_refused_is_told_to_come_back(retry: Any) -> None:
    """By a 200, as browsers give up at a 503; but not at once, and also by a closed bouncer."""
    low, high = retry or (5_000, 15_000)
    bouncer, retries = EventBouncer(max_subscribers=1, retry=retry), set[int]()
    with bouncer.subscribe():
        for _ in range(20):
            response = app_of(bouncer.stream).test_client().get("/")
            assert 200 == response.status_code
            (number,) = re.findall(rb"^retry: ([0-9]+)\n: [^\n]+\n$", response.data)
            retries.add(int(number))
            bouncer.close()
    assert len(retries) > 5
    assert low <= min(retries) <= max(retries) <= high
    assert 20 == bouncer.stats()["refused"]


@pytest.mark.parametrize("header, query, argument", [(1, 2, 3), (0, 2, 3), (0, 0, 3), (3, 0, 1)])
def test_response_begins_after(header: int, query: int, argument: int) -> None:
    """The browser's own id, else event-source-polyfill's, else the page's. 0 stands for none."""
    bouncer = EventBouncer(history=9)
    ids = ["", *ids_of(bouncer, *"abc")]
    client = app_of(lambda: bouncer.stream(last_event_id=ids[argument])).test_client()
    headers = {"Last-Event-ID": ids[header]}
    with client.get(f"/?lastEventId={ids[query]}", headers=headers) as response:
        bouncer.close()
        after = header or query or argument
        assert "abc"[after:] == "".join(map(str, parse(response.data.decode())))


@pytest.mark.parametrize("detach", [False, True])
def test_response_of_items_is_these_and_nothing_else(caplog: Any, detach: bool) -> None:
    """By the app's JSON. What cannot be formatted is logged, and left out. None is skipped."""
    day = {"n": datetime.date(2030, 1, 2)}
    items = ["a\nb", None, format_sse("c", "greet"), math.nan, day, b"bytes", ""]
    expected = "data: a\ndata: b\n\nevent: greet\ndata: c\n\n"
    expected += f"data: {flask.json.dumps(day)}\n\ndata: bytes\n\ndata: \n\n"
    app = app_of(lambda: sse_response((item for item in items), detach=detach))
    assert expected == app.test_client().get("/").text
    (record,) = caplog.records
    assert "ERROR" == record.levelname
    assert "nan" in record.getMessage()


@pytest.mark.parametrize("items", range(4))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_response_closes_its_source(method: str, items: int) -> None:
    """However far the body was read, or not at all."""
    source = io.StringIO("a\nb")
    body = body_of(app_of(lambda: sse_response(source)), method)
    list(itertools.islice(body, items))
    body.close()
    assert source.closed


def test_response_to_head_has_the_headers_of_a_get() -> None:
    client = app_of(EventBouncer(max_subscribers=1).stream).test_client()
    with client.get("/") as response:  # by now a HEAD that subscribes would be refused
        assert response.headers == client.head("/").headers


def test_response_is_not_refused_where_descriptors_have_no_limit(monkeypatch: Any) -> None:
    bouncer = EventBouncer()
    monkeypatch.setattr(os, "sysconf", {"SC_OPEN_MAX": -1}.get)  # as on a Mac
    body_of(app_of(bouncer.stream)).close()
    assert 0 == bouncer.stats()["refused"]


def test_response_is_not_held_back_by_eventlet_until_there_are_32_kib() -> None:
    with app_of(lambda: sse_response(["x"])).test_request_context() as context:
        context.app.dispatch_request()
        assert 0 == context.request.environ["eventlet.minimum_write_chunk_size"]


def test_response_snapshot_is_first_and_nothing_of_meanwhile_is_lost(server: Server) -> None:
    """A megabyte. A thousand events more than maxsize are held while it is made, and follow."""
    bouncer = Remote(server, maxsize=1, history=9)
    client = bouncer.client(view=subscribe_with_state).wait_opening()
    bouncer.broadcast("live")
    state, *events = client.events(1_002)
    assert Event("state".ljust(2**20), "snapshot", state.id) == state
    assert [*map(str, range(1_000)), "live"] == [event.data for event in events]
    assert 0 == bouncer.stats()["dropped"]


def test_response_on_close_is_called_once_for_each_end_in_order(server: Server) -> None:
    """In the view's context. Only a logout is an end that was meant: others have no last chunk."""
    bouncer, users = Remote(server, maxsize=100), ["ada", "bob", "vic", "eve", "joe"]
    view: dict[str, Any] = {"view": subscribe_and_tell, "receive_buffer": 4096}
    ada, bob, _, eve, joe = (bouncer.client(user, **view) for user in users)
    ada.leave("close")
    bouncer.wait_for(subscribers=4)
    bob.leave("reset")
    bouncer.wait_for(subscribers=3)
    while not bouncer.stats()["dropped"]:
        bouncer.broadcast(*["x" * 65536] * 15, channel="vic")
    bouncer.disconnect("eve")
    assert [] == eve.wait_end()
    assert eve.whole
    bouncer.close()
    assert [] == joe.wait_end()
    assert joe.whole != server.kind.shows_cut
    wait_until(lambda: len(bouncer.do(what_was_seen).get("left", [])) >= 5, "all are told of")
    assert users == bouncer.do(what_was_seen)["left"]


def test_response_through_the_server_limits_how_long_a_client_may_stall() -> None:
    """By the connection's own timeout, which is put back, once: nobody holds a thread."""
    bouncer = EventBouncer(detach=False)
    with offered(bouncer.stream) as offer:
        bouncer.broadcast("a")
        assert b":\ndata: a\n\n" == next(offer.body) + next(offer.body)
        assert 1 <= (offer.connection.gettimeout() or 0) <= 60
        offer.body.close()  # type: ignore[attr-defined]
        assert offer.connection.gettimeout() is None
        offer.connection.settimeout(5)  # the server's own, for the next request
    assert 5 == offer.connection.gettimeout()  # after the body has been closed again


@on(*[kind for kind in KINDS if kind != "uwsgi"])  # which answers 200 whatever fails
def test_response_of_a_generator_that_fails_at_once_is_500(server: Server) -> None:
    """Browsers then give up, and don't run it again and again."""
    bouncer = Remote(server, detach=False)
    assert 500 == bouncer.request(view=generate_and_fail, query={"items": 0}).head.status
    server.wait_for_log("ConnectionRefusedError: ")
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        server.clear()


@pytest.mark.parametrize("detach", [False, True])
@on("development", "sync", "gthread", "gevent", "pywsgi")  # where a client can tell
def test_response_of_a_generator_that_fails_later_is_cut_off(server: Server, detach: bool) -> None:
    """After a retry of ten seconds. The log has its traceback, once."""
    before, bouncer = server.log().count("RefusedError: "), Remote(server, detach=detach)
    client = bouncer.request(view=generate_and_fail, query={"items": 2})
    assert ["x", "x"] == client.wait_end()
    assert client.body.endswith(b"\n\nretry: 10000\n")
    assert not client.whole
    server.wait_for_log("RefusedError: ", before + 1)
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        server.clear()
    assert before + 1 == server.log().count("RefusedError: ")


@on("gthread", "gevent", "pywsgi")
def test_response_of_a_generator_that_exits_ends_its_thread_alone(server: Server) -> None:
    bouncer, query = Remote(server), {"items": 1, "exit": 1}
    other = bouncer.client()
    assert ["x"] == bouncer.request(view=generate_and_fail, query=query).wait_end()
    bouncer.broadcast("hi")
    assert ["hi"] == other.datas(1)


def test_response_that_a_hook_reads_is_an_error_and_no_hang() -> None:
    """Of a logger, or of one that makes ETags. A stream that ends is read as before."""
    bouncer = EventBouncer()
    app = app_of(lambda: bouncer.stream() if flask.request.args else sse_response(["a"]))

    @app.after_request
    def read(response: flask.Response) -> flask.Response:
        response.get_data()
        return response

    assert 500 == Task(app.test_client().get, "/?live=1").result().status_code
    assert () == bouncer.subscribers
    assert b"data: a\n\n" == app.test_client().get("/").data


HEADS: dict[str, dict[str, Any]] = {
    "cookies": {},
    "session and ProxyFix": {"query": {"session": 1}},
    "wrapped by middleware": {"query": {"watched": 1}},
    "POST": {"method": "POST"},
}


def response_to(client: Client) -> tuple[list[bytes], bytes]:
    """Return the lines of a response's head, but for the times in them, and its body as sent."""
    sent = b"".join(iter(functools.partial(client.socket.recv, 65536), b""))
    head, _, body = sent.partition(b"\r\n\r\n")
    # After a dot, a session's cookie has the time.
    head = re.sub(rb"\r\n(Date|Connection): [^\r]*|(?<=\.)[^\r;]*;", b"", head)
    return head.split(b"\r\n"), body.lower()


@detaching
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_takeover_sends_what_the_server_would_send(server: Server, options: Any) -> None:
    """Head and body, chunks included; only Connection may differ."""
    options = {"headers": {"Connection": "close", "X-Forwarded-For": "192.0.2.7"}, **options}
    bouncer, through_server = Remote(server), Remote(server, detach=False, heartbeat=None)
    detached = bouncer.client("x", **options)
    bouncer.broadcast("a")
    bouncer.disconnect("x")
    head, body = response_to(detached)
    options["query"] = {"ended": 1, **options.get("query", {})}
    assert (head, body) == response_to(through_server.request("x", **options))
    assert {b"X-Middleware: 1", b"X-Accel-Buffering: no"} <= set(head)
    assert sum(line.startswith(b"Set-Cookie:") for line in head) >= 2


@detaching
def test_takeover_sends_no_chunks_to_a_client_of_http_1_0(server: Server) -> None:
    """The development server does so by mistake."""
    bouncer = Remote(server)
    client = bouncer.client("x", protocol="HTTP/1.0")
    bouncer.broadcast("a")
    bouncer.disconnect("x")
    head, body = response_to(client)
    assert b"Transfer-Encoding" not in b"".join(head)
    assert b":\ndata: a\n\n" == body


CHANGED = [b"200 OK\r\n\r\nchanged", b"201 OK\r\n\r\n:\n", b"200 OK\r\nContent-Length:9\r\n\r\n:\n"]


@pytest.mark.parametrize("changed", CHANGED, ids=["body", "status", "length"])
def test_takeover_leaves_what_was_changed_to_the_server(changed: bytes, caplog: Any) -> None:
    """And the log says so. A generator that fails then still tells its client to wait."""
    with offered(lambda: sse_response((1 / 0 for _ in "a"), detach=True)) as offer:
        next(offer.body)
        offer.connection.sendall(b"HTTP/1.1 " + changed)
        assert b"retry: 10000\n" == next(offer.body)
        assert b"HTTP/1.1 " + changed == offer.client.recv(4096)
    assert 1 == caplog.text.count("goes through the server")


@detaching
def test_takeover_leaves_a_short_and_normal_request(server: Server) -> None:
    """As middleware, teardown functions and the log see it. A stream begins with what is held."""
    bouncer = Remote(server)
    client = bouncer.request("x", query={"held": 1, "watched": 1})
    expected = {"bytes": 2, "closed": True, "teardown": "None"}
    bouncer.wait_for(detached=1)
    if server.kind.has_log:
        server.wait_for_log(r"GET /subscribe.*watched=1.* 200 ")
    wait_until(lambda: bouncer.do(what_was_seen) == expected, "it has ended")
    assert ["a"] == bouncer.request("x", query={"ended": 1}).wait_end()
    assert ["a", "a"] == client.wait_end()


TLS = ["development --cert certificate --key key"]
TLS += [f"{kind} --certfile certificate --keyfile key" for kind in ("gthread-served", "gevent")]


@pytest.mark.parametrize(("view", "first"), [(subscribe, ":"), (generate, "data: ada, secret")])
@pytest.mark.parametrize("tls", TLS)
def test_takeover_leaves_tls_to_the_server(tls: str, view: Any, first: str, tmp_path: Path) -> None:
    """Also what a generator yields that asks for detach=True, and it has the view's context."""
    need("openssl")
    command = "openssl req -x509 -newkey rsa:2048 -noenc -subj /CN=x -keyout key -out certificate"
    made = run(*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", cwd=tmp_path)
    assert 0 == made.returncode, made.stderr
    kind, *switches = tls.split()
    with serve(kind, tmp_path, *switches) as server:
        server.tls = ssl.create_default_context(cafile=tmp_path / "certificate")
        bouncer = Remote(server, detach=True)
        with server.open(bouncer.url(view, channel="x")) as stream:
            assert f"{first}\n".encode() == stream.readline()
            assert 0 == bouncer.stats()["detached"]
            bouncer.broadcast("hi")
            bouncer.disconnect("x")
            assert b"data: hi\n\n" == stream.read().lstrip()


CHUNKS = ("Transfer-Encoding: chunked", (b"8000\r\n%b\r\n" % (b"x" * 0x8000)) * 30 + b"0\r\n\r\n")
LENGTH = ("Content-Length: 1000000", b"x" * 1_000_000)


@detaching
@pytest.mark.parametrize(("header", "sent"), [LENGTH, CHUNKS], ids=["length", "chunks"])
def test_takeover_of_a_request_with_unread_body(server: Server, header: str, sent: bytes) -> None:
    """Its own body is nothing that a client says beyond it."""
    bouncer = Remote(server)
    client = bouncer.client(method="POST", headers=dict([header.split(": ")]), more=sent)
    bouncer.broadcast("hi")
    assert ["hi"] == client.datas(1)


@on("development", "sync", "gevent", "pywsgi")
def test_takeover_of_a_large_head_or_of_one_that_is_too_large(server: Server) -> None:
    """200 KB arrive. 4 MB end the request. waitress has a buffer, and uWSGI sends no large head."""
    bouncer = Remote(server)
    client = bouncer.client(query={"headers": 4})
    assert 50_000 == len(client.head.headers["X-3"])
    failed = bouncer.request(query={"headers": 80})
    while failed.socket.recv(65536):
        pass
    failed.leave()  # for which gunicorn waits
    bouncer.wait_for(subscribers=1, detached=1)
    with contextlib.suppress(AssertionError):  # what the log says is the server's own
        server.clear()


def generating(bouncer: Remote, count: int, **query: Any) -> list[Client]:
    """Have so many generators run, each of which has yielded what its context has."""
    clients = [bouncer.request(view=generate, query=query) for _ in range(count)]
    assert [["ada, secret"]] * count == [client.datas(1) for client in clients]
    return clients


def test_takeover_of_a_silent_generator_has_heartbeats(monkeypatch: Any) -> None:
    """After 15 seconds: the clock is put forward, and an item has the hub look at it."""
    clock, bouncer = time.monotonic, EventBouncer()
    items = (item for item in bouncer.subscribe())
    with offered(lambda: sse_response(items, detach=True)) as offer:
        offer.detach()
        wait_until(lambda: offer.client.recv(4096).endswith(b"\n:\n"), "opening")
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 16)
        bouncer.broadcast("hi")
        wait_until(lambda: b":\n" in offer.client.recv(4096), "a heartbeat")
        bouncer.close()


@detaching
def test_takeover_of_twenty_generators_holds_no_worker_and_leaves_nothing(server: Server) -> None:
    """With stream_with_context, too. One whose client leaves is closed at its next item."""
    bouncer = Remote(server, maxsize=1_000)
    generating(bouncer, 1)
    threads, descriptors = server.count("task"), server.count("fd")
    clients = generating(bouncer, 10) + generating(bouncer, 10, kept=1)
    bouncer.broadcast(*range(100))
    assert [list(map(str, range(100)))] * 20 == [client.datas(100) for client in clients]
    clients.pop(0).leave("close")
    clients.pop().leave("reset")
    publish = functools.partial(bouncer.broadcast, "x")
    wait_until(lambda: bouncer.do(what_was_seen).get("ended") == 2, "finally", publish)
    bouncer.disconnect("x")
    for client in clients:
        assert {"x"} == {*client.wait_end()}
        assert client.whole
        client.leave()
    wait_until(lambda: server.count("task") <= threads, "the threads end")
    wait_until(lambda: server.count("fd") <= descriptors, "the descriptors are closed")


def ahead(bouncer: Remote) -> Client:
    """Have a generator yield as much as it can to a client that reads nothing."""
    client = bouncer.request(view=generate, query={"endless": 1}, receive_buffer=4096)
    wait_until(lambda: bouncer.do(what_was_seen).get("yielded", 0) > 64, "it is ahead")
    for _ in range(100):  # in each, it could go on
        bouncer.stats()
    return client


@detaching
def test_takeover_of_a_generator_waits_for_a_slow_client(server: Server) -> None:
    """Which costs a few hundred KiB meanwhile, and then gets everything."""
    bouncer = Remote(server)
    client = ahead(bouncer)
    assert bouncer.do(what_was_seen)["yielded"] < 500
    assert list(range(2_000)) == list(map(int, client.datas(2_001)[1:]))


def test_takeover_of_more_than_a_thousand_generators_leaves_them_to_the_server() -> None:
    """The server's own threads are the brake then; when one has ended, there may be another."""
    others, end, names = {*threading.enumerate()}, threading.Event(), queue.SimpleQueue[str]()

    def items() -> Iterator[str]:
        names.put(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            end.wait(TIMEOUT)
        yield "x"

    def start() -> str:  # its client leaves at once
        with offered(lambda: sse_response(items(), detach=True)) as offer:
            offer.begin()
            next(offer.body, None)
            return names.get(timeout=TIMEOUT)

    assert {"sse_bouncer generator"} == {start() for _ in range(1_000)}
    assert threading.current_thread().name == start()
    end.set()
    wait_until(lambda: {*threading.enumerate()} <= others, "the threads end")
    assert "sse_bouncer generator" == start()


def test_takeover_of_a_connection_that_its_server_has_closed_harms_no_other() -> None:
    """Another client may have its descriptor's number by then."""
    ours, theirs = socket.socketpair()
    with ours, theirs, offered(EventBouncer().stream) as offer:
        number = offer.connection.detach()
        os.dup2(theirs.fileno(), number)
        next(offer.body)
        os.write(number, b"mine")
        os.close(number)
        assert b"mine" == ours.recv(100)


def test_takeover_broadcast_or_end_in_which_a_signal_handler_closes() -> None:
    """At any moment: no stream and no end is forgotten, and nobody waits for ever."""
    before = signal.signal(signal.SIGALRM, lambda *_: bouncer.close())
    try:
        for number in range(1, 450):
            bouncer = EventBouncer(history=5, heartbeat=None)
            with offered(bouncer.stream) as one, offered(bouncer.stream) as two:
                one.detach()
                two.begin()
                streams = bouncer.subscribers[: number % 3]
                readers = [bouncer.subscribe() for _ in range(20)]
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 6e-9 * number**2)  # mostly soon
                assert [] == list(two.body)
                for subscription in streams:
                    bouncer.unsubscribe(subscription)
                while bouncer.subscribers:
                    bouncer.broadcast("x")
                    for reader in readers:
                        held(reader)
                for offer in (one, two):
                    received = b"".join(iter(functools.partial(offer.client.recv, 4096), b""))
                    assert b"\n:\n" in received
                with pytest.raises(sse_bouncer.Refused):
                    bouncer.subscribe()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("items", [0, 1])
def test_takeover_that_the_server_breaks_off_leaves_nothing(items: int) -> None:
    """Before it asks for the first item or the second: it has its connection back, and answers."""
    bouncer, before = EventBouncer(), descriptors()
    with offered(bouncer.stream) as offer:
        list(itertools.islice(offer.body, items))
        offer.body.close()  # type: ignore[attr-defined]
        offer.connection.sendall(b"an error page")
        assert b"an error page" == offer.client.recv(100)
    assert () == bouncer.subscribers
    assert before == descriptors()


# =================================================================================================
# STOPPING: the server's own ways to stop, reload and recycle, with open streams


def wait_until_idle(server: Server) -> None:
    """Wait until its processes sleep: at a signal during an accept, gunicorn 27's gthread hangs."""
    wait_until(lambda: all(") S " in (p / "stat").read_text() for p in server.processes()), "idle")


STOPS = [("sync", "SIGTERM", 1_000), ("gevent", "SIGTERM", 20), ("uwsgi", "SIGTERM", 20)]
STOPS += [(kind, "SIGINT", 20) for kind in ("development", "gthread", "waitress", "pywsgi")]


@pytest.mark.parametrize(("kind", "how", "count"), STOPS)
def test_stopping_ends_all_streams(kind: str, how: str, count: int, tmp_path: Path) -> None:
    with serve(kind, tmp_path) as server:
        clients = Remote(server).streams(count)
        wait_until_idle(server)
        server.process.send_signal(getattr(signal, how))
        assert [[]] * count == [client.wait_end() for client in clients]
        server.process.wait(TIMEOUT)


@pytest.mark.parametrize("kind", WORKERS)
def test_stopping_for_a_reload_ends_all_streams(kind: str, tmp_path: Path) -> None:
    """And there may be new ones."""
    with serve(kind, tmp_path) as server:
        clients = Remote(server).streams(20)
        wait_until_idle(server)
        server.process.send_signal(signal.SIGHUP)
        assert [[]] * 20 == [client.wait_end() for client in clients]
        server.wait_for_log("Booting worker", times=2)
        assert Remote(server).client()


@pytest.mark.parametrize("kind", ["gthread-served", "gevent"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_stopping_recipe_ends_streams_first(kind: str, how: str, tmp_path: Path) -> None:
    """The documented hook, as it stands, ends what holds workers before gunicorn waits for them."""
    hook = "\n".join(re.findall(r"^ {4}(.*)", inspect.getdoc(EventBouncer.close) or "", re.M))
    (tmp_path / "gunicorn.conf.py").write_text(hook, "utf-8")
    first = BLOCKS[0].replace("EventBouncer()", "EventBouncer(detach=False)")
    assert "detach=False" in first
    with serve(kind, tmp_path, app=write_app(tmp_path, first)) as server:
        clients = [server.client("/subscribe").wait_opening() for _ in range(2)]
        wait_until_idle(server)
        server.process.send_signal(getattr(signal, how))
        for client in clients:
            assert [] == client.wait_end()
            client.leave()  # for which gunicorn waits
        server.process.wait(TIMEOUT)


LAST = [*((kind, "SIGTERM") for kind in WORKERS), ("development", "SIGINT"), ("waitress", "SIGINT")]


@pytest.mark.parametrize(("kind", "how"), LAST)
def test_stopping_sends_all_and_closes_generators(kind: str, how: str, tmp_path: Path) -> None:
    """And calls on_close. Two generators are endless, one for a client that reads nothing."""
    with serve(kind, tmp_path) as server:
        bouncer = Remote(server)
        readers = [Task(client.wait_end) for client in bouncer.streams(100)]
        told = Remote(server).client("ada", view=subscribe_and_tell)
        endless = Remote(server).request(view=generate, query={"endless": 1})
        clients = [told, endless, *generating(Remote(server), 1)]
        others = [Task(client.wait_end) for client in clients]
        ahead(Remote(server))
        Task(bouncer.do, broadcast_and_end, how)  # not answered by a server that ends at once
        assert [list(map(str, range(100)))] * 100 == [reader.result() for reader in readers]
        for other in others:
            other.result()
        wait_until(lambda: server.log().count("finally") == 3, "the generators are closed")
        server.wait_for_log("ada left secret")
        server.bouncers.clear()
        server.kill()
        assert 1 == server.log().count("ada left secret")


def exit_after_an_end() -> None:
    """End a stream for good, do what a process does at its exit, and print what was sent."""
    bouncer = EventBouncer()
    with offered(lambda: bouncer.stream("x")) as offer:
        offer.detach()
        bouncer.broadcast("last")
        bouncer.disconnect("x")
        atexit._run_exitfuncs()
        offer.client.setblocking(False)
        print(b"".join(iter(functools.partial(offer.client.recv, 4096), b"")))


def test_stopping_sends_the_end_of_a_body_that_comes_right_before_it() -> None:
    assert "data: last" in run(PYTHON, __file__, "exit_after_an_end").stdout


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
window.read = [];
window.source = new EventSource(arguments[0]);
for (const name of ["message", "greet", "gap", "done", ""])
    source.addEventListener(name, (event) => {
        read.push([event.data, event.type, event.lastEventId]);
        if (name === "done") source.close();
    });
"""


def wait_in_page(browser: Any, condition: str) -> None:
    wait_until(lambda: browser.execute_script(f"return {condition}"), f"in the page: {condition}")


def chromium(browser: Any, url: str) -> Iterator[Event]:
    """Read by EventSource, from a page of the same origin."""
    browser.get(url.replace("/subscribe?", "/nothing?"))
    browser.execute_script(READ, url)
    for place in itertools.count():
        wait_in_page(browser, f"read.length > {place}")
        yield Event(*browser.execute_script(f"return read[{place}]"))


def sseclient(browser: Any, url: str) -> Iterator[Event]:
    need("requests", "sseclient")
    import requests
    from sseclient import SSEClient

    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        for event in SSEClient(response).events():  # type: ignore[arg-type]
            yield Event(event.data, event.event, event.id or "")


def direct(port: int, folder: Path) -> contextlib.AbstractContextManager[int]:
    return contextlib.nullcontext(port)


@contextlib.contextmanager
def nginx(upstream: int | str, folder: Path) -> Iterator[int]:
    """Run nginx before a server (its port, or a directive), as in the README, but with gzip."""
    need("nginx")
    (site,) = re.findall(r"^```nginx\n(.*?)^```", README, re.M | re.S)
    with held_port() as port:
        site = re.sub(r"listen .*;\n.*;\n", f"listen 127.0.0.1:{port};\n", site)
        if isinstance(upstream, int):
            upstream = f"proxy_pass http://127.0.0.1:{upstream};"
        site = site.replace("proxy_pass http://127.0.0.1:8000;", upstream)
        begin = "daemon off; master_process off; pid pid; error_log stderr notice;"
        begin += "events { worker_connections 1000; } http {"
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


TEXTS = [(row[0], row[2]) for row in FRAMES if type(row[0].get("data")) is str]
TEXTS = [pair for pair in TEXTS if {*pair[0]} <= {"data", "event"}]
TEXTS += [({"data": "x" * 100_000}, [Event("x" * 100_000)])]
TEXTS += [({"data": "", "event": "done"}, [Event("", "done")])]


@development
@pytest.mark.parametrize("way", [direct, nginx])
@pytest.mark.parametrize("reads", [chromium, sseclient])
def test_client_has_each_event_at_once(
    server: Server, way: Any, reads: Any, browser: Any, tmp_path: Path
) -> None:
    """To the character, and no event that nobody sent. Through nginx, with gzip, it is the same."""
    bouncer, read = Remote(server, history=100, heartbeat=0.02, retry=1000), list[Event]()
    with way(server.port, tmp_path) as port:
        url = f"http://127.0.0.1:{port}{bouncer.url()}"
        with contextlib.closing(reads(browser, url)) as events:
            for fields, _ in TEXTS:
                coming = Task(next, events)
                bouncer.wait_for(subscribers=1)
                bouncer.broadcast(fields["data"], event=fields.get("event"))
                read.append(coming.result())
        bouncer.wait_for(subscribers=0)
    expected = [(event.data, event.type) for _, events in TEXTS for event in events]
    assert expected == [(event.data, event.type) for event in read]
    assert are_increasing(event.id for event in read)


@development
def test_client_comes_back_by_itself_and_misses_nothing(server: Server, browser: Any) -> None:
    """Chromium, with the id of the last event that it read."""
    bouncer = Remote(server, history=9, retry=50)
    browser.get(f"http://127.0.0.1:{server.port}/nothing")
    browser.execute_script(READ, bouncer.url(channel="x"))
    bouncer.wait_for(detached=1)
    bouncer.broadcast(0)
    for number in range(1, 4):
        wait_in_page(browser, f"read.length === {number}")
        bouncer.disconnect("x")
        bouncer.broadcast(number)
    wait_in_page(browser, "read.map((event) => event[0]).join() === '0,1,2,3'")


# =================================================================================================
# WAYS TO USE IT: the README's own code, as it stands; the blog posts'; and the example

README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
README_TESTS = "\n".join(block for block in BLOCKS if "def test_" in block)
README_APP = "\n".join(block for block in BLOCKS if "def test_" not in block)


@pytest.fixture(scope="session", params=["development", "gthread-served"])
def readme(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The README's app, under the development server, and under gunicorn with its relay."""
    app, folder = README_APP, tmp_path_factory.mktemp("readme")
    if request.param != "development":
        (made,) = re.findall(r"`(EventBouncer\(history=1000, relay=[^`]*)`", README)
        made = re.sub(r"redis://[\w.:]+", request.getfixturevalue("redis").url, made)
        line = f"from sse_bouncer import RedisRelay; bouncer = {made}"
        app = app.replace("bouncer = EventBouncer()", line)
    with serve(request.param, folder, app=write_app(folder, app)) as server:
        yield server


def log_in(readme: Server, user: str) -> dict[str, str]:
    body = f"user={user}".encode()
    form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(body))}
    login = readme.client("/login", method="POST", headers=form, more=body)
    return {"Cookie": str(login.head.getheader("Set-Cookie")).partition(";")[0]}


def test_readme_publishes_what_its_page_sends(readme: Server) -> None:
    """To all, and to those in an inbox, who are known."""
    assert '"/subscribe"' in readme.ask("/")
    assert 401 == readme.client("/inbox").head.status
    bob = readme.client("/inbox", headers=log_in(readme, "bob")).wait_opening()
    client = readme.client("/subscribe").wait_opening()
    readme.ask("/publish", b"a\nb")
    assert [["a\nb"]] * 2 == [client.datas(1), bob.datas(1)]


def test_readme_room_knows_who_is_there(readme: Server) -> None:
    """A user with two tabs once, until both are closed. Through Redis, older news come later."""
    eve, dan = log_in(readme, "eve"), log_in(readme, "dan")
    tabs = [readme.client("/room", headers=eve).wait_opening() for _ in range(2)]
    watcher = readme.client("/room", headers=dan).wait_opening()

    def wait_for(*names: str) -> None:
        news = watcher.unread
        watcher.wait_until(lambda: news and json.loads(news.popleft().data) == [*names], "the news")

    wait_for("user-dan", "user-eve")
    tabs[0].leave("close")
    wait_for("user-dan", "user-eve")
    tabs[1].leave("reset")
    wait_for("user-dan")


@pytest.mark.parametrize("readme", ["gthread-served"], indirect=True)
def test_readme_progress_ends_for_good(readme: Server) -> None:
    client = readme.client("/progress")
    *steps, _ = client.wait_end()
    assert [{"done": n + 1, "of": 20} for n in range(20)] == [json.loads(step) for step in steps]
    last = client.unread[-1]
    assert "done" == last.type
    assert 204 == readme.client("/progress", headers={"Last-Event-ID": last.id}).head.status


def test_readme_page_of_todos(browser: Any, tmp_path: Path) -> None:
    """It shows the state, and what changes."""
    (page,) = re.findall(r"^```html\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "todos.html").write_text(page, "utf-8")
    with serve("development", tmp_path, app=write_app(tmp_path, README_APP)) as server:
        browser.get(f"http://127.0.0.1:{server.port}/static/todos.html")
        wait_in_page(browser, "list.innerText === 'tea'")
        server.client("/todos/2", method="PUT", headers={"Content-Length": "4"}, more=b"milk")
        wait_in_page(browser, "list.innerText === 'tea\\nmilk'")


def test_readme_tests_pass(tmp_path: Path) -> None:
    write_app(tmp_path, README_APP)
    (tmp_path / "test_app.py").write_text(README_TESTS, "utf-8")
    finished = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed", finished.stdout, re.M), finished.stdout


@on("gthread-served")
def test_blog_posts_with_their_import_changed(server: Server) -> None:
    """They publish, and clients that left are noticed when they do."""
    bouncer = Remote(server)
    clients = [bouncer.request(view=listen) for _ in range(2)]
    bouncer.wait_for(subscribers=2)  # both generators have started
    bouncer.do(announce)
    assert [["a\nb"]] * 2 == [client.datas(1) for client in clients]
    clients[0].leave()
    wait_until(lambda: bouncer.stats()["subscribers"] == 1, "noticed", lambda: bouncer.do(announce))
    assert ["a\nb"] == clients[1].datas(1)


def test_example_page(browser: Any, tmp_path: Path) -> None:
    """By ``python example_app.py``: it shows what anyone publishes as the text that it is."""
    example = (ROOT / "example_app.py").read_text("utf-8").replace("app.run(", "app.run(port=0, ")
    with serve("script", tmp_path, app=write_app(tmp_path, example)) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: server.ask("/stats")["subscribers"], "the page's stream")
        server.ask("/publish", "<b>tea</b> & cake 😀".encode())
        wait_in_page(browser, "document.body.innerText.includes('<b>tea</b> & cake 😀')")
        assert server.client("/progress").events(1)


# =================================================================================================
# PROMISES about the package as a whole


WITHOUT_FLASK = """
import logging, os, signal, sys, threading
sys.modules["flask"] = sys.modules["werkzeug"] = None  # an import of either now fails
def state():
    handlers = [*map(signal.getsignal, signal.valid_signals()), *logging.root.handlers]
    return handlers, os.listdir("/dev/fd"), threading.enumerate()
before, modules = state(), set(sys.modules)
from sse_bouncer import *
loaded = {name.partition(".")[0] for name in set(sys.modules) - modules} - {"sse_bouncer"}
assert loaded <= sys.stdlib_module_names, loaded
assert before == state()
bouncer = EventBouncer(relay=RedisRelay.from_url(*sys.argv[1:]))
bouncer.broadcast({"n": 1}, channel="a")
assert threading.enumerate() == [threading.main_thread()]
"""


def test_promise_import_starts_nothing_and_needs_no_flask(processes: Processes) -> None:
    """A cron job broadcasts without Flask, and without a thread."""
    subscription = processes().subscribe("a")
    finished = run(sys.executable, "-c", WITHOUT_FLASK, processes.redis.url, processes.key)
    assert "" == finished.stderr
    assert ['{"n": 1}'] == next_datas(subscription, 1)


def test_promise_types_reach_users_of_the_wheel(tmp_path: Path) -> None:
    """mypy --strict sees the installed wheel's types: right code passes, wrong code does not."""
    need("mypy", "hatchling")
    site, pip = tmp_path / "site", [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    assert "Successfully installed" in run(*pip, "install", *options, str(ROOT)).stdout
    example = (ROOT / "example_app.py").read_text("utf-8")
    (tmp_path / "user.py").write_text(example + 'bouncer.broadcast("x", channel=5)', "utf-8")
    mypy = [PYTHON, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "user.py"]
    finished = run(*mypy, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(site)})
    wrong, _ = finished.stdout.splitlines()
    assert 'error: Argument "channel" to "broadcast"' in wrong


if __name__ == "__main__":  # a function of this file, and its arguments
    globals()[sys.argv[1]](*sys.argv[2:])
