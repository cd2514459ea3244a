"""An engine in a thread: the same answers as alone, aborts at any time, limits, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlx import LLM, AsyncEngine, BusyError, Chunk, EngineError, ModelError, Output, RequestError, SamplingParams
from dlx.async_engine import Limits
from dlx.engine import Engine
from dlx.request import Finish
from tests.loops import Gate, Run, answered, at_rest, configured, read

LONG = SamplingParams(max_tokens=40, ignore_eos=True, threshold=0.9)
ONE_BY_ONE = replace(LONG, threshold=1.0)  # a token a forward
PROMPTS = [[1, 267, 202, *random.Random(n).choices(range(36, 99), k=n)] for n in (0, 7, 12, 13, 24, 33)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs coroutines on one event loop, each for a minute at most."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(scope="module")
def engine(nano: Path, run: Run) -> Iterator[AsyncEngine]:
    """The nano model with two slots, which prefills 64 tokens a launch."""
    engine = AsyncEngine(configured(nano, max_num_batched_tokens=64, prefix_caching=False))
    run(engine.start())
    yield engine
    run(engine.close())


@pytest.fixture
def fresh(nano: Path, run: Run) -> Iterator[Callable[..., AsyncEngine]]:
    """Starts an engine with these limits, to be closed or broken."""
    engines: list[AsyncEngine] = []

    def start(**limits: Any) -> AsyncEngine:
        engines.append(AsyncEngine(configured(nano), Limits(**limits)))
        run(engines[-1].start())
        return engines[-1]

    yield start
    for engine in engines:
        run(engine.close())


@pytest.fixture(scope="module")
def alone(nano: Path) -> list[list[int]]:
    """What each prompt gets when nothing else runs, in the caller's thread."""
    with LLM(nano, device="cpu", graphs="off", max_num_seqs=2) as llm:
        return [llm.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> Iterator[None]:
    yield
    assert run(answered(engine.submit(PROMPTS[1], LONG))).token_ids == alone[1]
    assert at_rest(engine)


def test_answers_are_those_of_the_callers_own_loop(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> list[Output]:
        return await asyncio.gather(*(answered(engine.submit(prompt, LONG)) for prompt in PROMPTS))

    assert [out.token_ids for out in run(ask())] == alone


def test_generate_yields_the_chunks_of_one_answer(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> list[Chunk]:
        return [chunk async for chunk in engine.generate(PROMPTS[3], LONG)]

    chunks = run(ask())
    assert [tok for chunk in chunks for tok in chunk.token_ids] == alone[3]
    assert [chunk.finish for chunk in chunks if chunk.finish] == [Finish.LENGTH]


def test_a_request_that_can_never_run_is_refused_at_once(engine: AsyncEngine, run: Run) -> None:
    async def ask(prompt: list[int], params: SamplingParams) -> None:
        engine.submit(prompt, params)

    for prompt, params in (([], LONG), ([3], LONG), ([5], replace(LONG, max_tokens=0)), ([5] * 2040, LONG)):
        with pytest.raises(RequestError):
            run(ask(prompt, params))
    assert at_rest(engine)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_timeout_that_is_no_time_is_refused(engine: AsyncEngine, timeout_s: float) -> None:
    with pytest.raises(RequestError, match="pass seconds above 0"):
        engine.submit(PROMPTS[0], LONG, timeout_s=timeout_s)


def test_the_graphs_are_made_before_requests_may_come(nano: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(configured(nano))
    seen: list[str] = []
    monkeypatch.setattr(Engine, "prepare", lambda self: seen.append(engine.health().status))
    run(engine.start())
    run(engine.close())
    assert seen == ["starting"]


@pytest.mark.parametrize(("device", "made"), [("cpu", 0), ("cuda", 1)])
def test_without_graphs_a_gpu_has_kernels_to_make_before_requests_may_come(
    nano_llm: LLM, monkeypatch: pytest.MonkeyPatch, device: str, made: int
) -> None:
    """The first step would take longer than a watchdog waits."""
    engine, seen = nano_llm.engine, list[object]()
    assert engine.worker.config.graphs == "off"
    monkeypatch.setattr(engine.worker, "device", torch.device(device))
    monkeypatch.setattr(engine.worker, "prepare", lambda *buckets: seen.append(buckets))
    engine.prepare()
    assert len(seen) == made


@pytest.mark.parametrize("forwards", [1, 3])
def test_without_graphs_each_bucket_is_run_once(nano: Path, forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(nano, graphs="off", device="cpu", max_num_seqs=2, forwards=forwards) as llm:
        worker, shapes = llm.engine.worker, llm.engine.worker.shapes
        seen, forward = list[object](), worker.net.forward
        monkeypatch.setattr(worker.net, "forward", lambda *a: (seen.append(a), forward(*a))[1])
        worker.prepare(shapes.rows, shapes.tokens)
        assert len(seen) == len(shapes.rows) + len(shapes.tokens)


@pytest.mark.parametrize(
    ("turns", "params", "prompt", "finish"),
    [
        (0, LONG, [72] * 9, Finish.ABORT),
        (2, LONG, [72] * 300, Finish.ABORT),  # 64 tokens of it are prefilled a turn
        (4, ONE_BY_ONE, [72] * 9, Finish.ABORT),
        (2, replace(ONE_BY_ONE, max_nfe=3), [72] * 9, Finish.MAX_NFE),  # it ends in the turn that runs
    ],
    ids=["before its first turn", "in prefill", "within a block", "in its last turn"],
)
def test_an_abort_ends_its_request_with_the_turn_that_runs_and_changes_no_other(
    engine: AsyncEngine,
    run: Run,
    alone: list[list[int]],
    turns: int,
    params: SamplingParams,
    prompt: list[int],
    finish: Finish,
) -> None:
    async def ask() -> tuple[Output, Output]:
        with Gate(engine) as gate:
            dropped, other = engine.submit(prompt, params), engine.submit(PROMPTS[4], LONG)
            await gate.held(turns)
            dropped.abort()
            dropped.abort()
            engine.abort(dropped.id)
            await gate.held(1)
            output = await answered(dropped)  # while the thread is held before the turn that follows the abort
            gate.open()
            return output, await answered(other)

    output, other = run(ask())
    assert (output.finish_reason, other.token_ids) == (finish, alone[4])


def test_a_request_that_waits_is_aborted_as_well(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> list[Output]:
        with Gate(engine) as gate:
            tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS[:4]]
            await gate.held(1)
            tickets[2].abort()
            gate.open()
            return [await answered(ticket) for ticket in tickets]

    outputs = run(ask())
    assert (outputs[2].finish_reason, outputs[2].token_ids, outputs[2].nfe) == (Finish.ABORT, [], 0)
    assert [out.token_ids for n, out in enumerate(outputs) if n != 2] == [alone[0], alone[1], alone[3]]


def test_aborts_of_what_is_unknown_or_over_are_ignored(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> tuple[list[int], list[Chunk]]:
        ticket = engine.submit(PROMPTS[2], LONG)
        output = await answered(ticket)
        for id in (ticket.id, 10**9, -1):
            engine.abort(id)
        ticket.abort()
        return output.token_ids, await read(ticket)

    assert run(ask()) == (alone[2], [])


def test_a_reader_who_leaves_aborts(engine: AsyncEngine, run: Run) -> None:
    async def ask() -> None:
        before = engine.stats().finished.get("abort", 0)
        stream = engine.generate(PROMPTS[1], replace(ONE_BY_ONE, max_tokens=500))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await engine._quiet.wait()
        assert engine.stats().finished["abort"] == before + 1
        assert at_rest(engine)

    run(ask())


def test_a_task_that_is_cancelled_aborts(engine: AsyncEngine, run: Run) -> None:
    async def ask() -> None:
        async def reader() -> None:
            async for _ in engine.generate(PROMPTS[1], replace(ONE_BY_ONE, max_tokens=500)):
                began.set()

        began = asyncio.Event()
        task = asyncio.create_task(reader())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine._quiet.wait()
        assert at_rest(engine)

    run(ask())


def test_a_slow_reader_of_a_watched_request_gets_the_newest_window(engine: AsyncEngine, run: Run) -> None:
    async def ask() -> tuple[Chunk, list[Chunk]]:
        with Gate(engine) as gate:
            ticket = engine.submit(PROMPTS[1], ONE_BY_ONE, watch=True)
            await gate.held(12)
            newest = await anext(ticket)
            gate.open()
            await engine._quiet.wait()
            return newest, await read(ticket)

    newest, rest = run(ask())
    (last,) = rest
    assert last.output is not None and last.output.nfe > 12
    ids = newest.token_ids + last.token_ids
    assert ids == last.output.token_ids
    assert newest.text + last.text == last.output.text
    mask = engine.card.mask_id
    shown = list(zip(newest.window, ids[len(newest.token_ids) :]))
    assert sum(seen != mask for seen, _ in shown) + len(newest.token_ids) == 12  # a token a turn
    assert all(seen in (mask, tok) for seen, tok in shown)


def test_only_who_watches_sees_windows(engine: AsyncEngine, run: Run) -> None:
    async def ask() -> tuple[list[Chunk], list[Chunk]]:
        tickets = [engine.submit(PROMPTS[n], ONE_BY_ONE, watch=n == 1) for n in (1, 2)]
        return await asyncio.gather(*map(read, tickets))  # type: ignore[return-value]

    watched, other = run(ask())
    assert any(chunk.window for chunk in watched)
    assert all(chunk.window == [] and chunk.token_ids for chunk in other)


def test_a_full_queue_refuses_and_those_who_run_go_on(
    fresh: Callable[..., AsyncEngine], run: Run, alone: list[list[int]]
) -> None:
    engine = fresh(max_queued=2)

    async def ask() -> list[Output]:
        with Gate(engine) as gate:
            tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS[:2]]
            await gate.held(1)  # both run
            tickets += [engine.submit(prompt, LONG) for prompt in PROMPTS[2:4]]
            with pytest.raises(BusyError, match="2 requests wait, of 2") as caught:
                engine.submit(PROMPTS[4], LONG)
            assert 1.0 <= caught.value.retry_after_s <= 60.0
            gate.open()
            outputs = [await answered(ticket) for ticket in tickets]
            return [*outputs, await answered(engine.submit(PROMPTS[4], LONG))]

    assert [out.token_ids for out in run(ask())] == alone[:5]


def test_who_finds_a_free_slot_does_not_count_as_waiting(
    fresh: Callable[..., AsyncEngine], run: Run, alone: list[list[int]]
) -> None:
    """All of them come within one turn, which has yet to give out its two slots."""
    engine = fresh(max_queued=1)

    async def ask() -> list[Output]:
        with Gate(engine) as gate:
            tickets = [engine.submit(PROMPTS[0], LONG)]
            await gate.held()
            tickets += [engine.submit(prompt, LONG) for prompt in PROMPTS[1:3]]
            with pytest.raises(BusyError, match="3 requests wait, of 3"):
                engine.submit(PROMPTS[3], LONG)
            gate.open()
            return [await answered(ticket) for ticket in tickets]

    assert [out.token_ids for out in run(ask())] == alone[:3]


def test_waiting_tokens_are_bounded_but_one_request_may_always_wait(
    fresh: Callable[..., AsyncEngine], run: Run
) -> None:
    engine = fresh(max_queued_tokens=100)

    async def ask() -> None:
        with Gate(engine) as gate:
            tickets = [engine.submit([72] * 90, LONG)]  # 130 tokens
            with pytest.raises(BusyError, match="for 130 tokens, of 100"):
                engine.submit([72], replace(LONG, max_tokens=1))
            gate.open()
            await answered(tickets[0])
            assert engine.stats().queued_tokens == 0

    run(ask())


def test_what_waits_too_long_ends_and_what_runs_goes_on(
    fresh: Callable[..., AsyncEngine], run: Run, alone: list[list[int]]
) -> None:
    engine = fresh(queue_timeout_s=0.05)

    async def ask() -> list[Output]:
        with Gate(engine) as gate:
            tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS[:2]]
            await gate.held(1)
            tickets.append(engine.submit(PROMPTS[2], LONG))
            asyncio.get_running_loop().call_later(0.1, gate.open)  # the thread is held until its time is over
            return [await answered(ticket) for ticket in tickets]

    outputs = run(ask())
    assert (outputs[2].finish_reason, outputs[2].token_ids) == (Finish.TIMEOUT, [])
    assert [out.token_ids for out in outputs[:2]] == alone[:2]
    assert at_rest(engine)


def test_what_runs_too_long_ends_with_what_it_has(engine: AsyncEngine, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> tuple[Output, Output]:
        with Gate(engine) as gate:
            ticket = engine.submit(PROMPTS[1], LONG, timeout_s=0.05)
            other = engine.submit(PROMPTS[4], LONG)
            for _ in range(40):  # until a block is committed
                if ticket._inbox:
                    break
                await gate.held(1)
            asyncio.get_running_loop().call_later(0.1, gate.open)
            return await answered(ticket), await answered(other)

    output, other = run(ask())
    assert output.finish_reason in (Finish.TIMEOUT, Finish.LENGTH)
    assert output.token_ids == alone[1][: len(output.token_ids)]
    assert other.token_ids == alone[4]


def test_a_drained_engine_refuses_finishes_and_stays_drained(
    fresh: Callable[..., AsyncEngine], run: Run, alone: list[list[int]]
) -> None:
    engine = fresh()

    async def ask() -> list[Output]:
        tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        drained = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        assert engine.health().status == "draining"
        with pytest.raises(EngineError, match="is draining and takes no requests"):
            engine.submit(PROMPTS[0], LONG)
        await drained
        assert at_rest(engine)
        return [await answered(ticket) for ticket in tickets]

    assert [out.token_ids for out in run(ask())] == alone
    assert engine.health().status == "draining"


def test_a_drain_aborts_at_its_deadline(fresh: Callable[..., AsyncEngine], run: Run) -> None:
    engine = fresh()

    async def ask() -> list[Output]:
        tickets = [engine.submit(prompt, replace(ONE_BY_ONE, max_tokens=1500)) for prompt in PROMPTS]
        await engine.drain(0.0)
        return [await answered(ticket) for ticket in tickets]

    assert [out.finish_reason for out in run(ask())] == [Finish.ABORT] * len(PROMPTS)


def test_close_ends_all_that_is_there_and_the_thread(fresh: Callable[..., AsyncEngine], run: Run) -> None:
    before = set(threading.enumerate())
    engine = fresh()
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["dlx-engine"]

    async def ask() -> list[Output]:
        tickets = [engine.submit(prompt, ONE_BY_ONE) for prompt in PROMPTS]
        await engine.close()
        await engine.close()
        return [await answered(ticket) for ticket in tickets]

    assert [out.finish_reason for out in run(ask())] == [Finish.ABORT] * len(PROMPTS)
    assert set(threading.enumerate()) == before
    assert engine.health() == ("closed", "it was closed")
    for use in (lambda: engine.submit(PROMPTS[0], LONG), lambda: engine.card, engine.stats):
        with pytest.raises(EngineError, match="closed"):
            use()
    with pytest.raises(EngineError, match="start is called once, on a new one"):
        run(engine.start())


def test_an_engine_that_was_not_started_says_so_and_closes(nano: Path, run: Run) -> None:
    engine = AsyncEngine(configured(nano))
    assert engine.health() == ("new", "not started")
    with pytest.raises(EngineError, match="the engine is new"):
        engine.submit(PROMPTS[0], LONG)
    run(engine.drain(1.0))
    run(engine.close())


def test_a_start_that_fails_raises_what_loading_raised(tmp_path: Path, run: Run) -> None:
    before = set(threading.enumerate())
    engine = AsyncEngine(configured(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="nowhere does not exist"):
        run(engine.start())
    status, reason = engine.health()
    assert status == "closed" and "nowhere does not exist" in reason
    run(engine.close())
    assert set(threading.enumerate()) == before


def test_an_engine_that_is_closed_while_it_starts_ends(nano: Path, run: Run) -> None:
    before = set(threading.enumerate())
    engine = AsyncEngine(configured(nano))

    async def ask() -> None:
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        assert engine.health().status == "starting"
        await engine.close()
        with pytest.raises(EngineError, match="closed while it started"):
            await start

    run(ask())
    assert engine.health().status == "closed"
    assert set(threading.enumerate()) == before


def test_an_engine_is_a_context(nano: Path, run: Run, alone: list[list[int]]) -> None:
    async def ask() -> list[int]:
        async with AsyncEngine(configured(nano)) as engine:
            return (await answered(engine.submit(PROMPTS[2], LONG))).token_ids

    assert run(ask()) == alone[2]
