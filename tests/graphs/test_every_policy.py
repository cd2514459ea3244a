"""Of every policy: one graph a scope and forward, with no break, the same answers compiled, rows that are strangers.

Dynamo and AOT trace the step as they do for Inductor, and its graph runs eagerly: seconds instead of minutes. What
Inductor makes of it is the business of tests that are marked `long`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch._dynamo

from dlx import LLM, SamplingParams, worker
from dlx.graphs.policies import POLICIES
from tests.checkpoints import Shape, write

SMALL = Shape(8, heads=2, kv_heads=1, head_dim=16, layers=1, hidden=32, ffn=48)
NAMES = [name for name, policy in POLICIES.items() if policy.canvas is None]  # of a canvas: test_gemma.py


@pytest.fixture
def made(tmp_path: Path, all_to_all: Callable[[Path], Path]) -> Callable[[str], Path]:
    """The folder of a random checkpoint that a policy suits."""
    return lambda name: (all_to_all if POLICIES[name].full else Path)(write(tmp_path / name, SMALL, 1))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of function was compiled, with AOT's eager graphs in place of Inductor's."""
    compiles, real = Counter[str](), torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiles["graphs"] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(real, backend=backend))
    return compiles


def asked(name: str) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = Random(name)
    prompts = [[rng.randrange(4, 300) for _ in range(n)] for n in (3, 13, 8)]
    return prompts, [SamplingParams(m, threshold=0.5, seed=m, temperature=m % 2 * 0.7) for m in (12, 9, 18)]


def said(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple[list[int], int, str]]:
    return [(o.token_ids, o.nfe, str(o.finish_reason)) for o in llm.generate(prompts, params)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_one_graph_a_scope_and_decodes_compiled_as_eagerly(
    name: str, made: Callable[[str], Path], traced: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LONG", 8)  # so that windows have both of their forwards
    folder, (prompts, params) = made(name), asked(name)
    how = {"device": "cpu", "dtype": "float32", "max_num_seqs": 1, "max_model_len": 64}
    with LLM(folder, policy=name, graphs="off", **how) as llm:
        eager = said(llm, prompts, params)
    assert not traced
    with LLM(folder, policy=name, graphs="compile", **how) as llm:
        traced.clear()  # of what an engine tries before it serves
        assert said(llm, prompts, params) == eager
        keys = set(llm.engine.worker.graphs._run)
        scopes = 1 if llm.policy.turn is None else len(llm.policy.turn.scopes)
        steps = {key for key in keys if key[0] == "step"}
        assert len(steps) == scopes
        graphs = (
            len(keys) + llm.engine.worker.either
        )  # of a window's step, one with the place that commits, one without
        assert traced["graphs"] == graphs
        assert said(llm, prompts, params) == eager
        assert traced["graphs"] == graphs


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_what_inductor_makes_of_a_policy_decodes_as_eagerly(name: str, made: Callable[[str], Path], nano: Path) -> None:
    folder, answers = made(name) if POLICIES[name].full else nano, []  # what is random and soft turns on the last bit
    for graphs in ("off", "compile"):
        how = {"device": "cpu", "dtype": "float32", "max_num_seqs": 1, "max_model_len": 64}
        with LLM(folder, policy=name, graphs=graphs, **how) as llm:
            answers.append(said(llm, *asked(name)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("name", "N"), [(n, N) for n in NAMES for N in ((1, 3) if POLICIES[n].turn is None else (1,))])
def test_a_row_is_a_stranger_to_its_neighbours(name: str, N: int, made: Callable[[str], Path]) -> None:
    policy = replace(POLICIES[name], N=N)
    folder, (prompts, params) = made(name), asked(name)
    how = {"device": "cpu", "dtype": "float32", "max_num_seqs": 3, "max_model_len": 64, "batch_invariant": True}
    with LLM(folder, policy=policy, graphs="off", **how) as llm:  # one bucket
        alone = [answer for p, q in zip(prompts, params, strict=True) for answer in said(llm, [p], [q])]
        assert said(llm, prompts, params) == alone
