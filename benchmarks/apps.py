"""The apps under test. Each one streams on /stream what is posted to /publish.

Each line of a POST is one event, for all, or for the user named after it. On /stream?user=NAME a
user gets both. Each app is written as its library's documentation shows, with room for 16 events
per subscriber where the app chooses the size of the queue.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
import asyncio
import os
import queue
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any


def flask_app(broadcast: Callable[[str, str], object]) -> Any:
    from flask import Flask, request

    app = Flask(__name__)

    @app.post("/publish")
    def publish() -> tuple[str, int]:
        for line in request.get_data(as_text=True).splitlines():
            event, _, user = line.partition(" ")
            broadcast(event, user)
        return "", 204

    return app


def sse_bouncer() -> Any:
    from flask import request

    from sse_bouncer import EventBouncer, RedisRelay

    url = os.environ.get("REDIS_URL")
    bouncer = EventBouncer(relay=RedisRelay.from_url(url) if url else None)
    app = flask_app(lambda event, user: bouncer.broadcast(event, channel=user or None))
    app.get("/stream")(lambda: bouncer.stream(*request.args.values()))
    return app


class MessageAnnouncer:  # as in most Flask tutorials about server-sent events
    def __init__(self) -> None:
        self.listeners: list[queue.Queue[str]] = []

    def listen(self) -> queue.Queue[str]:
        self.listeners.append(queue.Queue(maxsize=16))
        return self.listeners[-1]

    def announce(self, msg: str) -> None:
        for i in reversed(range(len(self.listeners))):
            try:
                self.listeners[i].put_nowait(msg)
            except queue.Full:
                del self.listeners[i]


def blog_post() -> Any:
    from flask import Response, request

    announcers: defaultdict[str, MessageAnnouncer] = defaultdict(MessageAnnouncer)  # by user

    def broadcast(event: str, user: str) -> None:
        for announcer in [announcers[user]] if user else list(announcers.values()):
            announcer.announce(f"data: {event}\n\n")

    def stream() -> Response:
        messages = announcers[request.args.get("user", "")].listen()
        return Response(iter(messages.get, None), mimetype="text/event-stream")

    app = flask_app(broadcast)
    app.get("/stream")(stream)
    return app


def flask_sse() -> Any:
    from flask_sse import sse

    app = flask_app(lambda event, user: sse.publish(event))
    app.config["REDIS_URL"] = os.environ["REDIS_URL"]
    app.register_blueprint(sse, url_prefix="/stream")
    return app


def sse_starlette() -> Any:
    from sse_starlette import EventSourceResponse, ServerSentEvent
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    users: defaultdict[str, set[asyncio.Queue[str]]] = defaultdict(set)

    async def stream(request: Any) -> Response:
        messages: asyncio.Queue[str] = asyncio.Queue(16)
        mine = {"", request.query_params.get("user", "")}  # "" is all of them
        for user in mine:
            users[user].add(messages)

        async def events() -> AsyncIterator[ServerSentEvent]:
            try:
                while True:
                    yield ServerSentEvent(data=await messages.get())
            finally:
                for user in mine:
                    users[user].discard(messages)

        # Its ping, one timer per subscriber every 15 s, would be work that the others do not do.
        return EventSourceResponse(events(), ping=3600)

    async def publish(request: Any) -> Response:
        for line in (await request.body()).decode().splitlines():
            event, _, user = line.partition(" ")
            for messages in list(users[user]):
                try:
                    messages.put_nowait(event)
                except asyncio.QueueFull:
                    users[user].discard(messages)
        return Response(status_code=204)

    post = Route("/publish", publish, methods=["POST"])
    return Starlette(routes=[Route("/stream", stream), post])
