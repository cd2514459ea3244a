"""Of every policy without a canvas, and of a rule of a user's own: captured, the answers are the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dlx import LLM, Policy, SamplingParams
from dlx.bench.arguments import shape
from dlx.bench.policies import Pinned
from dlx.bench.scene import How, Scene
from dlx.errors import PolicyError
from dlx.graphs.policies import POLICIES
from tests.checkpoints import write
from tests.graphs import own_rules
from tests.graphs.test_every_policy import SMALL, asked, said
from tests.graphs.test_own import Pairs
from tests.models.test_parity import questions

pytestmark = pytest.mark.gpu

CAUSAL = {name: p for name, p in POLICIES.items() if p.canvas is None and p.full is not True}
BOTH_WAYS = [name for name, p in POLICIES.items() if p.full]
ALL = {**CAUSAL, "a rule of one's own": Policy(N=2, select=Pairs())}


@pytest.mark.parametrize("name", ALL)
def test_captured_a_policy_decodes_as_eagerly(nano: Path, name: str) -> None:
    prompts = questions(nano, {"chain3": 1.0, "add2": 1.0}, 6, seed=2)
    params = [SamplingParams(max_tokens=48, temperature=t, seed=5) for t in (0.0, 0.0, 0.0, 0.0, 0.7, 0.7)]
    params[1::2] = [replace(p, fixed=((1, 40), *((i, 41) for i in range(5, 23)), (47, 42))) for p in params[1::2]]
    answers = []
    for graphs in ("off", "capture"):
        how = {"device": "cuda", "dtype": "float32", "max_num_seqs": 2, "max_model_len": 256}
        with LLM(nano, policy=ALL[name], graphs=graphs, **how) as llm:
            answers.append([(o.token_ids, o.nfe) for o in llm.generate(prompts, params)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_captured_a_policy_of_models_that_see_both_ways_decodes_as_eagerly(
    name: str, tmp_path: Path, all_to_all: Callable[[Path], Path]
) -> None:
    folder, answers = all_to_all(write(tmp_path / name, SMALL, 1)), []
    for graphs in ("off", "capture"):
        how = {"device": "cuda", "dtype": "float32", "max_num_seqs": 2, "max_model_len": 64}
        with LLM(folder, policy=name, graphs=graphs, **how) as llm:
            answers.append(said(llm, *asked(name)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_step_of_one_row_is_captured_at_any_block_length(name: str, block: int) -> None:
    scene = Scene(shape("nano"), block, 64, 1, 2)
    pinned = Pinned.of(scene, How(device="cuda"), CAUSAL[name], 64 + 8 * block)
    before = int(pinned.at.worker.buf.age[0])
    pinned.at.launch()
    assert int(pinned.at.worker.buf.age[0]) == before + 1


@pytest.mark.parametrize("rule", ["Reads", "Leaves", "LeavesOne", "Comes"])
@pytest.mark.parametrize("graphs", ["off", "capture"])
def test_a_rule_that_waits_for_the_host_is_refused(nano: Path, rule: str, graphs: str) -> None:
    with pytest.raises(PolicyError, match=r"own_rules.py:\d+"):
        LLM(nano, policy=Policy(select=getattr(own_rules, rule)()), device="cuda", graphs=graphs)


def test_a_number_of_the_host_is_no_wait(nano: Path) -> None:
    with LLM(nano, policy=Policy(select=own_rules.Number()), device="cuda", graphs="off", max_num_seqs=1) as llm:
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, max_nfe=9))[0].nfe > 0
