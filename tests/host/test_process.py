"""dlx as a guest of a process: it leaves the process as it is, works in any thread, and does not survive a fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from dlx import LLM, AsyncEngine, DecodeSession, EngineError, SamplingParams
from dlx.request import Finish
from tests.loops import answered, configured

LONG = SamplingParams(max_tokens=24, ignore_eos=True)
PROMPTS = [[72] * 9, [80] * 20]

GUEST = """
import asyncio, atexit, logging, os, signal, sys, threading
import torch
import torch._dynamo  # on import it registers an exit hook and names a cache folder in the environment
import dlx, dlx.llm, dlx.async_engine
from dlx.config import Config

def seen():
    logs = [logging.getLogger(), logging.getLogger("dlx")]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "logging": [(log.level, list(log.handlers), log.disabled) for log in logs],
        "at exit": atexit._ncallbacks(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
        "random": torch.get_rng_state().tolist(),
        "threads": threading.active_count(),
    }

async def serve(config):
    async with dlx.AsyncEngine(config) as engine:
        async for _ in engine.generate([72] * 9, params):
            pass

params = dlx.SamplingParams(max_tokens=8)
before = seen()
with dlx.LLM(sys.argv[1], device="cpu", graphs="off") as llm:
    llm.generate([72] * 9, params)
    list(llm.stream([72] * 9, params))
asyncio.run(serve(Config.from_args(sys.argv[1], device="cpu", graphs="off")))
after = seen()
print(*[name for name in before if before[name] != after[name]], sep="\\n")
"""


def test_engines_change_nothing_of_the_process(nano: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GUEST, str(nano)], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def served(nano: Path, n: int) -> list[int]:
    """One prompt answered by an engine of its own, on an event loop of its own."""

    async def ask() -> list[int]:
        async with AsyncEngine(configured(nano)) as engine:
            return (await answered(engine.submit(PROMPTS[n], LONG))).token_ids

    return asyncio.run(ask())


def told(nano: Path, n: int) -> list[int]:
    """The same by an LLM."""
    with LLM(nano, device="cpu", graphs="off", max_num_seqs=2) as llm:
        return llm.generate(PROMPTS[n], LONG)[0].token_ids


@pytest.mark.parametrize("way", [served, told])
def test_engines_live_side_by_side_in_any_thread(nano: Path, way: Callable[[Path, int], list[int]]) -> None:
    expected = [told(nano, n) for n in range(2)]
    got: dict[int, list[int]] = {}
    both = threading.Barrier(2)

    def work(n: int) -> None:
        both.wait()
        got[n] = way(nano, n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == expected


def test_two_engines_share_an_event_loop(nano: Path) -> None:
    async def ask() -> list[list[int]]:
        async with AsyncEngine(configured(nano)) as one, AsyncEngine(configured(nano)) as two:
            outputs = await asyncio.gather(*(answered(e.submit(p, LONG)) for e in (one, two) for p in PROMPTS))
            return [out.token_ids for out in outputs]

    assert asyncio.run(ask()) == [told(nano, n) for n in (0, 1, 0, 1)]


def in_a_fork(use: Callable[[], object]) -> str:
    """What the EngineError says that `use` raises in a forked child; empty if it raises none."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: this process has threads
        pid = os.fork()
    if not pid:
        try:
            use()
        except EngineError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def test_a_forked_process_is_told_to_build_its_own(nano_llm: LLM, nano: Path) -> None:
    word = "belongs to the process that built it"
    assert word in in_a_fork(lambda: nano_llm.generate([72], LONG))
    assert word in in_a_fork(lambda: next(nano_llm.stream([72], LONG)))

    async def ask() -> None:
        async with AsyncEngine(configured(nano)) as engine:
            assert word in in_a_fork(lambda: engine.submit([72], LONG))
            assert in_a_fork(lambda: engine.health()) == ""
            await answered(engine.submit([72], LONG))  # the parent's goes on

    asyncio.run(ask())
    assert nano_llm.generate([72], LONG)[0].tokens == 24


def test_a_clock_that_is_set_back_matters_to_nobody(nano_llm: LLM, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0)
    (output,) = nano_llm.generate([72] * 9, LONG)
    times = output.timings
    assert 0 <= times.admitted_s <= times.first_block_s <= times.total_s < 60
    assert served(nano, 0) == told(nano, 0)


def told_and_held(nano: Path) -> weakref.ref[object]:
    with LLM(nano, device="cpu", graphs="off") as llm:
        llm.generate(PROMPTS[0], LONG)
        return weakref.ref(llm.engine.worker)


def stepped_and_held(nano: Path) -> weakref.ref[object]:
    with DecodeSession(nano, device="cpu", graphs="off") as session:
        session.open(PROMPTS[0], LONG)
        session.step()
        return weakref.ref(session.engine.worker)


def served_and_held(nano: Path) -> weakref.ref[object]:
    async def ask() -> weakref.ref[object]:
        async with AsyncEngine(configured(nano)) as engine:
            await answered(engine.submit(PROMPTS[0], LONG))
            return weakref.ref(engine.engine.worker)

    return asyncio.run(ask())


def failed_and_held(nano: Path) -> weakref.ref[object]:
    with LLM(nano, device="cpu", graphs="off") as llm:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.engine.worker.net, "head", failing)
            patch.setattr("dlx.engine.log.disabled", True)  # pytest keeps what is logged, and its frames
            llm.engine.add_all([(PROMPTS[0], LONG)])
            assert [chunk.finish for chunk in llm.engine.step()] == [Finish.ERROR]
        return weakref.ref(llm.engine.worker)


def died_and_held(nano: Path) -> weakref.ref[object]:
    async def ask() -> weakref.ref[object]:
        async with AsyncEngine(configured(nano)) as engine:
            engine.engine.before_turn = failing
            with contextlib.suppress(EngineError):
                await answered(engine.submit(PROMPTS[0], LONG))
            return weakref.ref(engine.engine.worker)

    return asyncio.run(ask())


def failing() -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("use", [told_and_held, stepped_and_held, served_and_held, failed_and_held, died_and_held])
def test_what_is_closed_is_freed_at_once(nano: Path, use: Callable[[Path], weakref.ref[object]]) -> None:
    """Without the collector of cycles, which may not come for a long time."""
    use(nano)  # imports what is imported late: an error that is handled there holds frames
    gc.collect()
    gc.disable()
    try:
        assert use(nano)() is None
    finally:
        gc.enable()
