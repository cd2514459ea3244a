"""Tokens of the answer that are known beforehand, on block windows, against plain loops that hold them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.graphs import buffer, packing
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import SubBlock, Within
from dlx.graphs.step import Ids, step_
from tests import sequences
from tests.checkpoints import STOP, ZOO, Shape, write
from tests.families import FAMILIES, network
from tests.families import STOP as END
from tests.families import write as written
from tests.graphs.test_step import Table, begin
from tests.graphs.test_step import decode as decoded
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
            told = windowed(net, prompt, replace(strategy, threshold=bar), ask)
            want = walked(told, prompt, net)
            got = trail(llm, prompt, asked(most, fixed, threshold=bar, max_nfe=nfe), net.mask_id)
            if differ(got, want):
                assert excusable(got, want, told), (name, prompt, fixed, bar, got, want)
                excused += 1
            width = max(width, *(f.opened - f.lead for f in told.forwards))
    assert excused <= 1
    assert (width > 1) == (name != "fixed")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["single_bd", "multi_bd"])
@pytest.mark.parametrize("name", ["dream", "fast_dllm_v2", "llada"])
def test_it_holds_where_tokens_are_read_off_the_position_before_and_prompts_see_themselves(
    name: str, policy: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        monkeypatch.setattr(packing, "ENOUGH", 8)
    net, tiny, many, excused = network(name, seed=2, spread=6.0), FAMILIES[name], cases(4, END), 0
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


SMALL = Shape(8, heads=2, kv_heads=1, head_dim=16, layers=1, hidden=32, ffn=48)
Said = list[tuple[list[int], int, str]]


def said(llm: LLM, some: list[tuple[list[int], int, Fixed]], **more: object) -> Said:
    params = [asked(most, fixed, threshold=0.5, seed=i, **more) for i, (_, most, fixed) in enumerate(some)]
    return [(o.token_ids, o.nfe, str(o.finish_reason)) for o in llm.generate([p for p, _, _ in some], params)]


@pytest.mark.parametrize("name", ["single_bd", "multi_bd", "edit", "fast_dllm_v2"])
def test_a_row_is_a_stranger_to_its_neighbours(random8: Path, name: str) -> None:
    some, answers = [*cases(6, STOP), *((prompt, most, {}) for prompt, most, _ in cases(6, STOP)[:3])], []
    for rows in (1, 4):
        with opened(random8, name, rows=rows) as llm:
            answers.append(said(llm, some, temperature=0.7))
    assert answers[0] == answers[1]


def test_a_row_knows_nothing_of_what_was_fixed_in_its_slot(random8: Path) -> None:
    some = cases(7, STOP)
    plain = [(prompt, most, {}) for prompt, most, _ in some]
    with opened(random8, "multi_bd", rows=1) as llm:
        before, infilled, after = said(llm, plain), said(llm, some), said(llm, plain)
    assert before == after != infilled


def test_what_is_fixed_goes_with_the_row_that_gives_way(tmp_path: Path) -> None:
    draw, folder = Random(7), write(tmp_path, ZOO["b4"], 3)
    some: list[tuple[list[int], int, Fixed]] = []
    for _ in range(6):
        most = draw.randint(60, 85)
        fixed = {i: draw.randrange(4, 90) for i in range(most - 1) if draw.random() < 0.3}
        some.append(([draw.randrange(4, 90) for _ in range(draw.randint(1, 20))], most, fixed))
    answers = []
    for pages in (None, 40):
        with LLM(
            folder, policy="multi_bd", graphs="off", device="cpu", dtype="float32", page_size=4, num_pages=pages,
            max_num_seqs=4, max_model_len=112, batch_invariant=True,
        ) as llm:  # fmt: skip
            answers.append(said(llm, some, ignore_eos=True, temperature=0.5))
            assert (llm.engine.scheduler.preemptions > 0) == (pages is not None)
    assert answers[0] == answers[1]
    for (tokens, _, _), (_, most, fixed) in zip(answers[1], some, strict=True):
        assert len(tokens) == most and fixed.items() <= dict(enumerate(tokens)).items()


@pytest.mark.parametrize("forwards", [1, 6])
def test_several_forwards_a_launch_infill_alike(random8: Path, forwards: int) -> None:
    some = cases(8, STOP)
    with opened(random8, "multi_bd") as one, LLM(
        random8, policy="multi_bd", graphs="off", device="cpu", dtype="float32", max_num_seqs=3, forwards=forwards
    ) as many:  # fmt: skip
        assert said(one, some) == said(many, some)


@pytest.mark.slow
def test_a_compiled_step_infills_as_the_eager_one(tmp_path: Path) -> None:
    folder, some, answers = write(tmp_path, SMALL, 1), cases(9, STOP), []
    for graphs in ("off", "compile"):
        with LLM(
            folder, policy=replace(POLICIES["multi_bd"], N=2), graphs=graphs, device="cpu", dtype="float32",
            max_num_seqs=1, max_model_len=64,
        ) as llm:  # fmt: skip
            answers.append(said(llm, some))
    assert answers[0] == answers[1]


def test_a_budget_counts_what_is_fixed_once_its_block_is_open() -> None:
    script, sharp = list(range(1, 31)), [50.0, 50.0] + [2.0] * 28
    policy = replace(POLICIES["multi_bd"], auto_max_nfe=1, open_at=1.0)
    fixed = [(3, 9), *((i, 7) for i in range(4, 11))]  # the second block whole, which is not open
    buf, kv, out = begin(policy, [{"max_tokens": 12, "fixed": fixed, "max_nfe": buffer.UNLIMITED, "open_at": 1}])
    assert buf.tok[0].flatten()[:12].tolist() == [31, 31, 31, 9, *[7] * 7, 31]
    step_(policy, Ids(31, 32), Table(script, sharp), buf, kv, out)
    assert buf.tok[0, 0].tolist() == [1, 2, 31, 9]
    assert int(buf.ints[0, buffer.COUNTS.index("max_nfe")]) == 4  # 12 tokens, 3 a forward


def test_tokens_fixed_behind_what_is_decided_are_delivered_with_it_once_the_forwards_are_spent() -> None:
    table = Table(list(range(1, 31)), [50.0] * 3 + [2.0] * 27)
    for fixed, told in (([(3, 9), (4, 8)], [1, 2, 3, 9]), ([(2, 9), (5, 8)], [1, 2, 9])):
        row = {"max_tokens": 12, "fixed": fixed, "max_nfe": 1, "open_at": 1.0, "accept": 0.99}
        assert decoded(replace(POLICIES["multi_bd"], force_at=1.0), table, [row]) == [(told, 1, buffer.MAX_NFE)]
