"""The bundled model's confidences through every policy, forward for forward, against whole loops in plain Python.

The network is trained block-causal. For policies of networks trained all-to-all its weights are written as a family
whose mask is full: no model anyone would use, but its confidences are a trained network's, and drive the rules.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.graphs.policies import POLICIES
from tests import sequences
from tests.checkpoints import STOP
from tests.graphs.test_strategies import EDITING, differ, trail
from tests.models.test_parity import questions
from tests.models.test_sequences import trajectory
from tests.reference import Ask, Qwen3, Strategy
from tests.reference import decode as decode_blocks
from tests.sequences import NEAR, How
from tests.strategies import STRATEGIES, decode
from tests.windows import Whole, excusable, walked

log = logging.getLogger(__name__)

L = 16
PROMPTS = 50
MIX = {"story": 2.0, "rgsm": 1.0, "arith": 1.0, "sort": 1.0, "reverse": 1.0, "json": 1.0, "units": 1.0, "code": 1.0}
MOST = 20  # tokens of an answer, over two blocks or three
SLOW = 8  # of policies that decode a token a forward
WINDOW = {
    "d2f": Strategy(L, N=4, open_at=0.1),
    "multi_bd": Strategy(L, N=4, open_at=0.1),
    "fixed": Strategy(L, fixed=1),
}
DUAL = How(L, vocab=4096)
ANNEALED = replace(DUAL, scope="all", blocks=False, rule="annealed")
SEQUENCES = {
    "fast_dllm_v1": DUAL,
    "fast_dllm_v1_prefix": replace(DUAL, scope="prefix"),
    "vicinity": replace(DUAL, left=16, right=16, warm_up=4),
    "low_confidence": replace(DUAL, scope="all", rule="even"),
    "random": replace(DUAL, scope="all", rule="even", by="random"),
    "origin": replace(ANNEALED, by="random"),
    "maskgit_plus": ANNEALED,
    "topk_margin": replace(ANNEALED, by="margin"),
    "entropy": replace(ANNEALED, by="entropy"),
    "fast_dllm_v2_cached": replace(DUAL, scope="sub"),
}
ONE_A_FORWARD = (
    "sequential",
    "low_confidence_static",
    "fixed",
    *[n for n, how in SEQUENCES.items() if how.scope == "all"],
)
BARS = (None, 0.6, 0.95)  # thresholds take turns; None is the policy's own


@pytest.fixture
def full(tiny: Path, tmp_path: Path, all_to_all: Callable[[Path], Path]) -> Path:
    """The bundled weights as a family trained all-to-all."""
    return all_to_all(Path(shutil.copytree(tiny, tmp_path / "full")))


def opened(folder: Path, name: str) -> LLM:
    return LLM(folder, policy=name, graphs="off", device="cpu", dtype="float32", max_num_seqs=1, block_length=L)


class Count(NamedTuple):
    """What was compared, and how many prompts a decision that rounding may have made excused."""

    forwards: int
    tokens: int
    excused: int


def asked(name: str, n: int) -> Iterator[tuple[list[int], int, float, SamplingParams]]:
    """(prompt, tokens, threshold as fp32 sees it, what dlx is asked) of n held-out prompts."""
    most = SLOW if name in ONE_A_FORWARD else MOST
    for i, prompt in enumerate(questions(Path("dlx/assets/tiny"), MIX, n, seed=len(name))):
        bar = BARS[i % 3] if name != "entropy_bounded" else (None, 0.1, 1.0)[i % 3]
        used = POLICIES[name].accept if bar is None else bar
        yield prompt, most, torch.tensor(used).item(), SamplingParams(max_tokens=most, threshold=bar, seed=i)


def by_blocks(folder: Path, name: str, n: int) -> Count:
    """A block after the other, against the loop of tests/strategies.py."""
    net, excused, forwards, tokens = Qwen3(folder, L), 0, 0, 0
    stays = name not in EDITING
    with opened(folder, name) as llm:
        for prompt, most, bar, params in asked(name, n):
            want = decode(net, STRATEGIES[name], prompt, most, bar, STOP, stays=stays)
            got = trail(llm, prompt, params, net.mask_id)
            if differ(got, want):
                near = [decode(net, STRATEGIES[name], prompt, most, bar, STOP, by, stays) for by in (1e-5, 1e-4)]
                assert any(differ(one, want) for one in near), (name, prompt, bar, got, want)
                excused += 1
            forwards, tokens = forwards + len(want.steps), tokens + len(want.tokens)
    return Count(forwards, tokens, excused)


def by_windows(folder: Path, name: str, n: int) -> Count:
    """Several blocks at once, against the loop of tests/reference.py."""
    net, excused, forwards, tokens = Whole(folder, L) if name == "d2f" else Qwen3(folder, L), 0, 0, 0
    with opened(folder, name) as llm:
        for prompt, most, bar, params in asked(name, n):
            if isinstance(net, Whole):
                net.prompt = len(prompt)
            strategy = replace(WINDOW[name], threshold=bar)
            decoded = decode_blocks(net, prompt, strategy, Ask(most, stop_ids=frozenset({STOP})))
            want, got = walked(decoded, prompt, net), trail(llm, prompt, params, net.mask_id)
            if differ(got, want):
                assert excusable(got, want, decoded), (name, prompt, bar, got, want)
                excused += 1
            forwards, tokens = forwards + decoded.nfe, tokens + len(want.tokens)
    return Count(forwards, tokens, excused)


def by_sequences(folder: Path, name: str, n: int) -> Count:
    """Whole sequences or parts of them, against the loop of tests/sequences.py, which keeps the same old K/V."""
    net, excused, forwards, tokens = Qwen3(folder, L), 0, 0, 0
    net.net.set_attn_implementation("sdpa")  # takes masks of truth values
    how = replace(SEQUENCES[name], vocab=net.vocab)
    with opened(folder, name) as llm:
        for prompt, most, bar, params in asked(name, n):
            want = sequences.decode(net.net, prompt, most, replace(how, threshold=bar), seed=params.seed or 0)
            got, _ = trajectory(llm, prompt, params)
            unlike = [i for i, (a, b) in enumerate(zip(want.states, got.states)) if a != b]
            same = (got.tokens, got.finish, len(got.states)) == (want.tokens, want.finish, len(want.states))
            if unlike or not same:
                last = unlike[0] if unlike else len(want.states) - 1
                assert min(want.gaps[: last + 1]) < NEAR, (name, prompt, last, want.gaps, want.states, got.states)
                excused += 1
            forwards, tokens = forwards + len(want.states), tokens + len(want.tokens)
    return Count(forwards, tokens, excused)


def hold(name: str, tiny: Path, full: Path, n: int) -> Count:
    if name in SEQUENCES:
        return by_sequences(full if POLICIES[name].full else tiny, name, n)
    return by_windows(full if name == "d2f" else tiny, name, n) if name in WINDOW else by_blocks(tiny, name, n)


NAMES = [name for name, policy in POLICIES.items() if policy.canvas is None]


def test_every_policy_that_denoises_masks_has_a_loop_of_its_own() -> None:
    assert {*STRATEGIES, *WINDOW, *SEQUENCES} == set(NAMES)
    assert not set(STRATEGIES) & set(SEQUENCES) and not set(WINDOW) & {*STRATEGIES, *SEQUENCES}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_decodes_fifty_held_out_prompts_like_its_loop(name: str, tiny: Path, full: Path) -> None:
    count = hold(name, tiny, full, PROMPTS)
    log.warning("%s: %d forwards, %d tokens, %d of %d prompts excused", name, *count, PROMPTS)
    assert count.excused <= PROMPTS / 20
    assert count.forwards > 2 * PROMPTS


@pytest.mark.parametrize("name", ["dmax", "fast_dllm_v2", "multi_bd", "d2f", "fast_dllm_v1", "entropy"])
def test_a_policy_decodes_some_held_out_prompts_like_its_loop(name: str, tiny: Path, full: Path) -> None:
    assert hold(name, tiny, full, 2).excused == 0


def unlike(name: str, wrong: str, tiny: Path, some: Sequence[list[int]]) -> int:
    """How many prompts `wrong`'s loop decodes otherwise than dlx does by `name`."""
    net = Qwen3(tiny, L)
    with opened(tiny, name) as llm:
        return sum(
            differ(
                trail(llm, prompt, SamplingParams(max_tokens=MOST, threshold=0.6), net.mask_id),
                decode(
                    net, STRATEGIES[wrong], prompt, MOST, torch.tensor(0.6).item(), STOP, stays=wrong not in EDITING
                ),
            )
            for prompt in some
        )


@pytest.mark.long
@pytest.mark.parametrize(("name", "wrong"), [("dmax", "token_merge"), ("edit", "single_bd"), ("credit", "single_bd")])
def test_on_the_trained_model_too_another_policys_loop_decodes_otherwise(name: str, wrong: str, tiny: Path) -> None:
    assert unlike(name, wrong, tiny, questions(tiny, {"story": 1.0}, 6, seed=1)) > 2
