"""The load client: any number of subscribers and one publisher, in one thread.

Each event has a number and a time, and ends with the only "$". The client counts those and keeps a
checksum of each stream, which is cheap. Afterwards it compares the first stream with what was
published, and all others with that one, to the byte, so that the chunks of HTTP/1.1 have to be the
same, too: nothing lost, repeated, changed or reordered goes unseen.
"""

import random
import re
import select
import socket
import struct
import time
import zlib
from typing import Any

_AHEAD = 12  # events; every queue holds 16, so that nothing has to be dropped
_CHUNK = 4 * 1024  # bytes to read at a time
_BATCH = 256  # connections to read before looking at the publisher again
_WAITING = 500  # subscribers without an event at a time; servers queue 511 connections or more
_QUIET = 0.05  # seconds without input, after which new subscribers are waiting for an event
_SILENCE = 3.0  # seconds without input, after which what is missing is lost
_RESET = struct.pack("ii", 1, 0)  # linger for 0 seconds: close() sends a reset


class Subscriber:
    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.receive = connection, connection.recv
        self.head = b""  # input before the first event
        self.first = self.next = -1  # numbers of the first event, and of the one to come
        self.length = self.checksum = 0  # of all input from the first event on


class Client:
    _path = "/stream"

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._epoll = select.epoll()
        self.subscribers: dict[int, Subscriber] = {}
        self._left: list[Subscriber] = []
        self._in_step = 0  # subscribers that have received an event
        self._witness: Subscriber | None = None  # the first one, which stays until the end
        self._stream = bytearray()  # its input from its first event on
        self._publisher: Any = None
        self.idle = True  # whether the last POST has been answered
        self.sent: list[float] = []  # when each event was sent
        self._at = [0]  # for each event: how many subscribers have it as their next one
        self._complete = 0  # all events before this one have arrived everywhere
        self._reads: list[tuple[int, int, float]] = []  # first event, the one after the last, time
        self._heard_at = 0.0
        self.closed = 0  # streams that the server ended

    def connect(self, count: int, seconds: float = 90.0) -> None:
        """Add subscribers until there are `count` and each has received an event."""
        until = time.monotonic() + seconds
        while self._in_step < count:
            room = self._in_step + _WAITING if self._stream else 1
            while len(self.subscribers) < min(count, room):
                self.join()
            # Some servers send their headers with the first event. Others are slow to accept
            # connections while they publish, so wait for a pause.
            now = time.monotonic()
            if self.all_arrived() and now - self._heard_at > _QUIET:
                self._heard_at = now
                self.publish(now)
            self.turn(0.02)
            if self.closed or now > until:
                raise RuntimeError(f"only {self._in_step:,} connected, {self.closed:,} cut off")
        self.wait()

    def join(self) -> None:
        connection = socket.create_connection(self._address, timeout=20)
        path = self._path.format(connection.fileno())
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.subscribers[connection.fileno()] = subscriber = Subscriber(connection)
        self._witness = self._witness or subscriber
        self._epoll.register(connection.fileno(), select.POLLIN)

    def leave(self, count: int) -> None:
        """Let random subscribers leave, about half of them with a reset."""
        for fd in random.sample(list(self.subscribers)[1:], count):
            if random.random() < 0.5:
                connection = self.subscribers[fd].connection
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._remove(fd)

    def _remove(self, fd: int) -> None:
        subscriber = self.subscribers.pop(fd)
        self._in_step -= subscriber.first >= 0
        self._at[subscriber.next] -= subscriber.first >= 0
        self._left.append(subscriber)
        subscriber.connection.close()

    def measure(self, seconds: float, rate: float = 0.0) -> dict[str, Any]:
        """Publish so many events per second, or as fast as the server delivers; say what came."""
        first, count, cpu = len(self.sent), self._in_step, time.process_time()
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + seconds + 20:
            due = begin + (len(self.sent) - first) / rate if rate else now  # this counts as sent
            if due >= begin + seconds:
                break
            self.all_arrived()
            if self.idle and now >= due and (rate or len(self.sent) - self._complete < _AHEAD):
                self.publish(due)
            self.turn(max(0.0, min(0.05, due - now)) if rate else 0.05)
        self.wait()
        cpu, reads = time.process_time() - cpu, self._reads
        if not (late := self.latencies(first)):
            raise RuntimeError("no event arrived")
        elapsed = reads[-1][2] - self.sent[first]
        lost = 1 - len(late) / count / len(self.sent[first:])
        return {"late": late, "lost": lost, "rate": len(late) / elapsed, "cpu": cpu / elapsed}

    def burst(self, count: int) -> float:
        """Post so many events in one body, and return the share of their deliveries that came."""
        first, due = len(self.sent), count * self._in_step
        self.publish(time.monotonic(), count)
        self.wait(120)  # the slowest servers take most of a minute
        return len(self.latencies(first)) / due

    def latencies(self, first: int = 0) -> list[float]:
        """Return the seconds that each delivery took, from this event on, and forget the reads."""
        reads, self._reads, sent = self._reads, [], self.sent
        return [t - sent[i] for begin, end, t in reads for i in range(max(begin, first), end)]

    def wrong(self) -> int:
        """Return how many streams, of all since the beginning, had bytes that were not due."""
        self.wait()
        while self._epoll.poll(0.1, 1):  # what follows the last event's data
            self.turn(0)
        streams = [s for s in (*self.subscribers.values(), *self._left) if s.first >= 0]
        stream, first = bytes(self._stream), streams[0].first
        published = map(_payload, range(first, len(self.sent)), self.sent[first:])
        if re.findall(rb"@[^$]*\$", stream) != list(published):
            return len(streams)
        at = {i: event.start() for i, event in enumerate(re.finditer(b"@", stream), first)}
        due = (memoryview(stream)[at[s.first] :][: s.length] for s in streams)
        return sum(s.checksum != zlib.crc32(d) for s, d in zip(streams, due, strict=True))

    def wait(self, patience: float = 20.0) -> None:
        """Wait for what is under way, until all of it is there or nothing comes any more."""
        self._heard_at = time.monotonic()
        until = self._heard_at + patience
        while not self.all_arrived() and time.monotonic() < min(until, self._heard_at + _SILENCE):
            self.turn(0.05)

    def all_arrived(self) -> bool:
        while self._complete < len(self.sent) and not self._at[self._complete]:
            self._complete += 1
        return self.idle and self._complete == len(self.sent)

    def publish(self, stamp: float, count: int = 1) -> None:
        """Post one event, or several in one body."""
        self._post(b"\n".join(_payload(len(self.sent) + i, stamp) for i in range(count)))
        self.sent += [stamp] * count
        self._at += [0] * count

    def _post(self, body: bytes) -> None:
        if self._publisher:
            (poll := select.poll()).register(self._publisher, select.POLLIN)
            if poll.poll(0):
                self._answered()  # by the end: it was idle for too long
        if self._publisher is None:
            self._publisher = socket.create_connection(self._address, timeout=20)
            self._publisher.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._epoll.register(self._publisher.fileno(), select.POLLIN)
        head = f"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._publisher.sendall(head.encode() + body)
        self.idle = False

    def turn(self, timeout: float) -> None:
        """Wait for input and take it in. The inner loop is what the client costs."""
        subscribers, at, published = self.subscribers, self._at, len(self.sent)
        reads, clock, crc32 = self._reads, time.monotonic, zlib.crc32
        for fd, _ in self._epoll.poll(timeout, _BATCH):
            if (subscriber := subscribers.get(fd)) is None:
                self._answered()
                continue
            data = subscriber.receive(_CHUNK)
            self._heard_at = now = clock()
            if not data:
                self.closed += 1
                self._remove(fd)
                continue
            if subscriber.first < 0 and not (data := self._first_event(subscriber, data)):
                continue
            if subscriber is self._witness:
                self._stream += data
            subscriber.length += len(data)
            subscriber.checksum = crc32(data, subscriber.checksum)
            begin = subscriber.next
            subscriber.next = end = min(begin + data.count(b"$"), published)
            at[begin] -= 1
            at[end] += 1
            reads.append((begin, end, now))

    def _first_event(self, subscriber: Subscriber, data: bytes) -> bytes:
        """Return the input from the first event on; nothing if there is none yet."""
        subscriber.head += data
        if not subscriber.head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"a subscriber got {subscriber.head.splitlines()[0]!r}")
        if not (event := re.search(rb"@(\d{9})", subscriber.head)):
            return b""
        subscriber.first = subscriber.next = int(event[1])
        self._in_step += 1
        self._at[subscriber.first] += 1
        return subscriber.head[event.start() :]

    def _answered(self) -> None:
        """Read the answer to a POST: 204, so it has no body."""
        data = self._publisher.recv(_CHUNK)
        # Nothing is the end of an idle connection, which the next POST does without.
        if data[:12] != b"HTTP/1.1 204" and (data or not self.idle):
            raise RuntimeError(f"the server answered a POST with {data[:200]!r}")
        self.idle = True
        if not data or b"\nconnection: close" in data.lower():
            self._publisher.close()
            self._publisher = None


class Users(Client):
    """Each subscriber is a user, with events of its own beside those for all."""

    _path = "/stream?user={}"

    def measure(self, seconds: float, rate: float = 0.0) -> dict[str, Any]:
        """Post 100 events at a time, each to another user, or one; go on when they have come."""
        cpu, late, sent, wrong = time.process_time(), [], 0, 0
        begin = now = time.monotonic()
        while now < begin + seconds:
            users, stamp = random.sample(list(self.subscribers), 1 if rate else 100), now
            due = {fd: _payload(number, stamp) for number, fd in enumerate(users, sent)}
            self._post(b"\n".join(b"%b %d" % (event, fd) for fd, event in due.items()))
            sent += len(users)
            while (due or not self.idle) and now < stamp + _SILENCE:
                for fd, _ in self._epoll.poll(0.05, _BATCH):
                    if fd not in self.subscribers:
                        self._answered()
                        continue
                    for event in re.findall(rb"@[^$]*\$", self.subscribers[fd].receive(_CHUNK)):
                        late.append(time.monotonic() - stamp)
                        wrong += due.pop(fd, b"") != event
                now = time.monotonic()
        cpu, elapsed = time.process_time() - cpu, now - begin
        lost = (sent - len(late) + 2 * wrong) / sent  # one at the wrong user is missing elsewhere
        return {"late": late, "lost": lost, "rate": len(late) / elapsed, "cpu": cpu / elapsed}


def _payload(number: int, stamp: float) -> bytes:
    return (b"@%09d-%016d-" % (number, int(stamp * 1_000_000))).ljust(63, b"x") + b"$"
