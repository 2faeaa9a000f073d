"""The apps under test. Each one streams on /stream what is posted to /publish.

Each line of a POST is one event. Each app is written as its library's documentation shows, with
room for 16 events per subscriber where the app chooses the size of the queue.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
import asyncio
import os
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any


def flask_app(broadcast: Callable[[str], object]) -> Any:
    from flask import Flask, request

    app = Flask(__name__)

    @app.post("/publish")
    def publish() -> tuple[str, int]:
        for event in request.get_data(as_text=True).split():
            broadcast(event)
        return "", 204

    return app


def sse_bouncer() -> Any:
    from sse_bouncer import EventBouncer

    bouncer = EventBouncer()
    app = flask_app(bouncer.broadcast)
    app.get("/stream")(lambda: bouncer.stream())
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
    from flask import Response

    announcer = MessageAnnouncer()

    def events() -> Iterator[str]:
        messages = announcer.listen()
        while True:
            yield messages.get()

    app = flask_app(lambda event: announcer.announce(f"data: {event}\n\n"))
    app.get("/stream")(lambda: Response(events(), mimetype="text/event-stream"))
    return app


def flask_sse() -> Any:
    from flask_sse import sse

    app = flask_app(sse.publish)
    app.config["REDIS_URL"] = os.environ["REDIS_URL"]
    app.register_blueprint(sse, url_prefix="/stream")
    return app


def sse_starlette() -> Any:
    from sse_starlette import EventSourceResponse, ServerSentEvent
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    queues: set[asyncio.Queue[str]] = set()

    async def stream(request: Any) -> Response:
        messages: asyncio.Queue[str] = asyncio.Queue(16)
        queues.add(messages)

        async def events() -> AsyncIterator[ServerSentEvent]:
            try:
                while True:
                    yield ServerSentEvent(data=await messages.get())
            finally:
                queues.discard(messages)

        # Its ping, one timer per subscriber every 15 s, would be work that the others do not do.
        return EventSourceResponse(events(), ping=3600)

    async def publish(request: Any) -> Response:
        for event in (await request.body()).decode().split():
            for messages in list(queues):
                try:
                    messages.put_nowait(event)
                except asyncio.QueueFull:
                    queues.discard(messages)
        return Response(status_code=204)

    post = Route("/publish", publish, methods=["POST"])
    return Starlette(routes=[Route("/stream", stream), post])
