"""What runs beside a request changes nothing of it: prompts in pieces, and launches of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlx import LLM, SamplingParams
from dlx.graphs.policies import POLICIES
from dlx.graphs.shapes import plan
from dlx.request import Output

DRAW = Random(3)
PROMPTS = [DRAW.choices(range(36, 66), k=n) for n in (3, 200, 17, 64, 1, 130, 33, 90)]
PARAMS = [
    SamplingParams(max_tokens=DRAW.randint(1, 40), ignore_eos=True, temperature=n % 2 * 0.8, seed=n, threshold=0.5)
    for n in range(len(PROMPTS))
]
ROOM = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "prefix_caching": False}


def said(outputs: list[Output]) -> list[tuple[list[int], int]]:
    return [(output.token_ids, output.nfe) for output in outputs]


def alone(llm: LLM) -> list[tuple[list[int], int]]:
    return [said(llm.generate([p], q))[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture(scope="module", params=["multi_bd", "dmax"])
def still(request: pytest.FixtureRequest, nano: Path) -> Iterator[LLM]:
    """A model of one shape of launch; `dmax` shows the last bit of a confidence in its tokens."""
    with LLM(nano, policy=request.param, graphs="off", batch_invariant=True, max_num_seqs=5, **ROOM) as llm:
        yield llm


def test_launches_of_one_shape_give_the_same_tokens_alone_and_in_any_batch(still: LLM) -> None:
    solo = alone(still)
    assert said(still.generate(PROMPTS, PARAMS)) == solo
    assert said(still.generate(PROMPTS[::-1], PARAMS[::-1])) == solo[::-1]


def test_one_shape_is_the_largest_of_rows_and_of_tokens() -> None:
    many, one = plan(12, 300, 4, 16), plan(12, 300, 4, 16, invariant=True)
    assert (one.rows, one.tokens) == ((12,), plan(1, 300, 4, 16).tokens[-1:])
    assert one[2:] == many[2:]


@pytest.mark.long
def test_compiled_launches_of_one_shape_too(nano: Path) -> None:
    with LLM(nano, policy="single_bd", graphs="compile", batch_invariant=True, max_num_seqs=3, **ROOM) as llm:
        assert said(llm.generate(PROMPTS, PARAMS)) == alone(llm)
        assert len(llm.engine.worker.graphs._run) == 2


@pytest.mark.parametrize("budget", [1, 64, 100])
def test_prompts_in_pieces_give_the_same_tokens(nano: Path, budget: int) -> None:
    answers: list[Any] = []
    for most in (2048, budget):
        with LLM(nano, graphs="off", max_num_batched_tokens=most, max_num_seqs=5, **ROOM) as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
        answers.append(said(outputs))
    assert answers[0] == answers[1]
    assert [o.prefill_forwards for o in outputs][1] >= 200 // 64


def test_others_decode_while_a_prompt_is_prefilled(nano: Path) -> None:
    with LLM(nano, graphs="off", policy=POLICIES["fixed"], max_num_batched_tokens=64, max_num_seqs=2, **ROOM) as llm:
        first, second = llm.engine.add_all([(PROMPTS[0], PARAMS[0]), (PROMPTS[1], PARAMS[1])])
        said: list[int] = []
        while second not in said:
            said += [chunk.id for chunk in llm.engine.step() if chunk.token_ids]
            if not said and (request := llm.engine.scheduler.running.get(1)) is not None and not request.decodes:
                assert llm.engine.scheduler.running[0].nfe > 0
        assert said[0] == first
