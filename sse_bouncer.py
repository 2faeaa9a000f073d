"""Server-sent events for Flask, in one file, with no dependencies.

With ``bouncer = EventBouncer()`` one view returns ``bouncer.stream()``, and another one calls
``bouncer.broadcast("Hey!")``. Each of the five rooms uses only the rooms above it:

    1. WIRE FORMAT  text in, frame out: ``format_sse``, ``Frame``
    2. RELAY        events between processes and machines: ``RedisRelay``
    3. FAN-OUT      every event to every subscriber: ``EventBouncer``, ``Subscription``
    4. HUB          one thread that serves all streams, so that no stream holds a worker
    5. RESPONSE     a stream as a Flask response: ``sse_response``

Everything public may be called from any thread or greenlet, and `EventBouncer.close` from a signal
handler. Times are in seconds, but ``retry`` is in milliseconds, like the field on the wire. "The
standard" is https://html.spec.whatwg.org/multipage/server-sent-events.html, the WHATWG's 9.2.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["EventBouncer", "Frame", "RedisRelay", "Subscription", "format_sse", "sse_response"]

import atexit
import contextlib
import contextvars
import errno
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import selectors
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from flask import Response

logger = logging.getLogger("sse_bouncer")
_warned: set[str] = set()
_greenlets: list[Any] = []  # that gevent makes of the threads in here


def _warn_once(message: str, *args: object) -> None:
    """Log a warning, the first time in this process that it is given."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *args)


def _expect(condition: object, error: type[Exception], expected: str, given: object) -> None:
    """Raise an error that says what was expected, what was given and, after ";", what to do."""
    if not condition:
        what, _, advice = expected.partition("; ")
        raise error(f"{what}, got {given!r:.80}; {advice}")


def _number(name: str, value: Any, least: float, most: float = math.inf) -> Any:
    """Return ``value`` if it is in the range, and whole unless the range has a fraction."""
    kinds = (int,) if isinstance(least, int) else (int, float)
    what = f"{name}: expected {kinds[-1].__name__} from {least:,} to {most:,}; give it as a number"
    _expect(isinstance(value, kinds) and not isinstance(value, bool), TypeError, what, value)
    _expect(least <= value <= most, ValueError, what, value)
    return kinds[-1](value)


def _start_thread(run: Callable[[], None], name: str) -> None:
    def target() -> None:
        if "gevent" in sys.modules:
            _greenlets.append(sys.modules["gevent"].getcurrent())
        try:
            run()
        except SystemExit:  # in a forked child, where threading has forgotten it
            threading.Event().wait()

    threading.Thread(target=target, name=name, daemon=True).start()


# =================================================================================================
# 1. WIRE FORMAT
# Text in, frame out. What leaves this room is valid, so nothing can fail in the middle of a stream.
# No lock, no clock and no socket in here; of Flask only its JSON, if the app has loaded it.

# CRLF, LF and CR (9.2.5). str.splitlines() splits at eight others, and loses a trailing line end.
_LINE_END = re.compile(r"\r\n|\n|\r")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ID_LINE = re.compile(r"(?:^|[\r\n])id[:\r\n]")
# A comment without a blank line after it, of which some client libraries make an empty event.
_HEARTBEAT = b":\n"


class Frame(str):
    """Text that is in the wire format already, as ``markupsafe.Markup`` is text that is HTML.

    `format_sse` returns one. Call ``Frame(text)`` only for protocol that you have written yourself,
    one event each. Anything but text that ends in a blank line raises TypeError or ValueError.
    """

    __slots__ = ("_wire",)
    _wire: bytes  # encoded once, however many subscribers get it

    def __new__(cls, text: str) -> Frame:
        if isinstance(text, Frame):
            return text
        wire = _text("frame", text).encode()
        what = "frame: expected text that ends in a blank line; use format_sse(...) for data"
        _expect(_LINE_END.sub("\n", text[-4:]).endswith("\n\n"), ValueError, what, text)
        frame = super().__new__(cls, text)
        frame._wire = wire
        return frame


def format_sse(
    data: object = None,
    event: str | None = None,
    *,
    id: str | int | None = None,
    retry: int | None = None,
    comment: str | None = None,
) -> Frame:
    r"""Format one event for the wire.

    ``"a\r\nb"`` is sent as ``data: a\ndata: b\n\n``, and received as ``a\nb``.

    :param data: Text, or bytes in UTF-8, as they are; a `Frame`, unchanged; anything else as JSON
        without NaN and Infinity, by ``flask.json.dumps`` if Flask is loaded and so by the app's own
        provider. None, the default, sends no data: clients then dispatch no event.
    :param event: The event's name, without CR, LF and NUL. None or ``""`` is ``message``.
    :param id: What the client sends back as ``Last-Event-ID``, without CR, LF and NUL. ``""`` makes
        it forget the last one; None, the default, leaves that as it is.
    :param retry: Milliseconds that the client waits before it reconnects, from now on. 0 is at
        once; None, the default, leaves that as it is.
    :param comment: Text that clients ignore, for a person who reads the stream.
    :raises TypeError: if an argument is of the wrong type, or is not something JSON can hold.
    :raises ValueError: if a text breaks its field's rule or has no UTF-8, or nothing is given.
    """
    if isinstance(data, Frame):
        what = "data: expected no Frame beside other fields; give them to its format_sse(...)"
        _expect((event, id, retry, comment) == (None,) * 4, ValueError, what, data)
        return data
    lines = []
    if comment is not None:
        lines += [": " + line for line in _LINE_END.split(_text("comment", comment))]
    if event is not None and (name := _text("event", event, one_line=True)):
        lines.append("event: " + name)
    if id is not None:
        is_number = isinstance(id, int) and not isinstance(id, bool)
        lines.append("id: " + (str(int(id)) if is_number else _text("id", id, one_line=True)))
    if retry is not None:
        lines.append("retry: " + str(_number("retry", retry, 0)))
    if data is not None:
        # Always one space, which clients remove (9.2.6): data that begins with one keeps it.
        lines += ["data: " + line for line in _LINE_END.split(_data_text(data))]
    _expect(lines, ValueError, 'data: expected something to send; use "" for no text', data)
    return Frame("\n".join(lines) + "\n\n")


def _with_id(frame: Frame, id: str) -> Frame:
    what = "id: expected none beside the bouncer's own; leave it out, or history and relay"
    _expect(not _ID_LINE.search(frame), ValueError, what, str(frame))
    return Frame(f"id: {id}\n" + frame)


def _text(name: str, value: Any, one_line: bool = False) -> str:
    """Return ``value`` if it is text that has UTF-8, and can begin no other field if one line."""
    _expect(isinstance(value, str), TypeError, f"{name}: expected text; use str(...)", value)
    what = f"{name}: expected text without lone surrogates; use text.encode(errors='replace')"
    _expect(value.isascii() or not _SURROGATE.search(value), ValueError, what, value)
    # A NUL in an id makes a client ignore the field (9.2.6); in an event's name it is never meant.
    is_valid = not one_line or not {"\n", "\r", "\0"}.intersection(value)
    what = f"{name}: expected text without CR, LF or NUL; put it into data"
    _expect(is_valid, ValueError, what, value)
    return str.__str__(value)  # of a member of an enumeration, its text


def _data_text(data: object) -> str:
    if isinstance(data, str):
        return _text("data", data)
    try:
        if isinstance(data, bytes | bytearray | memoryview):
            return str(data, "utf-8")
        flask: Any = sys.modules.get("flask")
        # JSON.parse() in a browser refuses NaN and Infinity.
        text: str = (json if flask is None else flask.json).dumps(data, allow_nan=False)
        return text
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        what = "data: expected text, bytes in UTF-8 or what JSON can hold"
        raise kind(f"{what}, got {data!r:.80} ({error}); convert it first") from error


_GAP = format_sse("", "gap")


# =================================================================================================
# 2. RELAY
# Events between processes. There is one entry per event, and its id is the event's id, so all
# processes agree on ids and order, and a client may come back to any of them. Each entry also holds
# the id of the entry before it: a reader that finds another id there than the one it read last has
# missed something, whatever the cause. No HTTP in here; the Redis client is the app's own object.

_READ_COUNT = 1_000  # entries that are read at once

_Id = tuple[int, int]  # for Redis: milliseconds, and a sequence number within them
_NO_ID: _Id = (0, 0)  # before all others
_Entry = tuple[str, str, str | None, str | None]  # see RedisRelay
# A header is a stranger's text, and int() alone reads much more than this: "１", and "1_0".
_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})", re.ASCII)


def _parse_id(text: str | None) -> _Id | None:
    match = _ID.fullmatch(text or "")
    return (int(match[1]), int(match[2])) if match else None


def _id_text(id: _Id) -> str:
    return f"{id[0]}-{id[1]}"


class RedisRelay:
    """Carries events between processes by a Redis stream.

        relay = RedisRelay(redis.Redis.from_url("redis://localhost"))
        bouncer = EventBouncer(history=1000, relay=relay)

    It takes Redis 6.2 or later, Valkey, or a cluster, and for reading one connection per process.
    An access-control list needs ``+eval +xadd +xrange +xrevrange +xread`` on the key, and a
    cluster's also ``+cluster +command``.

    While Redis is gone, streams stay open, and `EventBouncer.broadcast` raises the client's error.
    When it is back, all that it kept is delivered. If it has lost events that this process had yet
    to read, every stream gets an event named ``gap`` before the next one. If the answer to an EVAL
    is lost, the client repeats it, and the event arrives twice. Any object with these three methods
    can be a relay. Its entries are tuples: the id, ``<digits>-<digits>``, which increases; the id
    of the entry before, or ``"0-0"``; channel, None for all; frame, None to end its streams.

    :param client: A ``redis.Redis`` or ``redis.RedisCluster``, which may decode responses.
    :param key: The stream's key; all processes of an app use the same. The default is ``sse``.
    :param maxlen: About how many events Redis keeps, at least 1. The default is 10,000.
    """

    # A script is one step for Redis: no other entry can come in between.
    _PUBLISH = """
        local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
        return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*',
            'after', last and last[1] or '0-0', unpack(ARGV, 2))
    """

    def __init__(self, client: Any, key: str = "sse", maxlen: int = 10_000) -> None:
        what = "client: expected a Redis client; use redis.Redis.from_url(...)"
        _expect(hasattr(client, "eval"), TypeError, what, client)
        self.key = _text("key", key)
        self.maxlen = _number("maxlen", maxlen, 1)
        self._client = client

    def publish(self, channel: str | None, frame: str | None) -> None:
        """Add an entry, for all processes, this one included. Called from any thread."""
        fields = {"channel": channel, "frame": frame}
        given = [(name, text.encode()) for name, text in fields.items() if text is not None]
        self._client.eval(self._PUBLISH, 1, self.key, self.maxlen, *itertools.chain(*given))

    def recent(self, count: int) -> list[_Entry]:
        """Return the newest entries, at most ``count``, the oldest first."""
        return self._entries("XREVRANGE", "+", "-", count)[::-1]

    def read(self, after: str, timeout: float) -> list[_Entry]:
        """Return entries after an id, the oldest first; wait up to ``timeout`` seconds for one."""
        # At most half of the time after which the client takes a silent Redis for gone.
        pool = getattr(self._client, "connection_pool", None)
        pool = pool or getattr(self._client, "nodes_manager", None)  # a cluster's
        options = getattr(pool, "connection_kwargs", {})
        timeout = min(timeout, (options.get("socket_timeout") or math.inf) / 2)
        block = "BLOCK", max(1, int(1000 * timeout))  # 0 milliseconds would be for ever
        self._execute("XREAD", "COUNT", 1, *block, "STREAMS", self.key, after)
        # XRANGE, because the shape of XREAD's answer depends on the client's version and protocol.
        return self._entries("XRANGE", f"({after}", "+", _READ_COUNT)

    def _entries(self, command: str, start: str, end: str, count: int) -> list[_Entry]:
        def decoded(value: Any) -> str:  # a Frame takes no surrogates
            return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value

        entries = []
        for id, fields in self._execute(command, self.key, start, end, "COUNT", count):
            text = {decoded(name): decoded(value) for name, value in fields.items()}
            after, channel, frame = text.get("after", ""), text.get("channel"), text.get("frame")
            entries.append((decoded(id), after, channel, frame))
        return entries

    def _execute(self, *command: object) -> Any:
        # A client that decodes would stop for good at an entry, of anyone's, that is not UTF-8.
        return self._client.execute_command(*command, NEVER_DECODE=True)


# =================================================================================================
# 3. FAN-OUT
# Every event to every subscriber, in one order, through a bounded queue for each. A subscriber that
# falls behind is dropped: its stream ends after what it holds, and with a history it comes back and
# gets what it missed. No HTTP and no socket in here.

# Seconds that a broadcast waits for readers whose queues are full, once for all of them. Without it
# broadcasts in a loop drop readers that keep up, which run only when the publisher lets them.
_GRACE = 0.05
_MAX_LAG = 1.0  # seconds that one reader may hold broadcasts up in all until it has caught up
_MAX_HEARTBEAT = 86_400.0  # seconds, a day: longer than proxies wait, and what a timer can take
_MAX_CHANNELS = 10_000  # of which a history knows what it no longer keeps
_RELAY_WAIT = 1.0  # seconds that a subscriber waits for the relay
_READ_TIMEOUT = 2.0  # seconds that the relay waits for an event; redis-py gives up after 5
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between attempts to reach a relay that is away


class _Event(NamedTuple):
    id: _Id
    channel: str | None  # None is everyone
    frame: Frame | None  # with the id; None ends the streams of the channel


class _History:
    """The newest events, in order, and what is no longer kept."""

    def __init__(self, size: int, floor: _Id) -> None:
        self._events: deque[_Event] = deque(maxlen=size)
        self.begin(floor)

    def begin(self, floor: _Id) -> None:
        """Forget everything, and go on with what comes after the event of this id."""
        self._events.clear()
        self._floor = self.newest = floor
        self._first: _Id | None = None  # the first id since then
        self._forgotten: dict[str | None, _Id] = {}  # a channel's newest event that is not kept

    def keep(self, event: _Event) -> None:
        self._first, self.newest = self._first or event.id, event.id
        if event.frame is None:  # the end of streams has an id, and is no event
            return
        if len(self._events) == self._events.maxlen:
            oldest = self._events[0] if self._events else event
            self._forgotten[oldest.channel] = oldest.id
            if len(self._forgotten) > _MAX_CHANNELS:
                self._forgotten.clear()
                self._floor = oldest.id
        self._events.append(event)

    def missed(self, last: _Id | None, channels: tuple[str, ...]) -> tuple[_Id | None, list[Frame]]:
        """Return what a client missed that has seen ``last``; None has seen nothing.

        If some of that is no longer kept, or ``last`` is not known here, return all that is kept,
        and the id after which nothing is missing.
        """
        gap = None
        if last is not None:
            complete = max(self._forgotten.get(c, self._floor) for c in (None, *channels))
            # Ids between the floor and the first event are of a stream that was deleted.
            is_known = self._first is not None and self._first <= last <= self.newest
            if last < complete or not is_known and last != self._floor:
                gap, last = complete, None
        since = last or _NO_ID
        newest_first = itertools.takewhile(lambda event: event.id > since, reversed(self._events))
        frames = [e.frame for e in newest_first if e.channel is None or e.channel in channels]
        return gap, [frame for frame in reversed(frames) if frame is not None]


class Subscription:
    """A bounded queue of frames, with the reading half of ``queue.Queue``.

    Iterating yields frames until it ends; as a context manager it is unsubscribed when the block
    is left. One that nothing refers to is gone. When it ends, a blocked reader wakes, and gets what
    is held; after that `get` raises `Ended`.
    """

    __slots__ = (
        "__weakref__ channels gap maxsize _bouncer _emptied _ended _frames _lag _ready"
        " _replay _descriptor _pending _received"
    ).split()

    class Ended(BrokenPipeError):
        """Raised by `get` at the end; as EPIPE, so servers take it for a client that left."""

    def __init__(self, bouncer: EventBouncer, channels: tuple[str, ...]) -> None:
        self.channels = channels
        self.maxsize = bouncer.maxsize  #: How many frames it holds at most.
        self.gap = False  #: Whether its first frame is an event ``gap``; see `subscribe`.
        self._bouncer = bouncer
        # These are guarded by the bouncer's lock.
        self._frames: deque[Frame] = deque()
        self._emptied = 0  # how often the queue has been emptied
        self._lag = 0.0  # seconds that broadcasts have waited since then
        self._ended: str | None = None  # why
        self._ready = bouncer._changed  # one of its own, once a reader has waited
        self._replay = 0  # how many frames of what it holds are what it missed, and do not count
        # These are the hub's thread's own, once it is detached; so is _replay.
        self._descriptor = -1  # of the client's connection
        self._pending: deque[bytes | memoryview] | None = None  # what is still to be sent
        self._received = 0  # bytes of input

    def get(self, block: bool = True, timeout: float | None = None) -> Frame:
        """Remove and return the next frame.

        :param block: Whether to wait for one.
        :param timeout: Seconds to wait. None, the default, is for ever; 0 is not at all.
        :raises queue.Empty: if there is none in time.
        :raises Subscription.Ended: if there is none and none will come.
        """
        what = "timeout: expected seconds >= 0 or None; use None to wait for ever"
        _expect(timeout is None or timeout >= 0, ValueError, what, timeout)
        with self._bouncer._lock:
            if block and not self._frames and self._ended is None:
                if self._ready is self._bouncer._changed:
                    self._ready = threading.Condition(self._bouncer._lock)
                timeout = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
                self._ready.wait_for(lambda: self._frames or self._ended is not None, timeout)
            if not self._frames:
                ended = self.Ended(errno.EPIPE, f"this subscription has ended: {self._ended}")
                raise queue.Empty if self._ended is None else ended
            frame = self._frames.popleft()
            self._replay = max(0, self._replay - 1)
            if not self._frames:
                self._emptied, self._lag = self._emptied + 1, 0.0
                self._bouncer._changed.notify_all()
            return frame

    def get_nowait(self) -> Frame:
        return self.get(block=False)

    def qsize(self) -> int:
        return len(self._frames)

    def empty(self) -> bool:
        return not self._frames

    def full(self) -> bool:
        """Return whether the next broadcast would find no room."""
        return len(self._frames) - self._replay >= self.maxsize

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        try:
            return self.get()
        except self.Ended:
            raise StopIteration from None

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bouncer.unsubscribe(self)


class EventBouncer:
    """Lets subscribers in, and sends what is broadcast to all of them. Make one per app.

    :param maxsize: How many frames a subscriber may fall behind, at least 1. Then it is dropped.
    :param history: How many events to keep, of all channels together, for clients that come back.
        The bouncer then gives every event an id. 0, the default, keeps none.
    :param heartbeat: Seconds of silence, at most 86,400, after which a stream sends a comment, for
        proxies and to notice a client that left; 15 as the standard advises (9.2.7). None: never.
    :param retry: Milliseconds that a client waits before it reconnects, or a pair of them, of which
        each client gets a random value between. 0 is at once. None leaves it to the browser.
    :param max_subscribers: How many there may be at a time, at least 1. None is any number.
    :param relay: What carries events between processes, a `RedisRelay` or an object with the same
        three methods. None keeps to this process.
    :param detach: Whether streams are taken over from a server that hands out its connections.
    :raises TypeError, ValueError: if an argument is of the wrong type, or out of range.
    """

    class Refused(RuntimeError):
        """Raised by `subscribe` if there are ``max_subscribers`` already, or after `close`."""

    def __init__(
        self,
        maxsize: int = 16,
        *,
        history: int = 0,
        heartbeat: float | None = 15.0,
        retry: int | tuple[int, int] | None = None,
        max_subscribers: int | None = None,
        relay: Any = None,
        detach: bool = True,
    ) -> None:
        self.maxsize: int = _number("maxsize", maxsize, 1)
        self.history: int = _number("history", history, 0)
        if heartbeat is not None:
            heartbeat = _number("heartbeat", heartbeat, 0.001, _MAX_HEARTBEAT)
        self.heartbeat = heartbeat
        if retry is not None:
            pair = retry if isinstance(retry, tuple | list) else (retry, retry)
            numbers = [_number("retry", number, 0) for number in pair]
            what = "retry: expected one number, or two from low to high; give milliseconds"
            _expect(len(pair) == 2 and numbers == sorted(numbers), ValueError, what, retry)
            retry = numbers[0], numbers[1]
        self.retry: Any = retry
        if max_subscribers is not None:
            _number("max_subscribers", max_subscribers, 1)
        self.max_subscribers = max_subscribers
        what = "detach: expected True or False; use bool(...)"
        _expect(isinstance(detach, bool), TypeError, what, detach)
        self.detach = detach
        what = "relay: expected an object with publish, recent and read; use RedisRelay(client)"
        is_relay = all(hasattr(relay, name) for name in ("publish", "recent", "read"))
        _expect(relay is None or is_relay, TypeError, what, relay)
        self.relay = relay
        self._gives_ids = history > 0 or relay is not None
        self._closed = False
        self._counts = {"broadcasts": 0, "dropped": 0, "refused": 0}
        self._begin()
        _bouncers.add(self)

    def _begin(self) -> None:
        # _lock guards everything mutable in the bouncer and its subscriptions, and puts events in
        # order: each gets its id, its place in the history and in every queue, and is handed to the
        # hub, in one pass under the lock. It is never held while something blocks, logs or runs the
        # app's code. It is reentrant, and loops are over copies, because a signal handler may
        # close(), or a finaliser unsubscribe, in the thread that it interrupts in here.
        self._lock = threading.RLock()
        # For what waits: told when a queue is empty, a subscription has ended, an event has come.
        self._changed = threading.Condition(self._lock)
        # Held while a thread starts, which may run a finaliser, and so not under _lock.
        self._starting = threading.RLock()
        # Those that are read by get(): hundreds at most, as each holds a thread. One that a failed
        # view has left behind ends by its bound.
        self._readers: weakref.WeakKeyDictionary[Subscription, None] = weakref.WeakKeyDictionary()
        self._detached: set[Subscription] = set()  # those of the hub: thousands
        self._hub: _Hub | None = None  # made for the first stream that is detached
        self._relay_reader: _RelayReader | None = None  # made for the first subscriber
        # Without a relay ids begin with the time, so that no other process knows them.
        floor = (time.time_ns(), 0) if self.relay is None else _NO_ID
        self._history = _History(self.history, floor)

    def subscribe(self, *channels: str, last_event_id: str | None = None) -> Subscription:
        """Subscribe to what is broadcast without a channel, and to these channels, from now on.

        :param channels: Names, none of them empty. Who may read which is for the route to decide.
        :param last_event_id: The id that the client saw last. What it missed since comes first; if
            something of that is no longer kept, or the id is not known here, all that is kept,
            after an event named ``gap``, at which a page loads its state again. ``"earliest"`` asks
            for all that is kept. None, the default, and other text begin with the live stream.
        :raises EventBouncer.Refused: if there are too many already, or all is closed.
        """
        subscription = Subscription(self, _channel_names(channels))
        what = "last_event_id: expected text or None; use str(...)"
        _expect(isinstance(last_event_id, str | None), TypeError, what, last_event_id)
        last = _parse_id(last_event_id)
        self._start_relay_reader()
        with self._lock:
            if self.relay is not None:
                # The client may have seen, at another process, what is still to come here.
                seen = last or _NO_ID
                self._changed.wait_for(lambda: seen <= self._history.newest, _RELAY_WAIT)
            count, most = len(self._readers) + len(self._detached), self.max_subscribers
            if self._closed or most is not None and count >= most:
                self._counts["refused"] += 1
                what = "an open bouncer" if self._closed else f"fewer than max_subscribers={most}"
                raise self.Refused(f"expected {what}, got {count} subscribers; try later")
            if self._gives_ids and (last is not None or last_event_id == "earliest"):
                gap, frames = self._history.missed(last, subscription.channels)
                subscription.gap = gap is not None
                if gap is not None:
                    frames.insert(0, _with_id(_GAP, _id_text(gap)))
                subscription._frames.extend(frames)
                subscription._replay = len(frames)
            self._readers[subscription] = None
            if self._closed:  # by a signal handler, since the look above
                self._remove(subscription, "closed")
        return subscription

    def broadcast(
        self,
        msg: object,
        event: str | None = None,
        *,
        channel: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> None:
        """Send an event to every subscriber, or to those of one channel.

        Readers whose queues are full get about 0.05 seconds together, and are then dropped.
        Detached streams are waited for only if their hub is 64 KiB of frames behind. With a relay
        this returns when the relay has the event, and raises what the relay raises.

        :param msg: A `Frame`, or data. For this, ``event``, ``id`` and ``retry`` see `format_sse`;
            with a history or a relay the bouncer gives the ids.
        :param channel: The channel to send it to. None, the default, is everyone.
        :raises TypeError, ValueError: as `format_sse` does; nothing is sent.
        """
        frame = format_sse(msg, event, id=id, retry=retry)
        if channel is not None:
            (channel,) = _channel_names([channel])
        if self._gives_ids:
            _with_id(frame, "0-0")  # raises now if it has an id of its own
        if self.relay is not None:
            self.relay.publish(channel, str(frame))
        else:
            self._deliver(None, channel, frame)

    def stream(self, *channels: str, last_event_id: str | None = None) -> Response:
        """Return a Flask response that streams to one new subscriber. See `subscribe`.

        A client that comes back has a ``Last-Event-ID`` header, or a query parameter
        ``lastEventId``, which beats the argument. One that is refused is answered 200, a ``retry``
        and the end: at any other status an EventSource gives up for good (9.2.3).
        """
        return _stream(self, channels, last_event_id)  # calls room 5

    def unsubscribe(self, subscription: Subscription) -> None:
        """End one subscription; what it holds is still delivered. A second call has no effect."""
        what = "subscription: expected one of this bouncer; give what subscribe() returned"
        _expect(isinstance(subscription, Subscription), TypeError, what, subscription)
        _expect(subscription._bouncer is self, ValueError, what, subscription)
        self._remove(subscription, "unsubscribed")

    def disconnect(self, *channels: str) -> None:
        """End the streams that have one of these channels; new ones may come.

        What was broadcast before is still delivered. With a relay this is for all processes; if
        the relay fails, it is for this one, and the relay's error is raised.
        """
        names = set(_channel_names(channels))
        try:
            for name in sorted(names) if self.relay is not None else ():
                self.relay.publish(name, None)
                names.discard(name)
        finally:
            self._disconnect(names)

    def close(self) -> None:
        """End every stream of this process, after what it holds, and refuse new ones.

        In ``gunicorn.conf.py`` this ends streams that would hold up gunicorn's stop or reload::

            def post_worker_init(worker):
                import signal, app
                for number in signal.SIGTERM, signal.SIGINT, signal.SIGQUIT:
                    def handle(*args, before=signal.getsignal(number)):
                        app.bouncer.close()
                        before(*args)
                    signal.signal(number, handle)
        """
        self._closed = True  # before the loop: see the end of subscribe()
        for subscription in self.subscribers:
            self._remove(subscription, "closed")

    @property
    def subscribers(self) -> tuple[Subscription, ...]:
        """The subscriptions of this process at this moment."""
        with self._lock:
            return (*self._detached, *self._audience(None))

    @property
    def last_event_id(self) -> str | None:
        """The newest event's id, for a page to pass to `stream`; None without a history."""
        self._start_relay_reader()
        return _id_text(self._history.newest) if self._gives_ids else None

    def stats(self) -> dict[str, int]:
        """Count this process's subscribers and broadcasts; ``detached`` ones hold no worker."""
        with self._lock:
            detached, readers = len(self._detached), len(self._readers)
            return {"subscribers": detached + readers, "detached": detached, **self._counts}

    def _deliver(self, id: _Id | None, channel: str | None, frame: Frame) -> None:
        with self._lock:
            self._wait_for_room(channel)
            if self._gives_ids:
                if id is None:
                    id = (self._history.newest[0], self._history.newest[1] + 1)
                    frame = _with_id(frame, _id_text(id))
                self._history.keep(_Event(id, channel, frame))
            self._counts["broadcasts"] += 1
            self._fan_out(channel, frame)
        if self._hub is not None:
            self._hub.wait_until_behind_at_most(_BACKLOG)

    def _disconnect(self, channels: set[str]) -> None:
        for subscription in self.subscribers:
            if not channels.isdisjoint(subscription.channels):
                self._remove(subscription, "disconnected")

    def _remove(self, subscription: Subscription, why: str) -> None:
        """End a subscription. If it has ended before, this has no effect."""
        with self._lock:
            if subscription._ended is None:
                subscription._ended = why
                self._counts["dropped"] += why == "dropped"
            if self._hub is not None and subscription in self._detached:
                self._detached.discard(subscription)
                self._hub.command(self._hub.end, subscription)
            self._readers.pop(subscription, None)
            subscription._ready.notify_all()
            self._changed.notify_all()

    def _start_relay_reader(self) -> None:
        if self.relay is not None and not self._closed:
            with self._starting:
                reader = self._relay_reader = self._relay_reader or _RelayReader(self)
            reader.has_tried.wait(_RELAY_WAIT)

    def _begin_after(self, floor: _Id, events: Iterable[_Event] = ()) -> None:
        """Begin the history anew, and tell every stream that it may have missed something."""
        with self._lock:
            self._wait_for_room(None)
            self._history.begin(floor)
            for event in events:
                self._history.keep(event)
            self._fan_out(None, _with_id(_GAP, _id_text(self._history.newest)))

    def _hand_over(self, subscription: Subscription, hub: _Hub, head: bytes) -> None:
        """Give a subscription with a reader to the hub."""
        with self._lock:
            held, subscription._frames = subscription._frames, _NO_FRAMES
            subscription._pending = deque([head, *(frame._wire for frame in held)])
            subscription._replay = len(subscription._pending)
            hub.command(hub.attach, subscription)
            self._detached.add(subscription)
            self._readers.pop(subscription, None)
            if subscription._ended is not None:  # since it subscribed: what it holds, and the end
                self._remove(subscription, subscription._ended)

    def _begin_in_child(self) -> None:
        # Threads and clients are the parent's, and a lock that was held would stay locked for ever.
        old = (*self._detached, *self._audience(None))
        if self._hub is not None:
            self._hub.close_in_child()
        self._begin()
        for subscription in old:
            subscription._ready = self._changed
            self._remove(subscription, "it belongs to the process that this one was forked from")

    def _audience(self, channel: str | None) -> list[Subscription]:
        readers = [s for r in self._readers.keyrefs() if (s := r()) is not None]
        return readers if channel is None else [s for s in readers if channel in s.channels]

    def _wait_for_room(self, channel: str | None) -> None:  # called with the lock held
        # Until each full queue has been empty: a loop then waits once in ``maxsize`` frames. Others
        # may fill it again, so only looks that fail count. On a busy machine ten take longer.
        looks, began = 10, time.monotonic()
        while looks:
            readers = self._audience(channel)
            late = {s: s._emptied for s in readers if s.full() and s._lag < _MAX_LAG}
            if not late:
                break
            is_over = lambda: all(s._emptied > n or s._ended for s, n in late.items())  # noqa: B023, E731
            looks -= not self._changed.wait_for(is_over, _GRACE / 10)
            for subscription, emptied in late.items():
                if subscription._emptied == emptied:
                    subscription._lag += time.monotonic() - began
            began = time.monotonic()

    def _fan_out(self, channel: str | None, frame: Frame) -> None:
        if self._hub is not None and self._detached:
            self._hub.command(None, (channel, frame._wire), len(frame._wire))
        for subscription in self._audience(channel):
            if subscription.full():
                self._remove(subscription, "dropped")
            else:
                subscription._frames.append(frame)
                subscription._ready.notify_all()
        self._changed.notify_all()


class _RelayReader:
    """The thread that reads a relay for one bouncer, from its first subscriber to its close."""

    def __init__(self, bouncer: EventBouncer) -> None:
        self.has_tried = threading.Event()  # the relay has been reached, or has failed once
        self._bouncer = bouncer
        self._position: str | None = None  # the id of the entry that was read last
        _start_thread(self._run, "sse_bouncer relay")

    def _run(self) -> None:
        pause = 0.0
        while not self._bouncer._closed:
            try:
                self._read()
                pause = 0.0
            except Exception as error:
                if not pause:
                    what = f"{type(error).__name__}: {error}"
                    logger.warning("the relay cannot be read; trying until it can: %s", what)
                pause = min(2 * pause or _FIRST_PAUSE, _LAST_PAUSE)
            self.has_tried.set()
            time.sleep(pause * random.uniform(0.5, 1))

    def _read(self) -> None:
        bouncer = self._bouncer
        if self._position is None:
            entries = bouncer.relay.recent(bouncer.history or 1)
            start = _parse_id(entries[0][1]) if entries else None
            bouncer._begin_after(start or _NO_ID, filter(None, map(_parse_entry, entries)))
            self._position = entries[-1][0] if entries else _id_text(_NO_ID)
            return
        for entry in bouncer.relay.read(self._position, _READ_TIMEOUT):
            event = _parse_entry(entry)
            if event is not None:
                if entry[1] != self._position:
                    logger.warning("events were lost in the relay before this process read them")
                    # After a deletion, or an older copy, nobody has seen all that was before this.
                    after, position = (_parse_id(id) or _NO_ID for id in (entry[1], self._position))
                    floor = after if after > position else (event.id[0] - 1, 2**64 - 1)
                    bouncer._begin_after(floor)
                if event.frame is not None:
                    bouncer._deliver(event.id, event.channel, event.frame)
                elif event.channel is not None:
                    with bouncer._lock:
                        bouncer._history.keep(event)
                        bouncer._changed.notify_all()
                    bouncer._disconnect({event.channel})
            self._position = entry[0]


def _parse_entry(entry: _Entry) -> _Event | None:
    """Return the event of a relay's entry; None, with a line in the log, if there is none."""
    try:
        id, after, channel, text = entry
        what = "id, after: expected <digits>-<digits>; add entries by publish()"
        _expect(_parse_id(id) and _parse_id(after), ValueError, what, (id, after))
        frame = None if text is None else _with_id(Frame(text), id)
        return _Event(_parse_id(id) or _NO_ID, channel, frame)
    except (TypeError, ValueError) as error:
        logger.warning("skipped an entry of the relay that is not an event: %s", error)
        return None


def _channel_names(channels: Iterable[str]) -> tuple[str, ...]:
    what = "channel: expected one name each, as text; a broadcast goes to one channel"
    for channel in channels:
        _expect(isinstance(channel, str), TypeError, what, channel)
        _expect(_text("channel", channel), ValueError, what, channel)
    return tuple(dict.fromkeys(map(str.__str__, channels)))


_NO_FRAMES: deque[Frame] = deque(maxlen=0)  # of all detached ones: a deque takes 624 bytes
_bouncers: weakref.WeakSet[EventBouncer] = weakref.WeakSet()


def _begin_in_child() -> None:
    gevent: Any = sys.modules.get("gevent")
    while _greenlets:  # which survive a fork, as threads do not
        if isinstance(greenlet := _greenlets.pop(), gevent.Greenlet):
            gevent.kill(greenlet, SystemExit)
    for bouncer in list(_bouncers):
        bouncer._begin_in_child()


@atexit.register
def _send_at_exit() -> None:
    for hub in [bouncer._hub for bouncer in list(_bouncers)]:
        if hub is not None:
            hub.wait_until_behind_at_most(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


# =================================================================================================
# 4. HUB
# One thread for all detached streams of a bouncer. It knows frames as bytes and clients as
# descriptors, nothing of HTTP or Flask. The bouncer gives it commands, under its lock, and the hub
# runs them in that order. Everything else belongs to the hub's thread and needs no lock. It alone
# closes a descriptor, after it has forgotten it: a reused number gets no other client's frames.

_SEND_BUFFER = 64 * 1024  # bytes that a connection holds in the kernel; its default is megabytes
_BACKLOG = 64 * 1024  # bytes of frames that may wait for the hub before publishers do
_BURST = 1_000  # frames beyond its bound that a stream may hold for _MAX_LAG, as in a burst
# Seconds for an ended stream to make progress, and then for its client to close: a socket that is
# closed with unread input is reset, and what is under way gets lost.
_LINGER = 5.0
_MAX_INPUT = 64 * 1024  # bytes of a client's input that are ignored; one that sends more is cut off
_BATCH = 128  # streams that are sent to before other threads and greenlets may run
_POLL_INTERVAL = 0.001  # seconds between looks of a thread that waits for the hub
_GATHER_PAUSE = 0.0005  # seconds without a new command after which the hub waits for no more


class _Hub:
    """The thread that serves all detached streams of one bouncer, and its mailbox."""

    def __init__(self, bouncer: EventBouncer) -> None:
        self._heartbeat = bouncer.heartbeat or math.inf
        # A method and a stream, or None and an event. Filled under the bouncer's lock.
        self._commands: deque[tuple[Callable[[Subscription], None] | None, Any]] = deque()
        self._is_woken = False  # a byte is in the pipe, or the hub is about to look anyway
        # Bytes of frames: queued ones are counted under the bouncer's lock, sent ones by the hub.
        self._queued_bytes = self._sent_bytes = 0
        self._streams: dict[Subscription, None] = {}  # those that are to get events
        self._channels: dict[str, dict[Subscription, None]] = {}
        self._deadlines: dict[Subscription, float] = {}  # of those over their bound, or ending
        self._heartbeat_at = math.inf  # when all streams that are silent get a heartbeat
        self._rested_at = self._busy_time = 0.0  # when it last ran commands, and for how long
        self._send_to_all = _sender()
        self._selector = selectors.DefaultSelector()
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_read, False)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ)
        _start_thread(self._run, "sse_bouncer")

    def command(self, do: Any, what: object, size: int = 0) -> None:
        """Have `attach` or `end` done with a stream, or an event sent. Called under the lock."""
        self._queued_bytes += size
        self._commands.append((do, what))
        # The command first, then the look at the flag; the hub clears the flag first, and then
        # takes the commands. So either it takes this one, or this one finds the flag cleared.
        if not self._is_woken:
            self._is_woken = True
            os.write(self._wakeup_write, b"\0")

    def wait_until_behind_at_most(self, size: int) -> None:
        """Wait, but not for ever, until no more bytes of frames than this are left to send."""
        until = time.monotonic() + _MAX_LAG
        while self._queued_bytes - self._sent_bytes > size and time.monotonic() < until:
            time.sleep(_POLL_INTERVAL)

    def close_in_child(self) -> None:
        """Close in a forked child what it has of its parent's, or no client would see its end."""
        attaching = [what._descriptor for do, what in self._commands if do is not None]
        descriptors = {*self._selector.get_map(), *attaching, self._wakeup_write} - {-1}
        with contextlib.suppress(OSError):  # a kqueue is not inherited
            self._selector.close()  # before the descriptors, as gevent's selector watches them
        for descriptor in descriptors:
            os.close(descriptor)

    # Everything below is for the hub's thread only.

    def _run(self) -> None:
        while True:
            try:
                self._run_once()
            except Exception:
                logger.exception("unexpected error; the hub goes on")
                time.sleep(_GRACE)  # whatever it is, it must not fill the log

    def _run_once(self) -> None:
        wake_at = min([self._heartbeat_at, *self._deadlines.values()])
        for key, events in self._selector.select(min(wake_at - time.monotonic(), _MAX_HEARTBEAT)):
            if key.data is None:
                # Before the flag is cleared, or the byte of a later command would be lost.
                os.read(self._wakeup_read, 1024)
            else:
                self._guard(self._serve, key.data, events)
        self._gather()
        # Also without a command: it may have been taken in the last turn, and its byte in this one.
        self._is_woken = False
        began = time.monotonic()
        if self._commands:
            self._run_commands()
            self._rested_at = time.monotonic()
            self._busy_time = self._rested_at - began
        self._watch_the_clock()

    def _gather(self) -> None:
        """Under load, wait for what publishers are about to add, to send it all in one go.

        With 1,000 streams it raised 0.63 to 0.82 million deliveries per second.
        """
        began, seen = time.monotonic(), 0
        is_loaded = began - self._rested_at < self._busy_time  # it has rested less than worked
        until = began + self._busy_time  # never longer than what it saves
        while is_loaded and seen < len(self._commands) and time.monotonic() < until:
            seen = len(self._commands)
            time.sleep(_GATHER_PAUSE)

    def _run_commands(self) -> None:
        events: list[tuple[str | None, bytes]] = []
        for _ in range(len(self._commands)):
            do, what = self._commands.popleft()
            if do is None:
                events.append(what)
            else:
                self._send(events)
                events = []
                self._guard(do, what)
        self._send(events)

    def _watch_the_clock(self) -> None:
        now = time.monotonic()
        if now >= self._heartbeat_at:
            self._send_to([s for s in self._streams if s._pending is None], [_HEARTBEAT])
            self._heartbeat_at = now + self._heartbeat if self._streams else math.inf
        for stream in [s for s, at in self._deadlines.items() if now >= at]:
            if stream in self._streams:
                stream._bouncer._remove(stream, "dropped")
            else:
                self._close(stream)

    def _guard(self, do: Callable[..., None], stream: Subscription, *args: Any) -> None:
        """Do something with one stream; if it goes wrong, that costs this stream and no other."""
        try:
            do(stream, *args)
        except BlockingIOError:
            pass  # there was nothing to read after all
        except Exception as error:
            if not isinstance(error, OSError):  # reset, timed out: the client is gone
                logger.exception("unexpected error; it costs one stream")
            self._close(stream)

    def attach(self, stream: Subscription) -> None:
        if not self._streams:
            self._heartbeat_at = time.monotonic() + self._heartbeat
        self._streams[stream] = None
        for channel in stream.channels:
            self._channels.setdefault(channel, {})[stream] = None
        self._selector.register(stream._descriptor, selectors.EVENT_READ, stream)
        self._flush(stream)

    def _send(self, events: list[tuple[str | None, bytes]]) -> None:
        try:
            alike: dict[tuple[str, ...], dict[Subscription, None]] = {}
            for name in {channel for channel, _ in events if channel is not None}:
                for stream in self._channels.get(name, ()):
                    alike.setdefault(stream.channels, {})[stream] = None
            for channels, streams in alike.items():
                wires = [wire for channel, wire in events if channel is None or channel in channels]
                self._send_to(list(streams), wires)
            if to_all := [wire for channel, wire in events if channel is None]:
                rest = list(self._streams)
                if alike:
                    rest = [s for s in rest if s.channels not in alike]
                self._send_to(rest, to_all)
                self._heartbeat_at = time.monotonic() + self._heartbeat
        finally:
            self._sent_bytes += sum(len(wire) for _, wire in events)

    def _send_to(self, streams: list[Subscription], wires: list[bytes]) -> None:
        """Send the same to many streams: one system call for each, however many events."""
        data = b"".join(wires)
        yielded_at = time.monotonic()
        for batch in (streams[i : i + _BATCH] for i in range(0, len(streams), _BATCH)):
            clear = [s for s in batch if s._pending is None]
            behind = [s for s in batch if s._pending is not None] if len(clear) < len(batch) else []
            taken = self._send_to_all([s._descriptor for s in clear], data)
            if taken.count(len(data)) < len(clear):
                for stream, count in zip(clear, taken, strict=True):
                    if count < len(data):
                        self._guard(self._hold, stream, wires, count)
            for stream in behind:
                self._guard(self._hold, stream, wires, 0)
            # The interpreter switches threads by itself, every 5 milliseconds; gevent does not.
            if time.monotonic() - yielded_at > 0.005:
                time.sleep(0)
                yielded_at = time.monotonic()

    def _hold(self, stream: Subscription, wires: list[bytes], taken: int) -> None:
        """Keep what the connection did not take, within the stream's bound."""
        if stream._pending is None:
            stream._pending = deque(wires)
            self._flush(stream, taken)
        else:
            stream._pending.extend(wires)
        over = len(stream._pending or ()) - stream.maxsize - stream._replay
        if over > _BURST:
            stream._bouncer._remove(stream, "dropped")
        elif over > 0:
            self._deadlines.setdefault(stream, time.monotonic() + _MAX_LAG)

    def _serve(self, stream: Subscription, events: int) -> None:
        if events & selectors.EVENT_READ:
            # A client that leaves reads as nothing, and so does one that shuts its half down.
            received = len(os.read(stream._descriptor, _MAX_INPUT))
            stream._received += received
            if not received or stream._received > _MAX_INPUT:
                self._close(stream)
        if events & selectors.EVENT_WRITE and stream._pending is not None:
            self._flush(stream)

    def _flush(self, stream: Subscription, taken: int = -1) -> None:
        """Take off the pending frames what was sent; -1 is to send now, of up to 1,024 buffers."""
        pending = stream._pending or deque()
        if pending and taken < 0:
            try:
                taken = os.writev(stream._descriptor, list(itertools.islice(pending, 1024)))
            except BlockingIOError:
                taken = 0
        while pending and taken >= len(pending[0]):
            taken -= len(pending.popleft())
        if stream not in self._streams:
            self._deadlines[stream] = time.monotonic() + _LINGER
        elif len(pending) <= stream.maxsize + stream._replay:
            self._deadlines.pop(stream, None)
        events = selectors.EVENT_READ
        if pending:
            pending[0] = memoryview(pending[0])[taken:]
            events |= selectors.EVENT_WRITE
        else:
            stream._pending = None
            stream._replay = 0
            if stream not in self._streams:
                with socket.socket(fileno=os.dup(stream._descriptor)) as connection:
                    connection.shutdown(socket.SHUT_WR)
        self._selector.modify(stream._descriptor, events, stream)

    def end(self, stream: Subscription) -> None:
        if stream in self._streams:
            self._forget(stream)
            self._flush(stream)

    def _forget(self, stream: Subscription) -> None:
        if stream in self._streams:
            del self._streams[stream]
            for channel in stream.channels:
                del self._channels[channel][stream]
                if not self._channels[channel]:
                    del self._channels[channel]

    def _close(self, stream: Subscription) -> None:
        descriptor, stream._descriptor = stream._descriptor, -1
        if descriptor < 0:
            return
        stream._pending = None
        self._deadlines.pop(stream, None)
        self._forget(stream)
        with contextlib.suppress(KeyError):  # it was not registered yet
            self._selector.unregister(descriptor)
        stream._bouncer._remove(stream, "its client left")
        # Closing alone tells the client nothing if the process has just been forked.
        with contextlib.suppress(OSError), socket.socket(fileno=descriptor) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def _sender() -> Callable[[list[int], bytes], list[int]]:
    """Return a function that sends the same to many connections, and returns what each took.

    ``socket.send`` lets go of the GIL in each call. With one CPU-bound thread in the process a
    delivery took 2,764 microseconds that way, and 12 through a PyDLL, which keeps the GIL.
    """
    try:
        import ctypes

        send = ctypes.PyDLL(None).send
        send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
        send.restype = ctypes.c_ssize_t
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    except (ImportError, AttributeError, OSError, TypeError):
        return lambda fds, data: [-1] * len(fds)
    same = itertools.repeat
    return lambda fds, data: list(map(send, fds, same(data), same(len(data)), same(flags)))


# =================================================================================================
# 5. RESPONSE
# A stream as a Flask response. The only room that knows HTTP and Flask. However a response ends,
# what it holds is released: by close() where the server calls it, else with the body object.

# For caches, for proxies that would compress, and for nginx, which buffers. No Connection header:
# it is the server's own, and waitress answers 500 to an app that sets it.
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",
}
_RESERVED = "connection content-length content-type keep-alive te trailer transfer-encoding upgrade"
_OF_CONNECTION = (b"connection:", b"keep-alive:", b"transfer-encoding:")
_SUCCESS = re.compile(rb"HTTP/1\.[01] 200 ")
_CHANGES_BODY = re.compile(rb"\r\ncontent-(encoding|length):", re.IGNORECASE)
_HOLDS_WORKER = "a stream goes through the server and holds its worker: %s"
# The last are milliseconds after which the kernel gives up a peer that acknowledges nothing.
_SOCKET_OPTIONS = {"SO_SNDBUF": _SEND_BUFFER, "TCP_NODELAY": 1, "TCP_USER_TIMEOUT": 30_000}


def sse_response(
    source: Iterable[object] | Subscription,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a Flask response that streams a generator, any iterable, or a `Subscription`.

    Items go through `format_sse`. One that cannot be formatted is logged and left out. When the
    response ends, however it does, ``source.close()`` is called where there is one. When a stream
    ends, a browser reconnects. To end it for good, send a last event at which the page calls
    ``close()`` on its EventSource, or answer the reconnect with status 204.

    :param source: What to stream.
    :param status: The HTTP status. Browsers read a stream only from the default, 200.
    :param headers: More headers. None, the default, adds none.
    :raises TypeError: if ``source`` cannot be iterated, or is a text, bytes or a mapping.
    :raises ValueError: if a header is the server's own, or Content-Type.
    """
    if isinstance(source, Subscription):
        sockets = _sockets(source._bouncer)
        response = _respond(_subscription_body(source, *sockets), status, headers)
        for each in sockets[1:]:
            response.call_on_close(each.close)
        return response
    what = "source: expected an iterable of items or a Subscription; put one item into a list"
    is_item = isinstance(source, str | bytes | bytearray | Mapping)
    _expect(isinstance(source, Iterable) and not is_item, TypeError, what, source)
    # The app context is gone when the server iterates, but the JSON is to be the app's own.
    response = _respond(_items_body(source, contextvars.copy_context()), status, headers)
    if hasattr(source, "close"):
        response.call_on_close(source.close)
    return response


def _stream(bouncer: EventBouncer, channels: tuple[str, ...], last: str | None) -> Response:
    from flask import request

    if request.environ.get("wsgi.multiprocess") and bouncer.relay is None:
        _warn_once(
            "the server runs several processes, and each broadcasts to its own subscribers only; "
            "run one (a stream needs no worker), or connect them by a RedisRelay"
        )
    if request.method == "HEAD":
        return sse_response(())
    # A client that comes back knows best. The query parameter is event-source-polyfill's.
    returning = request.headers.get("Last-Event-ID") or request.args.get("lastEventId")
    try:
        return sse_response(bouncer.subscribe(*channels, last_event_id=returning or last))
    except EventBouncer.Refused as refused:
        _warn_once("clients are told to come back later: %s", refused)
        retry = random.randint(*(bouncer.retry or (5_000, 15_000)))
        return _respond([b"retry: %d\n: no room now, come back later\n" % retry], 200, None)


def _respond(body: Iterable[bytes], status: int, headers: Mapping[str, str] | None) -> Response:
    from flask import Response, current_app, has_app_context

    _number("status", status, 200)
    # The app's own class: Flask would turn any other response into one.
    response_class = current_app.response_class if has_app_context() else Response
    response: Response = response_class(body, status=status)
    what = "headers: expected none that the server or the stream sets itself; leave it out"
    for name in headers or ():
        _expect(name.lower() not in _RESERVED.split(), ValueError, what, name)
    response.headers.update({**_HEADERS, **(headers or {})})
    return response


def _items_body(source: Iterable[object], context: contextvars.Context) -> Iterator[bytes]:
    """Yield what streams a generator or another iterable."""
    yield b""  # no part of the body, but most servers send the headers at it
    for item in source:
        try:
            yield context.run(format_sse, item)._wire
        except (TypeError, ValueError):
            logger.exception("left out of a stream, which goes on: %.80r", item)


def _subscription_body(
    subscription: Subscription, connection: Any = None, client: Any = None, *pair: socket.socket
) -> Iterator[bytes]:
    """Yield the opening of a stream, then frames and heartbeats, unless the hub takes over.

    While the server writes the head and the first item, its descriptor refers to one end of a
    socket pair, and they arrive at the other. If the hub can go on from them, it gets them and the
    client's connection. If not, they are sent on, and the server gets its connection back.
    """
    bouncer = subscription._bouncer
    # Something, so that headers leave and ``onopen`` fires at once. A line, not a block, of which
    # several client libraries would make an empty event.
    opening = b"retry: %d\n" % random.randint(*bouncer.retry) if bouncer.retry else _HEARTBEAT
    try:
        if client is not None:
            ours, theirs = pair
            # The mode belongs to the open file, not to the descriptor.
            os.set_blocking(theirs.fileno(), os.get_blocking(client.fileno()))
            os.dup2(theirs.fileno(), connection.fileno(), inheritable=False)
            theirs.close()
        yield opening
        if client is not None:
            written = _read_all(ours)
            if head := _detached_head(written, opening):
                with bouncer._starting:
                    hub = bouncer._hub = bouncer._hub or _Hub(bouncer)
                client.setblocking(False)
                subscription._descriptor = client.detach()
                bouncer._hand_over(subscription, hub, head + opening)
                ours.close()  # to the server the client has left, so it keeps nothing alive for it
                return
            os.dup2(client.fileno(), connection.fileno(), inheritable=False)
            client = client.close()
            connection.sendall(written)
        while True:
            try:
                yield subscription.get(timeout=bouncer.heartbeat)._wire
            except queue.Empty:
                yield _HEARTBEAT
    except Subscription.Ended:
        pass
    finally:
        if client is not None and client.fileno() >= 0:
            # The server asks for no second item: the client gets what was written, and the server
            # its connection, if it still has one.
            with contextlib.suppress(OSError):
                client.sendall(_read_all(ours))
                os.dup2(client.fileno(), connection.fileno(), inheritable=False)
        if subscription in bouncer._readers:
            bouncer.unsubscribe(subscription)


def _read_all(ours: socket.socket) -> bytes:
    written = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := ours.recv(16 * 1024):
            written += chunk
    return written


def _detached_head(written: bytes, opening: bytes) -> bytes:
    """Return the head for a detached stream; nothing if the server wrote something unexpected."""
    head, _, body = written.partition(b"\r\n\r\n")
    chunk = b"%x\r\n%b\r\n" % (len(opening), opening)  # gunicorn's is in upper case
    is_head = _SUCCESS.match(head) and not _CHANGES_BODY.search(head)
    if not is_head or body.lower() not in (opening, chunk):
        if b"\r\ncontent-encoding:" not in head.lower():
            what = "its server or middleware sent %.40r and %.40r instead of a 200 and its opening"
            _warn_once(_HOLDS_WORKER, what % (head, body))
        return b""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(_OF_CONNECTION)]
    # No length and no chunks: the body ends with the connection.
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def _sockets(bouncer: EventBouncer) -> list[Any]:
    """Return the server's connection, a duplicate of it, and a socket pair to put in its place."""
    from flask import has_request_context, request

    environ = request.environ if has_request_context() else {}
    connection = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")
    # Bytes for TLS have to go through the server's object.
    if connection is None or not bouncer.detach or hasattr(connection, "getpeercert"):
        return []
    forks = "werkzeug.socket" in environ and environ.get("wsgi.multiprocess")
    if sys.platform == "win32" or forks:
        _warn_once(_HOLDS_WORKER, "on Windows, and if the server forks for each request, it has to")
        return []
    import resource

    for name, value in _SOCKET_OPTIONS.items():
        level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
        with contextlib.suppress(AttributeError, OSError):  # a unix socket has none of TCP's
            connection.setsockopt(level, getattr(socket, name), value)
    client = connection.dup()
    # It has the lowest number that was free, so about as many descriptors are open. A gunicorn
    # worker that cannot accept() for want of them ends, with all its streams.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if client.fileno() >= limit - limit // 10 and limit != resource.RLIM_INFINITY:
        client.close()
        raise EventBouncer.Refused("nine tenths of the descriptors are open; raise ulimit -n")
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return [connection, client, ours, theirs]
