"""A fault at any call of what makes a step, while prompts come in pieces, rows are preempted and pages are shared."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dlx import LLM, Chunk, SamplingParams
from dlx.engine import Engine
from dlx.pages import PagePool
from dlx.request import Finish
from dlx.scheduler import Scheduler
from tests.loops import read_late

pytestmark = pytest.mark.slow

LONG = SamplingParams(max_tokens=90, ignore_eos=True, threshold=0.4)
SHARED = random.Random(5).choices(range(36, 99), k=17)  # a page that prompts begin with
PROMPTS = [SHARED, [72] * 3, SHARED + [80] * 5, [90] * 30]
PLACES: dict[str, Callable[[Engine], tuple[object, str]]] = {
    "plan": lambda engine: (engine.scheduler, "plan"),
    "publish": lambda engine: (engine.scheduler.pool, "publish"),
    "launch": lambda engine: (engine.worker, "launch"),
    "leave": lambda engine: (engine.worker.rows, "leave"),
    "enter": lambda engine: (engine.worker.rows, "enter"),
    "replay": lambda engine: (engine.worker.graphs, "replay"),
    "harvest": lambda engine: (engine.worker, "harvest"),
    "take": lambda engine: (engine.scheduler, "take"),
}


@pytest.fixture(scope="module", params=["now", "late"])
def llm(request: pytest.FixtureRequest, nano: Path) -> Iterator[LLM]:
    """The nano model with three slots, pages for little more than one request, and prefills of 16 tokens."""
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 128, "max_num_batched_tokens": 16}
    settings["num_pages"] = 12 if request.param == "late" else 11
    with LLM(nano, graphs="off", device="cpu", **settings) as llm, pytest.MonkeyPatch.context() as patch:
        if request.param == "late":
            read_late(llm.engine, patch)
        yield llm


@pytest.fixture(scope="module")
def alone(nano: Path) -> list[list[int]]:
    """What each prompt gets with room for all, and nothing kept of those before."""
    with LLM(nano, graphs="off", device="cpu", prefix_caching=False) as llm:
        return [llm.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]


def at_call(n: int, real: Callable[..., Any], error: BaseException, after: bool) -> Callable[..., Any]:
    """A method that raises at its call n, before it acts or after."""
    calls = iter(range(10**6))

    def faulty(*args: Any, **options: Any) -> Any:
        now = next(calls) == n
        if now and not after:
            raise error
        result = real(*args, **options)
        if now:
            raise error
        return result

    return faulty


def outcome(engine: Engine, ids: list[int], chunks: Iterable[Chunk] = ()) -> list[list[int] | Finish]:
    """Step to the end, through interrupts: each request's ids, or how else it ended; each ends once."""
    told = list(chunks)
    for _ in range(500):
        if engine.idle:
            break
        with contextlib.suppress(KeyboardInterrupt):
            told += engine.step()
    last = {chunk.id: chunk.output for chunk in told if chunk.output is not None}
    assert len(last) == len(ids) == sum(chunk.finish is not None for chunk in told)
    ends = [last[id] for id in ids]
    return [end.token_ids if end.finish_reason is Finish.LENGTH else end.finish_reason for end in ends]


def test_requests_are_preempted_and_pages_are_shared_while_faults_come(llm: LLM, alone: list[list[int]]) -> None:
    """What the other tests rest on."""
    scheduler = llm.engine.scheduler
    before = scheduler.preemptions, scheduler.prefix_hits
    assert outcome(llm.engine, llm.engine.add_all([(prompt, LONG) for prompt in PROMPTS])) == alone
    assert scheduler.preemptions > before[0] and scheduler.prefix_hits > before[1]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", PLACES)
def test_each_request_ends_as_alone_or_as_failed_and_nothing_stays_behind(
    llm: LLM, alone: list[list[int]], place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine
    target, name = PLACES[place](engine)
    failed = 0
    for n in (1, 4, 8):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, at_call(n, getattr(target, name), error, after=n == 4))
            got = outcome(engine, engine.add_all([(prompt, LONG) for prompt in PROMPTS]))
        failed += got.count(Finish.ERROR)
        assert [ids for ids, expected in zip(got, alone) if ids not in (expected, Finish.ERROR)] == []
        engine.scheduler.check_invariants()
        assert engine.idle and engine.scheduler.pool.used == 0 and not engine.worker.rows._kept
        assert bool(engine.worker.buf.done.all())
    assert failed > 0 or isinstance(error, KeyboardInterrupt)
    assert outcome(engine, engine.add_all([(prompt, LONG) for prompt in PROMPTS])) == alone


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_row_that_gave_way_in_half_a_plan_runs_no_more(
    llm: LLM, alone: list[list[int]], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are others' from then on."""
    engine = llm.engine
    preempt = at_call(0, engine.scheduler._preempt, error, after=True)
    ids, chunks = engine.add_all([(prompt, LONG) for prompt in PROMPTS]), list[Chunk]()
    before = engine.scheduler.preemptions
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "_preempt", preempt)
        while engine.scheduler.preemptions == before:
            with contextlib.suppress(KeyboardInterrupt):
                chunks += engine.step()
    assert bool(engine.worker.buf.done.all())
    got = outcome(engine, ids, chunks)
    assert [ids for ids, expected in zip(got, alone) if ids not in (expected, Finish.ERROR)] == []
    assert Finish.ERROR in got and engine.scheduler.pool.used == 0 and not engine.worker.rows._kept


class Lines:
    """Counts the lines of functions as they run, and interrupts at one of its runs; usable once."""

    def __init__(self, functions: Iterable[Callable[..., Any]], line: int = 0, run: int = 0) -> None:
        self._codes = {function.__code__ for function in functions}
        self.line, self.run = line, run
        self.seen: Counter[int] = Counter()

    def _look(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.seen[frame.f_lineno] += 1
            if frame.f_lineno == self.line and self.seen[self.line] == self.run:
                raise KeyboardInterrupt
        return self._look

    def __enter__(self) -> Lines:
        sys.settrace(lambda frame, *_: self._look if frame.f_code in self._codes else None)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


@pytest.mark.parametrize(
    "functions",
    [
        (PagePool.allocate, PagePool._evicted, PagePool.publish),
        (PagePool.share, PagePool.release),
        (Scheduler._admit, Scheduler._preempt),
        (Scheduler._end, Scheduler._leave),
        (Engine.add, Engine._launch, Engine._take),
    ],
    ids=lambda functions: functions[0].__qualname__,
)
def test_an_interrupt_between_any_two_lines_of_bookkeeping_loses_neither_page_nor_slot(
    llm: LLM, alone: list[list[int]], functions: tuple[Callable[..., Any], ...]
) -> None:
    engine, draw = llm.engine, random.Random(1)
    asked = [(prompt, LONG) for prompt in PROMPTS]
    with Lines(functions) as lines:
        assert outcome(engine, engine.add_all(asked)) == alone
    for line, runs in sorted(lines.seen.items())[draw.randrange(3) :: 3]:
        ids, chunks = list[int](), list[Chunk]()
        with contextlib.suppress(KeyboardInterrupt), Lines(functions, line, draw.randint(1, runs)):
            ids = engine.add_all(asked)
            while not engine.idle:
                chunks += engine.step()
        got = outcome(engine, ids, chunks)
        assert [ids for ids, expected in zip(got, alone) if ids not in (expected, Finish.ERROR)] == []
        engine.scheduler.check_invariants()
        assert engine.idle and engine.scheduler.pool.used == 0 and not engine.worker.rows._kept
        assert bool(engine.worker.buf.done.all()) and not engine._answers._open
    assert outcome(engine, engine.add_all(asked)) == alone


def test_an_abort_before_any_turn_changes_no_other(llm: LLM, alone: list[list[int]]) -> None:
    engine, ended = llm.engine, set()
    for turn in range(0, 24, 3):
        ids = engine.add_all([(prompt, LONG) for prompt in PROMPTS])
        chunks = [chunk for _ in range(turn) for chunk in engine.step()]
        last = engine.abort(ids[turn % 4])
        left = outcome(engine, ids, [*chunks, *([last] if last else [])])
        ended.add(left[turn % 4] is Finish.ABORT)
        assert [got for n, (got, expected) in enumerate(zip(left, alone)) if n != turn % 4 and got != expected] == []
        engine.scheduler.check_invariants()
        assert engine.scheduler.pool.used == 0 and bool(engine.worker.buf.done.all())
    assert True in ended
