"""AsyncEngine: an engine for asyncio. It runs in a thread of its own; see `dlx.engine_thread`.

Nothing of the process is touched: no signal handlers, no exit hooks, no environment. Several may live in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from dlx.config import Config
from dlx.engine import Engine
from dlx.engine_thread import Due, EngineThread
from dlx.errors import BusyError, EngineError, RequestError
from dlx.graphs.policies import Policy
from dlx.health import Health, Limits, Stats, Status
from dlx.models.card import Card
from dlx.request import Chunk, Request, SamplingParams
from dlx.ticket import Ticket
from dlx.tokenizer import Tokenizer

log = logging.getLogger(__name__)

QUEUED = 8  # times what the K/V pages hold may wait, where Limits does not say
LOOKS = 8  # of the monitor within `watchdog_s`


class AsyncEngine:
    """An engine whose loop runs in a thread; all methods are for the event loop that called `start`.

    Cheap to build: nothing is loaded before `start`.
    """

    def __init__(self, config: Config, limits: Limits = Limits()) -> None:  # noqa: B008
        self.config, self.limits = config, limits
        self._status: Status = "new"
        self._reason = "not started"
        self._pid = os.getpid()
        self._engine: Engine | None = None
        self._thread: EngineThread | None = None
        self._tickets: dict[int, Ticket] = {}  # those that have not ended
        self._finished: Counter[str] = Counter()
        self._pace_s = 1.0  # between two ends of requests, lately
        self._ended_s = time.monotonic()  # the last end
        self._quiet = asyncio.Event()  # no ticket is open
        self._quiet.set()
        self._over = asyncio.Event()  # the thread has ended, or hangs
        self._hangs = False
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Load the model and make its graphs; returns when requests may come.

        Raises what loading raised; EngineError when called twice
        """
        if self._status != "new":
            raise EngineError(f"the engine is {self._status}; start is called once, on a new one")
        self._status, self._reason = "starting", "the model is being loaded"
        ready: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()

        def over(error: BaseException | None) -> None:
            if not ready.done():
                ready.set_exception(error or EngineError("the engine was closed while it started"))
            self._end(error)

        self._thread = EngineThread(self.config, partial(_resolve, ready), self._hear, over)
        try:
            engine = await ready
            if self._status != "starting":
                raise EngineError("the engine was closed while it started")
        except BaseException as error:
            self._thread.end()
            self._status, self._reason = "closed", f"it did not start: {error}"
            raise
        self._engine = engine
        self._status, self._reason = "ready", ""
        self._monitor()

    @property
    def engine(self) -> Engine:
        """The engine, which only its thread may step. Raises EngineError before the start and after the end."""
        if self._engine is None:
            raise EngineError(f"the engine is {self._status} ({self._reason}); start a new one")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def card(self) -> Card:
        """Facts of the model."""
        return self.engine.worker.card

    @property
    def policy(self) -> Policy:
        """The policy as it is bound to the model."""
        return self.engine.worker.policy

    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.engine.worker.max_len

    def submit(
        self, prompt: list[int], params: SamplingParams, *, watch: bool = False, timeout_s: float | None = None
    ) -> Ticket:
        """Check a request and queue it; its chunks come to the ticket.

        watch      chunks also hold the undecided window, one a turn
        timeout_s  until the last token, at most that of the limits
        Raises RequestError  if it can never run
        Raises BusyError     if the queue is full
        Raises EngineError   if no requests are taken
        """
        status, reason = self.health()
        if status != "ready" or self._thread is None:
            raise EngineError(f"the engine is {status} and takes no requests ({reason})")
        if timeout_s is not None and not timeout_s > 0:
            raise RequestError(f"timeout_s={timeout_s!r} is not allowed; pass seconds above 0, or None")
        request = self.engine.request(prompt, params, watch)
        self._admit(request)
        most = self.limits.timeout_s
        end_s = request.arrived_s + (most if timeout_s is None else min(timeout_s, most))
        ticket = Ticket(request, self.abort)
        self._tickets[request.id] = ticket
        self._quiet.clear()
        self._thread.add(Due(request, end_s, request.arrived_s + self.limits.queue_timeout_s))
        return ticket

    async def generate(self, prompt: list[int], params: SamplingParams, **options: Any) -> AsyncIterator[Chunk]:
        """The chunks of `submit`; the request is aborted when the caller stops reading."""
        ticket = self.submit(prompt, params, **options)
        try:
            async for chunk in ticket:
                yield chunk
        finally:
            ticket.abort()

    def abort(self, id: int) -> None:
        """End a request within one launch; numbers that are unknown, or have ended, are ignored."""
        if id in self._tickets and self._thread is not None:
            self._thread.abort(id)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let those that are here finish, and abort what is left after so many seconds."""
        if self._status == "ready":
            self._status, self._reason = "draining", "no new requests are taken; the engine will close"
        try:
            await asyncio.wait_for(self._quiet.wait(), timeout_s)
        except TimeoutError:
            for id in list(self._tickets):
                self.abort(id)
            await self._quiet.wait()

    async def close(self) -> None:
        """Abort what is left, end the thread and give the memory back; may be called twice."""
        if self._status != "unhealthy":
            self._status, self._reason = "closed", "it was closed"
        thread = self._thread
        if thread is None:
            return
        thread.end()
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self.limits.watchdog_s / LOOKS)
            self._look()  # what hangs is not waited for
        if not self._hangs:
            thread.thread.join()
        self._status, self._reason, self._engine, self._thread = "closed", self._reason, None, None
        if self._timer is not None:
            self._timer.cancel()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def health(self) -> Health:
        """Whether requests are taken, as of now."""
        if os.getpid() != self._pid:
            return Health(
                "unhealthy", "the process was forked, and an engine belongs to the process that built it; build another"
            )
        self._look()
        return Health(self._status, self._reason)

    def stats(self) -> Stats:
        """Figures for those who watch the engine."""
        engine = self.engine
        scheduler, worker, waiting = engine.scheduler, engine.worker, self._waiting()
        launches, eager = worker.epoch + worker.prefills, self.config.graphs == "off"
        return Stats(
            waiting=len(waiting),
            running=len(scheduler.running),
            queued_tokens=sum(map(_tokens, waiting)),
            pages_total=scheduler.pool.total,
            pages_used=scheduler.pool.used,
            pages_cached=scheduler.pool.cached,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            preemptions=scheduler.preemptions,
            replays=0 if eager else launches,
            eager_steps=launches if eager else 0,
            forwards=engine.counts["forwards"],
            prefill_forwards=worker.prefills,
            tokens=engine.counts["tokens"],
            finished=dict(self._finished),
        )

    def _waiting(self) -> list[Request]:
        return [ticket.request for ticket in self._tickets.values() if ticket.request.slot is None]

    def _admit(self, request: Request) -> None:
        """Raise BusyError if the queue has no room for the request; whoever finds a slot free waits for nothing."""
        waiting = self._waiting()
        room = self.limits.max_queued + self.config.max_num_seqs - len(self.engine.scheduler.running)
        pool, S = self.engine.scheduler.pool, self.engine.worker.shapes.S
        most = self.limits.max_queued_tokens
        most = QUEUED * pool.total * S if most is None else most
        tokens = sum(map(_tokens, waiting))
        if len(waiting) >= room or (waiting and tokens + _tokens(request) > most):
            retry_s = min(max(self._pace_s, 1.0), 60.0)
            raise BusyError(
                f"the queue is full: {len(waiting)} requests wait, of {room}, for {tokens} tokens, of {most}; "
                f"ask again in {retry_s:.0f} s",
                retry_s,
            )

    def _hear(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            ticket = self._tickets.get(chunk.id)
            if ticket is None:
                continue
            ticket.put(chunk)
            if chunk.finish is not None:
                del self._tickets[chunk.id]
                self._finished[chunk.finish.value] += 1
                now = time.monotonic()
                self._pace_s, self._ended_s = 0.8 * self._pace_s + 0.2 * (now - self._ended_s), now
        if not self._tickets:
            self._quiet.set()

    def _monitor(self) -> None:
        """Look at the turn that runs, again and again."""
        self._look()
        if self._status in ("ready", "draining"):
            self._timer = asyncio.get_running_loop().call_later(self.limits.watchdog_s / LOOKS, self._monitor)

    def _look(self) -> None:
        """Is the turn that runs taking too long?"""
        began_s = self._thread.began_s if self._thread is not None else None
        if began_s is None or self._over.is_set():
            return
        took_s = time.monotonic() - began_s
        if took_s > self.limits.watchdog_s:
            log.error("a turn of the engine takes longer than %g s; where its threads are:", self.limits.watchdog_s)
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            self._hangs = True
            self._break(f"a step takes longer than watchdog_s={self.limits.watchdog_s:g}")

    def _end(self, error: BaseException | None) -> None:
        """The thread has ended."""
        if error is not None and not self._over.is_set() and self._engine is not None:
            self._break(str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")
        self._over.set()

    def _break(self, why: str) -> None:
        """Nothing more will come: those who wait are told at once."""
        self._status, self._reason = "unhealthy", why
        for ticket in self._tickets.values():
            ticket.fail(EngineError(f"the engine failed: {why}"))
        self._finished["error"] += len(self._tickets)
        self._tickets.clear()
        self._quiet.set()
        self._over.set()
        if self._thread is not None:
            self._thread.end()


def _tokens(request: Request) -> int:
    return len(request.prompt) + request.params.max_tokens


def _resolve(future: asyncio.Future[Engine], engine: Engine) -> None:
    if not future.done():
        future.set_result(engine)
