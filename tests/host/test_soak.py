"""Many requests through one engine: each gets what it gets alone, and when they are gone nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dlx import LLM, AsyncEngine, Chunk, Output, SamplingParams
from dlx.async_engine import Limits
from dlx.config import Config
from dlx.request import Finish
from dlx.ticket import Ticket
from tests.loops import answered, at_rest, read


def requests(n: int, most: int, longest: int = 60) -> list[tuple[list[int], SamplingParams]]:
    """Requests that differ in prompt, length, threshold, temperature and seed."""
    draw = random.Random(n)

    def params() -> SamplingParams:
        return SamplingParams(
            max_tokens=draw.randint(1, most),
            threshold=draw.choice([None, 0.0, 0.3, 0.6, 0.9]),
            temperature=draw.choice([0.0, 0.0, 0.7, 1.5]),
            seed=draw.getrandbits(60),
            ignore_eos=draw.random() < 0.5,
        )

    return [([1, 267, 202, *draw.choices(range(36, 99), k=draw.randint(0, longest))], params()) for _ in range(n)]


async def left(ticket: Ticket, chunks: int) -> Output:
    """The answer to a request that is aborted after so many chunks."""
    for _ in range(chunks):
        await anext(ticket, None)
    ticket.abort()
    return (await read(ticket) or [Chunk(ticket.id, "", [], None, [], None)])[-1].output  # type: ignore[return-value]


@pytest.mark.parametrize(
    "model", [pytest.param("nano", marks=pytest.mark.slow), pytest.param("tiny", marks=pytest.mark.long)]
)
def test_64_concurrent_requests_get_what_each_gets_alone(request: pytest.FixtureRequest, model: str) -> None:
    """Every fourth is aborted somewhere: what it has by then is the beginning of that."""
    asked, folder = requests(64, most=32), request.getfixturevalue(model)
    settings: dict[str, Any] = {"device": "cpu", "graphs": "off", "batch_invariant": True, "max_num_seqs": 4}

    async def ask() -> list[Output | None]:
        async with AsyncEngine(Config.from_args(folder, **settings)) as engine:
            tickets = [engine.submit(prompt, params) for prompt, params in asked]
            ways = [left(ticket, n // 4 % 4) if n % 4 == 0 else answered(ticket) for n, ticket in enumerate(tickets)]
            outputs = await asyncio.gather(*ways)
            assert at_rest(engine)
            return outputs

    with LLM(folder, **settings) as llm:
        expected = [llm.generate(prompt, params)[0] for prompt, params in asked]
    aborted = 0
    for n, (got, alone) in enumerate(zip(asyncio.run(ask()), expected)):
        if got is None:
            assert n % 4 == 0  # it had ended before it was aborted
        elif got.finish_reason is Finish.ABORT:
            assert n % 4 == 0
            assert got.token_ids == alone.token_ids[: len(got.token_ids)]
            aborted += 1
        else:
            assert (got.text, got.token_ids, got.finish_reason, got.nfe) == (
                alone.text, alone.token_ids, alone.finish_reason, alone.nfe,
            )  # fmt: skip
    assert aborted >= 4


@pytest.mark.slow
def test_1000_requests_leave_pages_threads_and_memory_where_they_began(nano: Path) -> None:
    asked = requests(20, most=4, longest=20)

    async def ask() -> None:
        async with AsyncEngine(Config.from_args(nano, device="cpu", graphs="off"), Limits(max_queued=999)) as engine:

            async def rounds(n: int) -> None:
                for _ in range(n):
                    tickets = [engine.submit(prompt, params) for prompt, params in asked]
                    await asyncio.gather(*(left(t, 1) if n % 5 == 0 else answered(t) for n, t in enumerate(tickets)))

            def held() -> tuple[int, int, int]:
                assert at_rest(engine)
                gc.collect()
                return threading.active_count(), len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

            await rounds(5)  # caches fill
            threads, objects, traced = held()
            await rounds(50)
            now = held()
            assert sum(engine.stats().finished.values()) == 1100
            assert now[0] == threads
            assert now[1] - objects < 100  # a tenth of an object a request
            assert now[2] - traced < 64_000  # 64 bytes a request

    tracemalloc.start()
    try:
        asyncio.run(ask())
    finally:
        tracemalloc.stop()
