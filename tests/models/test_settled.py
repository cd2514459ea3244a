"""How many forwards run after an answer of the bundled model is settled, for every block-causal policy.

An answer is settled by the forward after which no token of it, its stop id included, changes. Where decided tokens stay
that forward ends it; where they may be edited, the policy may want to see once more that it stays.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dlx import LLM, SamplingParams
from dlx.graphs.policies import POLICIES
from tests.checkpoints import STOP
from tests.models.test_parity import questions

log = logging.getLogger(__name__)

CAUSAL = [name for name, p in POLICIES.items() if p.canvas is None and p.full is not True]
SHORT = {"units": 1.0, "reverse": 1.0, "sort": 1.0, "arith": 1.0}  # answers of one block to three


def after(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[int]:
    """For each prompt: the forwards that ran after the one that settled its answer."""
    steps: dict[int, list[list[int]]] = {}  # of each request, what was told and what stood behind it
    out: dict[int, list[int]] = {}
    late: dict[int, int] = {}
    ids = llm.engine.add_all([(prompt, params) for prompt in prompts], watch=True)
    while not llm.engine.idle:
        for chunk in llm.engine.step():
            told = out.setdefault(chunk.id, [])
            told += chunk.token_ids
            steps.setdefault(chunk.id, []).append(told + chunk.window)
            if chunk.output is not None:
                assert chunk.output.finish_reason == "stop"
                whole = [*told, STOP]
                last = chunk.output.nfe - 1
                assert len(steps[chunk.id]) == chunk.output.nfe
                settled = last
                while settled and steps[chunk.id][settled - 1][: len(whole)] == whole:
                    settled -= 1
                late[chunk.id] = last - settled
    return [late[id] for id in ids]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_at_most_one_forward_runs_after_an_answer_is_settled(name: str, tiny: Path) -> None:
    prompts = questions(tiny, SHORT, 4, seed=5)
    most = []
    for N in (1, 2, 4) if POLICIES[name].turn is None else (1,):
        policy = replace(POLICIES[name], N=N)
        rows = 4 if policy.turn is None else 1  # rows that want different scopes wait for each other
        with LLM(tiny, policy=policy, graphs="off", device="cpu", dtype="float32", max_num_seqs=rows) as llm:
            late = after(llm, prompts, SamplingParams(max_tokens=64))
        most.append(max(late))
        log.warning("%s, N=%d: %s forwards after the answer was settled", name, N, late)
    assert max(most) <= (1 if name in ("edit", "dmax", "token_merge") else 0)
