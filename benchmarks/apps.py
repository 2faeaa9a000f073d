"""The apps under test: each streams what is posted to /publish to all who read /stream.

What is posted are events of 64 bytes: one, or several that the route publishes in a loop.
Each is written as its own documentation has it, and with a queue of 16 events per subscriber
where the queue is the app's to choose. Nothing but what the app itself needs is imported.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, unused-ignore"

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any


def pieces(body: bytes) -> list[bytes]:
    return [body[i : i + 64] for i in range(0, len(body), 64)]


def sse_bouncer() -> Any:
    from flask import Flask, Response, request

    from sse_bouncer import EventBouncer

    app = Flask(__name__)
    bouncer = EventBouncer()

    @app.get("/stream")
    def stream() -> Response:
        return bouncer.stream()

    @app.post("/publish")
    def publish() -> tuple[str, int]:
        for event in pieces(request.get_data()):
            bouncer.broadcast(event)
        return "", 204

    return app


def blog_post() -> Any:
    """The class that most Flask tutorials on the subject have."""
    import queue

    from flask import Flask, Response, request

    class MessageAnnouncer:
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

    app = Flask(__name__)
    announcer = MessageAnnouncer()

    @app.get("/stream")
    def stream() -> Response:
        def events() -> Iterator[str]:
            messages = announcer.listen()
            while True:
                yield messages.get()

        return Response(events(), mimetype="text/event-stream")

    @app.post("/publish")
    def publish() -> tuple[str, int]:
        for event in pieces(request.get_data()):
            announcer.announce(f"data: {event.decode()}\n\n")
        return "", 204

    return app


def flask_sse() -> Any:
    from flask import Flask, request
    from flask_sse import sse

    app = Flask(__name__)
    app.config["REDIS_URL"] = os.environ["REDIS_URL"]
    app.register_blueprint(sse, url_prefix="/stream")

    @app.post("/publish")
    def publish() -> tuple[str, int]:
        for event in pieces(request.get_data()):
            sse.publish(event.decode())
        return "", 204

    return app


def sse_starlette() -> Any:
    import asyncio

    from sse_starlette import EventSourceResponse, ServerSentEvent
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    queues: set[asyncio.Queue[str]] = set()

    async def stream(request: Request) -> Response:
        messages: asyncio.Queue[str] = asyncio.Queue(16)
        queues.add(messages)

        async def events() -> AsyncIterator[ServerSentEvent]:
            try:
                while True:
                    yield ServerSentEvent(data=await messages.get())
            finally:
                queues.discard(messages)

        # Its ping every 15 seconds, one timer per subscriber, is work that the others do not have.
        return EventSourceResponse(events(), ping=3600)

    async def publish(request: Request) -> Response:
        for event in pieces(await request.body()):
            for messages in list(queues):
                try:
                    messages.put_nowait(event.decode())
                except asyncio.QueueFull:
                    queues.discard(messages)
        return Response(status_code=204)

    return Starlette(
        routes=[Route("/stream", stream), Route("/publish", publish, methods=["POST"])]
    )
