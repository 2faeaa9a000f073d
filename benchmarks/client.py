"""The load client: any number of subscribers and one publisher, in one thread.

Every event carries its number and the time at which it was sent, so all that a subscriber is to
receive is known in advance but for what the server puts around it (field names, chunk sizes), and
that the client learns from the first two events. After that, checking what arrives is comparing
it with the bytes that are due there: cheap enough for Python to count some hundred thousand
deliveries a second, and nothing that is lost, doubled, reordered or changed gets through.
"""

from __future__ import annotations

import gc
import os
import random
import re
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

_PAYLOAD = 64  # bytes; the apps cut what is posted into pieces of this size
_EVENT = re.compile(rb"@(\d{9}) \d{16} x+\$")
_BLANK_LINE = re.compile(rb"\n\n|\r\n\r\n")
_CHUNK = 32 * 1024  # bytes to read at a time
_BATCH = 256  # connections to read before looking at the publisher again
_NOWHERE = sys.maxsize  # as a position in the stream: no bytes are expected there
_KNOCKING = 250  # connections that have not received anything yet; the least backlog is below 2048
_QUIET = 0.05  # seconds without input after which all who connect are waiting for an event
_SILENCE = 3.0  # seconds after which what has not arrived is lost
_PATIENCE = 20.0  # seconds to wait for the rest in all
_MUCH_PATIENCE = 120.0  # after a burst, which takes the slowest servers most of a minute
_RESET = struct.pack("ii", 1, 0)  # linger for 0 seconds: close() sends a reset


@dataclass
class Outcome:
    """What one measurement saw."""

    events: int
    deliveries: int
    lost: int  # deliveries that never came
    strange: int  # bytes that were not those due: doubled, reordered, changed
    closed: int  # streams that the server ended
    per_second: float
    p50: float  # seconds from sending the event to having its last byte
    p99: float
    worst: float
    client_cpu: float  # share of one core
    client_cost: float  # seconds of its CPU per delivery


class Failed(Exception):
    """The server did not do its part; the message says what happened."""


class _Subscriber:
    __slots__ = ("at", "connection", "have", "unread")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.at = _NOWHERE  # position in the expected stream
        self.have = -1  # number of the next event; -1 before it has received one
        self.unread = b""  # while the position is not known


class _Publisher:
    """A connection that posts events, and is opened anew if the server closes it."""

    def __init__(self, port: int, path: str) -> None:
        self._address = ("127.0.0.1", port)
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: text/plain\r\nContent-Length: "
        ).encode()
        self.connection: socket.socket | None = None
        self.busy = False
        self._answer = b""

    def post(self, body: bytes) -> socket.socket | None:
        """Send, and return the connection if it is a new one."""
        new = self.connection is None
        if self.connection is None:
            self.connection = socket.create_connection(self._address, timeout=_PATIENCE)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.busy = True
        self.connection.sendall(self._head + b"%d\r\n\r\n" % len(body) + body)
        return self.connection if new else None

    def hear(self) -> socket.socket | None:
        """Read the answer, and return the connection if this was its last."""
        assert self.connection is not None
        data = self.connection.recv(_CHUNK)
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if end:
            if not re.match(rb"HTTP/1\.. 2", head):
                raise Failed(f"the server answered a POST with {self._answer[:200]!r}")
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            if len(body) >= (int(length[1]) if length else 0):
                self._answer, self.busy = b"", False
                if not re.search(rb"(?i)\nconnection: *close", head):
                    return None
        elif self.busy and not data:
            raise Failed("the server closed the connection of a POST without an answer")
        if not data or not self.busy:
            last, self.connection = self.connection, None
            return last
        return None


class Client:
    """All subscribers of one server and the publisher that sends to them."""

    def __init__(self, port: int, say: Callable[[str], None] = lambda text: None) -> None:
        self._port = port
        self._say = say
        self._subscribers: dict[int, _Subscriber] = {}
        self._knocking: dict[int, socket.socket] = {}  # connections that have sent nothing yet
        self._silent = 0  # connections that have received nothing yet
        self._in_step = 0  # subscribers that have received an event
        self._publisher = _Publisher(port, "/publish")
        self._watch: select.epoll | select.poll
        if sys.platform == "linux":
            self._watch = epoll = select.epoll()
            self._poll: Callable[[float], list[tuple[int, int]]] = lambda s: epoll.poll(s, _BATCH)
        else:  # slower with many connections, but everywhere
            self._watch = poll = select.poll()
            self._poll = lambda s: poll.poll(s * 1000)
        # By event: when it was sent, how many are to receive it, when each of them did.
        self.stamps: list[float] = []
        self._due: list[int] = []
        self.arrivals: list[array[float]] = []
        self._complete = 0  # all events before this one have arrived everywhere
        # The expected stream: each event's payload and what the server puts between two.
        self._expected = bytearray()
        self._between = b""
        self._period = 0  # bytes from one event to the next; 0 until it is known
        self._end = 0  # bytes from an event's payload to the end of its blank line
        self._heard_at = 0.0
        self.strange = 0
        self.closed = 0
        # What is kept here are millions of numbers and no cycles: looking through them for some
        # would make pauses, and be measured as the server's.
        gc.disable()

    @property
    def size(self) -> int:
        return len(self._subscribers)

    def close(self) -> None:
        for subscriber in list(self._subscribers.values()):
            self._leave(subscriber, reset=True)
        for connection in (*self._knocking.values(), self._publisher.connection):
            if connection is not None:
                connection.close()
        if sys.platform == "linux" and isinstance(self._watch, select.epoll):
            self._watch.close()
        gc.enable()

    # --- connecting --------------------------------------------------------------------------

    def connect(self, count: int, timeout: float) -> None:
        """Add subscribers until there are ``count``, and see each of them receive an event."""
        until = time.monotonic() + timeout
        if not self._period:
            self._learn_framing(until)
        while self._in_step < count:
            self._say(f"connecting {self._in_step:,} of {count:,}")
            while self.size + len(self._knocking) < count and self._silent < _KNOCKING:
                self.knock()
            self.warm_up()
            self._check(until)
        for _ in range(3):
            while not (self.idle and self.all_arrived()):
                self.turn(0.1)
                self._check(until)
            self.publish(time.monotonic())
        self.drain()

    def _learn_framing(self, until: float) -> None:
        self.knock()
        while not self._period:
            self.warm_up()
            self._check(until)

    def knock(self) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self._port))
        self._silent += 1
        self._knocking[connection.fileno()] = connection
        self._watch.register(connection.fileno(), select.POLLOUT)

    def warm_up(self) -> None:
        """Give the newly connected something to receive, once the server has nothing more to say.

        Some servers send the head with the first event only, and until then nobody can tell
        whether a subscriber is one. Others are slow to let subscribers in while they publish.
        """
        now = time.monotonic()
        if self.idle and self.all_arrived() and now - self._heard_at > _QUIET:
            self.publish(now)
            self._heard_at = now
        self.turn(0.02)

    def _check(self, until: float) -> None:
        if self.closed or time.monotonic() > until:
            what = "the server ended a stream" if self.closed else "no more time"
            raise Failed(f"{what} with {self._in_step:,} connected")

    # --- measuring ---------------------------------------------------------------------------

    def capacity(self, seconds: float, ahead: int) -> Outcome:
        """Publish as fast as the server delivers, never more than ``ahead`` events before it.

        The bound is below every server's queue of 16, so none has a reason to drop anything.
        """

        def events(until: float) -> None:
            while (now := time.monotonic()) < until:
                self.all_arrived()
                if self.idle and len(self.stamps) - self._complete < ahead:
                    self.publish(now)
                self.turn(0.05)

        return self._measure(seconds, events)

    def paced(self, seconds: float, rate: float) -> Outcome:
        """Publish ``rate`` events a second, whatever the server does.

        An event's time is when it was due: what waits because the server has not answered the
        one before is late, too.
        """

        def events(until: float) -> None:
            due = time.monotonic()
            while due < until:
                now = time.monotonic()
                if now > until + _PATIENCE:
                    break
                if now >= due and self.idle:
                    self.publish(due)
                    due += 1 / rate
                self.turn(max(0.0, min(0.05, due - time.monotonic())))

        return self._measure(seconds, events)

    def burst(self, count: int) -> float:
        """Post so many events at once, for a route that broadcasts them in a loop.

        Return the share of their deliveries that came.
        """
        first = len(self.stamps)
        self.publish(time.monotonic(), count)
        self.drain(_MUCH_PATIENCE)
        return sum(map(len, self.arrivals[first:])) / sum(self._due[first:])

    def _measure(self, seconds: float, events: Callable[[float], None]) -> Outcome:
        first = len(self.stamps)
        size, strange, closed = self.size, self.strange, self.closed
        begin, cpu = time.monotonic(), time.process_time()
        events(begin + seconds)
        self.drain()
        elapsed, cpu = time.monotonic() - begin, time.process_time() - cpu
        arrivals = self.arrivals[first:]
        latencies = sorted(
            at - sent
            for sent, times in zip(self.stamps[first:], arrivals, strict=True)
            for at in times
        )
        if not latencies:
            raise Failed("no event arrived")
        count = len(latencies)
        return Outcome(
            events=len(arrivals),
            deliveries=count,
            lost=len(arrivals) * size - count,
            strange=self.strange - strange,
            closed=self.closed - closed,
            per_second=count / (max(map(max, filter(None, arrivals))) - self.stamps[first]),
            p50=latencies[count // 2],
            p99=latencies[min(count - 1, int(count * 0.99))],
            worst=latencies[-1],
            client_cpu=cpu / elapsed,
            client_cost=cpu / count,
        )

    def drain(self, patience: float = _PATIENCE) -> None:
        """Wait for what is under way, until all is there or nothing comes any more."""
        begin = self._heard_at = time.monotonic()
        while not (self.idle and self.all_arrived()):
            self.turn(0.05)
            now = time.monotonic()
            if now - self._heard_at > _SILENCE or now - begin > patience:
                break

    @property
    def idle(self) -> bool:
        """Whether the last event that was posted has been answered."""
        return not self._publisher.busy

    @property
    def behind(self) -> int:
        """How many of those who have received an event have not received the newest."""
        return sum(-1 < s.have < len(self.stamps) for s in self._subscribers.values())

    def all_arrived(self) -> bool:
        while (
            self._complete < len(self.stamps)
            and len(self.arrivals[self._complete]) >= self._due[self._complete]
        ):
            self._complete += 1
        return self._complete == len(self.stamps)

    # --- sending and receiving ---------------------------------------------------------------

    def publish(self, stamp: float, count: int = 1) -> None:
        """Post one event, or several in one body."""
        assert self.idle
        bodies = []
        for _ in range(count):
            bodies.append(_payload(len(self.stamps), stamp))
            self.stamps.append(stamp)
            self._due.append(self._in_step)
            self.arrivals.append(array("d"))
            self._expected += bodies[-1] + self._between
        new = self._publisher.post(b"".join(bodies))
        if new is not None:
            self._watch.register(new.fileno(), select.POLLIN)

    def turn(self, timeout: float) -> None:
        """Wait for input and take it in. Its inner loop is what the client costs."""
        subscribers, expected, arrivals = self._subscribers, self._expected, self.arrivals
        clock, read = time.monotonic, os.read
        for fd, _ in self._poll(timeout):
            subscriber = subscribers.get(fd)
            if subscriber is None:
                self._other(fd)
                continue
            try:
                data = read(fd, _CHUNK)
            except OSError:
                data = b""
            self._heard_at = now = clock()
            if not data or not expected.startswith(data, subscriber.at):
                data = self._find_place(subscriber, data)
                if not data:
                    continue
            subscriber.at += len(data)
            done = 1 + (subscriber.at - self._end) // self._period
            for number in range(subscriber.have, done):
                arrivals[number].append(now)
            subscriber.have = max(subscriber.have, done)

    def _find_place(self, subscriber: _Subscriber, data: bytes) -> bytes:
        """Return the part of the input from which on it is as expected; the slow way.

        At first, that is from the first whole event on. Later it means that something is wrong,
        which is counted, and the next event at which the stream is in step again is looked for.
        """
        if not data:
            self.closed += 1
            self._leave(subscriber)
            return b""
        if subscriber.at != _NOWHERE:
            self.strange += 1
            subscriber.at = _NOWHERE
            subscriber.unread = b""
        elif not subscriber.unread:
            self._silent -= 1
            if not data.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
                raise Failed(f"the server answered a subscriber with {data[:200]!r}")
        subscriber.unread += data
        if not self._period and not self._learn(subscriber.unread):
            return b""
        for event in _EVENT.finditer(subscriber.unread):
            number = int(event[1])
            rest = subscriber.unread[event.start() :]
            if self._expected.startswith(rest, number * self._period):
                self._in_step += subscriber.have < 0
                subscriber.at = number * self._period
                subscriber.have = max(subscriber.have, number)  # those before it are lost
                subscriber.unread = b""
                return rest
        return b""

    def _learn(self, data: bytes) -> bool:
        """Learn from two events what the server puts between them."""
        events = list(_EVENT.finditer(data))
        if len(events) < 2:
            return False
        self._between = data[events[0].end() : events[1].start()]
        blank_line = _BLANK_LINE.search(self._between)
        if blank_line is None:
            raise Failed(f"the server puts no blank line after an event, but {self._between!r}")
        self._end = _PAYLOAD + blank_line.end()
        self._period = _PAYLOAD + len(self._between)
        for number, stamp in enumerate(self.stamps):
            self._expected[number * self._period :] = _payload(number, stamp) + self._between
        return True

    def _other(self, fd: int) -> None:
        """Serve what is no subscriber yet: a new connection, or the publisher's."""
        connection = self._knocking.pop(fd, None)
        if connection is not None:
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise Failed(f"cannot connect: {os.strerror(error)}")
            connection.send(
                f"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
                "Accept: text/event-stream\r\n\r\n".encode()
            )
            self._subscribers[fd] = _Subscriber(connection)
            self._watch.modify(fd, select.POLLIN)
        elif last := self._publisher.hear():
            self._watch.unregister(fd)
            last.close()

    def churn(self, count: int) -> None:
        """Let some subscribers leave, every other one without a goodbye, and as many come."""
        known = [s for s in self._subscribers.values() if s.have >= 0]
        for i, subscriber in enumerate(random.sample(known, min(count, len(known)))):
            self._leave(subscriber, reset=i % 2 == 0)
            self.knock()

    def _leave(self, subscriber: _Subscriber, reset: bool = False) -> None:
        fd = subscriber.connection.fileno()
        self._in_step -= subscriber.have >= 0
        del self._subscribers[fd]
        self._watch.unregister(fd)
        if reset:
            subscriber.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        subscriber.connection.close()


def _payload(number: int, stamp: float) -> bytes:
    return (b"@%09d %016d " % (number, int(stamp * 1_000_000))).ljust(_PAYLOAD - 1, b"x") + b"$"
