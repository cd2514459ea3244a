"""Streams: chunks join to the answer, windows show what follows it, and a stream may end early or share the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from dlx import LLM, Chunk, Output, RequestError, SamplingParams
from dlx.request import Finish

L = 16
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
CASES = [
    SamplingParams(max_tokens=40),
    replace(LONG, max_nfe=4, threshold=0.6),
    replace(LONG, max_tokens=7, temperature=50.0, seed=1),  # bytes that are no text, cut within a character
]
PROMPTS = [[1, 267, 202, *random.Random(n).choices(range(36, 99), k=n)] for n in (0, 7, 12, 13, 24, 33)]


def at_rest(llm: LLM) -> bool:
    pool = llm.engine.scheduler.pool
    pool.check_invariants()
    return llm.engine.idle and pool.free == pool.total and bool(llm.engine.worker.buf.done.all())


def whole(chunks: list[Chunk]) -> Output:
    """The output in the last chunk, and in no other."""
    *body, last = chunks
    assert last.output is not None
    assert last.finish is last.output.finish_reason
    assert all(chunk.output is None and chunk.finish is None for chunk in body)
    assert {chunk.id for chunk in chunks} == {last.output.id}
    return last.output


@pytest.fixture(scope="module", params=["single_bd", "multi_bd"])
def two(request: pytest.FixtureRequest, nano: Path) -> Iterator[LLM]:
    """The nano model with two slots, by either policy."""
    with LLM(nano, policy=request.param, graphs="off", device="cpu", max_num_seqs=2) as llm:
        yield llm


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("params", CASES)
def test_chunks_join_to_the_answer(two: LLM, params: SamplingParams, watch: bool) -> None:
    for prompt in PROMPTS:
        (expected,) = two.generate(prompt, params)
        chunks = list(two.stream(prompt, params, watch))
        output = whole(chunks)
        assert output[1:7] == expected[1:7]  # all but the number, the timings and what was prefilled before
        assert output.stop == expected.stop
        assert "".join(chunk.text for chunk in chunks) == output.text
        assert [tok for chunk in chunks for tok in chunk.token_ids] == output.token_ids
    assert at_rest(two)


def test_without_parameters_the_defaults_hold(two: LLM) -> None:
    assert whole(list(two.stream(PROMPTS[1]))).token_ids == two.generate(PROMPTS[1])[0].token_ids


def test_a_stream_takes_every_form_of_prompt(two: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    for prompt in ("text", [72, 73], (72, 73), chat):
        assert whole(list(two.stream(prompt, LONG))).text == two.generate(prompt, LONG)[0].text  # type: ignore[arg-type]


def test_without_watch_windows_are_empty_and_chunks_bring_something(two: LLM) -> None:
    for prompt in PROMPTS:
        chunks = list(two.stream(prompt, LONG))
        assert all(chunk.window == [] for chunk in chunks)
        assert all(chunk.token_ids for chunk in chunks)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_watched_stream_has_a_chunk_a_forward(two: LLM, threshold: float) -> None:
    chunks = list(two.stream(PROMPTS[-1], replace(LONG, threshold=threshold), watch=True))
    assert len(chunks) == whole(chunks).nfe
    assert chunks[-1].window == []


def test_a_window_begins_after_what_is_committed_and_its_tokens_stay(two: LLM) -> None:
    """So it never shows the prompt; masks are in windows alone."""
    masks = 0
    for prompt in PROMPTS:
        chunks = list(two.stream(prompt, replace(LONG, threshold=0.7), watch=True))
        ids, n = whole(chunks).token_ids, 0
        for chunk in chunks[:-1]:
            n += len(chunk.token_ids)
            assert (len(prompt) + n + len(chunk.window)) % L == 0
            assert len(chunk.window) <= L * two.policy.N
            masks += chunk.window.count(two.card.mask_id)
            follows = zip(chunk.window, ids[n:])
            assert all(shown in (two.card.mask_id, tok) for shown, tok in follows)
        assert two.card.mask_id not in ids
    assert masks > 0


@pytest.mark.parametrize("watch", [False, True])
def test_a_stream_that_is_closed_early_frees_its_place(two: LLM, watch: bool) -> None:
    expected = two.generate(PROMPTS[3], LONG)[0].text
    for taken in range(3):
        stream = two.stream(PROMPTS[2], replace(LONG, max_tokens=64, threshold=1.0), watch)
        assert len(list(islice(stream, taken))) == taken
        stream.close()  # type: ignore[attr-defined]
        assert at_rest(two)
        assert two.generate(PROMPTS[3], LONG)[0].text == expected


def test_a_stream_whose_reader_fails_frees_its_place(two: LLM) -> None:
    stream = two.stream(PROMPTS[2], LONG)
    next(stream)
    with pytest.raises(ZeroDivisionError):
        stream.throw(ZeroDivisionError)  # type: ignore[attr-defined]
    assert at_rest(two)


def test_a_stream_that_is_refused_leaves_the_engine_as_it_was(two: LLM) -> None:
    for prompt in ("", [], [3], [320], [{"role": "user"}]):
        with pytest.raises(RequestError):
            next(two.stream(prompt))  # type: ignore[arg-type]
    assert at_rest(two)
    assert whole(list(two.stream("a", LONG))).finish_reason is Finish.LENGTH


@pytest.fixture
def patient(two: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The same; a reader who would wait for ever fails."""
    step, turns = two.engine.step, iter(range(500))

    def counted() -> list[Chunk]:
        assert next(turns, None) is not None, "500 steps, and no end"
        return step()

    monkeypatch.setattr(two.engine, "step", counted)
    return two


def test_streams_may_be_read_in_turns(patient: LLM) -> None:
    expected = [patient.generate(prompt, LONG)[0].text for prompt in PROMPTS[:3]]
    streams = [patient.stream(prompt, LONG, watch=True) for prompt in PROMPTS[:3]]  # more than there are slots
    texts, left = [""] * 3, {0, 1, 2}
    while left:
        for n in sorted(left):
            chunk = next(streams[n])
            texts[n] += chunk.text
            if chunk.output is not None:
                left.remove(n)
    assert texts == expected
    assert at_rest(patient)


def test_prompts_may_be_answered_while_a_stream_is_open(patient: LLM) -> None:
    expected = [patient.generate(prompt, LONG)[0].text for prompt in PROMPTS[:2]]
    stream = patient.stream(PROMPTS[0], LONG)
    first = next(stream)
    assert patient.generate(PROMPTS[1], LONG)[0].text == expected[1]
    assert first.text + "".join(chunk.text for chunk in stream) == expected[0]
    assert at_rest(patient)


def test_no_chunk_follows_the_last_one_of_a_request(nano: Path) -> None:
    with LLM(nano, graphs="off", device="cpu", max_num_seqs=2) as llm:
        engine = llm.engine
        engine.lag = 1
        short, _ = engine.add_all(
            [([5] * 16, SamplingParams(max_nfe=1)), ([5] * 16, SamplingParams(max_tokens=64, max_nfe=40))], watch=True
        )
        chunks = engine.step()  # leaves a launch unread
        while not engine.idle:
            chunks += engine.step()
        assert [c.finish is not None for c in chunks if c.id == short] == [True]


def test_an_interrupted_launch_loses_no_request(nano_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=24)
    expected = nano_llm.generate([5] * 9, params)[0].token_ids
    engine = nano_llm.engine
    (id,) = engine.add_all([([5] * 9, params)])
    launch = engine.worker.launch

    def fail(plan: object) -> None:
        monkeypatch.setattr(engine.worker, "launch", launch)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.worker, "launch", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    chunks = []
    while not engine.idle:
        chunks += engine.step()
    assert [c.output.token_ids for c in chunks if c.id == id and c.output] == [expected]
    engine.scheduler.pool.check_invariants()
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
