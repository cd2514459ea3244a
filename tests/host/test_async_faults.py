"""Steps that fail, hang or kill the engine's thread: who waits is told at once, who asks next is refused or served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlx import LLM, AsyncEngine, Chunk, EngineError, SamplingParams
from dlx.async_engine import Limits
from dlx.engine import FAILURES
from dlx.request import Finish
from dlx.ticket import Ticket
from tests.loops import Gate, Run, answered, at_rest, configured, read

LONG = SamplingParams(max_tokens=40, ignore_eos=True, threshold=0.9)
PROMPTS = [[72 + n] * (9 + 7 * n) for n in range(4)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs coroutines on one event loop, each for a minute at most."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(scope="module")
def alone(nano: Path) -> list[list[int]]:
    """What each prompt gets when nothing else runs, in the caller's thread."""
    with LLM(nano, device="cpu", graphs="off", max_num_seqs=2) as llm:
        return [llm.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]


@pytest.fixture
def start(nano: Path, run: Run) -> Iterator[Callable[..., AsyncEngine]]:
    """Starts an engine with two slots and these limits."""
    engines: list[AsyncEngine] = []

    def start(**limits: Any) -> AsyncEngine:
        engines.append(AsyncEngine(configured(nano), Limits(**limits)))
        run(engines[-1].start())
        return engines[-1]

    yield start
    for engine in engines:
        run(engine.close())


def failing(error: BaseException, times: int) -> Callable[..., None]:
    """A method that raises so many times, and then does nothing."""
    left = iter([error] * times)

    def fail(*_: object) -> None:
        for wrong in left:
            raise wrong

    return fail


async def ends(tickets: list[Ticket]) -> list[Chunk | str]:
    """The last chunk of each, or what reading it raised."""

    async def end(ticket: Ticket) -> Chunk | str:
        try:
            return (await read(ticket))[-1]
        except EngineError as error:
            return str(error)

    return await asyncio.gather(*map(end, tickets))


def test_a_step_that_fails_ends_its_requests_and_the_engine_stays(
    start: Callable[..., AsyncEngine], run: Run, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    launch = engine.engine.worker.launch

    def fail(plan: object) -> None:
        monkeypatch.setattr(engine.engine.worker, "launch", launch)
        raise ValueError("boom")

    async def ask() -> list[Chunk | str]:
        with Gate(engine) as gate:
            tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS]
            await gate.held()
            monkeypatch.setattr(engine.engine.worker, "launch", fail)
            gate.open()
            return await ends(tickets)

    *failed, third, fourth = run(ask())
    assert [(c.finish, c.error) for c in failed] == [(Finish.ERROR, "ValueError: boom")] * 2
    assert [third.output.token_ids, fourth.output.token_ids] == alone[2:]
    assert engine.health() == ("ready", "")
    assert engine.stats().finished == {"error": 2, "length": 2}
    assert run(answered(engine.submit(PROMPTS[0], LONG))).token_ids == alone[0]
    assert at_rest(engine)


def test_steps_that_fail_again_and_again_make_the_engine_unhealthy(
    start: Callable[..., AsyncEngine], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    monkeypatch.setattr(engine.engine.worker, "launch", failing(ValueError("boom"), 99))

    async def ask() -> list[Chunk | str]:
        told = await ends([engine.submit(prompt, LONG) for prompt in PROMPTS * FAILURES])
        await engine._over.wait()
        return told

    assert all(isinstance(end, Chunk) and end.finish is Finish.ERROR for end in run(ask()))
    status, reason = engine.health()
    assert status == "unhealthy" and f"{FAILURES} steps in a row failed, the last with ValueError: boom" in reason
    with pytest.raises(EngineError, match="is unhealthy and takes no requests"):
        engine.submit(PROMPTS[0], LONG)


def test_a_lost_device_ends_all_there_are_and_makes_the_engine_unhealthy(
    start: Callable[..., AsyncEngine], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    async def ask() -> list[Chunk | str]:
        with Gate(engine) as gate:
            tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS]
            await gate.held(1)
            monkeypatch.setattr(engine.engine.worker, "launch", failing(lost, 99))
            monkeypatch.setattr(engine.engine.worker, "stop", failing(lost, 99))
            gate.open()
            told = await ends(tickets)
            await engine._over.wait()
            return told

    assert all(isinstance(end, Chunk) and "illegal memory access" in str(end.error) for end in run(ask()))
    assert engine.health().status == "unhealthy"
    assert "the device does not answer" in engine.health().reason


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), ValueError("in the thread")], ids=repr)
def test_a_thread_that_dies_fails_those_who_wait(
    start: Callable[..., AsyncEngine], run: Run, error: BaseException
) -> None:
    engine = start()

    async def ask() -> list[Chunk | str]:
        tickets = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        engine.engine.before_turn = failing(error, 1)
        return await ends(tickets)

    assert [end for end in run(ask()) if isinstance(end, str)] == [
        f"the engine failed: {type(error).__name__}: {error}"
    ] * 4
    assert engine.health().status == "unhealthy"
    assert run(engine.drain(1.0)) is None


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """What a turn waits for until the test is over."""
    over = threading.Event()

    def hanging_step() -> None:
        over.wait()

    yield hanging_step
    over.set()


def test_a_step_that_hangs_is_told_with_where_it_stands(
    start: Callable[..., AsyncEngine], run: Run, hang: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = start(watchdog_s=2.0)
    engine.engine.before_turn = hang

    async def ask() -> list[Chunk | str]:
        return await ends([engine.submit(prompt, LONG) for prompt in PROMPTS])

    assert run(ask()) == ["the engine failed: a step takes longer than watchdog_s=2"] * 4
    assert engine.health() == ("unhealthy", "a step takes longer than watchdog_s=2")
    with pytest.raises(EngineError, match="unhealthy and takes no requests"):
        engine.submit(PROMPTS[0], LONG)
    run(engine.close())  # it does not wait for the thread
    assert engine.health() == ("closed", "a step takes longer than watchdog_s=2")
    assert capfd.readouterr().err.count("hanging_step") == 1


def test_whoever_asks_for_the_health_looks_at_the_clock(
    start: Callable[..., AsyncEngine], run: Run, hang: Callable[[], None]
) -> None:
    """A monitor that looks every few seconds is not needed to see a step that hangs."""
    engine = start(watchdog_s=3600.0)

    async def ask() -> None:
        with Gate(engine) as gate:
            engine.submit(PROMPTS[0], LONG)
            await gate.held()
            assert engine.health() == ("ready", "")
            engine.limits = Limits(watchdog_s=0.0)
            assert engine.health().status == "unhealthy"

    run(ask())


def test_a_thread_that_comes_back_ends_and_harms_nobody(start: Callable[..., AsyncEngine], run: Run) -> None:
    engine = start()
    thread = engine._thread
    assert thread is not None

    async def ask() -> None:
        with Gate(engine) as gate:
            ticket = engine.submit(PROMPTS[0], LONG)
            await gate.held()
            engine.limits = Limits(watchdog_s=0.0)
            assert engine.health().status == "unhealthy"
            with pytest.raises(EngineError, match="a step takes longer"):
                await read(ticket)
        await asyncio.to_thread(thread.thread.join)

    run(ask())
    assert engine.stats().running == 0


def test_a_close_does_not_wait_for_a_step_that_hangs(
    start: Callable[..., AsyncEngine], run: Run, hang: Callable[[], None]
) -> None:
    engine, held = start(watchdog_s=1.0), asyncio.Event()

    async def ask() -> list[Chunk | str]:
        loop = asyncio.get_running_loop()

        def stand() -> None:
            loop.call_soon_threadsafe(held.set)
            hang()

        engine.engine.before_turn = stand
        ticket = engine.submit(PROMPTS[0], LONG)
        await held.wait()
        await engine.close()
        return await ends([ticket])

    assert run(ask()) == ["the engine failed: a step takes longer than watchdog_s=1"]
    assert engine.health() == ("closed", "a step takes longer than watchdog_s=1")


def test_a_thread_that_dies_while_it_is_closed_fails_those_who_wait(
    start: Callable[..., AsyncEngine], run: Run
) -> None:
    engine, held, go = start(), asyncio.Event(), threading.Event()

    async def ask() -> list[Chunk | str]:
        loop = asyncio.get_running_loop()

        def die() -> None:
            loop.call_soon_threadsafe(held.set)
            go.wait()
            raise RuntimeError("the device is lost")

        engine.engine.before_turn = die
        ticket = engine.submit(PROMPTS[0], LONG)
        await held.wait()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        go.set()
        await closing
        return await ends([ticket])

    assert run(ask()) == ["the engine failed: RuntimeError: the device is lost"]
