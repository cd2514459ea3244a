"""Strategies that compute whole sequences or parts of them, forward by forward, against a plain loop over transformers'
network with the same old K/V."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlx import LLM, SamplingParams
from dlx.errors import PolicyError, RequestError
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Annealed, Even, Factor, Refresh, SubBlock, Whole, Within
from tests.families import FAMILIES, MASK, STOP, VOCAB, network, write
from tests.graphs.test_strategies import differ, trail
from tests.sequences import NEAR, Decoded, How, decode
from tests.strategies import Trail, trimmed

DUAL = How(L=8)
ANNEALED = How(L=8, scope="all", blocks=False, rule="annealed")
STRATEGIES: dict[str, tuple[str | Policy, How]] = {
    "fast_dllm_v1": ("fast_dllm_v1", DUAL),
    "factor": (replace(POLICIES["fast_dllm_v1"], select=Factor()), replace(DUAL, rule="factor")),
    "fast_dllm_v1_prefix": ("fast_dllm_v1_prefix", replace(DUAL, scope="prefix")),
    "vicinity": (
        replace(POLICIES["vicinity"], turn=Refresh(left=5, right=3, warm_up=1)),
        replace(DUAL, left=5, right=3, warm_up=1),
    ),
    "iter_smooth in a vicinity": (
        replace(POLICIES["iter_smooth"], full=True, turn=Refresh(left=5, right=3, warm_up=1)),
        replace(DUAL, left=5, right=3, warm_up=1, smooth=True),
    ),
    "low_confidence": ("low_confidence", replace(DUAL, scope="all", rule="even")),
    "low_confidence in 3": (
        replace(POLICIES["low_confidence"], select=Even(3)),
        replace(DUAL, scope="all", rule="even", steps=3),
    ),
    "random": (
        replace(POLICIES["random"], select=Even(5, random=True)),
        replace(DUAL, scope="all", rule="even", steps=5, by="random"),
    ),
    "origin": ("origin", replace(ANNEALED, by="random")),
    "maskgit_plus": ("maskgit_plus", ANNEALED),
    "topk_margin": ("topk_margin", replace(ANNEALED, by="margin")),
    "entropy": (
        replace(POLICIES["entropy"], select=Annealed(steps=7)),
        replace(ANNEALED, by="entropy", steps=7),
    ),
}


def opened(folder: Path, policy: str | Policy | None, L: int = 8, **more: Any) -> LLM:
    return LLM(folder, policy=policy, **{"graphs": "off", "device": "cpu", "dtype": "float32"} | more, block_length=L)


def trajectory(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[Decoded, int]:
    """One request's answer, and its sequence after each forward; also its prefill forwards."""
    engine = llm.engine
    engine.add_all([(prompt, params)])
    states, end = [], len(prompt) + params.max_tokens
    while True:
        chunks = engine.step()
        states.append(engine.worker.sequences.ids[0, :end].tolist())
        for chunk in chunks:
            if chunk.output is not None:
                got = chunk.output
                assert got.nfe == len(states)
                tokens = got.token_ids + [STOP] * (got.finish_reason == "stop")
                return Decoded(tokens, str(got.finish_reason), states, []), got.prefill_forwards


def hold(llm: LLM, net: Any, how: How, prompts: int, seed: int, sub: bool = False) -> tuple[int, int]:
    """Random prompts on both sides, forward by forward → how many forwards, and how many prompts a near one excused."""
    rng, forwards, excused = Random(seed), 0, 0
    for _ in range(prompts):
        prompt = [rng.randrange(4, VOCAB) for _ in range(rng.choice((1, 2, 7, 8, 9, 16, 23, 41)))]
        most = rng.choice((1, 6, 17, 24, 30))
        tau = rng.choice((0.5, 0.9, 0.99))
        nfe = rng.choice((None, None, None, 3))
        fixed = {} if sub else {i: rng.randrange(4, VOCAB) for i in range(most) if rng.random() < rng.choice((0, 0.3))}
        key = rng.getrandbits(62)
        want = decode(net, prompt, most, replace(how, threshold=tau), fixed, key, nfe)
        params = SamplingParams(most, threshold=tau, seed=key, max_nfe=nfe, fixed=tuple(fixed.items()))
        got, prefills = trajectory(llm, prompt, params)
        assert prefills == 0 or sub
        unlike = [i for i, (a, b) in enumerate(zip(want.states, got.states, strict=False)) if a != b]
        forwards += len(want.states)
        if unlike and min(want.gaps[: unlike[0] + 1]) < NEAR:
            excused += 1
            continue
        assert not unlike, (prompt, unlike[0], want.states[unlike[0]], got.states[unlike[0]], want.gaps)
        assert (got.tokens, got.finish, len(got.states)) == (want.tokens, want.finish, len(want.states))
    return forwards, excused


@pytest.fixture(scope="module", params=["llada", "dream"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A family trained all-to-all, its oracle, and the folder of its checkpoint."""
    net = network(request.param, seed=1, spread=6.0)
    return request.param, net, write(tmp_path_factory.mktemp("sequences") / request.param, request.param, net)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_forward_is_the_references(made: tuple[str, Any, Path], strategy: str) -> None:
    name, net, folder = made
    policy, how = STRATEGIES[strategy]
    with opened(folder, policy) as llm:
        prompts = 8 if how.scope != "all" else 4
        forwards, excused = hold(llm, net, replace(how, shift=FAMILIES[name].shift), prompts, seed=3)
        assert forwards > 15
        assert excused <= 1


@pytest.mark.parametrize("name", ["llada_moe", "diffucoder"])
def test_the_other_families_trained_all_to_all_decode_by_their_own_policy_as_the_reference(
    name: str, tmp_path: Path
) -> None:
    net = network(name, seed=1, spread=6.0)
    with opened(write(tmp_path, name, net), None) as llm:
        assert llm.policy.turn == POLICIES["fast_dllm_v1"].turn
        forwards, excused = hold(llm, net, replace(DUAL, shift=FAMILIES[name].shift), prompts=4, seed=3)
    assert forwards > 10
    assert excused <= 1


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fifty_prompts_are_the_references(made: tuple[str, Any, Path], strategy: str) -> None:
    name, net, folder = made
    policy, how = STRATEGIES[strategy]
    with opened(folder, policy) as llm:
        assert hold(llm, net, replace(how, shift=FAMILIES[name].shift), 50, seed=4)[1] <= 2


@pytest.mark.parametrize("name", ["fast_dllm_v2", "llada2"])
def test_sub_blocks_with_a_block_cache_are_the_references(name: str, tmp_path: Path) -> None:
    net, shift = network(name, seed=2, spread=6.0), FAMILIES[name].shift
    for size in (2,) if name == "llada2" else (4,):
        policy = replace(POLICIES["fast_dllm_v2_cached"], select=Within(size), turn=SubBlock(size))
        with opened(write(tmp_path / str(size), name, net), policy) as llm:
            how = How(8, "sub", size=size, shift=shift)
            forwards, excused = hold(llm, net, how, 7, seed=size, sub=True)
            assert forwards > 40
            assert excused <= 1
            with pytest.raises(AssertionError):
                hold(llm, net, replace(how, cached=False), 7, seed=size, sub=True)


@pytest.mark.long
def test_fifty_prompts_of_sub_blocks_with_a_block_cache_are_the_references(tmp_path: Path) -> None:
    net, policy = network("fast_dllm_v2", seed=2, spread=6.0), POLICIES["fast_dllm_v2_cached"]
    policy = replace(policy, select=Within(4), turn=SubBlock(4))
    with opened(write(tmp_path, "fast_dllm_v2", net), policy) as llm:
        assert hold(llm, net, How(8, "sub", size=4, shift=True), 50, seed=5, sub=True)[1] <= 2


@pytest.mark.parametrize("n", [6, pytest.param(50, marks=pytest.mark.long)])
def test_sub_blocks_without_a_cache_are_the_references(n: int, tmp_path: Path) -> None:
    net, rng, excused = network("fast_dllm_v2", seed=2, spread=6.0), Random(n), 0
    how = How(8, "sub", size=4, shift=True, cached=False)
    with opened(write(tmp_path, "fast_dllm_v2", net), replace(POLICIES["fast_dllm_v2"], select=Within(4))) as llm:
        for i in range(n):
            length, most = (1, 3, 8, 13, 16, 21)[i % 6], rng.randrange(1, 30)
            prompt, bar = [rng.randrange(4, VOCAB) for _ in range(length)], (0.5, 0.7, 0.9)[i % 3]
            want = decode(net, prompt, most, replace(how, threshold=bar), stop=None)
            got = trail(llm, prompt, SamplingParams(most, threshold=bar, ignore_eos=True), MASK)
            got = got._replace(steps=[trimmed(step[:most], MASK) for step in got.steps])  # without what is behind it
            steps = [trimmed(state[length:], MASK) for state in want.states]
            if differ(got, Trail(want.tokens, steps)):
                unlike = [at for at, (a, b) in enumerate(zip(got.steps, steps)) if a != b] or [len(steps) - 1]
                assert min(want.gaps[: unlike[0] + 1]) < NEAR, (prompt, most, bar, got, want)
                excused += 1
    assert excused <= n / 20


@pytest.mark.parametrize(
    ("strategy", "wrongly"),
    [
        ("fast_dllm_v1", {"scope": "all"}),
        ("fast_dllm_v1", {"scope": "prefix"}),
        ("fast_dllm_v1", {"left": 3}),
        ("fast_dllm_v1_prefix", {"scope": "dual"}),
        ("vicinity", {"warm_up": 3}),
        ("vicinity", {"right": 0}),
        ("iter_smooth in a vicinity", {"smooth": False}),
        ("topk_margin", {"by": "prob"}),
        ("random", {"by": "prob"}),
    ],
)
def test_a_reference_that_keeps_other_keys_or_ranks_otherwise_decodes_otherwise(
    made: tuple[str, Any, Path], strategy: str, wrongly: dict[str, Any]
) -> None:
    name, net, folder = made
    policy, how = STRATEGIES[strategy]
    with opened(folder, policy) as llm, pytest.raises(AssertionError):
        hold(llm, net, replace(how, shift=FAMILIES[name].shift, **wrongly), 8, seed=3)


SOME = ["fast_dllm_v1", "fast_dllm_v1_prefix", "vicinity", "random", "entropy"]


def asked(name: str) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = Random(name)
    prompts = [[rng.randrange(4, VOCAB) for _ in range(n)] for n in (3, 13, 8, 40)]
    return prompts, [SamplingParams(m, threshold=0.6, seed=m, temperature=m % 2 * 0.5) for m in (12, 9, 16, 20)]


@pytest.mark.parametrize("policy", SOME)
def test_rows_do_not_depend_on_their_neighbours_nor_on_the_forwards_of_a_launch(policy: str, tmp_path: Path) -> None:
    prompts, params = asked(policy)
    folder = write(tmp_path, "dream", network("dream", seed=1, spread=6.0))
    with opened(folder, policy, max_num_seqs=1) as llm:
        alone = [(o.token_ids, o.nfe, o.finish_reason) for o in llm.generate(prompts, params)]
    for rows, forwards in ((3, 1), (4, 6)):
        with opened(folder, policy, max_num_seqs=rows, forwards=forwards) as llm:
            assert alone == [(o.token_ids, o.nfe, o.finish_reason) for o in llm.generate(prompts, params)]


@pytest.mark.long
@pytest.mark.parametrize("policy", ["fast_dllm_v1", "fast_dllm_v1_prefix", "entropy", "fast_dllm_v2_cached"])
def test_compiled_is_eager(policy: str, tmp_path: Path) -> None:
    name = "fast_dllm_v2" if policy == "fast_dllm_v2_cached" else "dream"
    folder = write(tmp_path, name, network(name, seed=1, spread=6.0))
    prompts, params = asked(policy)
    said = []
    for graphs in ("off", "compile"):
        with opened(folder, policy, graphs=graphs, max_num_seqs=2) as llm:
            said.append([(o.token_ids, o.nfe) for o in llm.generate(prompts, params)])
            keys = [key for key in llm.engine.worker.graphs._run if key[0] == "step"]
            assert {key[2] for key in keys} == set(range(len(llm.policy.turn.scopes)))
    assert said[0] == said[1]


def test_a_window_is_shown_as_it_is(made: tuple[str, Any, Path]) -> None:
    with opened(made[2], "fast_dllm_v1") as llm:
        windows = [c.window for c in llm.stream([5, 6, 7], SamplingParams(12, threshold=0.99), watch=True)]
    assert windows[0].count(MASK) == 7
    assert all(len(window) in (0, 4, 8) for window in windows)


def test_the_family_takes_its_policy_and_a_wrong_one_is_refused(made: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, folder = made
    with opened(folder, None) as llm:
        assert llm.policy == replace(POLICIES["fast_dllm_v1"], L=8)
    with pytest.raises(PolicyError, match=f"full=False does not suit this {name} checkpoint.* policy='fast_dllm_v1'"):
        opened(folder, "fast_dllm_v2_cached")
    sdar = write(tmp_path / "sdar", "sdar", network("sdar"))
    for policy in ("fast_dllm_v1", "vicinity", "low_confidence", "entropy", Policy(turn=Whole())):
        with pytest.raises(PolicyError, match=r"full=True does not suit this sdar checkpoint.* policy='single_bd'"):
            opened(sdar, policy, L=4)
    with pytest.raises(PolicyError, match=r"size=8.* does not divide the 4 tokens.* a size that does"):
        opened(sdar, "fast_dllm_v2", L=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"N": 2, "turn": Whole()},
        {"full": False, "turn": Whole()},
        {"full": True, "turn": SubBlock()},
        {"turn": Even()},
        {"select": Even()},
        {"select": Annealed()},
    ],
)
def test_a_policy_refuses_what_its_turn_does_not_go_with(fields: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="turn"):
        Policy(**fields)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (((0, MASK),), "other than the mask id"),
        (((0, VOCAB),), f"from 0 to {VOCAB - 1}"),
        (((8, 5),), "offset of fixed=8 is not allowed; pass an integer from 0 to 7"),
        (((0, -1),), "id of fixed=-1"),
        ((5,), r"fixed=\(5,\) is not allowed; pass a tuple of pairs"),
        ([(0, 5)], "pass a tuple of pairs"),
    ],
)
def test_fixed_tokens_that_cannot_be_are_refused(made: tuple[str, Any, Path], fixed: Any, message: str) -> None:
    with opened(made[2], None) as llm, pytest.raises(RequestError, match=message):
        llm.generate([[5, 6]], SamplingParams(8, fixed=fixed))


def test_a_gap_before_a_suffix_is_filled_and_the_suffix_stays(made: tuple[str, Any, Path]) -> None:
    suffix = [5, STOP, 7, 8]
    fixed = tuple((6 + i, tok) for i, tok in enumerate(suffix))
    params = SamplingParams(10, fixed=fixed, ignore_eos=True)
    for policy in (None, "low_confidence", "entropy"):
        with opened(made[2], policy) as llm:
            got = llm.generate([[9, 10, 11]], params)[0]
        assert got.token_ids[6:] == suffix
        assert MASK not in got.token_ids
    with (
        opened(made[2], "d2f") as window,
        pytest.raises(RequestError, match=r"whole sequences.* use policy='fast_dllm_v1'"),
    ):
        window.generate([[9, 10, 11]], params)
