"""Server-sent events: how chunks are written, and a response that notices silence and a client that has gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dlx.request import Chunk
from dlx.serve.faults import Fault

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class Encoder(Protocol):
    """Turns what a call's choices committed into events; a dict literal in `app.py` names them by `stream_mode`.

    watch  the engine is to tell of undecided windows too
    """

    watch: bool

    def begin(self, index: int) -> bytes:
        """What is sent for a choice before it has anything."""
        ...

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        """A chunk that does not end its choice; empty where there is nothing to tell."""
        ...

    def end(self, index: int, chunk: Chunk, total: dict[str, object] | None) -> bytes:
        """The chunk that ends a choice; `total` is the usage, known with the last of them."""
        ...

    def close(self, total: dict[str, object]) -> bytes:
        """What comes behind all choices."""
        ...


def event(data: Mapping[str, object]) -> bytes:
    """One event of JSON."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def failure(fault: Fault) -> bytes:
    """The event that ends a stream that failed; no [DONE] follows it."""
    return b"event: error\n" + event(fault.envelope)


async def gone(receive: Receive) -> None:
    """Return once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come; a comment in every `ping_s` of silence.

    events  raises nothing but what is to be logged: faults are events
    leave   called however the response ends, also where its events were never asked for
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        leave: Callable[[], object],
        ping_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._leave, self._ping_s, self._sent_s = events, leave, ping_s, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._sent_s = loop.time()
            tasks += [loop.create_task(work) for work in (self._send(send), gone(receive), self._ping(send))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = bool(tasks) and tasks[0].done()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
            self._leave()
        if not ended:
            log.info("499 %s: the client went away", scope["path"])
        elif not tasks[0].cancelled():
            tasks[0].result()

    async def _send(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_s = now()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(self._ping_s)
        while True:
            quiet = now() - self._sent_s
            if quiet >= self._ping_s:
                await send({"type": "http.response.body", "body": PING, "more_body": True})
                self._sent_s, quiet = now(), 0.0
            await asyncio.sleep(self._ping_s - quiet)
