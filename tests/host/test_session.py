"""A session in the caller's loop: the ids that an LLM answers with, as events or in the caller's own buffers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dlx import LLM, DecodeSession, EngineError, RequestError, SamplingParams, ShapeError
from dlx.request import Finish
from dlx.session import Event, State

LONG = SamplingParams(max_tokens=40, ignore_eos=True, threshold=0.9)
PROMPTS = [[1, 267, 202, *random.Random(n).choices(range(36, 99), k=n)] for n in (0, 7, 12, 13, 24, 33)]


@pytest.fixture(scope="module")
def session(nano: Path) -> Iterator[DecodeSession]:
    """The nano model with two slots."""
    with DecodeSession(nano, graphs="off", device="cpu", max_num_seqs=2) as session:
        yield session


@pytest.fixture(scope="module")
def alone(nano: Path) -> list[list[int]]:
    """What an LLM answers to each prompt."""
    with LLM(nano, graphs="off", device="cpu", max_num_seqs=2) as llm:
        return [out.token_ids for out in llm.generate(PROMPTS, LONG)]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(session: DecodeSession) -> Iterator[None]:
    yield
    session.engine.scheduler.check_invariants()
    assert session.idle and session.engine.scheduler.pool.used == 0


class Said(NamedTuple):
    ids: list[int]
    end: str


def finished(session: DecodeSession) -> dict[int, Said]:
    """Step until nothing is open: what each request got."""
    ids: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    while not session.idle:
        for event in session.step():
            assert event.id not in ends, "an event after the last"
            ids.setdefault(event.id, []).extend(event.token_ids)
            if event.finish is not None:
                ends[event.id] = event.finish.name
    return {id: Said(ids[id], ends[id]) for id in ids}


def test_events_join_to_the_answers_of_an_llm(session: DecodeSession, alone: list[list[int]]) -> None:
    ids = [session.open(prompt, LONG) for prompt in PROMPTS]
    said = finished(session)
    assert [said[id] for id in ids] == [Said(answer, "LENGTH") for answer in alone]


def test_requests_may_come_between_steps(session: DecodeSession, alone: list[list[int]]) -> None:
    first = session.open(PROMPTS[4], LONG)
    began = session.step()
    second = session.open(PROMPTS[5], LONG)
    said = finished(session)
    assert [tok for event in began for tok in event.token_ids] + said[first].ids == alone[4]
    assert said[second].ids == alone[5]


def test_a_prompt_may_be_an_int32_tensor_and_no_other(session: DecodeSession, alone: list[list[int]]) -> None:
    id = session.open(torch.tensor(PROMPTS[1], dtype=torch.int32), LONG)
    assert finished(session)[id].ids == alone[1]
    for wrong in (torch.tensor(PROMPTS[1]), torch.tensor([PROMPTS[1]], dtype=torch.int32)):
        with pytest.raises(RequestError, match="pass a list of integers, or"):
            session.open(wrong, LONG)


def test_what_can_never_run_is_refused(session: DecodeSession) -> None:
    for prompt, params in (([], LONG), ([3], LONG), ([5], replace(LONG, max_tokens=0))):
        with pytest.raises(RequestError):
            session.open(prompt, params)


def test_a_closed_request_brings_no_event_and_changes_no_other(session: DecodeSession, alone: list[list[int]]) -> None:
    ids = [session.open(prompt, LONG) for prompt in PROMPTS[:4]]  # two run, two wait
    session.step()
    for id in (ids[0], ids[2], ids[0], 10**6):
        session.close(id)
    said = finished(session)
    assert set(said) <= {ids[1], ids[3]}
    assert said[ids[3]].ids == alone[3]


def test_stop_strings_work_without_text(session: DecodeSession, alone: list[list[int]], nano_llm: LLM) -> None:
    stop = nano_llm.tokenizer.decode(alone[2][5:7])
    (expected,) = nano_llm.generate(PROMPTS[2], replace(LONG, stop=(stop,)))
    id = session.open(PROMPTS[2], replace(LONG, stop=(stop,)))
    assert finished(session)[id] == Said(expected.token_ids, "STOP")


def test_no_text_is_made_where_nobody_asks_for_it(session: DecodeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object) -> None:
        raise AssertionError("text was decoded")

    monkeypatch.setattr(session.engine.tokenizer, "stream", made)
    id = session.open(PROMPTS[2], LONG)
    assert finished(session)[id].end == "LENGTH"


def test_a_step_that_fails_is_an_event(session: DecodeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: object) -> None:
        raise ValueError("boom")

    id = session.open(PROMPTS[2], LONG)
    with monkeypatch.context() as patch:
        patch.setattr(session.engine.worker, "launch", fail)
        assert session.step() == [Event(id, [], Finish.ERROR, "ValueError: boom")]


def test_a_session_starts_no_thread_and_closes_for_good(nano: Path) -> None:
    before = threading.enumerate()
    with DecodeSession(nano, graphs="off", device="cpu") as session:
        session.open(PROMPTS[0], LONG)
        session.step()
        assert threading.enumerate() == before
    session.close()
    session.close(0)
    for use in (session.step, lambda: session.open([5]), lambda: session.card, lambda: session.idle):
        with pytest.raises(EngineError, match="this session is closed"):
            use()


class Buffers(NamedTuple):
    requests: Tensor
    tokens: Tensor
    lengths: Tensor
    states: Tensor


def buffers(R: int, K: int) -> Buffers:
    """The caller's, filled with what is no id."""
    return Buffers(*(torch.full(shape, -7, dtype=torch.int32) for shape in ((R,), (R, K), (R,), (R,))))


@pytest.mark.parametrize(("R", "K"), [(2, 64), (1, 64), (8, 3), (1, 1)])
def test_buffers_of_any_size_hold_what_events_tell(
    session: DecodeSession, alone: list[list[int]], R: int, K: int
) -> None:
    ids = [session.open(prompt, LONG) for prompt in PROMPTS]
    got: dict[int, list[int]] = {id: [] for id in ids}
    ends: dict[int, int] = {}
    into = buffers(R, K)
    while not session.idle:
        for t in into:
            t.fill_(-7)
        n = session.step_into(*into)
        assert 0 <= n <= R
        for i in range(n):
            id, length = int(into.requests[i]), int(into.lengths[i])
            assert id not in ends
            got[id] += into.tokens[i, :length].tolist()
            assert bool((into.tokens[i, length:] == -7).all())
            if into.states[i] != State.RUNNING:
                ends[id] = int(into.states[i])
        assert all(bool((t[n:] == -7).all()) for t in into)
    assert [got[id] for id in ids] == alone
    assert ends == dict.fromkeys(ids, State.LENGTH)


def test_every_end_has_a_number() -> None:
    assert {state.name for state in State} == {"RUNNING", *(finish.name for finish in Finish)}
    assert [int(state) for state in State] == list(range(8))


@pytest.mark.parametrize(
    ("at", "tensor"),
    [
        (0, torch.zeros(2, dtype=torch.int64)),
        (1, torch.zeros(2, 4)),
        (1, torch.zeros(8, dtype=torch.int32)),
        (1, torch.zeros(2, 0, dtype=torch.int32)),
        (2, torch.zeros(3, dtype=torch.int32)),
        (3, torch.zeros(2, 1, dtype=torch.int32)),
    ],
    ids=str,
)
def test_buffers_that_cannot_be_written_are_refused_before_the_step(
    session: DecodeSession, at: int, tensor: Tensor
) -> None:
    id = session.open(PROMPTS[0], LONG)
    into = [*buffers(2, 4)]
    into[at] = tensor
    with pytest.raises(ShapeError, match=r"int32|one R and one K"):
        session.step_into(*into)
    assert id in finished(session)
