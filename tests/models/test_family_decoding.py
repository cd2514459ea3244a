"""Every family decodes at T = 0 as a plain loop over transformers' network does, after prompts of every length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from dlx import LLM, SamplingParams
from dlx.errors import PolicyError
from dlx.graphs import packing
from dlx.graphs.policies import POLICIES, Policy
from tests.families import FAMILIES, MASK, STOP, VOCAB, logits, mask, network, write
from tests.reference import Ask, Strategy, compare, decode

SINGLE = Strategy(L=4, N=1, threshold=0.9, open_at=1.0, force_at=0.9)
STRATEGIES = {
    "single_bd": SINGLE,
    "multi_bd": replace(SINGLE, N=4, open_at=0.1),
    "d2f": replace(SINGLE, N=4, open_at=0.1),
}


class Speaker:
    """The oracle as `tests.reference.decode` asks it: logits of positions of a sequence that began with a prompt."""

    mask_id, vocab = MASK, VOCAB

    def __init__(self, net: Any, L: int, prompt: int | None, shift: bool) -> None:
        self.net, self.L, self.prompt, self.shift = net, L, prompt, shift

    def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
        seen = logits(self.net, torch.tensor(ids), mask(len(ids), self.L, self.prompt))
        return seen[torch.tensor(rows) - int(self.shift)]


def opened(folder: Path, name: str, policy: str | Policy | None, **more: Any) -> LLM:
    L = FAMILIES[name].L
    return LLM(folder, policy=policy, graphs="off", device="cpu", dtype="float32", block_length=L, **more)


def hold(llm: LLM, net: Any, name: str, strategy: Strategy, lengths: list[int], **wrongly: bool) -> list[str]:
    """Random prompts of these lengths on both sides; what differs, without what a near decision excuses.

    wrongly  facts of the family that the reference takes for something else
    """
    tiny, rng = FAMILIES[name]._replace(**wrongly), Random(name)
    strategy = replace(strategy, L=tiny.L)
    prompts, asks, params = [], [], []
    for n in lengths:
        prompts.append([rng.randrange(4, VOCAB) for _ in range(n)])
        most = rng.choice((1, tiny.L, 2 * tiny.L + 1, 5 * tiny.L - 1))
        asks.append((Ask(most, stop_ids=frozenset({STOP})), replace(strategy, threshold=rng.choice((0.3, 0.6, 0.9)))))
        params.append(SamplingParams(max_tokens=most, threshold=asks[-1][1].threshold))
    wrong, excused = [], 0
    for prompt, (ask, how), got in zip(prompts, asks, llm.generate(prompts, params), strict=True):
        speaker = Speaker(net, tiny.L, len(prompt) if tiny.full else None, tiny.shift)
        try:
            excused += compare(decode(speaker, prompt, how, ask), got)
        except AssertionError as error:
            wrong.append(f"{name}, {len(prompt)} tokens: {error}")
    assert excused <= 1
    return wrong


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A family, its oracle, and the folder of its checkpoint."""
    net = network(request.param, seed=1, spread=6.0)
    return request.param, net, write(tmp_path_factory.mktemp("decoding") / request.param, request.param, net)


def test_blocks_from_left_to_right_decode_like_the_reference(made: tuple[str, Any, Path]) -> None:
    name, net, folder = made
    L = FAMILIES[name].L
    policy = "d2f" if FAMILIES[name].full else "single_bd"
    with opened(folder, name, "d2f" if FAMILIES[name].full else None) as llm:
        assert llm.policy == replace(POLICIES[policy], L=L, full=FAMILIES[name].full)
        assert not hold(llm, net, name, STRATEGIES[policy], [*range(1, 2 * L + 2), 5 * L, 70, 131, 160])


@pytest.mark.long
@pytest.mark.parametrize(("name", "forwards"), [("dream", 1), ("llada2", 1), ("fast_dllm_v2", 4)])
def test_the_compiled_step_decodes_like_the_reference(name: str, forwards: int, tmp_path: Path) -> None:
    net, L = network(name, seed=1, spread=6.0), FAMILIES[name].L
    with LLM(
        write(tmp_path, name, net), policy="d2f" if FAMILIES[name].full else None, graphs="compile", device="cpu",
        dtype="float32", block_length=L, max_num_seqs=2, forwards=forwards,
    ) as llm:  # fmt: skip
        assert not hold(
            llm, net, name, STRATEGIES["d2f" if FAMILIES[name].full else "single_bd"], [3, L, 2 * L + 1, 70]
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
@pytest.mark.parametrize("name", ["dream", "fast_dllm_v2", "llada"])
def test_shift_and_full_prompts_hold_for_one_block_and_several_packed_and_not(
    name: str, policy: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        monkeypatch.setattr(packing, "ENOUGH", 8)
    net, L = network(name, seed=2, spread=6.0), FAMILIES[name].L
    with opened(write(tmp_path, name, net), name, policy, max_num_seqs=4) as llm:
        assert (packing.seats(4, llm.policy.N, L) is not None) == packed
        assert not hold(llm, net, name, STRATEGIES[policy], list(range(1, 2 * L + 2)))


@pytest.mark.parametrize(
    ("name", "fact"),
    [("dream", "shift"), ("fast_dllm_v2", "shift"), ("sdar", "shift"), ("dream", "full"), ("llada", "full")],
)
def test_a_reference_with_one_fact_wrong_decodes_otherwise(name: str, fact: str, tmp_path: Path) -> None:
    net, tiny = network(name, seed=1, spread=6.0), FAMILIES[name]
    with opened(write(tmp_path, name, net), name, "d2f" if tiny.full else None) as llm:
        strategy = STRATEGIES["d2f" if tiny.full else "single_bd"]
        lengths = [tiny.L + 1, 2 * tiny.L, 40]
        assert hold(llm, net, name, strategy, lengths, **{fact: fact == "shift" and not tiny.shift})
        assert not hold(llm, net, name, strategy, lengths)


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        (
            "sdar",
            "d2f",
            "full=True does not suit this sdar checkpoint, which was trained block-causal; use policy='single",
        ),
        ("llada", Policy(full=False), "full=False does not suit this llada checkpoint, which was trained all-to-all"),
    ],
)
def test_a_visibility_that_the_model_was_not_trained_for_is_refused(
    name: str, policy: str | Policy, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=message):
        opened(write(tmp_path, name, network(name)), name, policy)


def test_a_block_length_is_free_where_the_model_was_trained_all_to_all(tmp_path: Path) -> None:
    folder = write(tmp_path, "llada", network("llada"))
    for L in (1, 7, 32):
        with LLM(folder, policy="d2f", graphs="off", device="cpu", dtype="float32", block_length=L) as llm:
            assert (llm.policy.L, llm.policy.N) == (L, 4)
