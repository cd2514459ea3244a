"""Tokens of the answer that are known beforehand, on block windows, against plain loops that hold them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.graphs import packing
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import SubBlock, Within
from tests import sequences
from tests.checkpoints import STOP, ZOO, write
from tests.families import FAMILIES, network
from tests.families import STOP as END
from tests.families import write as written
from tests.graphs.test_strategies import differ, opened, trail
from tests.models.test_family_decoding import STRATEGIES as WINDOWS
from tests.models.test_family_decoding import Speaker
from tests.reference import Ask, Qwen3, Strategy, compare
from tests.reference import decode as windowed
from tests.strategies import STRATEGIES, decode
from tests.windows import Whole, excusable, walked

L = ZOO["b8"].block_length
Fixed = dict[int, int]


def spans(*parts: tuple[int, int], draw: Random, stop: int | None = None) -> Fixed:
    """Random ids at the offsets of these half-open parts, a stop id at one of them."""
    fixed = {i: draw.randrange(4, 90) for first, end in parts for i in range(first, end)}
    return fixed | ({draw.choice(sorted(fixed)): stop} if stop is not None else {})


def cases(seed: int, stop: int, n: int = 1) -> list[tuple[list[int], int, Fixed]]:
    """(prompt, tokens, what is fixed): gaps in a block and across, whole blocks, a suffix, all, none, at random."""
    draw, out = Random(seed), []
    for _ in range(n):
        for most, parts in (
            (20, [(2, 4)]),
            (20, [(0, 1), (5, 13)]),
            (36, [(3, 27)]),  # whole blocks, wherever they begin
            (22, [(6, 9), (17, 22)]),
            (30, [(0, 3), (11, 30)]),  # a suffix of more than a block
            (12, [(0, 12)]),
            (10, []),
        ):
            prompt = [draw.randrange(4, 90) for _ in range(draw.choice((1, 5, 8, 15, 16, 21)))]
            out.append((prompt, most, spans(*parts, draw=draw, stop=stop if parts else None)))
        most = draw.randrange(1, 40)
        share = draw.choice((0.2, 0.5, 0.9))
        out.append((prompt, most, {i: draw.randrange(4, 90) for i in range(most) if draw.random() < share}))
    return out


def asked(most: int, fixed: Fixed, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=most, fixed=tuple(fixed.items()), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def random8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with blocks of 8."""
    return write(tmp_path_factory.mktemp("infilling"), ZOO["b8"], 3)


def hold(folder: Path, name: str, many: list[tuple[list[int], int, Fixed]], wrongly: bool = False) -> None:
    """Forward for forward as the loop of one block, but for one in ten that moved logits part as well.

    wrongly  the loop knows of the last fixed token nothing
    """
    net, excused, stays = Qwen3(folder, L), 0, name != "edit"
    with opened(folder, name, rows=1) as llm:
        for i, (prompt, most, fixed) in enumerate(many):
            bar = torch.tensor((0.35, 0.6, 0.85)[i % 3]).item()
            known = dict(list(fixed.items())[:-1]) if wrongly else fixed
            want = decode(net, STRATEGIES[name], prompt, most, bar, STOP, stays=stays, fixed=known)
            got = trail(llm, prompt, asked(most, fixed, threshold=bar), net.mask_id)
            if differ(got, want):
                near = decode(net, STRATEGIES[name], prompt, most, bar, STOP, 1e-5, stays, known)
                assert differ(near, want), (name, prompt, fixed, bar, got, want)
                excused += 1
    assert excused <= len(many) / 10


ONE_BLOCK = ["single_bd", "edit", "fast_dllm_v2", "hierarchical", "credit", "iter_smooth", "sequential"]


@pytest.mark.parametrize("name", ONE_BLOCK)
def test_a_block_with_fixed_tokens_decodes_forward_for_forward_like_its_loop(random8: Path, name: str) -> None:
    hold(random8, name, cases(1, STOP))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("dmax", "token_merge")])
def test_sixty_infilled_answers_are_the_loops(random8: Path, name: str) -> None:
    hold(random8, name, cases(2, STOP, 8))


def test_a_loop_that_knows_one_token_less_decodes_otherwise(random8: Path) -> None:
    with pytest.raises(AssertionError):
        hold(random8, "single_bd", cases(1, STOP), wrongly=True)


@pytest.mark.parametrize("name", ["multi_bd", "d2f", "fixed"])
def test_a_window_with_fixed_tokens_decodes_forward_for_forward_like_its_loop(
    name: str, random8: Path, tmp_path: Path, all_to_all: Callable[[Path], Path]
) -> None:
    folder = all_to_all(write(tmp_path, ZOO["b8"], 3)) if name == "d2f" else random8
    net = Whole(folder, L) if name == "d2f" else Qwen3(folder, L)
    strategy = Strategy(L, fixed=1) if name == "fixed" else Strategy(L, N=4, open_at=0.1)
    width = excused = 0
    with opened(folder, name, rows=1) as llm:
        for i, (prompt, most, fixed) in enumerate(cases(3, STOP, 2)):
            if isinstance(net, Whole):
                net.prompt = len(prompt)
            bar, nfe = torch.tensor((0.35, 0.6, 0.85)[i % 3]).item(), (None, None, None, 2)[i % 4]
            ask = Ask(most, max_nfe=nfe, stop_ids=frozenset({STOP}), fixed=fixed)
            decoded = windowed(net, prompt, replace(strategy, threshold=bar), ask)
            want = walked(decoded, prompt, net)
            got = trail(llm, prompt, asked(most, fixed, threshold=bar, max_nfe=nfe), net.mask_id)
            if differ(got, want):
                assert excusable(got, want, decoded), (name, prompt, fixed, bar, got, want)
                excused += 1
            width = max(width, *(f.opened - f.lead for f in decoded.forwards))
    assert excused <= 1
    assert (width > 1) == (name != "fixed")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
@pytest.mark.parametrize("name", ["dream", "fast_dllm_v2", "llada"])
def test_it_holds_where_tokens_are_read_off_the_position_before_and_prompts_see_themselves(
    name: str, policy: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        monkeypatch.setattr(packing, "FREE", 1)
    net, tiny, many, excused = network(name, seed=2, spread=6.0), FAMILIES[name], cases(4, END, 2), 0
    with LLM(
        written(tmp_path, name, net), policy=policy, graphs="off", device="cpu", dtype="float32", block_length=tiny.L,
        max_num_seqs=4,
    ) as llm:  # fmt: skip
        assert (packing.seats(4, llm.policy.N, tiny.L) is not None) == packed
        answers = llm.generate([p for p, _, _ in many], [asked(m, fixed, threshold=0.6) for _, m, fixed in many])
    for (prompt, most, fixed), got in zip(many, answers, strict=True):
        speaker = Speaker(net, tiny.L, len(prompt) if tiny.full else None, tiny.shift)
        ask, how = Ask(most, stop_ids=frozenset({END}), fixed=fixed), replace(WINDOWS[policy], L=tiny.L, threshold=0.6)
        excused += compare(windowed(speaker, prompt, how, ask), got)
    assert excused <= 1


@pytest.mark.parametrize("cached", [False, True])
def test_sub_blocks_with_fixed_tokens_are_the_references(cached: bool, tmp_path: Path) -> None:
    net, name, excused = network("fast_dllm_v2", seed=2, spread=6.0), "fast_dllm_v2" + "_cached" * cached, 0
    policy = replace(POLICIES[name], select=Within(4), turn=SubBlock(4) if cached else None)
    how = sequences.How(8, "sub", size=4, shift=True, cached=cached)
    with LLM(
        written(tmp_path, "fast_dllm_v2", net), policy=policy, graphs="off", device="cpu", dtype="float32",
        block_length=8, max_num_seqs=1,
    ) as llm:  # fmt: skip
        for i, (prompt, most, fixed) in enumerate(cases(5, END)):
            bar = (0.5, 0.7, 0.9)[i % 3]
            want = sequences.decode(net, prompt, most, replace(how, threshold=bar), fixed)
            got = llm.generate([prompt], asked(most, fixed, threshold=bar))[0]
            tokens = want.tokens[: len(want.tokens) - (want.finish == "stop")]
            if (got.token_ids, got.finish_reason, got.nfe) != (tokens, want.finish, len(want.states)):
                assert min(want.gaps) < sequences.NEAR, (prompt, most, fixed, bar, got, want)
                excused += 1
    assert excused <= 1
