"""A pool so small that requests give way to each other changes no answer, whatever the policy and the temperature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlx import LLM, SamplingParams
from dlx.engine import Engine
from dlx.plan import Plan
from dlx.request import Finish, Output
from tests import gemma
from tests.families import FAMILIES, network, write

DRAW = Random(7)
PROMPTS = [DRAW.choices(range(36, 66), k=DRAW.randint(1, 40)) for _ in range(8)]
PARAMS = [
    SamplingParams(
        max_tokens=DRAW.randint(60, 110), ignore_eos=True, temperature=t, seed=n, threshold=0.4, priority=n % 3 - 1
    )
    for n, t in enumerate((0.0, 0.8, 0.0, 1.5, 0.0, 0.8, 0.0, 1.0))
]
ROOM = {"max_num_seqs": 4, "max_model_len": 160, "batch_invariant": True}


def opened(folder: Path, **more: Any) -> LLM:
    return LLM(folder, graphs="off", device="cpu", dtype="float32", **ROOM | more)


def said(outputs: list[Output]) -> list[tuple[list[int], int, Finish]]:
    return [(output.token_ids, output.nfe, output.finish_reason) for output in outputs]


def checked(engine: Engine) -> None:
    """From now on the scheduler is checked before every launch."""
    plan = engine.scheduler.plan

    def planned() -> Plan | None:
        made = plan()
        engine.scheduler.check_invariants()
        return made

    engine.scheduler.plan = planned  # type: ignore[method-assign]


def same(folder: Path, pages: int, forwards: int, lag: int, **more: Any) -> int:
    """How often requests gave way, where all of them answered as they do with room."""
    with opened(folder, **more) as llm:
        roomy = said(llm.generate(PROMPTS, PARAMS))
        assert llm.engine.scheduler.preemptions == 0
    with opened(folder, num_pages=pages, forwards=forwards, **more) as llm:
        llm.engine.lag = lag
        checked(llm.engine)
        assert said(llm.generate(PROMPTS, PARAMS)) == roomy
        pool = llm.engine.scheduler.pool
        pool.check_invariants()
        assert pool.used == 0 and not llm.engine.worker.rows._kept
        return llm.engine.scheduler.preemptions


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("policy", ["single_bd", "multi_bd", "dmax", "edit", "token_merge", "credit"])
def test_all_answer_the_same_where_everybody_gives_way(nano: Path, policy: str, lag: int) -> None:
    assert same(nano, 14 if policy == "multi_bd" else 10, 1, lag, policy=policy) > 3


@pytest.mark.parametrize("lag", [0, 1])
def test_launches_of_several_forwards_change_nothing_of_it(nano: Path, lag: int) -> None:
    assert same(nano, 12, 2, lag, policy="single_bd") > 0


def test_a_row_that_is_read_off_the_position_before_goes_on_where_it_was(tmp_path: Path) -> None:
    name = "fast_dllm_v2_tied"
    write(tmp_path, name, network(name))
    assert same(tmp_path, 24, 1, 1, policy="multi_bd", block_length=FAMILIES[name].L, page_size=8) > 0


def test_a_prompt_that_sees_itself_whole_is_prefilled_again_with_its_answer(tmp_path: Path) -> None:
    write(tmp_path, "llada", network("llada"))
    assert same(tmp_path, 24, 1, 1, policy="d2f", block_length=8, page_size=8) > 0


def test_a_canvas_goes_on_where_it_was(tmp_path: Path) -> None:
    gemma.write(tmp_path, gemma.tensors(gemma.model(0, 3.0)))
    assert same(tmp_path, 22, 1, 1, page_size=8) > 0


def test_whole_sequences_take_all_their_pages_and_never_give_way(tmp_path: Path) -> None:
    write(tmp_path, "llada", network("llada"))
    assert same(tmp_path, 24, 1, 0, policy="fast_dllm_v1", block_length=8, page_size=8) == 0


def test_one_that_gave_way_and_is_aborted_leaves_nothing(nano: Path) -> None:
    with opened(nano, num_pages=10) as llm:
        engine = llm.engine
        params = [replace(p, priority=0) for p in PARAMS]
        numbers = engine.add_all(list(zip(PROMPTS, params, strict=True)))
        while not any(request.kept for request in engine.scheduler.waiting):
            engine.step()
        (waits,) = [request.id for request in engine.scheduler.waiting if request.kept]
        engine.abort(waits)
        assert not engine.worker.rows._kept
        done = []
        while not engine.idle:
            done += [chunk.id for chunk in engine.step() if chunk.finish]
        assert sorted([*done, waits]) == numbers
        assert engine.scheduler.pool.used == 0
