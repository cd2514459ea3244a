"""A step that fails ends the requests that were in it, with the cause in a line; all else goes on as if it had not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlx import LLM, Chunk, EngineError, SamplingParams
from dlx.engine import FAILURES, Engine
from dlx.request import Finish
from tests.loops import read_late

LONG = SamplingParams(max_tokens=40, ignore_eos=True, threshold=0.9)
PROMPTS = [[72 + n] * (9 + 7 * n) for n in range(4)]
PLACES = {
    "plan": lambda engine: (engine.scheduler, "plan"),
    "launch": lambda engine: (engine.worker, "launch"),
    "forward": lambda engine: (engine.worker.net, "forward"),
    "harvest": lambda engine: (engine.worker, "harvest"),
    "take": lambda engine: (engine.scheduler, "take"),
}


@pytest.fixture(scope="module")
def llm(nano: Path) -> Iterator[LLM]:
    """The nano model with two slots."""
    with LLM(nano, graphs="off", device="cpu", max_num_seqs=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """What each prompt gets when nothing fails."""
    return [llm.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM, alone: list[list[int]]) -> Iterator[None]:
    yield
    pool = llm.engine.scheduler.pool
    pool.check_invariants()
    assert llm.engine.idle and pool.free == pool.total and bool(llm.engine.worker.buf.done.all())
    assert llm.generate(PROMPTS[0], LONG)[0].token_ids == alone[0]


class Fault:
    """Makes a method raise at some of its calls; `before` runs it first, so that the error comes when it has acted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __call__(
        self, where: tuple[Any, str], error: BaseException, times: int = 1, after: bool = False, calls: int = 0
    ) -> None:
        target, name = where
        real: Callable[..., Any] = getattr(target, name)
        left, skip = iter([error] * times), iter(range(calls))

        def faulty(*args: Any, **options: Any) -> Any:
            passes = next(skip, None) is not None
            done = real(*args, **options) if passes or after else None
            wrong = None if passes else next(left, None)
            if wrong is not None:
                raise wrong
            return done if passes or after else real(*args, **options)

        self._patch.setattr(target, name, faulty)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


def finished(engine: Engine, chunks: list[Chunk] | None = None) -> dict[int, Chunk]:
    """The last chunk of every request that there is."""
    chunks = list(chunks or ())
    while not engine.idle:
        chunks += engine.step()
    last = {chunk.id: chunk for chunk in chunks if chunk.finish is not None}
    assert len(last) == sum(chunk.finish is not None for chunk in chunks), "a request ended twice"
    return last


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_was_in_the_step_fails_and_what_waits_goes_on(
    llm: LLM, alone: list[list[int]], fault: Fault, place: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine
    if late:
        read_late(engine, monkeypatch)
    ids = engine.add_all([(prompt, LONG) for prompt in PROMPTS])
    chunks = engine.step()
    fault(PLACES[place](engine), ValueError("boom\nof two lines"))
    last = finished(engine, chunks)
    for id in ids[:2]:
        assert (last[id].finish, last[id].error, last[id].token_ids) == (Finish.ERROR, "ValueError: boom", [])
    for id, expected in zip(ids[2:], alone[2:]):
        output = last[id].output
        assert output is not None and output.token_ids == expected


def test_a_step_that_fails_after_it_has_acted_ends_its_requests_once(llm: LLM, fault: Fault) -> None:
    """Requests that the step finished have no last chunk yet: they fail too."""
    engine = llm.engine
    ids = engine.add_all([(PROMPTS[0], replace(LONG, max_nfe=1)), (PROMPTS[1], LONG)])
    fault((engine.scheduler, "take"), ValueError("late"), after=True)
    last = finished(engine)
    assert [last[id].finish for id in ids] == [Finish.ERROR] * 2


def test_what_a_launch_before_has_finished_does_not_fail(
    llm: LLM, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine
    read_late(engine, monkeypatch)
    short, long = engine.add_all([(PROMPTS[0], replace(LONG, max_nfe=1)), (PROMPTS[1], LONG)])
    assert engine.step() == []  # the launch that finishes the first is not read
    fault((engine.worker, "launch"), ValueError("boom"))
    last = finished(engine)
    assert (last[short].finish, last[long].finish) == (Finish.MAX_NFE, Finish.ERROR)


def test_the_answer_so_far_is_in_the_last_chunk(llm: LLM, alone: list[list[int]], fault: Fault) -> None:
    engine = llm.engine
    (id,) = engine.add_all([(PROMPTS[1], LONG)])
    chunks: list[Chunk] = []
    while not chunks:
        chunks += engine.step()
    fault((engine.worker, "launch"), ValueError("boom"))
    output = finished(engine)[id].output
    assert output is not None and 0 < output.tokens < 40
    assert output.token_ids == alone[1][: output.tokens] == chunks[0].token_ids
    assert output.text == chunks[0].text
    assert output.finish_reason is Finish.ERROR


def test_a_text_that_cannot_be_told_fails_its_request_alone(llm: LLM, alone: list[list[int]], fault: Fault) -> None:
    engine = llm.engine
    first, second = engine.add_all([(prompt, LONG) for prompt in PROMPTS[:2]])
    fault((engine._answers._open[first][1], "add"), OverflowError("out of range"))
    last = finished(engine)
    assert (last[first].finish, last[first].error) == (Finish.ERROR, "OverflowError: out of range")
    output = last[second].output
    assert output is not None and output.token_ids == alone[1]


def test_a_request_whose_text_cannot_be_ended_is_aborted_all_the_same(llm: LLM, fault: Fault) -> None:
    engine = llm.engine
    (id,) = engine.add_all([(PROMPTS[0], LONG)])
    engine.step()
    fault((engine._answers._open[id][1], "add"), OverflowError("out of range"))
    chunk = engine.abort(id)
    assert chunk is not None and chunk.output is not None
    assert (chunk.finish, chunk.text) == (Finish.ABORT, "")
    assert engine.idle
    engine.scheduler.check_invariants()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()], ids=repr)
def test_a_step_without_memory_fails_its_batch_however_often(
    llm: LLM, alone: list[list[int]], fault: Fault, error: Exception
) -> None:
    engine = llm.engine
    fault((engine.worker, "launch"), error, times=FAILURES + 1)
    for _ in range(FAILURES + 1):
        (id,) = engine.add_all([(PROMPTS[0], LONG)])
        assert finished(engine)[id].finish is Finish.ERROR
    (id,) = engine.add_all([(PROMPTS[0], LONG)])
    output = finished(engine)[id].output
    assert output is not None and output.token_ids == alone[0]


def test_single_failures_never_add_up(llm: LLM, fault: Fault) -> None:
    engine = llm.engine
    for _ in range(FAILURES + 1):
        (id,) = engine.add_all([(PROMPTS[0], LONG)])
        fault((engine.worker, "launch"), ValueError("boom"), calls=1)
        assert finished(engine)[id].finish is Finish.ERROR


@pytest.fixture
def other(nano: Path) -> Iterator[Engine]:
    """An engine to be broken."""
    with LLM(nano, graphs="off", device="cpu", max_num_seqs=2) as llm:
        yield llm.engine


def test_steps_that_fail_one_after_the_other_break_the_engine(other: Engine, fault: Fault) -> None:
    ids = other.add_all([(prompt, LONG) for prompt in PROMPTS * FAILURES])
    fault((other.worker, "launch"), ValueError("boom"), times=99)
    last = finished(other)
    assert [last[id].error for id in ids[: 2 * FAILURES]] == ["ValueError: boom"] * 2 * FAILURES
    assert {last[id].error for id in ids[2 * FAILURES :]} == {
        f"{FAILURES} steps in a row failed, the last with ValueError: boom"
    }
    for use in (other.step, lambda: other.add_all([(PROMPTS[0], LONG)])):
        with pytest.raises(EngineError, match="in a row failed, the last with ValueError: boom; build a new engine"):
            use()


def test_a_device_that_does_not_answer_breaks_the_engine_at_once(other: Engine, fault: Fault) -> None:
    ids = other.add_all([(prompt, LONG) for prompt in PROMPTS])
    other.step()
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    fault((other.worker, "launch"), lost)
    fault((other.worker, "stop"), lost, times=99)
    last = finished(other)
    assert [last[id].finish for id in ids] == [Finish.ERROR] * 4
    assert "the device does not answer: RuntimeError: CUDA error" in str(last[ids[3]].error)
    with pytest.raises(EngineError, match="illegal memory access was encountered; build a new engine"):
        other.step()


@pytest.mark.parametrize("place", ["launch", "harvest"])
def test_an_interrupt_passes_through_and_costs_no_request_anything(
    llm: LLM, alone: list[list[int]], fault: Fault, place: str
) -> None:
    engine = llm.engine
    ids = engine.add_all([(prompt, LONG) for prompt in PROMPTS[:3]])
    chunks = engine.step()
    fault(PLACES[place](engine), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    last = finished(engine, chunks)
    assert [out.token_ids for id in ids if (out := last[id].output)] == alone[:3]


def test_after_an_interrupt_what_is_unread_is_read_before_more_is_planned(
    llm: LLM, alone: list[list[int]], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are given for one launch that is unread: a row with more of them would run on in pages of others."""
    engine, unread = llm.engine, list[int]()
    read_late(engine, monkeypatch)
    ids = engine.add_all([(prompt, LONG) for prompt in PROMPTS[:2]])
    chunks = engine.step()
    for _ in range(2):
        fault((engine.worker, "harvest"), KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    plan = engine.scheduler.plan
    monkeypatch.setattr(engine.scheduler, "plan", lambda: (unread.append(engine.worker.in_flight), plan())[1])
    last = finished(engine, chunks)
    assert max(unread) == 1
    assert [out.token_ids for id in ids if (out := last[id].output)] == alone[:2]


def test_no_more_launches_of_prompts_alone_are_sent_ahead_than_of_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a long prompt is on the device before the host looks up, and an abort of it comes too late."""
    engine = llm.engine
    read_late(engine, monkeypatch)
    monkeypatch.setattr(engine.scheduler, "budget", 64)
    (id,) = engine.add_all([([72] * 400, LONG)])
    for _ in range(3):
        engine.step()
        assert engine.worker.in_flight == 1
    assert engine.scheduler.running[0].filled == 192
    engine.abort(id)


def test_prompts_that_are_prefilled_do_not_hide_that_every_step_fails(other: Engine, fault: Fault) -> None:
    other.scheduler.budget = 64
    ids = other.add_all([([72] * 100, LONG)] * 2 * FAILURES)
    fault((other.worker.net, "head"), RuntimeError("boom"), times=99)
    last = finished(other)
    assert [last[id].finish for id in ids] == [Finish.ERROR] * len(ids)
    with pytest.raises(EngineError, match=f"{FAILURES} steps in a row failed"):
        other.step()


def test_an_interrupt_while_results_are_booked_ends_their_requests(llm: LLM, fault: Fault) -> None:
    engine = llm.engine
    ids = engine.add_all([(prompt, LONG) for prompt in PROMPTS[:2]])
    fault((engine.scheduler, "take"), KeyboardInterrupt(), after=True)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    last = finished(engine)
    assert [last[id].finish for id in ids] == [Finish.ERROR] * 2


def test_generate_names_the_cause_and_drops_the_rest(llm: LLM, fault: Fault) -> None:
    cause = ValueError("boom")
    fault((llm.engine.worker, "launch"), cause)
    with pytest.raises(EngineError, match=r"a step failed, and the request with it \(ValueError: boom\)") as caught:
        llm.generate(PROMPTS, LONG)
    assert caught.value.__cause__ is cause


def test_streams_of_the_step_name_the_cause_and_the_next_one_is_answered(
    llm: LLM, alone: list[list[int]], fault: Fault
) -> None:
    first, second, third = (llm.stream(prompt, LONG) for prompt in PROMPTS[1:])
    next(first)
    fault((llm.engine.worker, "launch"), ValueError("boom"))
    for stream in (second, first):  # the first to read takes the step that fails
        with pytest.raises(EngineError, match="ValueError: boom"):
            next(stream)
    assert [chunk.output.token_ids for chunk in third if chunk.output] == [alone[3]]
