"""Ticket: where the chunks of one request come, read on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from dlx.errors import EngineError
from dlx.request import Chunk, Request


class Ticket:
    """One request of an AsyncEngine: an async iterator of chunks that ends after the one with `finish`.

    A reader may be slow: chunks wait for it. Of watched requests at most one waits, with all that was committed and the
    newest window. Iteration raises EngineError if the engine fails.
    """

    def __init__(self, request: Request, abort: Callable[[int], None]) -> None:
        self.id = request.id
        self.request = request
        self._abort = abort
        self._inbox: deque[Chunk] = deque()
        self._news = asyncio.Event()
        self._ended = False  # nothing follows what is in the inbox
        self._error: EngineError | None = None

    def abort(self) -> None:
        """Drop the request; its last chunk says so. Ignored once it has ended."""
        self._abort(self.id)

    def put(self, chunk: Chunk) -> None:
        """Hand a chunk to the reader."""
        if self.request.watch and self._inbox:
            chunk = _joined(self._inbox.pop(), chunk)
        self._inbox.append(chunk)
        self._ended = chunk.finish is not None
        self._news.set()

    def fail(self, error: EngineError) -> None:
        """End without a last chunk: reading raises, once what came before is read."""
        self._error, self._ended = error, True
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._inbox:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._inbox.popleft()


def _joined(first: Chunk, second: Chunk) -> Chunk:
    """Two chunks in one: what both committed, and the rest as the second has it."""
    return second._replace(text=first.text + second.text, token_ids=first.token_ids + second.token_ids)
