"""What tests of engines in threads share: reading tickets, and holding the engine's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dlx import AsyncEngine, Chunk, Output
from dlx.config import Config
from dlx.engine import Engine
from dlx.ticket import Ticket

Run = Callable[[Coroutine[Any, Any, Any]], Any]  # a coroutine, on the event loop of the tests


def configured(nano: Path, **values: Any) -> Config:
    return Config.from_args(nano, device="cpu", graphs="off", **{"max_num_seqs": 2, **values})


def at_rest(engine: AsyncEngine) -> bool:
    """No request, slot, page or row is held."""
    stats = engine.stats()
    engine.engine.scheduler.check_invariants()
    assert bool(engine.engine.worker.buf.done.all())
    return (stats.waiting, stats.running, stats.queued_tokens, stats.pages_used) == (0, 0, 0, 0)


async def read(ticket: Ticket) -> list[Chunk]:
    return [chunk async for chunk in ticket]


async def answered(ticket: Ticket) -> Output:
    """The output of the last chunk; the chunks join to it, and no other has one."""
    *body, last = await read(ticket)
    assert last.output is not None and last.finish is last.output.finish_reason
    assert all(chunk.finish is None and chunk.output is None for chunk in body)
    assert [tok for chunk in (*body, last) for tok in chunk.token_ids] == last.output.token_ids
    assert "".join(chunk.text for chunk in (*body, last)) == last.output.text
    return last.output


class Gate:
    """Holds the engine's thread before each turn, until it is let go on."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._loop = asyncio.get_running_loop()
        self._held = asyncio.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._engine = engine.engine
        self._engine.before_turn = self._hold

    def _hold(self) -> None:
        self._loop.call_soon_threadsafe(self._held.release)
        self._go.acquire()

    async def held(self, turns: int = 0) -> None:
        """Let so many turns pass, and return when the thread stands before the next."""
        for _ in range(turns):
            await self._held.acquire()
            self._go.release()
        await self._held.acquire()
        self._held.release()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Let it go, for good."""
        self._engine.before_turn = None
        self._go.release()


def read_late(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """As on a GPU: launch t + 1 is sent before t is read, and rows have pages for both."""
    terms, policy = engine.scheduler.terms, engine.worker.policy
    assert engine.lag == 0 and terms.ahead is not None and policy.L is not None
    patch.setattr(engine, "lag", 1)
    patch.setattr(terms, "ahead", terms.ahead + policy.N * policy.L)
