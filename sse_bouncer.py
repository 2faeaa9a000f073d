"""Server-sent events for Flask, in one file, with no dependencies.

With ``bouncer = EventBouncer()`` one view returns ``bouncer.stream()``, and another one calls
``bouncer.broadcast("Hey!")``. The file has six rooms:

    1. WIRE FORMAT  text in, bytes out: ``format_sse``, ``Frame``
    2. HISTORY      the newest events, and what a client has missed
    3. RELAY        events between processes and machines: ``Relay``, ``RedisRelay``
    4. HUB          one thread that sends to many connections
    5. FAN-OUT      every event to every subscriber: ``EventBouncer``, ``Subscription``
    6. RESPONSE     a stream as a Flask response: ``sse_response``

A room calls only the rooms above it. There are two exceptions: ``EventBouncer.stream`` calls room
6, and the hub calls `_end` of a stream's subscription, in room 5, when the stream ends or has to.
All other attributes and methods with an underscore are used only in their room, but room 6 uses
those of `EventBouncer` and `Subscription` too. What all rooms need comes before them: warnings,
errors and threads. What happens when the process forks or ends comes after them.

Four words are used throughout. A *reader* is a subscription from which code takes frames by
``get()``. A *detached* stream is a client's connection that was taken over from the server: the hub
sends to it, and no worker and no thread waits for it. Any other stream goes *through the server*,
which reads frames and holds a worker or a thread. A *gap* is the event that tells a client that it
may have missed something for good. The *relay's reader* is no such reader: it is the thread that
reads the relay.

Everything public may be called from any thread or greenlet, and `EventBouncer.close` from a signal
handler. A finaliser may unsubscribe, but what it broadcasts in the middle of a broadcast may come
out of order. Times are in seconds, but ``retry`` is in milliseconds, like the field on the wire.
"The standard" is https://html.spec.whatwg.org/multipage/server-sent-events.html, the WHATWG's 9.2.
"""

from __future__ import annotations

__version__ = "0.1.0"

import atexit
import calendar
import contextlib
import contextvars
import dataclasses
import datetime
import decimal
import errno
import functools
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import selectors
import socket
import sys
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Set
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from flask import Flask, Response

__all__ = ["EventBouncer", "Subscription", "Refused", "Ended", "RedisRelay", "Relay"]
__all__ += ["Frame", "format_sse", "sse_response"]

logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds to wait for what is late: a client, a reader, the relay, the exit
_warned: set[str] = set()


def _warn_once(message: str, example: str = "") -> None:
    """Log a warning, unless the same one has been logged in this process, whatever the example."""
    if message not in _warned:
        _warned.add(message)  # first: what handles the log may broadcast, and come here again
        logger.warning("%s%.80s", message, example)


def _wrong(name: str, expected: str, given: object, advice: str) -> str:
    """Return the message of an error about an argument."""
    return f"{name}: expected {expected}, got {given!r:.80}; {advice}"


def _check_integer(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(_wrong(name, "an int", value, "give a whole number"))
    if value < least:
        raise ValueError(_wrong(name, f"at least {least}", value, "give a larger number"))
    return int(value)


_greenlets: weakref.WeakSet[Any] = weakref.WeakSet()  # those that run in place of threads


def _start_thread(run: Callable[[], None], name: str) -> None:
    """Run a function in a daemon thread, or under gevent in a greenlet.

    RuntimeError if there can be no more threads.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        # Not by threading.Thread: its greenlet would fail when a forked child kills it.
        _greenlets.add(sys.modules["gevent"].spawn(run))
    else:
        threading.Thread(target=run, name=name, daemon=True).start()


class _OwnThread:
    """An object with a thread of its own, which `start` starts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_started = False
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the thread, if it has not been started. RuntimeError if there can be none.

        A second caller waits for the first: when this returns, the thread has been started. Call it
        without holding a lock, as starting a thread may take its time.
        """
        with self._starting:
            if not self._has_started:
                _start_thread(self._run, self._name)
                self._has_started = True

    def _run(self) -> None:
        raise NotImplementedError


# =================================================================================================
# 1. WIRE FORMAT
# Text in, bytes out. What leaves this room is valid, so nothing can fail in the middle of a stream.
# No lock, no clock and no socket in here. Of Flask it uses only JSON, if the app has loaded it.

# Data that looks like this was formatted by hand; format_sse() formats it once more.
_FRAMED_BY_HAND = re.compile(r"(?:data|event|id|retry):")
_ID_LINE = re.compile(r"(?:^|[\r\n])id[:\r\n]")


class Frame(str):
    """Text that is in the wire format already, as ``markupsafe.Markup`` is text that is HTML.

    `format_sse` returns one. Call ``Frame(text)`` only for protocol that you have written yourself,
    one event each. Anything but text that ends in a blank line raises TypeError or ValueError.
    """

    __slots__ = ("has_id", "wire")
    wire: bytes  #: The text in UTF-8, encoded once, however many subscribers get it.
    has_id: bool  #: Whether there is an ``id`` line in it.

    def __new__(cls, text: str) -> Frame:
        text = _check_text("frame", text)
        if not "\n".join(_lines(text[-4:])).endswith("\n\n"):  # at most CR LF CR LF
            raise ValueError(_wrong("frame", "a blank line at its end", text, "use format_sse()"))
        return _frame(text, text.encode(), has_id=_ID_LINE.search(text) is not None)


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
    :param event: The event's name, without CR, LF and NUL. None or ``""`` is ``message``. In a page
        ``open`` and ``error`` also reach the handlers of the connection, so choose other names.
    :param id: What the client sends back as ``Last-Event-ID``, without CR, LF and NUL. ``""`` makes
        it forget the last one; None, the default, leaves that as it is.
    :param retry: Milliseconds that the client waits before it reconnects, from now on. 0 is at
        once; None, the default, leaves that as it is.
    :param comment: Text that clients ignore, for a person who reads the stream.
    :raises TypeError: if an argument is of the wrong type, or is not something JSON can hold.
    :raises ValueError: if a text breaks its field's rule or has no UTF-8, or nothing is given.
    """
    if isinstance(data, Frame):
        if any(field is not None for field in (event, id, retry, comment)):
            raise ValueError(_wrong("data", "no Frame beside other fields", data, "leave them out"))
        return data
    lines = []
    if comment is not None:
        lines += [": " + line for line in _lines(_check_text("comment", comment))]
    if event is not None and (name := _check_line("event", event)):
        lines.append("event: " + name)
    if id is not None:
        is_number = isinstance(id, int) and not isinstance(id, bool)
        lines.append("id: " + (str(int(id)) if is_number else _check_line("id", id)))
    if retry is not None:
        lines.append(f"retry: {_check_integer('retry', retry, 0)}")
    if data is not None:
        # Always one space, which clients remove (9.2.6): data that begins with one keeps it.
        lines += ["data: " + line for line in _lines(_data_text(data, _dumps))]
    if not lines:
        raise ValueError(_wrong("data", "something to send", data, 'use "" for no text'))
    text = "\n".join(lines) + "\n\n"
    return _frame(text, text.encode(), has_id=id is not None)


def _frame(text: str, wire: bytes, has_id: bool) -> Frame:
    """Return a frame of what has been checked already."""
    frame = str.__new__(Frame, text)
    frame.wire = wire
    frame.has_id = has_id
    return frame


# A comment without a blank line after it: some client libraries make an empty event of a block.
_HEARTBEAT = _frame(":\n", b":\n", has_id=False)


def _with_id(frame: Frame, id: str) -> Frame:
    """Return the frame with an id line before it. It is joined, as formatting takes long."""
    line = f"id: {id}\n"
    return _frame(line + frame, line.encode() + frame.wire, has_id=True)


def _lines(text: str) -> list[str]:
    # CRLF, LF and CR end a line (9.2.5). str.splitlines() splits at eight others, and a regular
    # expression takes ten times as long.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _check_text(name: str, value: Any, advice: str = "use str(...)") -> str:
    if not isinstance(value, str):
        raise TypeError(_wrong(name, "text", value, advice))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(_wrong(name, "text without surrogates", value, "replace them")) from None
    return str.__str__(value)  # of a member of an enumeration, its text


def _check_line(name: str, value: Any) -> str:
    """Return the text if it is one line, so that it can begin no other field."""
    text = _check_text(name, value)
    # A NUL in an id makes a client ignore the field (9.2.6); in an event's name it is never meant.
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(_wrong(name, "text without CR, LF or NUL", text, "put it into data"))
    return text


def _data_text(data: object, dumps: Callable[[object], str | bytes]) -> str:
    """Return text, and bytes in UTF-8, as they are, and anything else as JSON."""
    if isinstance(data, str):
        text = _check_text("data", data)
        if text.endswith("\n\n") and _FRAMED_BY_HAND.match(text):
            _warn_once(
                "data that looks like a frame is sent as data, so clients get its field names too; "
                "give the bare data, or Frame(text): ",
                repr(text),
            )
        return text
    try:
        if isinstance(data, bytes | bytearray | memoryview):
            return str(data, "utf-8")
        encoded = dumps(data)
        text = encoded if isinstance(encoded, str) else encoded.decode()
        if "NaN" in text or "Infinity" in text:  # or in a string
            json.loads(text, parse_constant=_refuse_constant)
        return text
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(_wrong("data", "text, UTF-8 or JSON", data, f"convert it ({error})")) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON.parse() in a browser refuses {name}")


def _dumps(data: object) -> str | bytes:
    """Encode as JSON: by the current app's provider, or by Flask, or as Flask would."""
    flask: Any = sys.modules.get("flask")
    encoded: str | bytes = flask.json.dumps(data) if flask else json.dumps(data, default=_as_flask)
    return encoded


def _as_flask(value: object) -> str:
    """Return what Flask's JSON makes of a value that JSON does not know."""
    if isinstance(value, datetime.date):  # without a time of day it has no time zone either
        timetuple = getattr(value, "utctimetuple", value.timetuple)
        return formatdate(calendar.timegm(timetuple()), usegmt=True)
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}")


# =================================================================================================
# 2. HISTORY
# The newest events, in order, and what a client has missed. No lock and no clock in here.

_MAX_CHANNELS = 10_000  # whose newest forgotten event a history remembers
_GAP = format_sse("", "gap")

_Id = tuple[int, int]  # for Redis: milliseconds, and a sequence number within them
_NO_ID: _Id = (0, 0)  # before the ids of all events
_EARLIEST: _Id = (-2, 0)  # given instead of an id by a client that wants everything that is kept
# Of no event: for a text that is no id of ours, and for a relay that has not been read yet.
_UNKNOWN_ID: _Id = (-1, 0)
# A header is a stranger's text, and int() alone reads much more than this: "１", and "1_0".
_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})", re.ASCII)


def _parse_id(text: object) -> _Id:
    match = _ID.fullmatch(text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else _UNKNOWN_ID


def _id_text(id: _Id) -> str:
    return f"{id[0]}-{id[1]}"


class _Event(NamedTuple):
    id: _Id  # _NO_ID if the bouncer is still to give it one, or gives none
    channel: str | None  # None is everyone
    frame: Frame | None  # None ends the streams of the channel


class _History:
    """The newest events, in order, and what is no longer kept."""

    def __init__(self, size: int, floor: _Id) -> None:
        self._size = size
        self._events: deque[tuple[_Id, str | None, Frame]] = deque()
        # The floor: of channels that are not in `_forgotten`, every event after it is kept. At
        # first it is the id before the first event, and stands for the ids of the first and newest.
        self._floor = self._first = self.newest = floor
        self._forgotten: dict[str | None, _Id] = {}  # each channel's newest event that was dropped

    def keep(self, event: _Event) -> None:
        id, channel, frame = event
        if self.newest == self._floor:
            self._first = id
        self.newest = id
        if frame is not None:  # the end of streams has an id, but there is nothing to replay
            self._events.append((id, channel, frame))
        if len(self._events) > self._size:
            oldest_id, its_channel, _ = self._events.popleft()
            self._forgotten[its_channel] = oldest_id
            if len(self._forgotten) > _MAX_CHANNELS:
                self._forgotten.clear()
                self._floor = oldest_id

    def missed(self, last: _Id, channels: tuple[str, ...]) -> tuple[list[Frame], bool]:
        """Return the events after ``last`` that a client of these channels has missed.

        If some of them are no longer kept, or if nobody knows, there is a gap: then it returns the
        event of that name, all that is kept, and True.
        """
        names = {None, *channels}
        complete_since = max(self._forgotten.get(name, self._floor) for name in names)
        # Ids between the floor and the first event belong to a stream that was deleted in the
        # relay: nobody can say what such a client has seen.
        is_known = last == self._floor or self._first <= last <= self.newest
        is_complete = last == _EARLIEST or (is_known and last >= complete_since)
        after = last if is_complete else _NO_ID
        newest_first = itertools.takewhile(lambda event: event[0] > after, reversed(self._events))
        frames = [frame for _, channel, frame in newest_first if channel in names][::-1]
        if not is_complete:
            frames.insert(0, _with_id(_GAP, _id_text(complete_since)))
        return frames, not is_complete


# =================================================================================================
# 3. RELAY
# Events between processes. There is one entry per event, and its id is the event's id, so all
# processes agree on ids and order, and a client may come back to any of them. Each entry also holds
# the id of the entry before it: a reader that finds another id there than the one it read last has
# missed something, whatever the cause. No HTTP in here.

_READ_COUNT = 1_000  # entries that are read at once

_Entry = tuple[str, str, str | None, str | None]  # see Relay


class Relay(Protocol):
    """What carries events between processes. Any object with these three methods is one.

    An entry is a tuple of its id, ``<digits>-<digits>``, which increases; of the id of the entry
    before, or ``"0-0"``; of the channel, None for all; and of the frame, None to end the channel's
    streams. What a method raises is logged, or raised by `EventBouncer.broadcast`.
    """

    def publish(self, channel: str | None, frame: str | None) -> None:
        """Add an entry, for all processes, this one included. Called from any thread."""

    def recent(self, count: int) -> list[_Entry]:
        """Return the newest entries, at most ``count``, the oldest first."""

    def read(self, after: str, timeout: float) -> list[_Entry]:
        """Return entries after an id, the oldest first; wait up to ``timeout`` seconds for one."""


class RedisRelay:
    """Carries events between processes by a Redis stream.

        relay = RedisRelay.from_url("redis://localhost")
        bouncer = EventBouncer(history=1000, relay=relay)

    It takes Redis 6.2 or later, Valkey, or a cluster, and for reading one connection per process.
    An access-control list needs ``+eval +xadd +xrange +xrevrange +xread`` on the key, and a
    cluster's also ``+cluster +command``.

    While Redis is gone, streams stay open, and `EventBouncer.broadcast` raises the client's error.
    When it is back, all that it kept is delivered. If it has lost events that this process had yet
    to read, every stream gets an event named ``gap`` before the next one. If the answer to an EVAL
    is lost, the client repeats it, and the event arrives twice.

    :param client: A ``redis.Redis`` or ``redis.RedisCluster`` of redis-py 4.4 or later, which may
        decode responses. Give it a ``socket_timeout``, or a Redis that hangs holds publishers.
    :param key: The stream's key. Processes with the same key share all events, also those of
        private channels. All processes of one app use one key, and each app another. The default is
        ``sse``.
    :param maxlen: About how many events Redis keeps, at least 1. The default is 10,000.
    :raises TypeError, ValueError: if an argument is of the wrong type, or out of range.
    """

    # A script is one step for Redis: no other entry can come in between.
    _PUBLISH = """
        local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
        return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*',
            'after', last and last[1] or '0-0', 'channel', ARGV[2], 'frame', ARGV[3])
    """

    def __init__(self, client: Any, key: str = "sse", maxlen: int = 10_000) -> None:
        is_redis_py = type(client).__module__.startswith("redis.")
        is_old = is_redis_py and sys.modules["redis"].VERSION < (4, 4)
        is_async = hasattr(client, "__aenter__")
        if not hasattr(client, "get_connection_kwargs") or is_async or is_old:
            expected = "redis-py's from 4.4 on, but not the one for asyncio"
            raise TypeError(_wrong("client", expected, client, "use RedisRelay.from_url(...)"))
        self.key = _check_text("key", key)
        self.maxlen = _check_integer("maxlen", maxlen, 1)
        self._client = client

    @classmethod
    def from_url(cls, url: str, key: str = "sse", maxlen: int = 10_000) -> RedisRelay:
        """Make one with a client for a URL as ``redis.Redis.from_url`` takes it.

        It gives up on a Redis that hangs after 5 seconds. The package ``redis`` is imported here.
        """
        import redis

        return cls(redis.Redis.from_url(url, socket_timeout=5), key, maxlen)

    def publish(self, channel: str | None, frame: str | None) -> None:
        # In UTF-8, whatever the client's own encoding is. "" stands for None: no channel's name and
        # no frame is empty.
        texts = [(text or "").encode() for text in (channel, frame)]
        self._client.eval(self._PUBLISH, 1, self.key, self.maxlen, *texts)

    def recent(self, count: int) -> list[_Entry]:
        return self._entries("XREVRANGE", "+", "-", count)[::-1]

    def read(self, after: str, timeout: float) -> list[_Entry]:
        # Wait for at most half of the time after which the client takes a silent Redis for gone.
        patience = self._client.get_connection_kwargs().get("socket_timeout") or math.inf
        block = max(1, int(1000 * min(timeout, patience / 2)))  # 0 milliseconds would be for ever
        self._execute("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", self.key, after)
        # XRANGE, because the shape of XREAD's answer depends on the client's version and protocol.
        return self._entries("XRANGE", f"({after}", "+", _READ_COUNT)

    def _entries(self, command: str, start: str, end: str, count: int) -> list[_Entry]:
        entries = []
        for id, fields in self._execute(command, self.key, start, end, "COUNT", count):
            values = [id, *(fields.get(name, b"") for name in (b"after", b"channel", b"frame"))]
            # What is not UTF-8 becomes surrogates, which Frame() refuses.
            id, after, channel, frame = (v.decode(errors="surrogateescape") for v in values)
            entries.append((id, after, channel or None, frame or None))
        return entries

    def _execute(self, *command: object) -> Any:
        # If the client decoded, one entry that is not UTF-8 would make every read fail.
        return self._client.execute_command(*command, NEVER_DECODE=True)


# =================================================================================================
# 4. HUB
# One thread that sends to many connections. It knows a client as a descriptor, what it sends as
# bytes, and a channel as a name. The bouncer calls `send`, `attach` and `end` under its lock,
# `start` and `wait_while_behind` without it, and `retire` either way. The first three are put into
# a mailbox, and the hub's thread does them in that order. Everything else belongs to that thread
# and needs no lock. It alone closes a descriptor, after it has forgotten it: a reused number gets
# no other client's frames. The exception is `close_in_child`, for a forked child.

_SEND_BUFFER = 64 * 1024  # bytes that a connection holds in the kernel; its default is megabytes
_BACKLOG = 64 * 1024  # bytes of frames that may wait for the hub before publishers do
# How many frames beyond its limit a detached stream may hold, for at most _PATIENCE; and how many
# frames beyond maxsize a subscription may hold until its server begins to send.
_BURST = 1_000
# Seconds for an ended stream to make progress, and then for its client to close: a socket that is
# closed with unread input is reset, and what is under way gets lost.
_LINGER = 5.0
_MAX_HEARTBEAT = 86_400.0  # seconds, a day: longer than proxies wait, and what a timer can take
_MAX_READS = 10_000  # reads of a client's input, which is ignored; then the client is cut off
_BATCH = 128  # streams that are sent to before other threads and greenlets may run
_POLL_INTERVAL = 0.001  # seconds between looks of a thread that waits for the hub
_GATHER_PAUSE = 0.0005  # seconds without a new message after which the hub waits for no more
_ERROR_PAUSE = 0.05  # seconds after an unexpected error, so that it does not fill the log

_Framing = Callable[[bytes], bytes]  # what to send for a frame; for b"", what ends the body


@dataclasses.dataclass(slots=True, eq=False)
class _Stream:
    """A client's connection, and what it has still to get. Once attached, it is the hub's own."""

    descriptor: int  # -1 once it is closed
    framing: _Framing
    pending: deque[bytes | memoryview] | None  # framed; None if it is not behind
    channels: tuple[str, ...] = ()
    # Told by the hub when the stream ends. No bound method: that takes 64 bytes more.
    owner: Subscription = dataclasses.field(init=False)
    is_live: bool = False  # it gets what is sent
    limit: int = 0  # how many frames may be pending
    reads_left: int = _MAX_READS


class _Message(NamedTuple):
    channel: str | None  # None is every stream
    wire: bytes


class _Command(NamedTuple):
    do: Callable[[_Stream], None]
    stream: _Stream


_hubs: set[_Hub] = set()  # those that hold descriptors


class _Hub(_OwnThread):
    """A thread that sends to streams, and its mailbox."""

    def __init__(self, maxsize: int, heartbeat: float | None, heartbeat_wire: bytes) -> None:
        super().__init__("sse_bouncer")
        self._maxsize = maxsize
        self._heartbeat = heartbeat or math.inf
        self._heartbeat_wire = heartbeat_wire
        self._mailbox: deque[_Message | _Command] = deque()
        self._is_woken = False  # a byte is in the pipe, or the hub is about to look anyway
        # The live streams by framing and channel, and for None those of any channel.
        self._groups: dict[_Framing, dict[str | None, dict[_Stream, None]]] = {}
        self._deadlines: dict[_Stream, float] = {}  # of those over their limit, or ending
        # When all streams that are not behind get a heartbeat.
        self._heartbeat_at = time.monotonic() + self._heartbeat
        # The hub counts as loaded until it has rested for as long as its last mail took.
        self._loaded_until = 0.0
        self._thread: int | None = None
        self._selector = selectors.DefaultSelector()
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_read, False)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ)
        _hubs.add(self)

    def send(self, channel: str | None, wire: bytes) -> None:
        """Send a frame to the streams of a channel; None is every stream."""
        self._post(_Message(channel, wire))

    def attach(self, stream: _Stream, held: Iterable[bytes]) -> None:
        """Let a stream in. After what is pending it gets these frames, then what is sent."""
        stream.pending = deque([*(stream.pending or ()), *map(stream.framing, held)])
        stream.limit = self._maxsize + len(stream.pending)
        self._post(_Command(self._let_in, stream))

    def end(self, stream: _Stream, is_meant: bool) -> None:
        """Send a stream nothing more, and close it when it has everything, or after a while.

        If the end is meant, the body ends as a complete one. If not, it is cut off, and a client
        that notices this comes back.
        """
        self._post(_Command(functools.partial(self._end, is_meant=is_meant), stream))

    def retire(self) -> None:
        """Let the thread end when its last stream has. Nothing is posted afterwards."""
        # Not by a post: the hub's thread could take it and close the pipe before _post() writes.
        descriptor, self._wakeup_write = self._wakeup_write, -1
        if self in _hubs:  # not in a forked child, which has closed it
            os.close(descriptor)
            if not self._has_started:
                self._release()

    def wait_while_behind(self, size: int) -> None:
        """Wait, for at most a second, while more than 64 KiB of frames are in the mailbox.

        The caller gives the size of its own frame, and all frames are taken to have that size.
        """
        if threading.get_ident() == self._thread:  # a finaliser that broadcasts would wait in vain
            return
        until = time.monotonic() + _PATIENCE
        while len(self._mailbox) > _BACKLOG // size and time.monotonic() < until:
            time.sleep(_POLL_INTERVAL)

    def close_in_child(self) -> None:
        """Close the descriptors that a forked child has inherited.

        With copies in the child, no client would see the end of the parent's connection.
        """
        posted = [post.stream.descriptor for post in self._mailbox if isinstance(post, _Command)]
        watched = [key.fd for key in self._selector.get_map().values()]
        with contextlib.suppress(OSError):  # a kqueue is not inherited
            self._selector.close()  # before the descriptors, as gevent's selector watches them
        for descriptor in {*watched, *posted, self._wakeup_read, self._wakeup_write}:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _post(self, post: _Message | _Command) -> None:
        # The mail first, then the look at the flag; the hub clears the flag first, and then takes
        # the mail. So either it takes this one, or this one finds the flag cleared.
        self._mailbox.append(post)
        if not self._is_woken:
            self._is_woken = True
            os.write(self._wakeup_write, b"\0")

    # Everything below is for the hub's thread only. The exception is `_release`, which `retire`
    # calls if there is no thread.

    def _run(self) -> None:
        self._thread = threading.get_ident()
        # Until retire() has closed the pipe, the selector has it; each stream is in there as well.
        while self._mailbox or self._selector.get_map():
            try:
                self._take_turn()
            except Exception:
                logger.exception("unexpected error; the hub goes on")
                time.sleep(_ERROR_PAUSE)
        self._release()

    def _release(self) -> None:
        _hubs.discard(self)
        self._selector.close()
        os.close(self._wakeup_read)

    def _take_turn(self) -> None:
        wake_at = min([self._heartbeat_at, *self._deadlines.values()])
        timeout = min(wake_at - time.monotonic(), _MAX_HEARTBEAT)
        for key, events in self._selector.select(timeout):
            if key.data is None:
                # Read before the flag is cleared, or this would take the byte of a later message.
                if not os.read(self._wakeup_read, 1024):  # retire() has closed the other end
                    self._selector.unregister(self._wakeup_read)
            else:
                self._guard(self._serve, key.data, events)
        self._gather()
        # Clear it without mail too: the mail of the byte may have been taken in the last turn.
        self._is_woken = False
        if self._mailbox:
            began = time.monotonic()
            self._do_mail()
            done = time.monotonic()
            self._loaded_until = done + (done - began)
        self._watch_the_clock()

    def _gather(self) -> None:
        """Under load, wait for what publishers are about to add, to send it all in one go.

        It stops when a pause has brought nothing new. With 1,000 streams it raised the rate from
        0.61 to 0.86 million deliveries per second.
        """
        seen = 0
        while seen < len(self._mailbox) and time.monotonic() < self._loaded_until:
            seen = len(self._mailbox)
            time.sleep(_GATHER_PAUSE)

    def _do_mail(self) -> None:
        """Do what was posted, in order; messages that follow each other are sent in one go."""
        messages: list[_Message] = []
        for _ in range(len(self._mailbox)):
            post = self._mailbox.popleft()
            if isinstance(post, _Message):
                messages.append(post)
            else:
                self._send(messages)
                messages = []
                self._guard(post.do, post.stream)
        self._send(messages)

    def _watch_the_clock(self) -> None:
        now = time.monotonic()
        if now >= self._heartbeat_at:
            for framing, groups in self._groups.items():
                clear = [stream for stream in groups.get(None, ()) if stream.pending is None]
                self._send_to(clear, [framing(self._heartbeat_wire)])
            self._heartbeat_at = now + self._heartbeat
        for stream in [stream for stream, at in self._deadlines.items() if now >= at]:
            if stream.is_live:
                stream.owner._end("dropped")  # which ends the stream, by the mailbox
            else:
                self._close(stream)

    def _guard(self, do: Callable[..., None], stream: _Stream, *args: Any) -> None:
        """Do something with one stream; if it goes wrong, that costs this stream and no other."""
        try:
            do(stream, *args)
        except BlockingIOError:
            pass  # there was nothing to read after all
        except Exception as error:
            if not isinstance(error, OSError):  # reset, timed out: the client is gone
                logger.exception("unexpected error; it costs one stream")
            self._close(stream)

    def _let_in(self, stream: _Stream) -> None:
        stream.is_live = True
        groups = self._groups.setdefault(stream.framing, {})
        for channel in (None, *stream.channels):
            groups.setdefault(channel, {})[stream] = None
        self._selector.register(stream.descriptor, selectors.EVENT_READ, stream)
        self._write_pending(stream)

    def _send(self, messages: list[_Message]) -> None:
        for framing, groups in self._groups.items():
            # The wires of each channel, with their places in the order.
            by_name: dict[str | None, list[tuple[int, bytes]]] = {}
            for place, (name, wire) in enumerate(messages):
                by_name.setdefault(name, []).append((place, framing(wire)))
            # First the streams of the named channels: those with the same channels get the same.
            alike: dict[tuple[str, ...], dict[_Stream, None]] = {}
            for name in by_name.keys() - {None}:
                for stream in groups.get(name, ()):
                    alike.setdefault(stream.channels, {})[stream] = None
            for channels, streams in alike.items():
                # Their places put them back into the order in which they were posted.
                mine = sorted(itertools.chain(*(by_name.get(n, ()) for n in (None, *channels))))
                self._send_to(list(streams), [wire for _, wire in mine])
            # Then all others, which get only what is for everyone.
            if to_all := by_name.get(None):
                rest = list(groups.get(None, ()))
                if alike:
                    rest = [stream for stream in rest if stream.channels not in alike]
                self._send_to(rest, [wire for _, wire in to_all])
                self._heartbeat_at = time.monotonic() + self._heartbeat

    def _send_to(self, streams: list[_Stream], wires: list[bytes]) -> None:
        """Send the same to many streams: one system call for each, however many events."""
        data = b"".join(wires)
        yielded_at = time.monotonic()
        for batch in (streams[i : i + _BATCH] for i in range(0, len(streams), _BATCH)):
            # A stream that is behind is not sent to now. With -1 for its descriptor the send fails
            # at once, and _hold() below puts the frames after those that are pending.
            descriptors = [s.descriptor if s.pending is None else -1 for s in batch]
            taken = _send_to_all(descriptors, data)
            if taken.count(len(data)) < len(batch):  # rare: mostly all have taken everything
                for stream, count in zip(batch, taken, strict=True):
                    if count < len(data):
                        self._guard(self._hold, stream, wires, max(count, 0))  # -1 is an error
            # The interpreter switches threads by itself, every 5 milliseconds; gevent does not.
            if time.monotonic() - yielded_at > 0.005:
                time.sleep(0)
                yielded_at = time.monotonic()

    def _hold(self, stream: _Stream, wires: list[bytes], taken: int) -> None:
        """Keep what the connection did not take, within the stream's limit."""
        if stream.pending is not None:
            stream.pending.extend(wires)
        else:
            stream.pending = deque(wires)
            _remove_taken(stream.pending, taken)
            self._write_pending(stream)  # it is full, or gone: a write tells which
        over = len(stream.pending or ()) - stream.limit
        if over > _BURST:
            stream.owner._end("dropped")
        elif over > 0:
            self._deadlines.setdefault(stream, time.monotonic() + _PATIENCE)

    def _serve(self, stream: _Stream, events: int) -> None:
        if events & selectors.EVENT_READ:
            # What a client sends is ignored: the rest of its request, perhaps. If it leaves, this
            # reads nothing, also if it shuts only its half down.
            stream.reads_left -= 1
            if not os.read(stream.descriptor, _SEND_BUFFER) or not stream.reads_left:
                self._close(stream)
        if events & selectors.EVENT_WRITE and stream.pending is not None:
            self._write_pending(stream)

    def _write_pending(self, stream: _Stream) -> None:
        """Write what is pending, as far as the connection takes it.

        Then set the stream's deadline, its limit and what to wait for. If it is ending and has
        everything, shut it down.
        """
        pending = stream.pending or deque()
        with contextlib.suppress(BlockingIOError):  # the connection takes nothing now
            # Up to 1,024 buffers, the system's limit.
            taken = os.writev(stream.descriptor, [*itertools.islice(pending, 1024)])
            _remove_taken(pending, taken)
        if not stream.is_live:  # it is ending
            self._deadlines[stream] = time.monotonic() + _LINGER
        elif len(pending) <= stream.limit:
            self._deadlines.pop(stream, None)
        events = selectors.EVENT_READ
        if pending:
            events |= selectors.EVENT_WRITE
        else:
            stream.pending = None
            stream.limit = self._maxsize
            if not stream.is_live:  # a socket object closes what it owns, so it gets a duplicate
                with _socket_of(os.dup(stream.descriptor)) as connection:
                    connection.shutdown(socket.SHUT_WR)
        self._selector.modify(stream.descriptor, events, stream)

    def _end(self, stream: _Stream, is_meant: bool) -> None:
        if stream.is_live:
            self._forget(stream)
            # If there is nothing to say at the end, an empty frame: writev() gets at least one.
            last = stream.framing(b"") if is_meant else b""
            stream.pending = deque([*(stream.pending or ()), last])
            self._write_pending(stream)

    def _forget(self, stream: _Stream) -> None:
        stream.is_live = False
        groups = self._groups[stream.framing]
        for channel in (None, *stream.channels):
            del groups[channel][stream]
            if not groups[channel]:
                del groups[channel]

    def _close(self, stream: _Stream) -> None:
        descriptor, stream.descriptor = stream.descriptor, -1
        if descriptor < 0:
            return
        stream.pending = None
        self._deadlines.pop(stream, None)
        if stream.is_live:
            self._forget(stream)
        with contextlib.suppress(KeyError):  # it was not registered yet
            self._selector.unregister(descriptor)
        # Closing alone tells the client nothing if the process has just been forked.
        with contextlib.suppress(OSError), _socket_of(descriptor) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        stream.owner._end("its client left")


def _remove_taken(pending: deque[bytes | memoryview], taken: int) -> None:
    """Remove from pending frames so many bytes, which the connection took."""
    while pending and taken >= len(pending[0]):
        taken -= len(pending.popleft())
    if taken:
        pending[0] = memoryview(pending[0])[taken:]


def _socket_of(descriptor: int) -> socket.socket:
    """Return an object that owns the descriptor. If that is no socket, it is closed."""
    try:
        return socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise


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
    except (ImportError, AttributeError, OSError, TypeError):  # then the hub writes to each
        return lambda descriptors, data: [0] * len(descriptors)
    same = itertools.repeat
    return lambda descriptors, data: list(
        map(send, descriptors, same(data), same(len(data)), same(flags))
    )


_send_to_all = _sender()


# =================================================================================================
# 5. FAN-OUT
# Every event to every subscriber, in one order, through a bounded queue for each. A subscriber that
# falls behind is dropped: its stream ends after what it holds, and with a history it comes back and
# gets what it missed. No HTTP in here, no socket, and no bytes of a stream.
#
# What ends a stream, always by `EventBouncer._remove`, and what its client sees of it:
#
#     unsubscribe, disconnect, the end of a generator   a body that ends as a whole one
#     close, dropped, a generator that fails            a body that is cut off, if it has chunks
#     its client left                                   nothing

# A broadcast waits this long, in all, for readers whose queues are full. Without the wait, a loop
# of broadcasts would drop readers that could keep up, because they get no chance to run.
_GRACE = 0.05
_LOOKS = 10  # into which the wait is divided
_READ_TIMEOUT = 2.0  # seconds that the relay waits for an event; redis-py gives up after 5
_READ_PAUSE = 0.05  # seconds before a relay whose read fails, or does not wait, is read again
_MEANT_ENDS = ("unsubscribed", "disconnected", "finished")
# Shared by all detached subscriptions, and never filled: an empty deque each would take 624 bytes.
_NO_FRAMES: deque[Frame] = deque(maxlen=0)
_RELAY_METHODS = ("publish", "recent", "read")
_bouncers: weakref.WeakSet[EventBouncer] = weakref.WeakSet()  # all: for a fork, and the exit


class Refused(RuntimeError):
    """Raised by `EventBouncer.subscribe` if there are too many already, or after `close`."""


class Ended(BrokenPipeError):
    """Raised by `Subscription.get` at the end; as EPIPE, so servers take it for a lost client."""


class _HubInUse:
    """A hub, and those who use it refer to this. When nobody does, the hub is retired.

    So no signal handler can retire it under a thread that is about to post something.
    """

    def __init__(self, bouncer: EventBouncer) -> None:
        self.hub = _Hub(bouncer.maxsize, bouncer.heartbeat, bouncer._heartbeat_frame.wire)
        # No __del__, during which another thread could still get this by a weak reference. And not
        # at exit: this would run before _end_at_exit(), which still posts the ends of the streams.
        weakref.finalize(self, self.hub.retire).atexit = False


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class Subscription:
    """A bounded queue of frames, with the reading half of ``queue.Queue``.

    Iterating yields frames until it ends; as a context manager it is unsubscribed when the block
    is left. The bouncer holds it weakly: keep a reference as long as you want to receive. When it
    ends, a blocked reader wakes, and gets what is held; after that `get` raises `Ended`.
    """

    channels: tuple[str, ...]
    maxsize: int  #: How many frames its reader may fall behind.
    _bouncer: EventBouncer  # whose lock guards everything in here
    # How many frames it may hold beyond maxsize, until it has been empty once: for the missed
    # events, the snapshot and what came before its server began to send.
    _extra: int = 0
    # When a broadcast found it full; None once it has been empty. Before its server begins to send
    # it, the distant past, so that no publisher waits for it.
    _late_since: float | None = None
    gap: bool = False  #: Whether it gets a ``gap`` first; see `EventBouncer.subscribe`.
    ended: str | None = None  #: Why it has ended; None while it is live.
    _frames: deque[Frame] = dataclasses.field(default_factory=deque)
    # Its reader waits for a frame, and publishers until it is empty. _put, _take and _mark_ended
    # notify both.
    _changed: threading.Condition | None = None
    _is_streamed: bool = False  # a response streams it
    _stream: _Stream | None = None  # the client's, once it is detached
    _on_close: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self.channels = tuple(dict.fromkeys(_check_channel(name) for name in self.channels))

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.channels)) or "no channel"
        state = f"has ended: {self.ended}" if self.ended else f"{self._behind()} frames behind"
        return f"<Subscription to {names}, {state}>"

    def get(self, block: bool = True, timeout: float | None = None) -> Frame:
        """Remove and return the next frame.

        :param block: Whether to wait for one.
        :param timeout: Seconds to wait. None, the default, is for ever; 0 is not at all.
        :raises queue.Empty: if there is none in time.
        :raises Ended: if there is none and none will come.
        :raises RuntimeError: if it is detached, and its frames go to its client.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(_wrong("timeout", "seconds >= 0", timeout, "use None for ever"))
        until = math.inf if timeout is None else time.monotonic() + timeout
        with self._bouncer._lock:
            while True:
                if self._stream is not None:
                    raise RuntimeError(_wrong("get", "a reader", self, "its client has its frames"))
                if self._frames:
                    return self._take()
                if self.ended is not None:
                    raise Ended(errno.EPIPE, f"this subscription has ended: {self.ended}")
                left = until - time.monotonic() if block else 0.0
                if left <= 0:
                    raise queue.Empty
                # In turns, as a signal handler that closes right before the wait wakes nobody.
                self._condition().wait(min(left, _PATIENCE))

    def get_nowait(self) -> Frame:
        return self.get(block=False)

    def qsize(self) -> int:
        return len(self._frames)

    def empty(self) -> bool:
        return not self._frames

    def full(self) -> bool:
        """Return whether the next broadcast would find it full, and drop it."""
        return len(self._frames) >= self.maxsize + self._extra

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        try:
            return self.get()
        except Ended:
            raise StopIteration from None

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        ends_a_stream = self._is_streamed and self.ended is None
        self._bouncer.unsubscribe(self)
        if ends_a_stream and error is None:
            advice = "return sse_response(...) without a block: it is streamed later"
            raise RuntimeError(_wrong("with", "a subscription that is read in it", self, advice))

    def _begin(self) -> None:
        """Begin as a stream through the server: what it holds by now does not count."""
        with self._bouncer._lock:
            self._late_since = None
            self._extra = len(self._frames)

    def _end(self, why: str) -> None:
        """End it. Called by the hub when it ends this subscription's stream."""
        behind = self._behind()
        self._bouncer._remove(self, why)
        if why == "dropped":
            logger.debug("dropped: a client of %s, %d frames behind", self.channels, behind)

    def _behind(self) -> int:
        """Return how many frames are still to be taken; of a detached stream, about how many."""
        stream = self._stream
        return len((self._frames if stream is None else stream.pending) or ())

    # What follows is the bouncer's, and called with the lock held.

    def _put_first(self, frames: list[Frame]) -> None:
        """Put frames that do not count before those that it holds."""
        self._frames.extendleft(reversed(frames))
        self._extra += len(frames)

    def _put(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._notify()

    def _take(self) -> Frame:
        frame = self._frames.popleft()
        if not self._frames:
            self._extra = 0
            self._late_since = None
            self._notify()
        return frame

    def _condition(self) -> threading.Condition:
        self._changed = self._changed or threading.Condition(self._bouncer._lock)
        return self._changed

    def _wait_until_empty(self, since: float | None, until: float) -> bool:
        """Wait until it has been empty once, or has ended. Return whether that was in time.

        ``since`` is what its `_late_since` was: it has another value if it has been empty.
        """
        return self._condition().wait_for(
            lambda: self._late_since != since or self.ended is not None, until - time.monotonic()
        )

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.notify_all()

    def _may_catch_up(self) -> bool:
        """Return whether it is full, and has been for less than _PATIENCE: publishers wait."""
        if not self.full():
            return False
        self._late_since = self._late_since or time.monotonic()
        return time.monotonic() < self._late_since + _PATIENCE

    def _detach(self, stream: _Stream) -> list[bytes]:
        """Become a stream of the hub. Return the frames that it held."""
        held, self._frames = self._frames, _NO_FRAMES
        self._stream = stream if self.ended is None else None
        stream.channels, stream.owner = self.channels, self
        return [frame.wire for frame in held]

    def _mark_ended(self, why: str) -> None:
        self.ended = why
        self._stream = None  # which refers to this
        self._notify()
        self._changed = None  # nobody waits from now on, and init_app() may replace the lock
        if self._on_close is not None:
            _callbacks().due.put(self._on_close)
            self._on_close = None

    def _disown(self) -> None:
        """End it in a forked child, where the condition's lock may be held for ever."""
        self._changed = self._on_close = None
        self.ended = self.ended or "it belongs to the process that this one was forked from"


@dataclasses.dataclass(eq=False, repr=False)
class EventBouncer:
    """Lets subscribers in, and sends what is broadcast to all of them. Make one per app.

    The parameters are attributes too, which only the constructor and `init_app` can set.

    :param maxsize: How many frames a subscriber may fall behind, at least 1. Then it is dropped.
    :param history: How many events to keep, of all channels together, for clients that come back.
        The bouncer then gives every event an id. 0, the default, keeps none.
    :param heartbeat: Seconds of silence, at most 86,400, after which a stream sends a comment, for
        proxies and to notice a client that left; 15 as the standard advises (9.2.7). None: never.
    :param heartbeat_event: Send an empty event of this name instead of the comment. A page can then
        reconnect when it stays away: no page sees comments. None or ``""``: the comment.
    :param retry: Milliseconds that a client waits before it reconnects, or a pair of them, of which
        each client gets a random value between. 0 is at once. None leaves it to the browser.
    :param max_subscribers: How many there may be at a time, at least 1. None is any number.
    :param relay: What carries events between processes, a `RedisRelay` or another `Relay`. None
        keeps to this process.
    :param detach: Whether streams are taken over from a server that hands out its connections.
    :raises TypeError, ValueError: if an argument is of the wrong type, or out of range.
    """

    maxsize: int = 16
    _: dataclasses.KW_ONLY
    history: int = 0
    heartbeat: float | None = 15.0
    heartbeat_event: str | None = None
    retry: int | tuple[int, int] | None = None
    max_subscribers: int | None = None
    relay: Relay | None = None
    detach: bool = True

    def __post_init__(self) -> None:
        # The parameters. From here on they are read-only.
        self._given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        _check_integer("maxsize", self.maxsize, 1)
        _check_integer("history", self.history, 0)
        if self.max_subscribers is not None:
            _check_integer("max_subscribers", self.max_subscribers, 1)
        seconds = self.heartbeat
        if not isinstance(seconds, int | float | None) or isinstance(seconds, bool):
            raise TypeError(_wrong("heartbeat", "seconds", seconds, "use None for never"))
        if seconds is not None and not 0 < seconds <= _MAX_HEARTBEAT:
            raise ValueError(_wrong("heartbeat", "0 < s <= 86,400", seconds, "use None for never"))
        if not isinstance(self.detach, bool):  # text from the environment, perhaps
            raise TypeError(_wrong("detach", "True or False", self.detach, "in JSON: true, false"))
        name = self.heartbeat_event
        self._heartbeat_frame = format_sse("", name) if name else _HEARTBEAT
        retry = self.retry
        self._retry: list[int] | None = None  # the least and the most milliseconds
        if retry is not None:
            pair = retry if isinstance(retry, tuple | list) else (retry, retry)
            self._retry = [_check_integer("retry", number, 0) for number in pair]
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(_wrong("retry", "one or (low, high)", retry, "give milliseconds"))
        if self.relay is not None and not all(hasattr(self.relay, name) for name in _RELAY_METHODS):
            expected = f"an object with {', '.join(_RELAY_METHODS)}"
            raise TypeError(_wrong("relay", expected, self.relay, "use RedisRelay(client)"))
        self._dumps: Callable[[object], str | bytes] | None = None  # None: see format_sse()
        self._gives_ids = self.history > 0 or self.relay is not None
        self._closed = False
        self._reset()
        _bouncers.add(self)

    def _reset(self) -> None:
        # The lock, once it is used; a dictionary, because setdefault() is one step.
        self._locks: dict[str, threading.RLock] = {}
        self._histories: dict[int, _History] = {}  # the one of this process, by its number
        # Readers, and streams that have not begun. They are held weakly: if a view fails and its
        # subscription is never read, it goes, or fills up and is dropped.
        self._readers: weakref.WeakKeyDictionary[Subscription, None] = weakref.WeakKeyDictionary()
        # The subscriptions of detached streams, which may be thousands. Each refers to the hub, and
        # so keeps it in use. `_hub()` returns the same reference, or None if there is no hub.
        self._detached: dict[Subscription, _HubInUse] = {}
        self._hub: Callable[[], _HubInUse | None] = lambda: None
        self._relay_reader: _RelayReader | None = None  # made when it is first needed
        self._publishes_into_nothing = False
        self._counts = {"events": 0, "dropped": 0, "refused": 0, "gaps": 0}

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self).get("_given", ()):
            raise AttributeError(_wrong(name, "no other value", value, "use init_app(app)"))
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<EventBouncer {', '.join(f'{name}={n}' for name, n in self.stats().items())}>"

    @property
    def _lock(self) -> threading.RLock:
        # The lock guards everything mutable in a bouncer and its subscriptions, and puts events in
        # order: each gets its id, its place in the history and in every queue, and is handed to the
        # hub, in one pass under the lock. It is never held while something blocks, logs or runs the
        # app's code. It is reentrant, and loops are over copies, because a signal handler may
        # close(), or a finaliser unsubscribe, in the thread that it interrupts in here.
        #
        # Made when it is first used, and anew in a forked child: a lock from before gevent patches
        # threading excludes no greenlet. setdefault() is one step, so all that come first get one.
        return self._locks.get("own") or self._locks.setdefault("own", threading.RLock())

    @property
    def _history(self) -> _History:
        # Made when a process first uses it: uWSGI loads apps in its master, and forks without a
        # word to Python. If there is no relay, ids begin with the time, or another process would
        # take them for its own.
        if (process := os.getpid()) not in self._histories:
            floor = (time.time_ns(), 0) if self.relay is None else _NO_ID
            self._histories.setdefault(process, _History(self.history, floor))
        return self._histories[process]

    def init_app(self, app: Flask) -> None:
        """Take the settings of an app, and begin anew. For an app factory; else it is not needed.

        ``SSE_MAXSIZE``, ``SSE_HISTORY``, ``SSE_HEARTBEAT``, ``SSE_HEARTBEAT_EVENT``, ``SSE_RETRY``,
        ``SSE_MAX_SUBSCRIBERS``, ``SSE_RELAY`` and ``SSE_DETACH`` of ``app.config`` are the
        parameters of the constructor, whose values are the defaults. ``SSE_REDIS_URL`` makes the
        relay, a `RedisRelay` with the key ``sse:`` and the app's import name. From now on JSON is
        made by this app's provider, also in threads and jobs. ``app.extensions["sse_bouncer"]`` is
        this.

        :raises TypeError, ValueError: as the constructor does; nothing is changed.
        :raises RuntimeError: while there are subscribers.
        """
        given, config = self._given, app.config
        settings = {name: config.get(f"SSE_{name.upper()}", given[name]) for name in given}
        if (url := config.get("SSE_REDIS_URL")) is not None:
            settings["relay"] = RedisRelay.from_url(url, f"sse:{app.import_name}")
        fresh = EventBouncer(**settings)
        with self._lock:  # nobody subscribes between the look and the update
            if count := len(self.subscribers):
                raise RuntimeError(_wrong("init_app", "no subscribers", count, "call it earlier"))
            # By vars(), as __setattr__() refuses the parameters. By a lambda, as the app may set
            # another provider later.
            vars(self).update(vars(fresh), _given=given, _dumps=lambda data: app.json.dumps(data))
        app.extensions["sse_bouncer"] = self

    def subscribe(self, *channels: str, last_event_id: str | None = None) -> Subscription:
        """Subscribe to what is broadcast without a channel, and to these channels, from now on.

        :param channels: Names, none of them empty. Who may read which is for the route to decide.
        :param last_event_id: The id that the client saw last. Then what it has missed since comes
            first. If the history does not have all of that, or if nobody knows, for example after a
            restart, it first gets an event named ``gap``, at which a page loads its state again,
            and then everything that is kept. ``"earliest"`` asks for everything that is kept. None,
            the default, and ``""`` begin with what is broadcast from now on.
        :raises Refused: if there are ``max_subscribers`` already, or after `close`.
        """
        seen = self._seen(last_event_id, is_trusted=True)
        subscription = Subscription(channels, self.maxsize, self)
        self._add(subscription, seen, wants_snapshot=False)
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
            with a history or a relay the bouncer gives the ids. The name ``gap`` is refused, as
            every page would load its state again. ``snapshot`` sends a new state to everybody.
        :param channel: The channel to send it to. None, the default, is everyone.
        :raises TypeError, ValueError: as `format_sse` does; nothing is sent.
        """
        if event == "gap":
            raise ValueError(_wrong("event", "your own name", event, "name a state 'snapshot'"))
        frame = self._format(msg, event, id, retry)
        if channel is not None:
            _check_channel(channel)
        if self._publishes_into_nothing:
            _warn_once("a forked process reaches no stream of its parent; use a RedisRelay")
        if self.relay is not None:
            self.relay.publish(channel, str(frame))
        else:
            self._deliver(_Event(_NO_ID, channel, frame))

    def stream(
        self,
        *channels: str,
        last_event_id: str | None = None,
        snapshot: Callable[[], object] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> Response:
        """Return a Flask response that streams to one new subscriber.

        A client that comes back has a ``Last-Event-ID`` header, or a query parameter
        ``lastEventId``, which beats the argument. One that is refused is answered 200, a ``retry``
        and the end: at any other status an EventSource gives up for good (9.2.3).

        :param channels: See `subscribe`.
        :param last_event_id: See `subscribe`. If there is a history or a relay, a header that is no
            id of this bouncer is answered by a gap: the client has seen something else.
        :param snapshot: A function that returns the state, called in the view, after the client has
            been subscribed. What it returns is the first event, named ``snapshot``; a `Frame` goes
            as it is. It is called for a client that is new, and for one that would get a gap. One
            whose missed events are all kept gets just these. What is broadcast meanwhile comes
            after it, and may be in it already, so make events that can be applied twice. If it
            raises, so does this, and nothing of the subscription stays. None, the default, sends no
            state.
        :param on_close: A function that is called once, when the stream gets no more events,
            whatever the reason, in a copy of the view's context, whose teardown is over: use a
            database within ``app.app_context()``. All of them run in one thread, in order. They may
            block and broadcast, and what they raise is logged. None, the default, tells nobody.
        :raises ValueError: if there is a snapshot, and ``last_event_id`` is ``"earliest"``.
        """
        # Until its server begins: _BURST frames beyond maxsize, and no publisher waits for it.
        subscription = Subscription(channels, self.maxsize, self, _BURST, -math.inf)
        return _stream_response(subscription, last_event_id, snapshot, on_close)

    def unsubscribe(self, subscription: Subscription) -> None:
        """End one subscription, of whichever bouncer; what it holds is still delivered.

        A second call has no effect.
        """
        subscription._bouncer._remove(subscription, "unsubscribed")

    def disconnect(self, *channels: str) -> None:
        """End the streams that have one of these channels; new ones may come.

        What was broadcast before is still delivered. With a relay this is for all processes; if
        the relay fails, it is for this one, and the relay's error is raised.
        """
        left = [_check_channel(name) for name in channels]
        try:
            while self.relay is not None and left:
                self.relay.publish(left[-1], None)
                left.pop()
        finally:
            # Without a relay, all channels are left; with one, those that it did not take.
            self._disconnect(set(left))

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
        self._closed = True  # before the loop: see _add()
        for subscription in self.subscribers:
            self._remove(subscription, "closed")

    @property
    def subscribers(self) -> tuple[Subscription, ...]:
        """The subscriptions of this process at this moment."""
        with self._lock:
            return (*self._detached, *self._audience(None))

    def latest_id(self) -> str | None:
        """Return the newest event's id, for a page to pass to `stream`; None without a history.

        With a relay it may wait a second until the relay has been reached for the first time.
        """
        self._read_relay(until=_NO_ID)
        return _id_text(self._history.newest) if self._gives_ids else None

    def stats(self) -> dict[str, int]:
        """Count what this process has: ``subscribers``, and how many of them are ``detached`` and
        hold no worker. And what it has seen: ``events`` that it delivered, subscribers that were
        ``dropped`` or ``refused``, and ``gaps``.
        """
        with self._lock:
            detached, readers = len(self._detached), len(self._readers)
            return {"subscribers": detached + readers, "detached": detached, **self._counts}

    # From here on for this file only. First what subscribers and room 6 ask for.

    def _format(self, data: object, event: Any, id: Any = None, retry: Any = None) -> Frame:
        if self._dumps is not None and not isinstance(data, str | None):
            data = _data_text(data, self._dumps)
        frame = format_sse(data, event, id=id, retry=retry)
        if self._gives_ids and frame.has_id:
            raise ValueError(_wrong("id", "the bouncer's own", str(frame), "leave it out"))
        return frame

    def _seen(self, last_event_id: str | None, is_trusted: bool) -> _Id | None:
        """Return the id that a client saw last; None if it is new."""
        if not last_event_id or not self._gives_ids:
            return None
        if is_trusted and last_event_id == "earliest":
            return _EARLIEST
        return _parse_id(last_event_id)

    def _add(self, subscription: Subscription, seen: _Id | None, wants_snapshot: bool) -> None:
        self._read_relay(until=seen or _NO_ID)
        with self._lock:
            if len(self._readers) + len(self._detached) >= (self.max_subscribers or math.inf):
                raise self._refused(f"fewer than {self.max_subscribers} subscribers", "as many")
            self._readers[subscription] = None
            # Only now look whether the bouncer is closed. If a signal handler closes it before this
            # look, the look finds it; later, the handler finds the subscription, and ends it.
            if self._closed and subscription.ended is None:
                self._readers.pop(subscription, None)
                raise self._refused("an open bouncer", "a closed one")
            if seen is not None:
                missed, subscription.gap = self._history.missed(seen, subscription.channels)
                if subscription.gap:
                    self._counts["gaps"] += 1
                if not (subscription.gap and wants_snapshot):
                    subscription._put_first(missed)
        if subscription.gap:
            logger.debug("a client of %s may have missed something for good", subscription.channels)

    def _refused(self, expected: str, given: str) -> Refused:
        with self._lock:
            self._counts["refused"] += 1
        return Refused(f"subscribe: expected {expected}, got {given}; try later")

    def _add_snapshot(self, subscription: Subscription, state: object, id: str | None) -> None:
        """Put the app's state before everything that the subscription holds.

        :param id: Of the newest event from before the state was made. A client that leaves right
            after the state comes back with this id, and then gets what was broadcast meanwhile.
        """
        if state is None:
            raise ValueError(_wrong("snapshot", "the state", state, "return something to send"))
        frame = self._format(state, None if isinstance(state, Frame) else "snapshot")
        if id is not None:
            frame = _with_id(frame, id)
        with self._lock:
            subscription._put_first([frame])

    def _attach(self, subscription: Subscription, stream: _Stream) -> None:
        """Move a subscription from the readers to the hub, with its client's connection.

        If there can be no hub, OSError or RuntimeError is raised, and nothing has changed.
        """
        with self._lock:
            used = self._hub() or _HubInUse(self)
            self._hub = weakref.ref(used)
        used.hub.start()
        with self._lock:
            self._detached[subscription] = used
            self._readers.pop(subscription, None)
            used.hub.attach(stream, subscription._detach(stream))
            # If a signal handler, or another thread, has ended the subscription meanwhile, its end
            # came to the hub before the stream did, and was without effect there.
            if subscription.ended is not None:
                self._detached.pop(subscription, None)
                used.hub.end(stream, subscription.ended in _MEANT_ENDS)

    def _remove(self, subscription: Subscription, why: str) -> None:
        """End a subscription. If it has ended before, this has no effect."""
        with self._lock:
            if subscription.ended is not None:
                return
            if why == "dropped":
                self._counts["dropped"] += 1
            stream = subscription._stream  # before _mark_ended(), which clears it
            subscription._mark_ended(why)
            self._readers.pop(subscription, None)
            used = self._detached.pop(subscription, None)
            # Without a stream this has interrupted _attach(), which then posts the end itself.
            if used is not None and stream is not None:
                used.hub.end(stream, why in _MEANT_ENDS)

    # What delivers events. The relay's reader calls the first two.

    def _deliver(self, event: _Event, source: _RelayReader | None = None) -> None:
        id, channel, frame = event
        with self._lock:
            self._wait_for_slow_readers(channel)
            # init_app() may have put another reader in place of this one. Without a relay, both are
            # None.
            if source is not self._relay_reader:
                return
            if source is None and frame is not None and self._gives_ids:
                id = (self._history.newest[0], self._history.newest[1] + 1)
                frame = _with_id(frame, _id_text(id))
            if self._gives_ids:
                self._history.keep(_Event(id, channel, frame))
            if frame is None:  # the end of the channel's streams
                self._disconnect({channel})
                return
            self._counts["events"] += 1
            dropped = self._fan_out(channel, frame)
        for reader in dropped:
            logger.debug("dropped: a reader of %s, %d behind", reader.channels, reader.qsize())
        if (used := self._hub()) is not None:
            used.hub.wait_while_behind(len(frame.wire))

    def _restart_history(self, floor: _Id, events: list[_Event], source: _RelayReader) -> None:
        """Begin the history anew, and tell every stream that it may have missed something."""
        with self._lock:
            if source is not self._relay_reader:
                return
            self._histories[os.getpid()] = _History(self.history, floor)
            for event in events:
                self._history.keep(event)
            if self.subscribers:
                self._counts["gaps"] += 1
            self._fan_out(None, _with_id(_GAP, _id_text(self._history.newest)))

    def _fan_out(self, channel: str | None, frame: Frame) -> list[Subscription]:
        """Send a frame to the channel's streams and readers. Return the readers that it dropped."""
        if (used := self._hub()) is not None:
            used.hub.send(channel, frame.wire)
        dropped = [reader for reader in self._audience(channel) if reader.full()]
        for reader in dropped:
            self._remove(reader, "dropped")
        for reader in self._audience(channel):
            reader._put(frame)
        return dropped

    def _audience(self, channel: str | None) -> list[Subscription]:
        # By keyrefs(), in one step: a signal handler may add to the dictionary, or empty it.
        readers = [reader for ref in self._readers.keyrefs() if (reader := ref()) is not None]
        return [r for r in readers if channel is None or channel in r.channels]

    def _wait_for_slow_readers(self, channel: str | None) -> None:  # called with the lock held
        # Wait until each full queue has been empty once, not just until it is below its bound: then
        # a loop of broadcasts waits once every maxsize frames. Another publisher may refill a queue
        # in between, so only a look in which the time is up counts. Looks, and not one long wait:
        # beside busy threads they take longer, just as a reader waits longer for its turn.
        looks = _LOOKS
        while looks and (late := [r for r in self._audience(channel) if r._may_catch_up()]):
            marked = [(reader, reader._late_since) for reader in late]
            until = time.monotonic() + _GRACE / _LOOKS
            if not all(reader._wait_until_empty(since, until) for reader, since in marked):
                looks -= 1

    def _disconnect(self, channels: Set[str | None]) -> None:
        for subscription in self.subscribers:
            if not channels.isdisjoint(subscription.channels):
                self._remove(subscription, "disconnected")

    # What belongs to the relay, and to a forked child.

    def _read_relay(self, until: _Id) -> None:
        """Have the relay read, if there is one, and wait a while for an event that it has."""
        if self.relay is None or self._closed:
            return
        with self._lock:
            reader = self._relay_reader = self._relay_reader or _RelayReader(self, self.relay)
        reader.start()
        reader.wait_for(until)

    def _is_read_by(self, reader: _RelayReader) -> bool:
        return self._relay_reader is reader and not self._closed

    def _begin_in_child(self) -> None:
        # Threads and clients are the parent's, and a lock that was held would stay locked for ever.
        old = (*self._detached, *self._audience(None))
        self._reset()
        self._publishes_into_nothing = self.relay is None and bool(old)
        for subscription in old:
            subscription._disown()


class _Callbacks(_OwnThread):
    """Calls what apps gave as ``on_close``, in order."""

    def __init__(self) -> None:
        super().__init__("sse_bouncer on_close")
        # A signal handler that ends streams may interrupt put(): only a SimpleQueue allows that.
        self.due: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def _run(self) -> None:
        while True:
            on_close = self.due.get()
            try:
                on_close()
            except BaseException:  # also SystemExit and gevent.Timeout: the next ones have to run
                # Not the process's own any more: this is a forked child, which kills its greenlets.
                if _process.get("callbacks") is not self:
                    raise
                logger.exception("an on_close function failed: %r", on_close)
            del on_close  # and with it the context of the view


_process: dict[str, _Callbacks] = {}  # the process's own; a dictionary for its setdefault()


def _callbacks() -> _Callbacks:
    # Made when it is first used, and anew in a forked child, as a bouncer's lock is.
    return _process.get("callbacks") or _process.setdefault("callbacks", _Callbacks())


class _RelayReader(_OwnThread):
    """Reads the relay for one bouncer, from its first use to its close.

    It holds the bouncer weakly, and ends with it.
    """

    def __init__(self, bouncer: EventBouncer, relay: Relay) -> None:
        super().__init__("sse_bouncer relay")
        self._bouncer = weakref.ref(bouncer)
        self._relay = relay
        # Set after the first attempt, or by the first caller that has waited one second for it.
        self._has_tried = threading.Event()
        self._position = _UNKNOWN_ID  # the id of the entry that was read last; less than any id
        self._has_read = threading.Condition()  # _take() notifies it of a new position
        self._is_away = False  # it has failed, and has not been read since

    def wait_for(self, id: _Id) -> None:
        """Wait, for a second each, until the relay has been tried, and this entry has been read.

        An id is a stranger's text, so nobody waits for one that the relay does not have. If the
        relay hangs, this takes a second, and nobody asks again until it has been read. The query
        has a thread of its own, because with a client that has no timeout it would never return.
        """
        if not self._has_tried.wait(_PATIENCE):
            self._has_tried.set()  # so that all wait a second together, and nobody later
        # Before the first read there is nothing to compare with, and later mostly no need to wait.
        if self._is_away or not _UNKNOWN_ID < self._position < id:
            return
        newest: list[_Entry] = []
        has_answered = threading.Event()

        def ask() -> None:
            with contextlib.suppress(Exception):  # it is away, as the reader will find
                newest.extend(self._relay.recent(1))
            has_answered.set()

        with contextlib.suppress(RuntimeError):  # there can be no more threads
            _start_thread(ask, "sse_bouncer relay query")
            if not has_answered.wait(_PATIENCE) and not self._is_away:
                logger.warning("the relay does not answer; trying until it does")
                self._is_away = True
        if any(_parse_id(entry[0]) >= id for entry in newest):
            with self._has_read:
                self._has_read.wait_for(lambda: self._position >= id, _PATIENCE)

    def _run(self) -> None:
        while (bouncer := self._bouncer()) is not None and bouncer._is_read_by(self):
            count = bouncer.history or 1  # without a history too, for the newest entry's id
            del bouncer  # nothing may hold it while the relay is waited for
            began, position = time.monotonic(), self._position
            try:
                if position == _UNKNOWN_ID:
                    found = self._relay.recent(count)
                else:
                    found = self._relay.read(_id_text(position), _READ_TIMEOUT)
                entries = [_parse_entry(entry) for entry in found]
                # Without an id there is no place to read on from.
                entries = [entry for entry in entries if entry[0].id != _UNKNOWN_ID]
            except Exception as error:
                if not self._is_away:
                    logger.warning("the relay cannot be read; trying until it can: %r", error)
                self._is_away = True
            else:
                self._is_away = False
                if (bouncer := self._bouncer()) is not None:
                    self._take(bouncer, entries)
            self._has_tried.set()
            # Pause if nothing was read and the call came back early: it failed, or does not wait.
            if self._position == position and time.monotonic() < began + _READ_PAUSE:
                time.sleep(_READ_PAUSE)

    def _take(self, bouncer: EventBouncer, entries: list[tuple[_Event, _Id]]) -> None:
        """Deliver what was read. An error in here is ours, and not the relay's."""
        if self._position == _UNKNOWN_ID:
            floor = _floor_before(*entries[0], self._position) if entries else _NO_ID
            bouncer._restart_history(floor, [event for event, _ in entries], self)
            self._position = entries[-1][0].id if entries else _NO_ID
            entries = []
        for event, after in entries:
            try:
                # An entry that publish() did not make says nothing of what was before it.
                if after not in (self._position, _UNKNOWN_ID):
                    logger.warning("events were lost in the relay before this process read them")
                    floor = _floor_before(event, after, self._position)
                    bouncer._restart_history(floor, [], self)
                bouncer._deliver(event, self)
            except Exception:
                logger.exception("unexpected error; the relay's reader goes on")
            self._position = event.id
        with self._has_read:
            self._has_read.notify_all()


def _floor_before(event: _Event, after: _Id, position: _Id) -> _Id:
    """Return the id after which this process has all events, beginning with this one."""
    # If the relay has gone back, by a deletion or to an older copy, or if the entry before is
    # unknown, nobody has seen all that was before this event: the floor is right before it.
    return after if after > position else (event.id[0] - 1, 2**64 - 1)


def _parse_entry(entry: _Entry) -> tuple[_Event, _Id]:
    """Return the event of a relay's entry, and the id of the one before.

    If it is not one that ``publish`` made, there is a line in the log, and the event, which ends
    the streams of no channel, is without effect: it only carries its id, if it has one.
    """
    id = _UNKNOWN_ID
    try:
        id_text, after_text, channel, text = entry
        id, after = _parse_id(id_text), _parse_id(after_text)
        if _UNKNOWN_ID in (id, after):
            raise ValueError(_wrong("id, after", "<digits>-<digits>", entry[:2], "use publish()"))
        if channel is not None:
            _check_channel(channel)
        frame = None if text is None else _with_id(Frame(text), id_text)
    except (TypeError, ValueError) as error:
        logger.warning("skipped an entry of the relay that is not an event: %s", error)
        return _Event(id, None, None), _UNKNOWN_ID
    return _Event(id, channel, frame), after


def _check_channel(name: Any) -> str:
    text = _check_text("channel", name, "give each name as a text of its own")
    if not text:
        raise ValueError(_wrong("channel", "a name", name, "leave it out for everyone"))
    return text


# =================================================================================================
# 6. RESPONSE
# A stream as a Flask response. The only room that knows HTTP, Flask and servers. However a response
# ends, what it holds is released: by close() where the server calls it, else with the body object.

# For caches, for proxies that would compress, and for nginx, which buffers. No Connection header:
# it is the server's own, and waitress answers 500 to an app that sets it.
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",
}
# uWSGI answers with the protocol that nginx passes on, which may be HTTP/2.0.
_SUCCESS = re.compile(rb"HTTP/[0-9.]+ 200 ")
_CHANGES_BODY = re.compile(rb"\r\ncontent-(encoding|length):", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked(?=\r\n|$)", re.IGNORECASE)
_CONNECTION_HEADER = re.compile(rb"\r\nconnection:[^\r\n]*", re.IGNORECASE)
_UWSGI_OWN = re.compile("https-socket|ssl-socket|gevent|async")  # TLS, or loops, of uWSGI's own
_HOLDS_WORKER = "a stream goes through the server and holds its worker: "
_STAND_IN_BUFFER = 1024 * 1024  # bytes of a response's head; the system may allow less
_STALL_TIME = 30.0  # seconds in which a client has to take 64 KiB from a server
_SELECT_LIMIT = 1_024  # descriptors that select() can wait for
_REFUSED_RETRY = (5_000, 15_000)  # milliseconds after which refused clients come back, at least
# So that a browser does not run at once again what has just failed. A line and no block, of which
# several client libraries would make an empty event.
_FAILED = _frame("retry: 10000\n", b"retry: 10000\n", has_id=False)
_MAX_GENERATORS = 1_000  # threads for generators; what is beyond goes through the server
_GENERATOR_EXIT_TIME = 5.0  # seconds that generators get when the process ends
_MOST_PENDING = 16  # frames that may wait for a client before its generator does
_LONGEST_POLL = 0.02  # seconds between looks of a generator that waits for its client
_NO_ITEM = object()
_Call = Callable[[], object] | None  # what an app gives to be called


def sse_response(source: Iterable[object] | Subscription, *, detach: bool = False) -> Response:
    """Return a Flask response that streams a generator, any iterable, or a `Subscription`.

    Items go through `format_sse`; None is skipped. One that cannot be formatted is logged and left
    out. When the response ends, however it does, ``source.close()`` is called where there is one.
    When a stream ends, a browser reconnects. To end it for good, send a last event at which the
    page calls ``close()`` on its EventSource, or answer the reconnect with status 204.

    A generator that fails before its first item is answered 500, unless it is given ``detach``, or
    its server is uWSGI. If it fails later, that is logged, the client is told to wait for ten
    seconds, and its body is cut off.

    :param source: What to stream.
    :param detach: Whether to run a generator in a thread of its own, so that it holds no worker. It
        runs in a copy of the view's context, but what belongs to the view's thread cannot be used
        in it, such as an sqlite3 connection. When its client leaves, it is closed at its next
        ``yield``; for a slow client it waits, about 30 seconds. When the process ends, generators
        get up to 5 seconds. Without it, the default, a graceful stop waits for them, 30 seconds in
        gunicorn. At most 1,000 run at a time. The rest, and all on servers that keep their
        connections, go through the server, also in a copy of the view's context. If the process
        is short of descriptors, the client is told to come back later, as by
        `EventBouncer.stream`.
    :raises TypeError: if ``source`` cannot be iterated, or is a text, bytes or a mapping.
    :raises RuntimeError: if a subscription is streamed by another response already.
    """
    if isinstance(source, Subscription):
        if source._is_streamed:
            raise RuntimeError(_wrong("source", "an unstreamed one", source, "subscribe anew"))
        source._is_streamed = True
        return _respond(_Body(source, source._bouncer.detach))
    if isinstance(source, AsyncIterable):
        raise TypeError(_wrong("source", "what is not async", source, "define it without async"))
    if isinstance(source, str | bytes | bytearray | Mapping) or not isinstance(source, Iterable):
        raise TypeError(_wrong("source", "items or a Subscription", source, "put it into a list"))
    try:
        return _respond(_GeneratorBody(source, detach))
    except Refused as refused:  # the body is freed with this error, and closes the source
        return _refuse(refused, _generators)


def _stream_response(
    subscription: Subscription, last: str | None, snapshot: _Call, on_close: _Call
) -> Response:
    from flask import request

    bouncer = subscription._bouncer
    if snapshot is not None and last == "earliest":
        raise ValueError(_wrong("last_event_id", "an id beside a snapshot", last, "leave it out"))
    if request.environ.get("wsgi.multiprocess") and bouncer.relay is None:
        _warn_once("of several processes each reaches its own subscribers only; use a RedisRelay")
    if request.method == "HEAD":
        return _respond(iter(()))  # a tuple would get a Content-Length
    # A client that comes back knows best. The query parameter is event-source-polyfill's. Only the
    # view may ask for everything that is kept.
    returning = request.headers.get("Last-Event-ID") or request.args.get("lastEventId")
    seen = bouncer._seen(returning or last, is_trusted=not returning)
    if on_close is not None:
        _callbacks().start()
        subscription._on_close = functools.partial(contextvars.copy_context().run, on_close)
    try:
        _check_descriptors(bouncer)
        newest = bouncer.latest_id()
        bouncer._add(subscription, seen, snapshot is not None)
        if snapshot is not None and (seen is None or subscription.gap):
            bouncer._add_snapshot(subscription, snapshot(), newest)
        return sse_response(subscription)
    except BaseException as error:
        subscription._on_close = None  # there was no stream, so nobody is told of its end
        bouncer.unsubscribe(subscription)
        if isinstance(error, Refused):
            return _refuse(error, bouncer)
        raise


def _refuse(refused: Refused, bouncer: EventBouncer) -> Response:
    _warn_once(f"clients are told to come back later: {refused}")
    # After some seconds at least: at once would be for ever.
    own = bouncer._retry or (0, 0)
    milliseconds = max(random.randint(*own), random.randint(*_REFUSED_RETRY))
    return _respond([b"retry: %d\n: no room now, come back later\n" % milliseconds])


def _respond(body: Iterable[bytes]) -> Response:
    from flask import Response, current_app, has_app_context

    # The app's own class: Flask would turn any other response into one.
    response_class = current_app.response_class if has_app_context() else Response
    # Or eventlet would hold back what is shorter than 32 KiB.
    _environ().setdefault("eventlet.minimum_write_chunk_size", 0)
    response: Response = response_class(body)
    response.headers.update(_HEADERS)  # the class may have set some of its own
    return response


def _environ() -> dict[str, Any]:
    """Return the WSGI environ of the request; outside of one, one of nothing."""
    from flask import has_request_context, request

    return request.environ if has_request_context() else {}


class _Body:
    """The frames of a subscription, and heartbeats: what a server iterates, and closes.

    It is an object, because a generator that was never started has no ``finally`` to run. If a
    server breaks a request off without close(), it still drops the body. Nothing that the body
    holds refers back to it, so it is freed, and closed, at once.
    """

    def __init__(self, subscription: Subscription, detach: bool) -> None:
        self._environ = _environ()
        self.connection = _Connection(self._environ, detach)
        self._is_detached = False
        self._subscription = subscription
        self._bouncer = subscription._bouncer
        # What is sent at once, so that a page's onopen fires. A line, not a block, of which several
        # client libraries would make an empty event.
        retry = self._bouncer._retry
        self.opening = b"retry: %d\n" % random.randint(*retry) if retry else _HEARTBEAT.wire

    def __iter__(self) -> Iterator[bytes]:
        try:
            has_begun = not self._is_in_view() and self.connection.begin()
            if self.opening:
                yield self.opening
            self._is_detached = has_begun and self.connection.detach(self)
            if self._is_detached:
                return
            for frame in self.frames():
                # Or a client that stops reading would hold this thread for ever.
                self.connection.set_timeout(_STALL_TIME * (1 + len(frame.wire) // _SEND_BUFFER))
                yield frame.wire
        except BaseException:  # now: the traceback holds the body, so __del__ would come late
            self.close()
            raise

    def close(self) -> None:
        self.connection.close()
        if not self._is_detached:
            self.release("its client left")

    __del__ = close

    def _is_in_view(self) -> bool:
        """Return whether a view or an after_request function reads the body, and no server."""
        # When these functions are over, Flask takes its request out of the environ, and ends the
        # context. Later, middleware may put another request into the environ, and a test client may
        # bring the context back, but hardly both.
        has_request = self._environ.get("werkzeug.request") is not None
        return has_request and _environ() is self._environ

    def frames(self) -> Iterator[Frame]:
        """Yield what goes through the server, after the opening."""
        if self._is_in_view():
            raise RuntimeError("a stream has no end: leave its body to the server")
        self._subscription._begin()
        while True:
            try:
                yield self._subscription.get(timeout=self._bouncer.heartbeat)
            except queue.Empty:
                yield self._bouncer._heartbeat_frame
            except Ended:
                if self._subscription.ended in _MEANT_ENDS or not self.connection.blocks:
                    return
                raise  # so that the server breaks the body off

    def attach(self, stream: _Stream) -> None:
        """Have a hub send from now on. RuntimeError or OSError if that cannot be."""
        self._bouncer._attach(self._subscription, stream)

    def release(self, why: str) -> None:
        """End what is not detached. A second call has no effect."""
        self._bouncer._remove(self._subscription, why)


# The bouncer whose hub sends what generators yield, each to a channel of its own. No queue of it is
# ever full, because a generator waits for its client.
_generators = EventBouncer(sys.maxsize)
_running: set[_GeneratorBody] = set()  # whose threads run


class _GeneratorBody(_Body):
    """What a generator, or any iterable, yields.

    It goes through the server as it is, or a thread of its own broadcasts it to a subscription.
    """

    def __init__(self, source: Iterable[object], detach: bool) -> None:
        self._source = source
        # The view's context is over when the generator runs, so a copy is kept: for the app's JSON,
        # and for a generator with `detach`, wherever it runs.
        self._in_context: Callable[..., Any] = contextvars.copy_context().run
        self._call: Callable[..., Any] = self._in_context if detach else operator.call
        super().__init__(Subscription((str(uuid.uuid4()),), sys.maxsize, _generators), detach)
        if not self.connection.can_be_taken_over:
            # Through the server, one that fails at once is answered by the server's own 500.
            self.opening = b""
        if detach:
            _check_descriptors(_generators)

    def frames(self) -> Iterator[Frame]:
        has_begun = bool(self.opening)
        try:
            items = self._call(iter, self._source)
            while (item := self._call(next, items, _NO_ITEM)) is not _NO_ITEM:
                if item is None:  # as language models send it between their tokens
                    continue
                try:
                    frame = self._in_context(format_sse, item)
                except (TypeError, ValueError):
                    logger.exception("left out of a stream, which goes on: %.80r", item)
                    continue
                yield frame
                has_begun = True
        except Ended:  # from a subscription that it reads: handled as if the client had left
            raise
        except Exception as error:
            if has_begun:
                yield _FAILED
            elif isinstance(error, OSError):  # which servers may take for a lost client
                raise RuntimeError("a generator failed") from error
            # Whoever asks for frames logs it: _run(), or the server. But a server whose sends block
            # is told, by Ended, that the client is lost, and logs nothing: then it is logged here.
            if not has_begun or not self.connection.blocks:
                raise
            logger.exception("a generator failed; its stream is cut off")
            raise Ended(errno.EPIPE, "its generator has failed") from error

    def attach(self, stream: _Stream) -> None:
        if len(_running) >= _MAX_GENERATORS:
            raise RuntimeError(f"{_MAX_GENERATORS:,} generators run already")
        _generators._add(self._subscription, seen=None, wants_snapshot=False)
        super().attach(stream)
        _running.add(self)
        try:
            _start_thread(self._run, "sse_bouncer generator")
        except RuntimeError as error:  # there can be no more threads: run it in the worker's
            _warn_once(f"{_HOLDS_WORKER}{error}")
            self._run()

    def release(self, why: str) -> None:
        super().release(why)
        close = getattr(self._source, "close", None)
        self._source = ()
        if close is not None:
            self._call(close)

    def _run(self) -> None:
        why = "failed"
        try:
            try:
                for frame in self.frames():
                    # Not by broadcast(), which warns in a forked child: this client is its own.
                    _generators._deliver(_Event(_NO_ID, self._subscription.channels[0], frame))
                    self._wait_for_client(len(frame.wire))
                    if self._subscription.ended is not None:  # its client left, or the process ends
                        break
                why = "finished"
            finally:  # also if it raises SystemExit
                self.release(why)
        # Ended: it has failed, or a subscription that it reads has ended. A SystemExit ends this
        # generator alone, but gevent would raise it in the main greenlet.
        except (Ended, SystemExit):
            pass
        except Exception:
            logger.exception("a generator failed, or could not be closed")
        finally:
            _running.discard(self)

    def _wait_for_client(self, size: int) -> None:
        """Wait until at most 16 frames, or 64 KiB of frames of this size, are left to send."""
        most = min(_MOST_PENDING, _BACKLOG // size)
        began = time.monotonic()
        while self._subscription._behind() > most and self._subscription.ended is None:
            waited = time.monotonic() - began
            if waited > _STALL_TIME * (1 + size // _SEND_BUFFER):  # its client takes too little
                _generators._remove(self._subscription, "dropped")
            time.sleep(min(_POLL_INTERVAL + waited, _LONGEST_POLL))


class _Connection:
    """A client's connection to the server, and how it is taken over in the middle of a response.

    Rack calls this a hijack, but there the app writes the response's head. Here the server does,
    with everything that extensions and middleware put into it:

    1. Before the first item, a stand-in takes the place of the connection: one end of a socket pair
       gets the server's descriptor. The client's connection stays open as a duplicate.
    2. The server writes the head and the first item, and they arrive at the other end.
    3. When the server asks for the second item, everything that it has written is there. If it is
       what was expected, the hub gets it, and the client's connection. The stand-in is hung up, so
       that the server sees a client that has left, and ends the request.
    4. If it is not, it is sent on, and the server gets its connection back.

    This needs a server that neither closes the descriptor nor registers it anew in between.
    """

    def __init__(self, environ: dict[str, Any], detach: bool) -> None:
        self._socket, self._descriptor, self.blocks = _connection_of(environ)
        is_tls = hasattr(self._socket, "getpeercert")  # whose bytes are the server's to make
        is_forked = "werkzeug.socket" in environ and environ.get("wsgi.multiprocess")
        if detach and is_forked:
            _warn_once(f"{_HOLDS_WORKER}its server makes a process for each request")
        self.can_be_taken_over = detach and self._descriptor >= 0 and not (is_tls or is_forked)
        self._is_http_1_0 = environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
        self._is_begun = False

    def _is_open(self) -> bool:
        """Return whether the server still has it. If not, another client may have its number."""
        return self._socket is None or self._socket.fileno() == self._descriptor

    def set_timeout(self, seconds: float | None) -> None:
        """Limit how long a send of the server may wait, if its sends block."""
        if self.blocks:
            with contextlib.suppress(OSError):  # the server has closed it
                self._socket.settimeout(seconds)

    def begin(self) -> bool:
        """Put the stand-in into place. Return whether that was possible."""
        if not self.can_be_taken_over or not self._is_open():
            return False
        try:
            with contextlib.ExitStack() as opened:
                # The mode belongs to the open file, not to the descriptor. It is read first, as a
                # socket object changes it where the app has called socket.setdefaulttimeout().
                self._was_blocking = os.get_blocking(self._descriptor)
                self._client = opened.enter_context(_socket_of(os.dup(self._descriptor)))
                self._ours, stand_in = map(opened.enter_context, socket.socketpair())
                self._ours.setblocking(False)
                stand_in.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STAND_IN_BUFFER)
                os.set_blocking(stand_in.fileno(), self._was_blocking)
                os.dup2(stand_in.fileno(), self._descriptor, inheritable=False)
                stand_in.close()
                opened.pop_all()
        except (OSError, AttributeError) as error:  # AttributeError: on Windows
            _warn_once(f"{_HOLDS_WORKER}{error}")
            return False
        self._is_begun = True
        # So a head that is larger than the stand-in's buffer is an error. Without a timeout the
        # worker would wait for ever, as only the worker itself could read it.
        self.set_timeout(_PATIENCE)
        return True

    def detach(self, body: _Body) -> bool:
        """Have the hub send from now on. If that is not possible, the server goes on."""
        written = self._written()
        with contextlib.suppress(OSError):  # a unix socket has nothing of TCP
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.setblocking(False)
        descriptor = self._client.detach()  # first, so that it never has two owners
        try:
            head, framing = _head_and_framing(written, body.opening, self._is_http_1_0)
            body.attach(_Stream(descriptor, framing, deque([head])))
        # The server wrote something else; Refused; or there is no thread or descriptor for a hub.
        except (RuntimeError, OSError) as error:
            self._client = _socket_of(descriptor)
            _warn_once(f"{_HOLDS_WORKER}{error}")
            self._give_back(written)
            return False
        self._is_begun = False
        self._ours.close()
        return True

    def close(self) -> None:
        """Let go. If the server asks for no second item, its client gets what it has written."""
        if self._is_begun:
            with contextlib.suppress(OSError):  # the client, or the connection, is gone
                self._give_back(self._written())
        self.set_timeout(None)
        self.blocks = False  # set no timeout from now on: the connection may serve another request

    def _written(self) -> bytes:
        # Of a socket that does not block, this is what is there, or None if nothing is.
        with open(self._ours.fileno(), "rb", buffering=0, closefd=False) as ours:
            return ours.readall() or b""

    def _give_back(self, written: bytes) -> None:
        self._is_begun = False
        with self._ours, self._client:
            try:
                self._client.settimeout(_STALL_TIME)
                self._client.sendall(written)
            finally:
                os.set_blocking(self._client.fileno(), self._was_blocking)
                if self._is_open():
                    os.dup2(self._client.fileno(), self._descriptor, inheritable=False)


def _connection_of(environ: Mapping[str, Any]) -> tuple[Any, int, bool]:
    """Return the socket of a request, its descriptor, and whether the server's sends block.

    If they do, a timeout can be set, and a body can be broken off without noise, because such a
    server takes a broken pipe for a lost client. If it is not known: None, -1 and False.

    | server        | where                                                                    |
    | ------------- | ------------------------------------------------------------------------ |
    | werkzeug      | ``werkzeug.socket``, set in ``WSGIRequestHandler.make_environ``          |
    | gunicorn      | ``gunicorn.socket``, set in ``gunicorn.http.wsgi.default_environ``       |
    | waitress      | ``waitress.client_disconnected``, documented; a method of the channel    |
    | gevent.pywsgi | ``wsgi.input``, which reads from a file that has the socket              |
    | uWSGI         | ``uwsgi.connection_fd()``, documented; only the descriptor               |
    """
    try:
        connection = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")
        if "waitress.client_disconnected" in environ:
            connection = environ["waitress.client_disconnected"].__self__.socket
        elif environ.get("SERVER_SOFTWARE", "").startswith("gevent/"):
            connection = environ["wsgi.input"].rfile.raw._sock
        elif "uwsgi.version" in environ:
            uwsgi: Any = sys.modules["uwsgi"]
            has_own_way = any(map(_UWSGI_OWN.match, uwsgi.opt))
            return None, -1 if has_own_way else uwsgi.connection_fd(), False
        # Of HTTP/2, several requests share a connection.
        if connection is not None and environ["SERVER_PROTOCOL"] in ("HTTP/1.0", "HTTP/1.1"):
            return connection, connection.fileno(), connection.gettimeout() is None
    except (AttributeError, KeyError) as error:
        _warn_once(f"{_HOLDS_WORKER}its connection is not where it used to be ({error!r})")
    return None, -1, False


def _head_and_framing(written: bytes, opening: bytes, is_http_1_0: bool) -> tuple[bytes, _Framing]:
    """Return what a client is to get first, and how the body goes on.

    The client gets what the server wrote, with ``Connection: close`` as its only Connection header.
    RuntimeError if the server wrote something else than a 200 and the opening.
    """
    head, _, body = written.partition(b"\r\n\r\n")
    framing: _Framing = _as_chunk if _CHUNKED.search(head) else bytes  # bytes(wire) is wire
    # Some servers write a chunk's size in capitals.
    if body.lower() != framing(opening) or not _SUCCESS.match(head) or _CHANGES_BODY.search(head):
        raise RuntimeError(f"instead of a 200 and its opening there was {head!r:.40}")
    if is_http_1_0:  # that client knows no chunks; the development server sends some by mistake
        head, body, framing = _CHUNKED.sub(b"", head), opening, bytes
    head = _CONNECTION_HEADER.sub(b"", head) + b"\r\nConnection: close"
    return head + b"\r\n\r\n" + body, framing


def _as_chunk(wire: bytes) -> bytes:
    """Return a chunk of HTTP/1.1; that of nothing ends the body."""
    return b"%x\r\n%b\r\n" % (len(wire), wire)


def _check_descriptors(bouncer: EventBouncer) -> None:
    """Raise Refused if there is no room for a stream and for a server that has to accept().

    A gunicorn worker that cannot accept() for want of descriptors ends, with all its streams, and
    so does waitress at a descriptor that is too large for select().
    """
    # ulimit -n; -1 if it is unlimited, as on Windows.
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
    if limit < 0:
        limit = sys.maxsize
    with contextlib.suppress(AttributeError, KeyError):  # it is not waitress
        if not _environ()["waitress.client_disconnected"].__self__.adj.asyncore_use_poll:
            limit = min(limit, _SELECT_LIMIT)
    # A file gets the lowest number that is free, so about as many descriptors are open. If none is
    # free, open() fails, which is the same answer.
    with contextlib.suppress(OSError), open(os.devnull) as lowest_free:
        if lowest_free.fileno() < 0.9 * limit:
            return
    given = "fewer (see ulimit -n, and with waitress --asyncore-use-poll)"
    raise bouncer._refused("a tenth of the descriptors to be free", given)


# =================================================================================================
# What happens to all rooms when the process forks, and when it ends.


def _begin_in_child() -> None:
    for greenlet in list(_greenlets):  # greenlets survive a fork; threads do not
        greenlet.kill(block=False)
    for hub in _hubs:
        hub.close_in_child()
    for started in (_greenlets, _hubs, _running, _process):
        started.clear()
    for bouncer in list(_bouncers):
        bouncer._begin_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


@atexit.register
def _end_at_exit() -> None:
    # `_generators` too. Generators that read a subscription of another bouncer end with that.
    for bouncer in list(_bouncers):
        bouncer.close()
    for callbacks in list(_process.values()):
        # The last call of all. `_process` is empty when everything that was due has been called.
        callbacks.due.put(_process.clear)
    limits = (_running, _GENERATOR_EXIT_TIME), (_hubs, _PATIENCE), (_process, _PATIENCE)
    for running, seconds in limits:
        until = time.monotonic() + seconds
        while running and time.monotonic() < until:
            time.sleep(_POLL_INTERVAL)
