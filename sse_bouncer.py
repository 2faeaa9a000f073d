"""Server-sent events for Flask, in one file, with no dependencies.

    from flask import Flask, request
    from sse_bouncer import EventBouncer

    app = Flask(__name__)
    bouncer = EventBouncer()

    @app.get("/subscribe")
    def subscribe():
        return bouncer.stream()

    @app.post("/publish")
    def publish():
        bouncer.broadcast(request.get_data())
        return {}

The file is a house with five rooms. Each uses only the rooms above it, so a reader can stop at
any banner and has a whole:

    1. WIRE FORMAT  text in, frame out: ``format_sse``, ``Frame``
    2. RELAY        events between processes and machines: ``RedisRelay``
    3. FAN-OUT      every frame to every subscriber: ``EventBouncer``, ``Subscription``
    4. HUB          one thread for all streams, so that none holds a worker
    5. RESPONSE     a stream as a Flask response: ``sse_response``

Everything public may be called from any thread or greenlet, in or out of a request, from a signal
handler or a finaliser; what goes to a relay, as far as that may be. Times are in seconds, except
``retry``, which bears the name of a field on the wire and so has its unit, milliseconds. "The
standard" is the WHATWG's HTML, section 9.2:
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = [
    "EventBouncer",
    "Frame",
    "RedisRelay",
    "Subscription",
    "format_sse",
    "sse_response",
]

import atexit
import contextlib
import errno
import functools
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.utils import formatdate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from flask import Flask, Response

logger = logging.getLogger("sse_bouncer")
_said: set[str] = set()


def _warn(message: str, *args: object, traceback: bool = False) -> None:
    """Log a warning, or with the traceback an error.

    A handler that raises has its own trouble: it shall end no stream, and no thread.
    """
    try:
        level = logging.ERROR if traceback else logging.WARNING
        logger.log(level, message, *args, exc_info=traceback)
    except Exception:
        pass


def _warn_once(about: str, message: str) -> None:
    """Log a warning, but each of its kind only once in the life of the process."""
    if about not in _said:
        _said.add(about)
        _warn(message)


def _shown(value: object) -> str:
    """Return what a message shows of a value: something short, whatever its own repr() does."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"<{type(value).__name__}, whose repr() fails>"


def _whole_number(name: str, value: object, least: int) -> int:
    """Return ``value`` if it is an int of at least ``least``; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number >= {least}, got {_shown(value)}")
    if value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {_shown(value)}")
    return value


@functools.cache
def _in_children(do: Callable[[], None]) -> None:
    """Have this done in every process that is forked from now on; told twice, it is done once."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=do)


# =================================================================================================
# 1. WIRE FORMAT
#
# Text in, frame out. What leaves this room is valid by construction: a Frame can be encoded and
# ends in a blank line, so no later room has to check, and nothing can fail in the middle of
# somebody's stream. No lock, no clock, no socket in here; of Flask only its JSON settings, where
# the app has brought them along.
# =================================================================================================

# "Lines must be separated by either a U+000D CARRIAGE RETURN U+000A LINE FEED (CRLF) character
# pair, a single U+000A LINE FEED (LF) character, or a single U+000D CARRIAGE RETURN (CR)
# character." (9.2.5) str.splitlines() splits at eight others too, and loses a trailing line end.
_LINE_END = re.compile(r"\r\n|\n|\r")
_FORMATTED = re.compile(r"(?:data|event|id|retry):")
_ID_LINE = re.compile(r"(?:^|[\r\n])id(?:[:\r\n])")
# A comment without a blank line after it: several clients that have seen an id once make an empty
# event of each blank line.
_HEARTBEAT = b":\n"


class Frame(str):
    """Text that already is in the wire format, as ``markupsafe.Markup`` is text that is HTML.

    `format_sse` returns one; it and `EventBouncer.broadcast` pass one through unchanged and
    format everything else, so a frame is never formatted twice and a user's text is never taken
    for protocol. Call ``Frame(text)`` only for protocol that you have written yourself: one event,
    as with a history it gets one id.

    :raises TypeError: if it is not given text.
    :raises ValueError: if the text does not end in a blank line, which would run it into the next
        frame, or holds a lone surrogate, which has no UTF-8.
    """

    __slots__ = ("_wire",)
    _wire: bytes  # encoded once, here, however many subscribers it reaches

    def __new__(cls, text: str) -> Frame:
        if isinstance(text, Frame):
            return text
        if not isinstance(text, str):
            raise TypeError(
                f"frame: expected text, got {_shown(text)}; use format_sse(...) for data"
            )
        wire = _utf8("frame", text)
        if not _LINE_END.sub("\n", text[-4:]).endswith("\n\n"):
            raise ValueError(
                f"frame: expected text that ends in a blank line, got {_shown(text)}; "
                "use format_sse(...) for data, or end it in two newlines"
            )
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

    =================== ========================== ======================
    given               sent                       what a client receives
    =================== ========================== ======================
    ``"hi"``            ``data: hi\n\n``           ``hi``
    ``"hi", "greet"``   ``event: greet\ndata: hi`` ``hi``, as a ``greet``
    ``"a\r\nb"``        ``data: a\ndata: b\n\n``   ``a\nb``
    ``""``              ``data: \n\n``             an event with no text
    ``{"n": 1}``        ``data: {"n": 1}\n\n``     JSON text
    =================== ========================== ======================

    Clients join lines with LF, whichever line ends were sent; to keep a CR, send JSON.

    :param data: Text, or bytes in UTF-8, as it is; a `Frame`, unchanged; any other object as JSON,
        by the app's own JSON provider where a Flask app context is active, without NaN and
        Infinity. None, the default, sends no data: the client then dispatches no event.
    :param event: The event's name. None or ``""``, the default, is what a client calls
        ``message``. No CR, LF or NUL.
    :param id: What the client sends back as ``Last-Event-ID`` when it reconnects. ``""`` makes it
        forget the last one; None, the default, leaves that as it is. No CR, LF or NUL.
    :param retry: Milliseconds that the client waits before it reconnects, from now on. 0 is at
        once; None, the default, leaves that as it is.
    :param comment: Text that clients ignore, for a person who reads the stream.
    :raises TypeError: if an argument is of the wrong type, or is not something JSON can hold.
    :raises ValueError: if a text breaks its field's rule or has no UTF-8, or nothing is given.
    """
    return _format(data, event, id, retry, comment, _json_dumps())


def _format(
    data: object,
    event: str | None,
    id: str | int | None,
    retry: int | None,
    comment: str | None,
    dumps: Callable[..., str],
) -> Frame:
    if isinstance(data, Frame):
        if any(field is not None for field in (event, id, retry, comment)):
            raise ValueError(
                f"data: expected no Frame beside event, id, retry or comment, got {_shown(data)}; "
                "give them to the format_sse(...) that makes the frame"
            )
        return data
    lines = []
    if comment is not None:
        lines += [": " + line for line in _LINE_END.split(_text("comment", comment))]
    # str methods, and no f-strings: they take the text of a StrEnum and the like, not its name.
    if event is not None and _one_line("event", event):
        lines.append("event: " + event)
    if id is not None:
        number = isinstance(id, int) and not isinstance(id, bool)
        lines.append("id: " + (_digits("id", id) if number else _one_line("id", id)))
    if retry is not None:
        # "If the field value consists of only ASCII digits" (9.2.6): no sign, point or exponent.
        lines.append("retry: " + _digits("retry", _whole_number("retry", retry, 0)))
    if data is not None:
        # Always one space: "If value starts with a U+0020 SPACE character, remove it from value."
        # (9.2.6) So data that itself begins with a space keeps it.
        lines += ["data: " + line for line in _LINE_END.split(_data_text(data, dumps))]
    if not lines:
        raise ValueError(
            f"data: expected something to send, got {data!r} and no other field; "
            'use "" for an event without text'
        )
    return Frame("\n".join(lines) + "\n\n")


def _numbered(frame: Frame, id: str) -> Frame:
    """Return the frame with an id.

    :raises ValueError: if it has one already.
    """
    if _ID_LINE.search(frame):
        raise ValueError(
            f"id: expected none, as the bouncer gives each event its own, "
            f"got {_shown(str(frame))}; leave it out, or make the bouncer without history and relay"
        )
    return Frame(f"id: {id}\n" + frame)


def _digits(name: str, number: Any) -> str:
    try:
        return str(int(number))
    except ValueError:  # Python does not even write one out that is so long
        raise ValueError(
            f"{name}: expected a number of fewer digits, got {_shown(number)}"
        ) from None


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}: expected text that UTF-8 can hold, got a lone surrogate in {_shown(text)}; "
            "replace it, for example by text.encode(errors='replace')"
        ) from None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {_shown(value)}; use str(...)")
    _utf8(name, value)
    return value


def _one_line(name: str, value: object) -> str:
    """Return text for a field that ends at the line's end: no text may begin a field of its own."""
    text = _text(name, value)
    # A NUL in an id makes a client ignore the field (9.2.6); in an event's name it is never meant.
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(f"{name}: expected text without CR, LF or NUL, got {_shown(text)}")
    return text


def _channel_name(channel: object) -> str:
    if not isinstance(channel, str):
        raise TypeError(f"channel: expected a name, got {_shown(channel)}; use str(...)")
    if not channel:
        raise ValueError(f"channel: expected a name that is not empty, got {channel!r}")
    _utf8("channel", channel)
    # Its text, if it is a member of an enumeration: some of those hash by their names.
    return str.__str__(channel)


def _data_text(data: object, dumps: Callable[..., str]) -> str:
    if isinstance(data, str):
        if data.endswith(("\n\n", "\r\n\r\n")) and _FORMATTED.match(data):
            _warn_once(
                "formatted",
                f"sent as data, though it looks formatted by hand: {_shown(str(data))}; "
                "use format_sse(...), or Frame(text) for protocol that you write yourself",
            )
        return _text("data", data)
    if isinstance(data, bytes | bytearray | memoryview):
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: expected bytes in UTF-8, got {_shown(data)} ({error.reason}); "
                "decode it with its own encoding, or send base64"
            ) from None
    try:
        return dumps(data, allow_nan=False)  # JSON.parse() refuses NaN and Infinity
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"data: expected text, bytes or what JSON can hold, got {_shown(data)} ({error}); "
            "convert it first"
        ) from error


def _json_dumps() -> Callable[..., str]:
    """Return the JSON encoder of the active Flask app, or the standard library's."""
    flask = sys.modules.get("flask")  # not imported by anyone: then no app can be active
    if flask is not None and flask.has_app_context():
        dumps: Callable[..., str] = flask.current_app.json.dumps
        return dumps
    return json.dumps


_GAP = format_sse("", "gap")


# =================================================================================================
# 2. RELAY
#
# Events between processes and machines. One entry per event; its id is the event's id, so all
# processes agree on ids and order, and a client may come back to any of them. No HTTP in here, and
# no redis: its client is the user's own.
# =================================================================================================

# Entries that are read at once.
_AT_ONCE = 1_000

_Id = tuple[int, int]  # of an event: milliseconds, and a sequence number within them
_NO_ID: _Id = (0, 0)  # before all others; also that of an event which has none
# A header is any stranger's text, and int() alone reads much more than this: "１", and "1_0".
_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})", re.ASCII)


def _parse_id(text: str | None) -> _Id | None:
    match = _ID.fullmatch(text or "")
    return (int(match[1]), int(match[2])) if match else None


def _id_text(id: _Id) -> str:
    return f"{id[0]}-{id[1]}"


def _before(id: _Id) -> _Id:
    """Return the id right before another."""
    return (id[0], id[1] - 1) if id[1] else (id[0] - 1, 2**64 - 1)


_Entry = tuple[str, str | None, str | None]  # of a relay: id, channel or None, frame or None


class Relay(Protocol):
    """What carries events between processes. `RedisRelay` is one; any object with these serves.

    An entry is a tuple of id, channel (None is to all) and frame, all text. Without a frame (None)
    it ends the streams of its channel, and without either it means nothing. Ids have the form
    ``<milliseconds>-<sequence>``, and increase. Each method may raise whatever it likes: from
    `publish` it goes to the caller of `EventBouncer.broadcast` or `EventBouncer.close`; around the
    others there is a thread, one per process, that logs it and tries again.
    """

    def publish(self, channel: str | None, frame: str | None) -> object:
        """Add an entry, for every process, this one included. Called from any thread."""

    def recent(self, count: int) -> tuple[str, Sequence[_Entry]]:
        """Return an id, and all entries after it, oldest first, at most the newest ``count``.

        ``"0-0"`` is the id before all entries, if none has ever been lost.
        """

    def read(self, after: str, timeout: float) -> tuple[bool, Sequence[_Entry]]:
        """Wait for entries after an id, at most ``timeout`` seconds, and return some, oldest first.

        The bool says whether nothing between the id and them has been lost. A loss is told once.
        """


class RedisRelay:
    """A `Relay` over a Redis stream: Redis 6.2 or later, Valkey, or a cluster of them.

        bouncer = EventBouncer(
            history=1000, relay=RedisRelay(redis.Redis.from_url("redis://localhost"))
        )

    `publish` is one XADD. Reading takes one connection per process, however many subscribers.

    When Redis goes away, streams stay open with their heartbeats and `EventBouncer.broadcast`
    raises the client's own error; how soon is for the client's timeouts and retries to say. When
    it is back, all that it kept is delivered once, in order. Where it may have lost something (its
    stream was trimmed or deleted, or is an older copy), every stream gets an event named ``gap``.

    :param client: A ``redis.Redis`` or ``redis.RedisCluster``, or one with the same methods. With
        or without ``decode_responses``.
    :param key: The stream's key; all processes of an app have the same. The default is ``sse``.
    :param maxlen: About how many events Redis keeps, at least 1. The default is 10,000.
    :raises TypeError: if an argument is of the wrong type.
    :raises ValueError: if one is out of range.
    """

    def __init__(self, client: Any, key: str = "sse", maxlen: int = 10_000) -> None:
        if not hasattr(client, "xadd"):
            raise TypeError(
                f"client: expected a Redis client, got {_shown(client)}; "
                "use redis.Redis.from_url(...)"
            )
        if not _text("key", key):
            raise ValueError(f"key: expected a name that is not empty, got {key!r}")
        self.key = key
        self.maxlen = _whole_number("maxlen", maxlen, 1)
        self._client = client
        self._instead: dict[str, str] = {}  # of an id after which some was lost: where to go on
        self._once: dict[str, str] = {}  # the tokens of entries that were read last, and their ids

    def publish(self, channel: str | None, frame: str | None) -> None:
        """Add an entry. See `Relay`."""
        # A client that got no answer tries again, though Redis may have the entry already. The
        # readers know the second one by its token.
        fields: dict[str, str | bytes] = {"once": os.urandom(9).hex()}
        if frame is None:
            fields["end"] = ""
        else:
            fields["frame"] = frame.encode()
        if channel is not None:
            fields["channel"] = channel.encode()
        self._client.xadd(self.key, fields, maxlen=self.maxlen, approximate=True)

    def recent(self, count: int) -> tuple[str, list[_Entry]]:
        """Return the newest entries, and the id after which they are all. See `Relay`."""
        entries = self._entries(self._found("XREVRANGE", "+", "-", count + 1)[::-1])
        if len(entries) > count:
            return entries[0][0], entries[1:]
        first = _parse_id(entries[0][0]) if entries else None
        if first is None or self._was_never_trimmed():
            return "0-0", entries
        return _id_text(_before(first)), entries

    def read(self, after: str, timeout: float) -> tuple[bool, list[_Entry]]:
        """Wait for entries. See `Relay`."""
        start = self._instead.get(after, after)
        whole, found = self._beyond(start)
        if whole and not found:
            self._wait(start, timeout)
            whole, found = self._beyond(start)
        if not whole:
            # Somebody has trimmed the stream, or deleted it, or Redis has begun anew: empty, or
            # with less than it had.
            if self._is_another(after):
                start = self._newest_known()
                _, found = self._beyond(start)
            else:
                start = f"({after}"
            self._instead = {after: start}
        if found:  # on from there; an entry of a stream begun anew may yet get that very id
            self._instead = {}
        return whole, self._entries(found)

    def _beyond(self, start: str) -> tuple[bool, list[Any]]:
        """Return what comes after an id, and whether none of that is missing.

        Trimming begins at the oldest: as long as the entry that was read last is there, so are all
        after it; that very entry, as one of a stream begun anew may have its id. Where it is known
        to be gone, "(" before its id means not to look for it.
        """
        if start == "0-0":
            found = self._found("XRANGE", "-", "+", _AT_ONCE)
            return not found or self._was_never_trimmed(), found
        found = self._found("XRANGE", start, "+", _AT_ONCE + 1)
        if start.startswith("("):
            return bool(found) or not self._is_another(start[1:]), found
        whole = bool(found) and _decoded(found[0][0]) == start and self._is_known(found[0])
        return whole, found[1:] if whole else found

    def _wait(self, start: str, timeout: float) -> None:
        block = max(1, int(1000 * min(timeout, self._longest_wait())))  # 0 would be for ever
        try:
            self._client.xread({self.key: start.removeprefix("(")}, count=1, block=block)
        except UnicodeDecodeError:
            pass  # there is something, and that is all there was to know

    def _was_never_trimmed(self) -> bool:
        info = self._info()
        # Redis 6.2 does not count, and is believed to have all.
        return bool(info.get("entries-added", info["length"]) == info["length"])

    def _is_another(self, after: str) -> bool:
        """Return whether the stream is not the one in which that id was the newest."""
        if not self._client.exists(self.key):
            return True
        newest = _parse_id(_decoded(self._info()["last-generated-id"]))
        return (newest or _NO_ID) < (_parse_id(after) or _NO_ID)

    def _newest_known(self) -> str:
        """Return the newest entry of the stream that has been read already; "0-0" if none has."""
        newest_first = self._found("XREVRANGE", "+", "-", _AT_ONCE)
        return next((_decoded(entry[0]) for entry in newest_first if self._is_known(entry)), "0-0")

    def _is_known(self, entry: tuple[Any, dict[Any, Any]]) -> bool:
        return _token(*entry) in self._once

    def _info(self) -> dict[str, Any]:
        # It holds entries too: see _found().
        command = "XINFO STREAM", self.key
        info: dict[str, Any] = self._client.execute_command(*command, NEVER_DECODE=True)
        return info

    def _found(self, command: str, start: str, end: str, count: int) -> list[Any]:
        # A client that decodes would stop for good at one entry, of anyone's, that is not UTF-8.
        arguments = command, self.key, start, end, "COUNT", count
        found: list[Any] = self._client.execute_command(*arguments, NEVER_DECODE=True)
        return found

    def _longest_wait(self) -> float:
        """Return seconds that the client waits for an answer before it takes Redis for gone."""
        pool = getattr(self._client, "connection_pool", None)
        cluster = getattr(self._client, "nodes_manager", None)
        options = getattr(pool or cluster, "connection_kwargs", {})
        return (options.get("socket_timeout") or math.inf) / 2

    def _entries(self, found: Iterable[tuple[Any, dict[Any, Any]]]) -> list[_Entry]:
        entries: list[_Entry] = []
        for raw_id, raw in found:
            id, token = _decoded(raw_id), _token(raw_id, raw)
            fields = {_decoded(name): _decoded(value) for name, value in raw.items()}
            if self._once.setdefault(token, id) != id:
                entries.append((id, None, None))  # the second of two, not the first one read again
                continue
            if len(self._once) > _AT_ONCE:
                del self._once[next(iter(self._once))]
            no_frame = None if "end" in fields else ""
            entries.append((id, fields.get("channel"), fields.get("frame", no_frame)))
        return entries


def _token(id: Any, fields: dict[Any, Any]) -> str:
    """Return what tells an entry from all others; one that was sent twice has the same twice."""
    return _decoded(fields.get(b"once", fields.get("once", id)))


def _decoded(value: Any) -> str:
    """Return text, whether the client decodes or not; bytes that are no UTF-8 no frame takes."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


# =================================================================================================
# 3. FAN-OUT
#
# Every frame to every subscriber, in one order, through a bounded queue for each. Nobody waits for
# a slow reader: who falls behind is dropped, keeps what it holds, and is told by its stream's end.
# With a history it comes back and gets what it missed. No HTTP and no socket in here.
# =================================================================================================

# How long a broadcast waits for readers whose queues are full, once for all of them. A thread or
# greenlet that reads a queue runs only when the publisher lets it: without this pause a route that
# broadcasts in a loop would drop readers that have done nothing wrong.
_MOMENT = 0.05
# How long one reader may hold broadcasts up in all before it has caught up again. Without this
# bound a client that always reads one frame per moment would slow every publisher down for ever.
_PATIENCE = 1.0
# Milliseconds by which an id may seem to come from the future: clocks of machines differ.
_SKEW = 60_000
# Seconds between attempts to reach a relay that is away: twice as long each time, up to a second.
_FIRST_PAUSE = 0.05
_LAST_PAUSE = 1.0
# Seconds that a subscriber waits for the relay to tell what there was before.
_FILL_WAIT = 1.0
# How long a relay is asked to wait for events. Below the 5 seconds after which redis-py takes a
# silent connection for a broken one.
_RELAY_WAIT = 2.0


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


class _Event(NamedTuple):
    id: _Id  # _NO_ID without a history
    channel: str | None
    frame: Frame


class _End(NamedTuple):
    id: _Id
    channel: str  # whose streams are to end


class _History:
    """The newest events, in order: of those after ``floor``, up to ``newest``, none is missing."""

    def __init__(self, most: int, after: _Id) -> None:
        self._events: deque[_Event] = deque(maxlen=most)
        self.begin(after)

    def begin(self, after: _Id, events: Iterable[_Event] = ()) -> None:
        """Forget what there was, and begin with these."""
        self._events.clear()
        self.hole = False  # whether events are missing between ``newest`` and the next to come
        self.floor = self.newest = after
        for event in events:
            self.keep(event)

    def keep(self, event: _Event) -> None:
        if self.hole or event.id <= self.newest:
            self.lose(event.id)  # a relay that has begun anew may have a clock that is behind
        if len(self._events) == self._events.maxlen:
            oldest = self._events[0].id if self._events else event.id
            self.floor = max(self.floor, oldest)
        self._events.append(event)
        self.newest = event.id

    def lose(self, first: _Id | None) -> None:
        """Begin anew with the ``first`` event after some that are missing; None is the next."""
        self.begin(self.newest if first is None else _before(first))
        self.hole = first is None

    def next_id(self) -> _Id:
        # Also when the clock is stepped back: then on from the newest.
        return max((_milliseconds(), 0), (self.newest[0], self.newest[1] + 1))

    def is_whole_after(self, id: _Id) -> bool:
        """Return whether nothing is missing of what came after an id."""
        if self.floor == _NO_ID < id and self._events and id < self._events[0].id:
            return False  # the relay's stream is whole, but this id is of another: one deleted
        return self.floor <= id <= self.newest and not self.hole

    def after(self, id: _Id) -> list[_Event]:
        """Return what is kept of what came after an id; all, if it is of nothing known here."""
        if id > self.newest:
            return list(self._events)
        newest_first = itertools.takewhile(lambda event: event.id > id, reversed(self._events))
        return list(newest_first)[::-1]


class _Outlet(Protocol):
    """What sends to detached streams, in the order in which it is told. The hub's, in room 4."""

    def attach(self, subscription: Subscription, connection: Any, held: Iterable[bytes]) -> Any:
        """Take on a stream, with what it has to send first; return the stream."""

    def send(self, event: _Event) -> None:
        """Send an event to all streams that are to have it."""

    def end(self, stream: Any) -> None:
        """Send what is held for a stream, and the end."""

    def hold_back(self) -> None:
        """Let a publisher wait while it is far ahead. The only one to be called without a lock."""


class Subscription:
    """A bounded queue of frames, with the reading half of ``queue.Queue``.

    Made by `EventBouncer.subscribe`. Iterating yields frames until the subscription ends; as a
    context manager it is unsubscribed when the block is left. One that nobody refers to any more
    is unsubscribed too, so a generator that is closed in the middle leaves nothing behind.

    It ends when it is dropped (its reader fell more than ``maxsize`` frames behind), by
    `EventBouncer.close` and by `EventBouncer.unsubscribe`. A blocked reader then wakes at once,
    what is held is still delivered, and after that `get` raises `Subscription.Ended` and iterating
    stops.
    """

    __slots__ = (
        "__weakref__",
        "_bouncer",
        "_ended",
        "_frames",
        "_ready",
        "_replay",
        "_seen",
        "_since",
        "_waited",
        "channels",
        "gap",
    )

    class Ended(BrokenPipeError):
        """Raised by `get` when the subscription has ended and what it held has been read.

        To a server an EPIPE means that the client has left, so a hand-written view that lets
        this one through ends its stream without a traceback.
        """

        def __init__(self, why: str) -> None:
            super().__init__(errno.EPIPE, f"this subscription has ended: {why}")

    def __init__(self, bouncer: EventBouncer, channels: tuple[str, ...]) -> None:
        self.channels = channels
        self._bouncer = bouncer
        # All below is guarded by the bouncer's lock.
        self._frames: deque[Frame] = deque()
        self._ended: str | None = None  # why
        self._ready: threading.Condition | None = None  # made for the first reader that waits
        self._waited = 0.0  # seconds that broadcasts have waited since the queue was last empty
        self._replay = 0  # how many of the frames are what it came to fetch, and do not count
        self._since: _Id | None = None  # where it begins, if its client does not know
        self._seen: _Id | None = None  # an id that it has seen and this process not yet
        #: Whether it missed events that are kept no more, between ``last_event_id`` and its first
        #: frame. A page should then load its state again.
        self.gap = False

    @property
    def maxsize(self) -> int:
        """How many frames it holds at most."""
        return self._bouncer.maxsize

    def get(self, block: bool = True, timeout: float | None = None) -> Frame:
        """Remove and return the next frame.

        :param block: Whether to wait for one. False is as ``timeout=0``.
        :param timeout: How long to wait, in seconds. None, the default, is until there is a frame
            or the subscription ends; 0 is not at all.
        :raises queue.Empty: if there is none in time.
        :raises Subscription.Ended: if there is none and none will come.
        :raises ValueError: if ``timeout`` is negative.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: expected seconds >= 0 or None, got {timeout!r}")
        with self._bouncer._lock:
            if block and not self._frames and self._ended is None:
                self._wait(timeout)
            if self._frames:
                return self._take()
            if self._ended is not None:
                raise self.Ended(self._ended)
            raise queue.Empty

    def get_nowait(self) -> Frame:
        """Remove and return the next frame without waiting; see `get`."""
        return self.get(block=False)

    def qsize(self) -> int:
        """Return how many frames are held; by the time you look it may be another number."""
        return len(self._frames)

    def empty(self) -> bool:
        """Return whether no frame is held; by the time you look one may be."""
        return not self._frames

    def full(self) -> bool:
        """Return whether the next broadcast would find no room, unless a frame is read first."""
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

    def __repr__(self) -> str:
        state = self._ended or f"{self.qsize()}/{self.maxsize} frames held"
        return f"<Subscription {', '.join(map(repr, self.channels)) or 'to all'}: {state}>"

    # These are only called with the bouncer's lock held.

    def _wait(self, timeout: float | None) -> None:
        if self._ready is None:
            self._ready = threading.Condition(self._bouncer._lock)
        if timeout is not None:
            timeout = min(timeout, threading.TIMEOUT_MAX)
        self._ready.wait_for(lambda: self._frames or self._ended is not None, timeout)

    def _take(self) -> Frame:
        frame = self._frames.popleft()
        if self._replay:
            self._replay -= 1
        if not self._frames:
            self._waited = 0.0
            self._bouncer._caught_up(self)
        return frame

    def _wants(self, id: _Id) -> bool:
        if self._seen is not None and id != _NO_ID:
            if id <= self._seen:
                return False
            self._seen = None
        return self._ended is None

    def _offer(self, event: _Event) -> bool:
        """Queue a frame, and return whether there was room; one that is not wanted needs none."""
        if self._wants(event.id):
            if self.full():
                return False
            self._frames.append(event.frame)
            self._wake()
        return True

    def _end(self, why: str) -> None:
        if self._ended is None:
            self._ended = why
            self._wake()
            self._bouncer._caught_up(self)

    def _wake(self) -> None:
        if self._ready is not None:
            self._ready.notify_all()


class EventBouncer:
    """Lets subscribers in, and sends what is broadcast to all of them.

    Make one per app, at import; nothing starts until it is used.

    :param maxsize: How many frames a subscriber may fall behind before it is dropped, at least 1.
        The default, 16, is a burst; a page that has fallen further behind is better served by
        reconnecting.
    :param history: How many events to keep, for clients that come back: they get what they missed,
        in order, and then the live stream, without a gap or a repeat between the two. The bouncer
        then gives every event an id, which increases also across restarts. 0, the default, keeps
        none.
    :param heartbeat: Seconds of silence after which a stream sends a comment, so that proxies keep
        it open and a client that left is noticed. Above 0; None sends none. The default, 15, is
        what the standard advises (9.2.7).
    :param retry: What each stream tells its client at the start: milliseconds to wait before it
        reconnects, or a pair of them, of which each client gets a random value between, so that
        not all come back in one instant after a restart. 0 is at once. None, the default, leaves
        it to the browser, which waits a few seconds.
    :param max_subscribers: How many there may be at a time, at least 1. None, the default, is as
        many as the process can hold.
    :param relay: What carries events between processes and machines, a `RedisRelay` or any object
        with the same three methods (see `Relay`). None, the default, keeps to this process.
    :param detach: Whether streams are taken over from the server, where it hands out its
        connections, so that none holds a worker. True, the default, is right unless something
        between the app and the server has to see every event.
    :raises TypeError: if an argument is of the wrong type.
    :raises ValueError: if one is out of range. Nothing here is unbounded, so 0 is no maxsize.
    """

    class Refused(RuntimeError):
        """Raised by `subscribe` when nobody can be let in.

        There are ``max_subscribers`` already, or all was closed, or someone comes back while the
        relay, from which this process has yet to learn what there was, is away.
        """

    def __init__(
        self,
        maxsize: int = 16,
        *,
        history: int = 0,
        heartbeat: float | None = 15.0,
        retry: int | tuple[int, int] | None = None,
        max_subscribers: int | None = None,
        relay: Relay | None = None,
        detach: bool = True,
    ) -> None:
        self.maxsize = _whole_number("maxsize", maxsize, 1)
        self.history = _whole_number("history", history, 0)
        self.heartbeat = None if heartbeat is None else _seconds("heartbeat", heartbeat)
        self.retry = None if retry is None else _retry_range(retry)
        self.max_subscribers = max_subscribers
        if max_subscribers is not None:
            _whole_number("max_subscribers", max_subscribers, 1)
        if not isinstance(detach, bool):
            raise TypeError(f"detach: expected True or False, got {_shown(detach)}")
        self.detach = detach
        if relay is not None and not all(hasattr(relay, m) for m in ("publish", "recent", "read")):
            raise TypeError(
                f"relay: expected an object with publish, recent and read, got {_shown(relay)}; "
                "RedisRelay(client) is one"
            )
        self.relay = relay
        # Those with a reader. Keys are weak: a subscription belongs to who reads it.
        self._readers: dict[weakref.ref[Subscription], tuple[str, ...]] = {}
        self._channels: dict[str, dict[weakref.ref[Subscription], None]] = {}
        # Those without, and what their streams are called in the outlet.
        self._detached: dict[Subscription, Any] = {}
        self._outlet: _Outlet | None = None  # made for the first that is detached
        # A finaliser runs at any moment, in any thread, maybe one that holds locks of its own; it
        # therefore takes none here, and only leaves a note. _sweep() reads them.
        self._gone: deque[weakref.ref[Subscription]] = deque()
        self._late: set[Subscription] = set()  # those that a broadcast is waiting for
        self._closed = False
        self._counts = {"broadcasts": 0, "dropped": 0, "refused": 0}
        self._born = _milliseconds()
        # No id given here is below the time at which the process began; a relay's are its own.
        self._history = _History(self.history, (self._born, 0) if relay is None else _NO_ID)
        self._reader: _Reader | None = None  # of the relay, once somebody has subscribed
        self._make_locks()
        _bouncers.add(self)
        _in_children(_begin_anew)

    def _make_locks(self) -> None:
        # _lock guards everything mutable in the bouncer and its subscriptions. It is held for a
        # few dict and deque operations, never while something blocks, logs or runs code
        # of the user's. It is reentrant because a signal handler may close() while the very
        # thread that it interrupted is in here: whatever loops under it loops over a copy, and
        # whatever decides looks again after it has acted. There is no second lock, so no order of
        # locks to keep.
        self._lock = threading.RLock()
        # A frame reaches all subscribers before the next reaches any, so all see one order, and
        # nobody comes in between. The thread that sees to that has its _turn, also while it waits
        # for room, without the lock. _changed is told when that is over, and when there is room.
        self._turn: int | None = None
        self._acts: deque[Callable[[], None]] = deque()  # what is to be done in turn
        self._changed = threading.Condition(self._lock)

    def subscribe(self, *channels: str, last_event_id: str | None = None) -> Subscription:
        """Subscribe to what is broadcast without a channel, and to these channels.

        It holds from now on: what is broadcast before a response starts is not missed.

        :param channels: Names, none of them empty. Who may read which is for the route to decide.
        :param last_event_id: The id that the client saw last; what it missed since comes first.
            None, the default, and a text that is no event's id begin with the live stream. Without
            a history it has no effect.
        :raises EventBouncer.Refused: if nobody can be let in.
        :raises TypeError: if a name or the id is not text.
        """
        subscription = Subscription(self, tuple(dict.fromkeys(map(_channel_name, channels))))
        if not isinstance(last_event_id, str | None):
            raise TypeError(f"last_event_id: expected text or None, got {_shown(last_event_id)}")
        self._start_reader()
        last = _parse_id(last_event_id)
        # In turn: what a signal handler, or a finaliser, broadcasts between the catching up and
        # the entering would otherwise be missed.
        with self._lock, self._my_turn():
            self._sweep()
            self._admit(resuming=last is not None)
            self._catch_up(subscription, last)
            self._enter(subscription)
            # A signal handler may have closed all between _admit() and here.
            if self._closed:
                self._remove(subscription, "closed")
        _release_if_view_fails(subscription)  # a door to room 5
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

        It returns when all have it in their queues. A subscriber whose queue is full is waited
        for, for a moment (about 0.05 seconds, once for all), and then dropped. Detached streams
        are not waited for; only if their hub is 64 KiB of frames behind, a broadcast waits until
        it has taken them.

        With a relay it returns when the relay has it, and if that fails raises what the relay
        raises; nothing has been sent then, as far as the relay can tell.

        :param msg: A `Frame`, or data as `format_sse` takes it.
        :param event: The event's name; see `format_sse`.
        :param channel: Whom to send it to. None, the default, is everyone.
        :param id: See `format_sse`. With a history or a relay the bouncer gives the ids.
        :param retry: See `format_sse`; milliseconds.
        :raises TypeError: as `format_sse` does; nothing is sent.
        :raises ValueError: as `format_sse` does; nothing is sent.
        """
        frame = format_sse(msg, event, id=id, retry=retry)
        if channel is not None:
            channel = _channel_name(channel)
        if self._numbers:
            _numbered(frame, "0-0")  # raises now, if it has an id of its own
        if self.relay is not None:
            self.relay.publish(channel, str(frame))
        else:
            self._in_turn(lambda: self._send(frame, channel))

    def stream(self, *channels: str, last_event_id: str | None = None) -> Response:
        """Return a Flask response that streams to one new subscriber. The one-liner for a route.

        A client that cannot be let in (see `EventBouncer.Refused`) is answered 200, a ``retry``
        and the end, so that it comes back: any other status makes an EventSource give up for good
        (9.2.3). HEAD is answered with the headers, and subscribes nobody.

        :param channels: See `subscribe`.
        :param last_event_id: The id that the client saw last, if its ``Last-Event-ID`` header does
            not tell a newer one: an id in a page's URL stays there each time that it reconnects.
            None, the default, leaves it to the header.
        """
        return _stream(self, channels, last_event_id)  # the door to room 5

    def unsubscribe(self, subscription: Subscription) -> None:
        """End one subscription; what it holds is still delivered. Twice is as good as once.

        :raises TypeError: if it is not a `Subscription`.
        :raises ValueError: if it is another bouncer's.
        """
        if not isinstance(subscription, Subscription):
            raise TypeError(f"subscription: expected a Subscription, got {_shown(subscription)}")
        if subscription._bouncer is not self:
            raise ValueError(
                f"subscription: expected one of this bouncer's, got another's, {subscription!r}"
            )
        with self._lock:
            self._remove(subscription, "unsubscribed")

    def close(self, *channels: str) -> None:
        """End the streams of these channels, or of all, and then let nobody in any more.

        A user has logged out: ``bouncer.close(f"user-{user.id}")`` ends the streams that have that
        channel among theirs, and new ones may come. With a relay it ends those of all processes; if
        that fails, those of this one, and raises what the relay raises.

        Without arguments every stream of this process ends, later subscribers are refused, and a
        later `broadcast` reaches nobody here. What subscribers hold is still delivered.
        """
        names = tuple(map(_channel_name, channels))
        if not names or self.relay is None:
            self._close(names)
            return
        # By way of the relay here too: what was broadcast before arrives before the end.
        try:
            for name in names:
                self.relay.publish(name, None)
        except BaseException:
            self._close(names)
            raise

    @property
    def subscribers(self) -> tuple[Subscription, ...]:
        """Those subscribed at this moment."""
        with self._lock:
            self._sweep()
            return (*self._detached, *self._audience(None))

    @property
    def last_event_id(self) -> str | None:
        """The newest event's id, or where ids begin if there is none yet; None without a history.

        A page takes this, renders its state, and puts it into the URL of its EventSource, and the
        route passes it on to `stream`: so nothing falls between rendering and connecting.
        """
        self._start_reader()
        return _id_text(self._history.newest) if self._numbers else None

    def stats(self) -> dict[str, int]:
        """Count what there is and what there was: whole numbers, for this process.

        ``subscribers`` now; ``detached``, those of them whose stream holds no worker; since the
        bouncer was made ``broadcasts``, the events that have reached it, ``dropped`` and
        ``refused``.
        """
        with self._lock:
            self._sweep()
            detached = len(self._detached)
            return {
                "subscribers": len(self._readers) + detached,
                "detached": detached,
                **self._counts,
            }

    # What the rooms below call.

    def _hand_over(
        self,
        subscription: Subscription,
        make_outlet: Callable[[], _Outlet],
        connection: Any,
        head: bytes,
    ) -> None:
        """Turn a subscription with a reader into one whose stream is in the outlet."""
        # In turn: a broadcast that has told the outlet already, and not yet this reader, would
        # otherwise be missed, or told twice.
        with self._lock, self._my_turn():
            outlet = self._outlet = self._outlet or make_outlet()
            held, subscription._frames = subscription._frames, _NO_FRAMES
            chunks = [head, *(frame._wire for frame in held)]
            self._detached[subscription] = outlet.attach(subscription, connection, chunks)
            self._forget(weakref.ref(subscription))
            if subscription._ended is not None:  # since it subscribed: what it holds, and the end
                self._remove(subscription, subscription._ended)

    def _left(self, subscription: Subscription) -> None:
        with self._lock:
            self._remove(subscription, "its client left")

    def _drop(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription._ended is None:
                self._counts["dropped"] += 1
                self._remove(
                    subscription, f"dropped, its client was {self.maxsize} frames behind"
                )

    # What the relay's reader calls.

    def _begin_with(self, after: _Id, events: Iterable[_Event]) -> None:
        """Begin the history with what the relay has."""
        with self._lock:
            self._history.begin(after, events)

    def _receive(self, what: _Event | _End) -> None:
        """Do what the relay brings."""
        if isinstance(what, _End):
            self._in_turn(lambda: self._end_streams(what.channel))
        else:
            self._in_turn(lambda: self._deliver(what))

    def _begin_after_gap(self, first: _Id | None) -> None:
        """Tell everyone that events are lost which were still to come, before the ``first``."""
        self._in_turn(lambda: self._send_gap(first))

    # For itself.

    @property
    def _numbers(self) -> bool:
        return self.history > 0 or self.relay is not None

    def _start_reader(self) -> None:
        """See to it that the relay is read, and the history filled before anyone is answered."""
        if self.relay is None:
            return
        with self._lock:
            reader = self._reader
            if is_new := reader is None:
                reader = self._reader = _Reader(self.relay, self)
        if is_new:
            try:
                reader.start()
            except RuntimeError:  # no thread to be had; the next one tries again
                self._reader = None
                raise
        reader.wait()

    def _close(self, names: tuple[str, ...]) -> None:
        with self._lock:
            # The flag first: a subscriber that a signal handler's close() has not found in the
            # loop below finds the flag when it looks again, at the end of subscribe().
            self._closed = self._closed or not names
            for name in names or (None,):
                self._end_streams(name)

    def _in_turn(self, act: Callable[[], None]) -> None:
        """Do something to all subscribers, when what was begun before is done."""
        with self._lock:
            self._acts.append(act)
            # In the middle of its own turn, a thread is here for a signal handler or a finaliser:
            # it does this when that turn ends.
            if self._turn != threading.get_ident():
                with self._my_turn():
                    pass
        if self._outlet is not None:
            self._outlet.hold_back()

    # These are only called with the lock held.

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        """Wait for the turn, and at its end do what was left to do until then."""
        me = threading.get_ident()
        if self._turn == me:
            yield
            return
        self._changed.wait_for(lambda: self._turn is None)
        self._turn = me
        try:
            yield
        finally:
            while self._turn == me:
                try:
                    while self._acts:
                        self._acts.popleft()()
                finally:
                    self._turn = None
                    self._changed.notify_all()
                # What was added after the last look, and before the turn was over, has been left
                # to this thread: so look again.
                if self._acts:
                    self._turn = me

    def _sweep(self) -> None:
        """Forget the subscriptions of which nobody is left to read them."""
        while self._gone:
            self._forget(self._gone.popleft())

    def _enter(self, subscription: Subscription) -> None:
        reference = weakref.ref(subscription, self._gone.append)
        self._readers[reference] = subscription.channels
        for channel in subscription.channels:
            audience = self._channels.setdefault(channel, {})
            audience[reference] = None
            # A signal handler may have found it empty in between, and taken it away.
            self._channels[channel] = audience

    def _forget(self, reference: weakref.ref[Subscription]) -> None:
        for channel in self._readers.pop(reference, ()):
            audience = self._channels.get(channel, {})
            audience.pop(reference, None)
            if not audience:
                self._channels.pop(channel, None)

    def _admit(self, resuming: bool) -> None:
        count, most = len(self._readers) + len(self._detached), self.max_subscribers
        if self._closed:
            why = "closed; it takes no more subscribers"
        elif most is not None and count >= most:
            why = f"full: expected fewer than max_subscribers={most!r}, got {count!r}; try later"
        elif resuming and self._relay_is_away():
            why = "waiting for its relay, and cannot tell yet what was missed; try later"
        else:
            return
        self._counts["refused"] += 1
        raise self.Refused(f"this bouncer is {why}")

    def _audience(self, channel: str | None) -> list[Subscription]:
        references = self._readers if channel is None else self._channels.get(channel, {})
        # list() first: a collection that the comprehension sets off may end in _sweep().
        return [s for reference in list(references) if (s := reference()) is not None]

    def _detached_from(self, channel: str | None) -> list[Subscription]:
        return [s for s in list(self._detached) if channel is None or channel in s.channels]

    def _end_streams(self, channel: str | None) -> None:
        for subscription in self._audience(channel) + self._detached_from(channel):
            self._remove(subscription, "closed")

    def _remove(self, subscription: Subscription, why: str) -> None:
        if self._outlet is not None and subscription in self._detached:
            self._outlet.end(self._detached.pop(subscription))
        else:
            self._forget(weakref.ref(subscription))  # equal to the key as long as both are alive
        subscription._end(why)

    def _catch_up(self, subscription: Subscription, last: _Id | None) -> None:
        """Give a new subscription what it missed, and see what it has to be told."""
        history = self._history
        if not self._numbers:
            return
        if last is None:
            subscription._since = None if self._relay_is_away() else history.newest
        elif last > history.newest and self._may_be_ahead(last):
            subscription._seen = last
            subscription.gap = history.hole  # it may be an id of what is missing here
        else:
            if not history.is_whole_after(last):
                subscription.gap = True
                subscription._since = None if history.hole else history.floor
            for _, channel, frame in history.after(last):
                if channel is None or channel in subscription.channels:
                    subscription._frames.append(frame)
            subscription._replay = len(subscription._frames)

    def _may_be_ahead(self, id: _Id) -> bool:
        """Return whether an id can be of an event that is still to come here.

        The client has it from a process that was faster to read the relay.
        """
        if self.relay is None:
            return False
        # Of a relay that is empty nobody can have read anything before this process began.
        earliest = self._born - (_SKEW if self._history.newest != _NO_ID else 0)
        return earliest <= id[0] <= _milliseconds() + _SKEW

    def _relay_is_away(self) -> bool:
        """Return whether it has never been there yet, so that nobody knows what came before."""
        return self._reader is not None and self._reader.away_since is not None

    # These are only called in turn, with the lock held.

    def _send(self, frame: Frame, channel: str | None) -> None:
        id = _NO_ID
        if self._numbers:
            id = self._history.next_id()
            frame = _numbered(frame, _id_text(id))
        self._deliver(_Event(id, channel, frame))

    def _send_gap(self, first: _Id | None) -> None:
        goes_on = first is not None and first > self._history.newest
        self._history.lose(first)
        begin = self._history.floor
        # Who has seen more than what is missing has missed nothing, and its id is not to go back;
        # but where ids begin anew, or nothing has followed yet, nobody can say that of anyone.
        id = begin if goes_on else _NO_ID
        frame = _GAP if first is None else _numbered(_GAP, _id_text(begin))
        self._fan_out(_Event(id, None, frame))

    def _deliver(self, event: _Event) -> None:
        if event.id != _NO_ID:
            self._history.keep(event)
        self._counts["broadcasts"] += 1
        self._fan_out(event)

    def _fan_out(self, event: _Event) -> None:
        if self._outlet is not None and self._detached:
            self._outlet.send(event)
        late = [s for s in self._audience(event.channel) if not s._offer(event)]
        try:
            if late:
                self._wait_for_room(late)
        finally:  # also when a KeyboardInterrupt ends the waiting: nobody misses a frame unnoticed
            for subscription in late:
                if not subscription._offer(event):
                    self._drop(subscription)

    def _wait_for_room(self, late: list[Subscription]) -> None:
        """Give the readers of full queues a moment to empty them.

        Empty, not just below full: a publisher in a loop then waits once in ``maxsize`` frames.
        """
        self._late = {s for s in late if s._waited < _PATIENCE}
        began = time.monotonic()
        try:
            # In ten looks: on a machine that is too busy to run this thread in time, readers do not
            # run in time either, and the moment grows with what it has to make up for.
            for _ in range(10):
                if self._changed.wait_for(lambda: not self._late, _MOMENT / 10):
                    break
        finally:
            for subscription in list(self._late):
                subscription._waited += time.monotonic() - began
            self._late = set()

    def _caught_up(self, subscription: Subscription) -> None:
        if self._late:
            self._late.discard(subscription)
            if not self._late:
                self._changed.notify_all()


class _Reader:
    """The thread that reads a relay for one bouncer.

    There is one per process, from the first subscriber on; a process that only publishes has none.
    """

    def __init__(self, relay: Relay, bouncer: EventBouncer) -> None:
        # Milliseconds; since when it has yet to learn what there was before. None once it knows.
        self.away_since: int | None = _milliseconds()
        self._relay = relay
        self._bouncer = weakref.ref(bouncer)  # whose life is not to depend on this thread's
        self._tried = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="sse_bouncer relay", daemon=True).start()

    def wait(self) -> None:
        """Wait until the history is filled; but while the relay is away, not for long."""
        self._tried.wait(_FILL_WAIT)

    def _run(self) -> None:
        position: str | None = None
        pause = 0.0
        while (bouncer := self._bouncer()) is not None and not bouncer._closed:
            try:
                if position is None:
                    position = self._fill(bouncer)
                del bouncer
                whole, entries = self._relay.read(position, _RELAY_WAIT)
                if (bouncer := self._bouncer()) is None:
                    break
                if not whole:
                    _warn("events were lost in the relay before this process read them")
                    bouncer._begin_after_gap(_parse_id(entries[0][0]) if entries else None)
                for entry in entries:
                    if (what := _parse_entry(entry)) is not None:
                        bouncer._receive(what)
                    position = entry[0]
                if pause:
                    _warn("the relay is back")
                pause = 0.0
            except Exception as error:
                if not pause:
                    _warn("the relay cannot be read; trying until it can: %s", _shown(error))
                self._tried.set()
                bouncer = None
                pause = min(2 * pause or _FIRST_PAUSE, _LAST_PAUSE)
                time.sleep(pause * random.uniform(0.5, 1))

    def _fill(self, bouncer: EventBouncer) -> str:
        """Begin the history with what the relay has, and return where to go on from."""
        after, entries = self._relay.recent(bouncer.history)
        found = [what for what in map(_parse_entry, entries) if what is not None]
        # Those who came while the relay was away have waited for what was published since.
        away = self.away_since or 0
        missed = [what for what in found if what.id[0] >= away]
        kept = [what for what in found if what.id[0] < away and isinstance(what, _Event)]
        bouncer._begin_with(_parse_id(after) or _NO_ID, kept)
        self.away_since = None
        self._tried.set()
        for what in missed:
            bouncer._receive(what)
        return entries[-1][0] if entries else after


def _parse_entry(entry: _Entry) -> _Event | _End | None:
    """Return what a relay's entry says; None if nothing, with a line in the log if it is none."""
    try:
        text, channel, frame = entry
        id = _parse_id(text)
        if id is None:
            raise ValueError(f"id: expected <milliseconds>-<sequence>, got {_shown(text)}")
        if channel is not None:
            _channel_name(channel)
        if frame is not None:
            return _Event(id, channel, _numbered(Frame(frame), text))
        return None if channel is None else _End(id, channel)
    except (TypeError, ValueError) as error:
        _warn("skipped an entry of the relay that is no event: %s", error)
        return None


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number of seconds > 0, or None, got {_shown(value)}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number of seconds > 0, or None, got {_shown(value)}")
    return float(value)


def _retry_range(retry: object) -> tuple[int, int]:
    pair = retry if isinstance(retry, tuple | list) else (retry, retry)
    if len(pair) != 2:
        raise ValueError(f"retry: expected milliseconds or a pair of them, got {_shown(retry)}")
    low, high = (_whole_number("retry", milliseconds, 0) for milliseconds in pair)
    if low > high:
        raise ValueError(f"retry: expected a pair that goes from low to high, got {_shown(retry)}")
    return low, high


_NO_FRAMES: deque[Frame] = deque(maxlen=0)  # of all detached ones; nothing can be put into it
_bouncers: weakref.WeakSet[EventBouncer] = weakref.WeakSet()


def _begin_anew() -> None:
    """In a child process: begin with no subscribers, and with locks that are free.

    The threads that read and the clients that listen are the parent's, and a lock that another
    thread held at the moment of the fork would stay locked for ever.
    """
    for bouncer in _bouncers:
        subscriptions = [*bouncer._audience(None), *bouncer._detached]
        bouncer._readers.clear()
        bouncer._channels.clear()
        bouncer._detached.clear()
        bouncer._outlet = None
        bouncer._reader = None
        if bouncer.relay is not None:
            bouncer._history.begin(bouncer._history.newest)  # the reader will fill it again
        bouncer._late.clear()
        bouncer._make_locks()
        for subscription in subscriptions:
            subscription._ready = None
            subscription._end("it belongs to the process that this one was forked from")


# =================================================================================================
# 4. HUB
#
# A stream holds no worker: one thread for the whole process owns the connections that the response
# room has taken over from the server. It knows frames as bytes and clients as descriptors, nothing
# of HTTP or Flask. Whatever one connection does costs one subscriber.
#
# Bouncers give it commands (attach, fan out, end), each under its own lock, and it obeys them in
# that order: so every stream sees the one order in which things were broadcast. All else in here,
# the streams, the selector, the descriptors, belongs to the hub's thread and needs no lock. It
# alone closes a descriptor, and only after it has forgotten it: a number that the system uses
# again cannot get another client's frames.
# =================================================================================================

# Bytes that an adopted connection may hold in the kernel. A client that stops reading costs this
# much before its own queue begins to fill; left alone the kernel would let it grow to megabytes.
_SEND_BUFFER = 64 * 1024
# Bytes of frames that may wait for the hub before publishers do: enough to make one send per
# stream worth its system call, little enough for that send to fit into _SEND_BUFFER.
_BACKLOG = 64 * 1024
# How many frames beyond its bound a stream may hold while its client gets a last chance to catch
# up, for _PATIENCE: a burst is not a slow client, and here nobody waits for this one.
_BURST = 1_000
# Seconds that an ended stream has to make progress with what it holds, and then for its client to
# close: a socket that is closed with unread input is reset, and what is under way gets lost.
_LINGER = 5.0
# Seconds after which the kernel gives up a peer that acknowledges nothing or takes nothing.
_DEAD_PEER = 30
# Bytes of input from one client that are read and ignored; one that says more is cut off.
_HEARSAY = 64 * 1024
# Streams that are sent to without giving other threads and greenlets a chance of their turn.
_BATCH = 128
# Seconds between looks at streams that have a deadline.
_TICK = 0.25
# Seconds between looks of a thread that waits for the hub.
_GLANCE = 0.001
# Seconds without a new command after which the hub no longer waits for one: see _gather().
_LULL = 0.0005

_Bytes = bytes | memoryview  # a view of what is left of a frame, as others wait for it too


class _Stream:
    """One client's connection."""

    __slots__ = ("ending", "fd", "heard", "outlet", "pending", "room", "subscription")

    def __init__(
        self, outlet: _Detached, subscription: Subscription, fd: int, pending: deque[_Bytes]
    ) -> None:
        self.outlet = outlet
        self.subscription = subscription
        self.fd = fd  # -1 once it is closed
        # What the connection has not taken yet. None in nearly all streams nearly all the time.
        self.pending: deque[_Bytes] | None = pending
        # What it holds at first is what its client came to fetch; later ones count.
        self.room = subscription.maxsize + len(pending)
        self.heard = 0  # bytes
        self.ending = False


class _Detached:
    """One bouncer's streams in the hub, and which of them gets which frame."""

    def __init__(self, hub: _Hub, heartbeat: float | None) -> None:
        self.hub = hub
        self.heartbeat = math.inf if heartbeat is None else heartbeat
        self.beat_at = math.inf  # when all that are silent get a heartbeat
        self.streams: dict[_Stream, None] = {}
        self.channels: dict[str, dict[_Stream, None]] = {}
        self.ahead: dict[_Stream, None] = {}  # those that have seen more than this process
        # Bytes in all. One is written under the bouncer's lock, one by the hub's thread.
        self.told = self.sent = 0

    # What the fan-out room calls, all but the last under the bouncer's lock.

    def attach(
        self, subscription: Subscription, connection: int, held: Iterable[bytes]
    ) -> _Stream:
        stream = _Stream(self, subscription, connection, deque(held))
        self.hub.command(self.hub.attach, stream)
        return stream

    def send(self, event: _Event) -> None:
        self.told += len(event.frame._wire)
        self.hub.command(self.fan_out, event)

    def end(self, stream: _Stream) -> None:
        self.hub.command(self.hub.end, stream)

    def hold_back(self) -> None:
        """Let a publisher wait while the hub is far behind.

        By asking again and again: to be told, it would need a lock that the hub needs too, and the
        publisher may hold others already. For the same reason not for ever: the hub might be
        waiting, in a log handler or a finaliser, for one of those.
        """
        until = time.monotonic() + _PATIENCE
        while self.told - self.sent > _BACKLOG and not self.hub.is_here():
            time.sleep(_GLANCE)
            if time.monotonic() > until:
                break

    # What the hub's thread calls.

    def fan_out(self, events: list[_Event]) -> None:
        """Send each stream all of these that it is to have, in one go.

        Streams of the same channels get the same bytes; those of none of the channels here get
        what goes to all.
        """
        try:
            self._fan_out(events)
        finally:
            self.sent += sum(len(event.frame._wire) for event in events)

    def _fan_out(self, events: list[_Event]) -> None:
        apart = dict(self.ahead)
        for name in {event.channel for event in events if event.channel is not None}:
            apart.update(self.channels.get(name, {}))
        alike: dict[tuple[tuple[str, ...], _Id | None], list[_Stream]] = {}
        for stream in apart:
            key = stream.subscription.channels, stream.subscription._seen
            alike.setdefault(key, []).append(stream)
        for (channels, seen), streams in alike.items():
            self.hub.deliver(
                streams,
                [
                    frame._wire
                    for id, channel, frame in events
                    if (channel is None or channel in channels)
                    and (seen is None or id == _NO_ID or id > seen)
                ],
            )
        for stream in list(self.ahead):
            stream.subscription._wants(events[-1].id)
            if stream.subscription._seen is None:  # no longer ahead
                del self.ahead[stream]
        if shared := [frame._wire for _, channel, frame in events if channel is None]:
            self.hub.deliver([s for s in self.streams if s not in apart], shared)
            self.beat_at = time.monotonic() + self.heartbeat

    def beat(self) -> None:
        # One that has not even taken its last frame is not silent, and gets no more to chew on.
        self.hub.deliver([s for s in self.streams if s.pending is None], [_HEARTBEAT])
        self.beat_at = time.monotonic() + self.heartbeat

    def add(self, stream: _Stream) -> None:
        if not self.streams:
            self.beat_at = time.monotonic() + self.heartbeat
        self.streams[stream] = None
        if stream.subscription._seen is not None:
            self.ahead[stream] = None
        for channel in stream.subscription.channels:
            self.channels.setdefault(channel, {})[stream] = None

    def discard(self, stream: _Stream) -> None:
        if stream in self.streams:
            del self.streams[stream]
            self.ahead.pop(stream, None)
            for channel in stream.subscription.channels:
                del self.channels[channel][stream]
                if not self.channels[channel]:
                    del self.channels[channel]


class _Hub:
    """The thread that serves all detached streams, and its mailbox."""

    def __init__(self) -> None:
        # What is put in at one end by any thread, under its bouncer's lock, is taken out at the
        # other by the hub's. A deque needs no lock for that.
        self._commands: deque[tuple[Callable[[list[Any]], None], Any]] = deque()
        self._woken = False  # a byte is in the pipe, or the hub is about to look anyway
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        # The hub's thread's own.
        self._outlets: dict[_Detached, None] = {}
        self._deadlines: dict[_Stream, float] = {}  # of streams over their bound, and ending ones
        self._tick_at = 0.0
        self._rested_at = 0.0  # when it last had nothing more to do
        self._took = 0.0  # seconds, to do what it did before that
        self._send = _sender()

    # For any thread.

    def start(self) -> None:
        """Start the thread, if that has not been done.

        :raises OSError: if there is no descriptor left for it.
        :raises RuntimeError: if there is no thread left for it.
        """
        with self._starting:
            if self._thread is not None:
                return
            selector = selectors.DefaultSelector()
            try:
                self._ear, self._bell = os.pipe()
            except OSError:
                selector.close()
                raise
            os.set_blocking(self._ear, False)
            selector.register(self._ear, selectors.EVENT_READ, None)
            self._selector = selector
            thread = threading.Thread(target=self._run, name="sse_bouncer", daemon=True)
            self._thread = thread
        # Without the lock: under gevent this switches to other greenlets, which may want it.
        try:
            thread.start()
        except RuntimeError:
            self._thread = None
            selector.close()
            os.close(self._ear)
            os.close(self._bell)
            raise
        atexit.register(self.settle)

    def command(self, obey: Callable[[list[Any]], None], argument: Any) -> None:
        self._commands.append((obey, argument))
        # The command first, then the look at the flag; the hub clears the flag first, and then
        # takes the commands. So either it takes this one, or this one finds the flag cleared.
        if not self._woken:
            self._woken = True
            os.write(self._bell, b"\0")

    def settle(self) -> None:
        """Wait, when the process ends, until what was broadcast is sent, but not for long."""
        until = time.monotonic() + _PATIENCE
        while _hubs.get(None) is self and self._is_busy() and time.monotonic() < until:
            time.sleep(_GLANCE)

    def _is_busy(self) -> bool:
        """Return whether something that was broadcast is still to be sent."""
        streams = list(self._deadlines)
        for outlet in list(self._outlets):
            if outlet.told > outlet.sent:
                return True
            streams += list(outlet.streams)
        return bool(self._commands) or any(stream.pending for stream in streams)

    def is_here(self) -> bool:
        """Return whether it is the hub's thread that asks."""
        return threading.current_thread() is self._thread

    # For the hub's thread only.

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except Exception:
                _warn("unexpected; the hub goes on", traceback=True)
                time.sleep(_MOMENT)  # whatever it is, it shall not fill the log

    def _turn(self) -> None:
        for key, events in self._selector.select(self._idle_time()):
            if key.data is None:
                os.read(self._ear, _BATCH)  # before the flag is cleared, or a byte of after is lost
            else:
                self._guard(key.data, self._serve, events)
        self._gather()
        # Also when there is nothing to take: a command may have been taken in the last turn, and
        # its bell heard in this one. See command().
        self._woken = False
        commands = [self._commands.popleft() for _ in range(len(self._commands))]
        if commands:
            began = time.monotonic()
            self._obey(commands)
            self._rested_at = time.monotonic()
            self._took = self._rested_at - began
        self._watch_the_clock()

    def _gather(self) -> None:
        """Under load, wait for what publishers are about to add, to send it all in one go.

        A publisher that is in the middle of its next request gets the time to finish it. With
        1,000 streams and a publisher that is never more than 8 events ahead, this took a gunicorn
        worker with 4 threads from 0.63 to 0.82 million deliveries per second, and with 10,000 from
        0.77 to 0.98. At leisure it waits for nothing.
        """
        began = time.monotonic()
        seen = 0
        while (
            began - self._rested_at < self._took  # less time to rest than to work: under load
            and seen < len(self._commands)  # more have come since the last look
            and time.monotonic() - began < self._took  # never longer than what it saves
        ):
            seen = len(self._commands)
            time.sleep(_LULL)

    def _obey(self, commands: list[tuple[Callable[[list[Any]], None], Any]]) -> None:
        for obey, run in itertools.groupby(commands, itemgetter(0)):
            try:
                obey([argument for _, argument in run])
            except Exception:  # the other commands are other people's
                _warn("unexpected; the hub goes on", traceback=True)

    def _idle_time(self) -> float | None:
        at = min((outlet.beat_at for outlet in self._outlets), default=math.inf)
        if self._deadlines:
            at = min(at, self._tick_at)
        return None if at == math.inf else max(0.0, at - time.monotonic())

    def _watch_the_clock(self) -> None:
        now = time.monotonic()
        for outlet in list(self._outlets):
            if now >= outlet.beat_at:
                outlet.beat()
        if self._deadlines and now >= self._tick_at:
            self._tick_at = now + _TICK
            for stream in [s for s, at in self._deadlines.items() if now >= at]:
                self._guard(stream, self._close if stream.ending else self._drop)

    def _guard(self, stream: _Stream, do: Callable[..., None], *args: Any) -> None:
        """Do something with one stream; if it goes wrong, that stream is what it costs."""
        try:
            do(stream, *args)
        except OSError:  # reset, timed out: its client is gone
            self._close(stream)
        except Exception:
            _warn("unexpected; it costs one stream: %r", stream.subscription, traceback=True)
            self._close(stream)

    def attach(self, streams: list[_Stream]) -> None:
        for stream in streams:
            self._guard(stream, self._attach)

    def _attach(self, stream: _Stream) -> None:
        self._outlets[stream.outlet] = None
        stream.outlet.add(stream)
        self._selector.register(stream.fd, selectors.EVENT_READ, stream)
        self._flush(stream)

    def deliver(self, streams: list[_Stream], frames: list[bytes]) -> None:
        """Send the same frames to many streams: one system call for each, however many frames."""
        data = b"".join(frames)
        if not data:
            return
        breath = time.monotonic()
        for i in range(0, len(streams), _BATCH):
            batch = streams[i : i + _BATCH]
            waiting = [s for s in batch if s.pending is not None]
            clear = [s for s in batch if s.pending is None] if waiting else batch
            taken = self._send([s.fd for s in clear], data)
            if taken.count(len(data)) < len(clear):
                for stream, count in zip(clear, taken, strict=True):
                    if count < len(data):
                        self._guard(stream, self._hold, frames, count)
            for stream in waiting:
                self._guard(stream, self._hold, frames, 0)
            # Threads are given turns by the interpreter, every 5 milliseconds; greenlets are not.
            if time.monotonic() - breath > 0.005:
                time.sleep(0)
                breath = time.monotonic()

    def _hold(self, stream: _Stream, frames: list[bytes], taken: int) -> None:
        """Keep what the connection did not take, within the stream's bound."""
        if stream.pending is None:
            if taken < 0:
                taken = _write(stream.fd, b"".join(frames))
            stream.pending = deque(frames)
            self._advance(stream, taken)
        else:
            stream.pending.extend(frames)
        over = len(stream.pending or ()) - stream.room
        if over > _BURST:
            self._drop(stream)
        elif over > 0:
            self._deadlines.setdefault(stream, time.monotonic() + _PATIENCE)

    def _serve(self, stream: _Stream, events: int) -> None:
        if events & selectors.EVENT_READ:
            # Nothing that it says matters but that it leaves, which reads as nothing. One that
            # shuts down its sending half alone looks the same, and is taken to leave as well.
            heard = len(os.read(stream.fd, _HEARSAY))
            stream.heard += heard
            if not heard or stream.heard > _HEARSAY:
                self._close(stream)
        if events & selectors.EVENT_WRITE and stream.pending is not None:
            self._flush(stream)

    def _flush(self, stream: _Stream) -> None:
        """Send of what is pending as much as the connection takes at once."""
        chunk: list[_Bytes] = []
        size = 0
        for frame in stream.pending or ():
            chunk.append(frame)
            size += len(frame)
            if size >= _SEND_BUFFER:
                break
        data = chunk[0] if len(chunk) == 1 else b"".join(chunk)  # a big one is not copied
        self._advance(stream, _write(stream.fd, data))

    def _advance(self, stream: _Stream, taken: int) -> None:
        """Take what was sent off the pending frames, and see what follows from what is left."""
        pending = stream.pending or deque()
        while pending and taken >= len(pending[0]):
            taken -= len(pending.popleft())
        if pending:
            pending[0] = memoryview(pending[0])[taken:]
            self._selector.modify(stream.fd, selectors.EVENT_READ | selectors.EVENT_WRITE, stream)
            if stream.ending:
                self._deadlines[stream] = time.monotonic() + _LINGER
            elif len(pending) <= stream.room:
                self._deadlines.pop(stream, None)
            return
        self._selector.modify(stream.fd, selectors.EVENT_READ, stream)
        stream.pending = None
        stream.room = stream.subscription.maxsize
        if stream.ending:
            self._say_goodbye(stream)
        else:
            self._deadlines.pop(stream, None)

    def _drop(self, stream: _Stream) -> None:
        stream.subscription._bouncer._drop(stream.subscription)

    def end(self, streams: list[_Stream]) -> None:
        for stream in streams:
            if stream.fd >= 0 and not stream.ending:
                self._guard(stream, self._end)

    def _end(self, stream: _Stream) -> None:
        stream.ending = True
        self._leave(stream)
        self._deadlines[stream] = time.monotonic() + _LINGER
        if stream.pending is None:
            self._say_goodbye(stream)

    def _say_goodbye(self, stream: _Stream) -> None:
        """Tell the client that this was all, and wait for it to close."""
        connection = socket.socket(fileno=stream.fd)
        try:
            connection.shutdown(socket.SHUT_WR)
        finally:
            connection.detach()

    def _close(self, stream: _Stream) -> None:
        if stream.fd < 0:
            return
        fd, stream.fd = stream.fd, -1
        stream.pending = None
        self._deadlines.pop(stream, None)
        try:
            self._leave(stream)
        except Exception:  # in the middle of a fan-out it would be others who pay
            _warn("unexpected; the stream is closed all the same", traceback=True)
        try:
            self._selector.unregister(fd)
        except KeyError:
            pass  # it was not registered yet
        _hang_up(fd)
        stream.subscription._bouncer._left(stream.subscription)

    def _leave(self, stream: _Stream) -> None:
        stream.outlet.discard(stream)
        if not stream.outlet.streams:
            self._outlets.pop(stream.outlet, None)


def _sender() -> Callable[[list[int], bytes], list[int]]:
    """Return a function that sends the same to many connections, without waiting for any.

    It returns how much each took; -1 is nothing, and trying again by itself tells why.

    ``socket.send`` and ``os.write`` let go of the GIL in each call, though a send that does not
    block takes 3 microseconds, and have to win it back from a busy thread: with one CPU-bound
    thread in the process a fan-out over 1,000 connections took 2,764 microseconds per delivery
    that way, and 12 through a PyDLL, which keeps it.
    """
    try:
        import ctypes

        send = ctypes.PyDLL(None).send
        send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
        send.restype = ctypes.c_ssize_t
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    except (ImportError, AttributeError, OSError, TypeError):
        return _send_by_hand
    same = itertools.repeat
    return lambda fds, data: list(map(send, fds, same(data), same(len(data)), same(flags)))


def _send_by_hand(fds: list[int], data: bytes) -> list[int]:
    taken = []
    for fd in fds:
        try:
            taken.append(os.write(fd, data))
        except OSError:
            taken.append(-1)
    return taken


def _write(fd: int, data: _Bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


def _hang_up(fd: int) -> None:
    # Shut down first: if the process has just been forked, closing alone tells the client nothing.
    with socket.socket(fileno=fd) as connection:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client was first


_hubs: dict[None, _Hub] = {}  # none yet, or the one of this process


def _hub() -> _Hub:
    """Return this process's hub, running."""
    # setdefault() and not a lock: one made at import could be of the wrong kind, if gevent comes
    # later, and one that is held while a thread starts would stop all greenlets.
    hub = _hubs.get(None) or _hubs.setdefault(None, _Hub())
    _in_children(_abandon_hub)
    hub.start()
    return hub


def _abandon_hub() -> None:
    """In a child process: close the parent's connections, or their clients would see no end."""
    hub = _hubs.pop(None, None)
    if hub is not None and hub._thread is not None:
        streams = {s for outlet in hub._outlets for s in outlet.streams} | set(hub._deadlines)
        streams |= {about for _, about in hub._commands if isinstance(about, _Stream)}
        # The selector is not told of them: what it is told, it would tell the parent's. Closed it
        # is, where it is a descriptor of its own; gevent's is all greenlets' together.
        if hasattr(hub._selector, "fileno"):
            with contextlib.suppress(OSError):  # a kqueue is not inherited
                hub._selector.close()
        for fd in {hub._ear, hub._bell} | {s.fd for s in streams if s.fd >= 0}:
            try:
                os.close(fd)
            except OSError:
                pass


def _detach(subscription: Subscription, connection: socket.socket, head: bytes) -> None:
    """Take a connection over from the server, for the hub to stream the subscription to it.

    The server keeps its socket object, but what that refers to from now on is a peer that has
    hung up: it notices when it writes, and takes it for a client that left, which is nothing to
    log. Whatever else it does to "its" connection (shutdown, linger, close, poll) touches that
    dead end, and not the client.

    :raises OSError: if no descriptor can be spared; the connection is as it was.
    :raises RuntimeError: if there is no thread to be had; the connection is as it was.
    """
    hub = _hub()
    for level, option, value in _OPTIONS:
        try:
            connection.setsockopt(level, option, value)
        except OSError:
            pass  # a unix socket has no TCP options
    fd = os.dup(connection.fileno())
    try:
        if fd >= _most_descriptors():  # it is the lowest that was free, so about as many are open
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        theirs, dead_end = socket.socketpair()
        dead_end.close()
        with theirs:
            os.dup2(theirs.fileno(), connection.fileno(), inheritable=False)
    except OSError:
        os.close(fd)
        raise
    os.set_blocking(fd, False)
    bouncer = subscription._bouncer
    bouncer._hand_over(subscription, lambda: _Detached(hub, bouncer.heartbeat), fd, head)


def _most_descriptors() -> float:
    """Return how many descriptors may be open before streams leave the rest to the server.

    One that cannot accept() for want of them does not only turn clients away: a gunicorn worker
    ends, and all its streams with it.
    """
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit - limit // 10


# Options are left out where the platform has none of the name.
_OPTIONS = tuple(
    (getattr(socket, level), getattr(socket, option), value)
    for level, option, value in (
        ("SOL_SOCKET", "SO_SNDBUF", _SEND_BUFFER),
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", _DEAD_PEER),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", _DEAD_PEER),
        ("IPPROTO_TCP", "TCP_USER_TIMEOUT", _DEAD_PEER * 1000),
        ("IPPROTO_TCP", "TCP_NODELAY", 1),
    )
    if hasattr(socket, option)
)


# =================================================================================================
# 5. RESPONSE
#
# A stream as a Flask response. The only room that knows HTTP and Flask. However a response ends
# (client gone, HEAD, never iterated, an exception in between), its source is released: by close()
# where the server calls it, and else when the body object goes.
# =================================================================================================

# no-cache and no-store for caches, no-transform for proxies that would compress, and so buffer;
# nginx buffers unless it is told not to. There is no Connection header: it is the server's own,
# and waitress answers 500 to an app that sets it.
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",
}
_SERVERS_OWN = frozenset(
    "connection content-length keep-alive proxy-authenticate proxy-authorization te trailer"
    " transfer-encoding upgrade".split()
)


def sse_response(
    source: Iterable[object] | Subscription,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a Flask response that streams a generator, any iterable, or a `Subscription`.

    Items go through `format_sse` unless they are frames. One that cannot be formatted is logged
    and left out, and the stream goes on. Nothing is added to what a generator yields; a
    subscription's stream opens with a comment or its ``retry``, and has heartbeats.

    When the response ends, however it does, ``source.close()`` is called where there is one: in a
    generator that has started, ``finally`` runs. To the server a detached stream's response ends
    at once, and so it is then that functions given to ``response.call_on_close`` run.

    When a stream ends, a browser reconnects. To end it for good, send a last event at which the
    page calls ``close()`` on its EventSource, or answer the reconnect with status 204.

    :param source: What to stream.
    :param status: The HTTP status. Browsers read a stream only from the default, 200.
    :param headers: More headers, or other values for those set here. None, the default, adds none.
    :raises TypeError: if ``source`` cannot be iterated, or is a text, bytes or a mapping.
    :raises ValueError: if ``headers`` holds one that is the server's own to set, or a Content-Type
        other than ``text/event-stream``.
    """
    if isinstance(source, Subscription):
        return _respond(_SubscriptionBody(source), status, headers)
    if isinstance(source, str | bytes | bytearray | Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"source: expected a generator, an iterable of items or a Subscription, "
            f"got {_shown(source)}; put a single item into a list"
        )
    return _respond(_ItemsBody(source), status, headers)


def _stream(
    bouncer: EventBouncer, channels: tuple[str, ...], last_event_id: str | None
) -> Response:
    from flask import request

    if request.environ.get("wsgi.multiprocess") and bouncer.relay is None:
        _warn_once(
            "multiprocess",
            "the server runs several processes, and each broadcasts to its own subscribers only; "
            "run one (a stream needs no worker), or connect them: "
            "EventBouncer(relay=RedisRelay(redis.Redis.from_url(...)))",
        )
    if request.method == "HEAD":
        return sse_response(())
    header = request.headers.get("Last-Event-ID")
    if (_parse_id(header) or _NO_ID) > (_parse_id(last_event_id) or _NO_ID):
        last_event_id = header
    try:
        return sse_response(bouncer.subscribe(*channels, last_event_id=last_event_id))
    except EventBouncer.Refused:  # why is no stranger's business
        return _respond([_turned_away(bouncer)], 200, None)


def _turned_away(bouncer: EventBouncer) -> bytes:
    """Return the whole body for a client that is to come back later."""
    retry = random.randint(*(bouncer.retry or (5_000, 15_000)))
    return f"retry: {retry}\n: no room now, come back later\n".encode()


def _respond(
    body: Iterable[bytes], status: int, headers: Mapping[str, str] | None
) -> Response:
    from flask import Response, current_app, has_app_context

    _whole_number("status", status, 200)
    for name, value in (headers or {}).items():
        if name.lower() in _SERVERS_OWN:
            raise ValueError(
                f"headers: expected none that the server sets itself, got {name!r}; leave it out"
            )
        if name.lower() == "content-type" and not value.startswith("text/event-stream"):
            raise ValueError(
                f"headers: expected Content-Type text/event-stream, the only one that clients of "
                f"a stream accept, got {_shown(value)}; leave it out"
            )
    # The app's own class: Flask would turn any other response into one.
    own: Any = current_app.response_class if has_app_context() else Response
    response: Response = _detaching(own)(body, status=status, headers=_HEADERS)
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response


@functools.cache
def _detaching(response_class: Any) -> Any:
    """Return a subclass whose responses give their worker back where that can be done.

    As late as can be: when the server calls the response, all after_request functions have run,
    and cookies are set.
    """

    def call(
        self: Response, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        started: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            write = start_response(status, headers, *exc_info)
            started[:] = status, write
            return write

        chunks: Iterable[bytes] = response_class.__call__(self, environ, start)
        if isinstance(self.response, _SubscriptionBody) and started:
            self.response.detach(environ, *started)
        return chunks

    return type(response_class.__name__, (response_class,), {"__call__": call})


class _SubscriptionBody:
    """What a server iterates to stream a subscription: the opening, frames, heartbeats."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._opening = _opening(subscription)
        self._opened = False
        self._detached = False

    def detach(self, environ: dict[str, Any], status: str, write: Any) -> None:
        """Give the stream to the hub; where that is not sound, leave it to the server."""
        bouncer = self._subscription._bouncer
        headers = _headers_at_server(write)
        names = {name.lower() for name, _ in headers}
        connection = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")
        if (
            not bouncer.detach
            or connection is None  # waitress, the test client: the server keeps it to itself
            or not headers  # middleware stands between, and has yet to see them
            or hasattr(connection, "getpeercert")  # TLS: the bytes have to go through its object
            # The development server, told to fork for each request, whose process ends with it.
            or ("werkzeug.socket" in environ and environ.get("wsgi.multiprocess"))
            or environ.get("SERVER_PROTOCOL") not in ("HTTP/1.1", "HTTP/1.0")  # HTTP/2 shares it
            or environ["REQUEST_METHOD"] != "GET"  # HEAD has no body; others may be mid-upload
            or not status.startswith("200 ")  # 204 and its like have none either
            or names & {"content-encoding", "content-length"}  # something changes what is sent
            or sys.platform == "win32"  # a socket is no file descriptor there
        ):
            return
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() not in _SERVERS_OWN]
        lines += [f"Date: {formatdate(usegmt=True)}"] if "date" not in names else []
        # No length and no chunks: the body ends with the connection.
        head = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")
        try:
            _detach(self._subscription, connection, head + self._opening)
        except OSError as error:
            _warn_once(
                "descriptors",
                f"clients are told to come back later, for want of descriptors: {error}; "
                "raise the limit, for example by ulimit -n",
            )
            bouncer.unsubscribe(self._subscription)
            self._opening = _turned_away(bouncer)
        except RuntimeError as error:
            _warn_once("thread", f"streams hold workers, for want of a thread: {error}")
        else:
            self._detached = True

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        bouncer = self._subscription._bouncer
        if self._detached:
            raise StopIteration
        if not self._opened:
            self._opened = True
            return self._opening
        try:
            return self._subscription.get(timeout=bouncer.heartbeat)._wire
        except queue.Empty:
            return _HEARTBEAT
        except Subscription.Ended:
            raise StopIteration from None

    def close(self) -> None:
        if not self._detached:
            self._subscription._bouncer.unsubscribe(self._subscription)


def _headers_at_server(write: Any) -> list[tuple[str, str]]:
    """Return the headers that have arrived at the server; none, if middleware holds them back.

    What ``start_response`` returns is in gunicorn a method of the response that has them, and in
    the development server a function in whose scope they are.
    """
    headers = getattr(getattr(write, "__self__", None), "headers", None)
    names = getattr(getattr(write, "__code__", None), "co_freevars", ())
    if "headers_set" in names:
        headers = write.__closure__[names.index("headers_set")].cell_contents
    return headers if isinstance(headers, list) else []


def _opening(subscription: Subscription) -> bytes:
    """Return what opens a stream: something, so that headers leave and ``onopen`` fires at once.

    "If the field name is 'retry'" sets the time as soon as its line is read (9.2.6), so it needs
    no block of its own, of which several client libraries would make an empty event.

    With a history, a client that has no id gets the one from which it must not miss anything: an
    id in a block without data is taken note of, and no event (9.2.6). httpx-sse makes an event of
    it all the same; as it never reconnects by itself, it loses nothing by not getting it.
    """
    from flask import has_request_context, request

    retry = subscription._bouncer.retry
    opening = _HEARTBEAT if retry is None else f"retry: {random.randint(*retry)}\n".encode()
    if subscription._since is None:
        return opening + _GAP._wire if subscription.gap else opening
    since = _id_text(subscription._since)
    if subscription.gap:
        return opening + _numbered(_GAP, since)._wire
    agent = request.headers.get("User-Agent", "") if has_request_context() else ""
    return opening if agent.startswith("python-httpx/") else opening + f"id: {since}\n\n".encode()


class _ItemsBody:
    """What a server iterates to stream a generator or another iterable."""

    def __init__(self, source: Iterable[object]) -> None:
        self._source = source
        self._items = iter(source)
        self._dumps = _json_dumps()  # the app context is gone when the server iterates
        self._opened = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._opened:
            self._opened = True
            return b""  # no part of the body, but most servers send the headers at it
        for item in self._items:
            try:
                return _format(item, None, None, None, None, self._dumps)._wire
            except (TypeError, ValueError):
                _warn("left out of a stream, which goes on: %s", _shown(item), traceback=True)
        raise StopIteration

    def close(self) -> None:
        for closable in {id(c): c for c in (self._items, self._source)}.values():
            close = getattr(closable, "close", None)
            if close is not None:
                close()


# WSGI leaves room in its environ for names of one's own.
_OF_REQUEST = "sse_bouncer.subscriptions"


def _release_if_view_fails(subscription: Subscription) -> None:
    """Tie a subscription to the request that made it, if there is one, in case that fails.

    The exception's traceback keeps the view's variables for as long as a log handler or a
    debugger keeps the traceback, and so would keep a subscription that nobody reads.
    """
    flask: Any = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        app = flask.current_app._get_current_object()
        # Connecting again has no effect.
        flask.request_finished.connect(_request_finished, app)
        flask.request_tearing_down.connect(_request_tearing_down, app)
        made = flask.request.environ.setdefault(_OF_REQUEST, [])
        made.append(weakref.ref(subscription))


def _request_finished(app: Flask, response: Response, **_: object) -> None:
    if response.status_code >= 400:  # an error handler has answered
        _release_all_of_request()


def _request_tearing_down(app: Flask, exc: BaseException | None = None, **_: object) -> None:
    if exc is not None:  # none has
        _release_all_of_request()


def _release_all_of_request() -> None:
    from flask import request

    for reference in request.environ.pop(_OF_REQUEST, ()):
        if (subscription := reference()) is not None:
            subscription._bouncer.unsubscribe(subscription)
