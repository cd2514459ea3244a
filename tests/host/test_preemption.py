"""A pool so small that requests give way to each other changes no answer, whatever the policy and the temperature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlx import LLM, SamplingParams
from dlx.engine import Engine
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Canvas
from dlx.plan import Plan
from dlx.request import Finish, Output
from tests import gemma
from tests.families import FAMILIES, network, write

DRAW = Random(7)
PROMPTS = [DRAW.choices(range(36, 66), k=DRAW.randint(1, 20)) for _ in range(6)]
PARAMS = [
    SamplingParams(
        max_tokens=DRAW.randint(60, 90), ignore_eos=True, temperature=t, seed=n, threshold=0.2, priority=n % 3 - 1
    )
    for n, t in enumerate((0.0, 0.8, 0.0, 1.5, 0.0, 0.8))
]
ROOM = {"max_num_seqs": 4, "max_model_len": 112, "batch_invariant": True}


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-causal checkpoint with blocks of four tokens."""
    return write(tmp_path_factory.mktemp("sdar"), "sdar", network("sdar"))


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


@pytest.mark.parametrize(
    ("policy", "pages", "forwards", "lag"),
    [
        ("single_bd", 32, 1, 1),
        pytest.param("single_bd", 32, 3, 1, marks=pytest.mark.slow),
        pytest.param("multi_bd", 40, 1, 1, marks=pytest.mark.slow),
        pytest.param("dmax", 32, 1, 1, marks=pytest.mark.long),
        pytest.param("edit", 32, 3, 0, marks=pytest.mark.long),
        pytest.param("token_merge", 32, 1, 1, marks=pytest.mark.long),
        pytest.param("credit", 32, 1, 1, marks=pytest.mark.long),
    ],
)
def test_all_answer_the_same_where_everybody_gives_way(
    sdar: Path, policy: str, pages: int, forwards: int, lag: int
) -> None:
    assert same(sdar, pages, forwards, lag, policy=policy, page_size=4) > 0


def test_blocks_as_long_as_a_page_change_nothing_of_it(nano: Path) -> None:
    assert same(nano, 10, 1, 1, policy="single_bd") > 0


@pytest.mark.slow
def test_a_row_that_is_read_off_the_position_before_goes_on_where_it_was(tmp_path: Path) -> None:
    name = "fast_dllm_v2_tied"
    write(tmp_path, name, network(name))
    assert same(tmp_path, 40, 1, 1, policy="multi_bd", block_length=FAMILIES[name].L, page_size=4) > 0


@pytest.mark.long
def test_a_prompt_that_sees_itself_whole_is_prefilled_again_with_its_answer(tmp_path: Path) -> None:
    write(tmp_path, "llada", network("llada"))
    assert same(tmp_path, 40, 1, 1, policy="d2f", block_length=4, page_size=4) > 0


@pytest.mark.slow
def test_a_canvas_goes_on_where_it_was(tmp_path: Path) -> None:
    gemma.write(tmp_path, gemma.tensors(gemma.model(0, 3.0)))
    policy = replace(POLICIES["diffusion_gemma"], canvas=Canvas(steps=3))
    assert same(tmp_path, 18, 1, 1, policy=policy, page_size=8) > 0


@pytest.mark.long
def test_whole_sequences_take_all_their_pages_and_never_give_way(tmp_path: Path) -> None:
    write(tmp_path, "llada", network("llada"))
    assert same(tmp_path, 40, 1, 0, policy="fast_dllm_v1", block_length=4, page_size=4) == 0


def test_one_that_gave_way_and_is_aborted_leaves_nothing(sdar: Path) -> None:
    with opened(sdar, num_pages=32, page_size=4) as llm:
        engine = llm.engine
        engine.add_all(list(zip(PROMPTS, PARAMS, strict=True)))
        while not any(request.kept for request in engine.scheduler.waiting):
            engine.step()
        waits = next(request.id for request in engine.scheduler.waiting if request.kept)
        assert waits in engine.worker.rows._kept
        engine.abort(waits)
        assert waits not in engine.worker.rows._kept
        while not engine.idle:
            assert waits not in [chunk.id for chunk in engine.step()]
        assert engine.scheduler.pool.used == 0 and not engine.worker.rows._kept
