"""Choices of a call, from the engine's queue to their ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.types import Receive

from dlx.errors import EngineError
from dlx.request import Chunk
from dlx.serve.admission import RETRY_S, Gone
from dlx.serve.asks import Call
from dlx.serve.faults import Fault, fault_of
from dlx.serve.metrics import Metrics
from dlx.serve.replies import REASONS, Seen, detail, failed, usage
from dlx.serve.stream import DONE, Encoder, failure, gone

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine, Ticket

log = logging.getLogger(__name__)


class Choices:
    """What became of a call. However it is left, no choice of it goes on."""

    def __init__(self, engine: AsyncEngine, call: Call, watch: bool, metrics: Metrics) -> None:
        """Submit all of them, or none. Raises what the engine raises: RequestError, BusyError, EngineError."""
        self._metrics, self._prompts = metrics, [len(prompt) for prompt in call.prompts]
        self._tickets: list[Ticket] = []
        try:
            for prompt, params in call.choices:
                self._tickets.append(engine.submit(prompt, params, watch=watch, timeout_s=call.timeout_s))
        except BaseException as error:
            self._drop()
            status = engine.health().status
            if isinstance(error, EngineError) and status != "ready":
                raise Fault(503, status, str(error), retry_after_s=RETRY_S) from None
            raise
        self._open = len(self._tickets)  # those that have not ended
        self._reason = "disconnect"  # why they are dropped, if they are

    @property
    def prompts(self) -> list[int]:
        """Tokens of each prompt."""
        return self._prompts

    async def answers(self, receive: Receive) -> list[Seen]:
        """How each ended. Raises Gone once the client went away, Fault if one failed."""
        work = asyncio.gather(*map(self._last, self._tickets))
        left = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Gone
            return work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            self.leave()

    async def events(self, encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """What a stream sends: a fault is an event, and no [DONE] follows it."""
        outputs, blocks = [], [0] * len(self._tickets)
        try:
            for index in range(len(self._tickets)):
                if first := encoder.begin(index):
                    yield first
            async with aclosing(self._news()) as news:
                async for index, chunk in news:
                    blocks[index] += bool(chunk.token_ids)
                    if chunk.finish is None:
                        if data := encoder.chunk(index, chunk):
                            yield data
                        continue
                    if chunk.output is None or chunk.output.finish_reason not in REASONS:
                        raise failed(chunk) or AssertionError
                    outputs.append(chunk.output)
                    self._ended(Seen(chunk, chunk.output, blocks[index]))
                    yield encoder.end(index, chunk, None if self._open else usage(outputs, self._prompts))
            if last := encoder.close(usage(outputs, self._prompts)):
                yield last
            yield DONE
        except Exception as error:
            fault = self._fault(error)
            self._open -= 1
            self._metrics.ended("failed", fault.code)
            yield failure(fault)
        finally:
            self.leave()

    async def _news(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The chunks of all, as they come; the number of the choice with each."""
        if len(self._tickets) == 1:
            async for chunk in self._tickets[0]:
                yield 0, chunk
        else:
            inbox: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue()
            tasks = [asyncio.ensure_future(_forward(at, ticket, inbox)) for at, ticket in enumerate(self._tickets)]
            try:
                left = len(tasks)
                while left:
                    at, chunk = await inbox.get()
                    if isinstance(chunk, Exception):
                        raise chunk
                    if chunk is None:
                        left -= 1
                    else:
                        yield at, chunk
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self._open:
            raise EngineError("the engine dropped the request")

    async def _last(self, ticket: Ticket) -> Seen:
        blocks, last = 0, None
        try:
            async for chunk in ticket:
                last, blocks = chunk, blocks + bool(chunk.token_ids)
            fault = failed(last)
            if fault is not None:
                raise fault
            assert last is not None and last.output is not None
        except Exception as error:
            self._open -= 1  # whoever answers with the fault counts it
            raise self._fault(error) from None
        seen = Seen(last, last.output, blocks)
        self._ended(seen)
        return seen

    def _ended(self, seen: Seen) -> None:
        self._open -= 1
        finished = REASONS[seen.output.finish_reason] != "abort"
        self._metrics.ended("finished" if finished else "aborted", detail(seen.output), seen.output, seen.blocks)

    def _fault(self, error: Exception) -> Fault:
        """The fault to tell of; one that nobody expected is logged."""
        fault = fault_of(error)
        if fault.code == "internal_error":
            log.error("a request failed", exc_info=error)
        self._reason = "other_choice"
        return fault

    def leave(self) -> None:
        """Drop what has not ended, as its client has gone or another choice failed; may be called again."""
        for _ in range(self._open):
            self._metrics.ended("aborted", self._reason)
        self._open = 0
        self._drop()

    def _drop(self) -> None:
        for ticket in self._tickets:
            ticket.abort()


async def _forward(at: int, ticket: Ticket, inbox: asyncio.Queue[tuple[int, Chunk | Exception | None]]) -> None:
    try:
        async for chunk in ticket:
            inbox.put_nowait((at, chunk))
        inbox.put_nowait((at, None))
    except Exception as error:
        inbox.put_nowait((at, error))
