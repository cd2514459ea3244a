"""What a request is refused for before it is queued, and what its row is admitted with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlx.errors import RequestError
from dlx.graphs.buffer import Row
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Calm, Edit
from dlx.graphs.shapes import Shapes
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.request import Request, SamplingParams
from dlx.scheduler import Plan, Scheduler

L, S, MASK, STOP = 4, 8, 3, 2
CARD = cast(Card, SimpleNamespace(stop_ids=(STOP,), vocab=50, mask_id=MASK, shift=False))
POLICY = Policy(L=L, accept=0.7, open_at=0.2, force_at=0.6, rewrite=Edit(), settle=Calm(), filters=True)
SHAPES = Shapes(rows=(1, 2, 4), tokens=(8, 16), C=8, S=S, W=8)
NAN = float("nan")


def scheduler(pages: int = 32) -> Scheduler:
    return Scheduler(POLICY, CARD, SHAPES, PagePool(pages), max_len=64)


def asked(prompt: list[int], max_tokens: int = 8, **params: Any) -> Request:
    return Request(0, prompt, SamplingParams(max_tokens=max_tokens, **params), 0.0)


def admitted(request: Request) -> tuple[Plan, Row]:
    s = scheduler()
    s.check(request)
    s.add(request)
    plan = s.plan()
    assert plan is not None
    assert s.pool.total - s.pool.free == len(request.pages)
    return plan, plan.admit[0]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "pages"), [(1, 7, 1), (4, 4, 1), (4, 5, 2), (1, 8, 2), (3, 9, 2), (16, 1, 3)]
)
def test_a_request_holds_pages_for_every_block_it_may_compute(prompt: int, max_tokens: int, pages: int) -> None:
    request = asked([9] * prompt, max_tokens)
    _, row = admitted(request)
    assert request.pages == row.pages == list(range(pages))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_what_is_prefilled_where_tokens_are_read_off_the_position_before_or_prompts_see_themselves(
    shift: bool, full: bool
) -> None:
    card = cast(Card, SimpleNamespace(stop_ids=(STOP,), vocab=50, mask_id=MASK, shift=shift))
    shapes = SHAPES._replace(tokens=(8, 64))
    for n in range(1, 45):
        request = asked([10 + i % 40 for i in range(n)])
        s = Scheduler(replace(POLICY, full=full), card, shapes, PagePool(32), max_len=64)
        s.add(request)
        plan = s.plan()
        assert plan is not None
        row, start = plan.admit[0], (n - 1) // L * L if shift else n // L * L
        assert (row.start, row.tok, request.tail) == (start, request.prompt[start:], n % L)
        done = [(chunk.start, chunk.tok, chunk.end) for chunk in plan.prefill]
        want = (0, request.prompt, n) if full else (0, request.prompt[:start], 0)
        assert done == ([want] if start else [])


def test_complete_blocks_are_prefilled_in_chunks_and_the_rest_joins_the_first_block() -> None:
    for n in range(1, 45):
        request = asked([10 + i % 40 for i in range(n)])
        plan, row = admitted(request)
        whole = n // L * L
        assert [t for chunk in plan.prefill for t in chunk.tok] == request.prompt[:whole]
        assert [chunk.start for chunk in plan.prefill] == list(range(0, whole, 16))
        assert all(len(chunk.tok) <= 16 and chunk.pages == request.pages for chunk in plan.prefill)
        assert (row.start, row.tok) == (whole, request.prompt[whole:])
        assert (request.tail, request.prefills) == (n - whole, -(-whole // 16))


def test_a_row_carries_the_policys_numbers() -> None:
    _, row = admitted(asked([9] * 6))
    assert row.num == (0.7, 0.2, 0.6, 0.0, 0.9, 0.0, 0.0, 1.0)
    assert row.ints == (14, 2**31 - 1, 0, 0, 6, 2**31 - 1, 0, -1)
    assert row.stops == [STOP]


def test_a_requests_own_numbers_come_first_zeros_too() -> None:
    own: dict[str, Any] = {"threshold": 0.0, "open_at": 0.0, "force_at": 1.0, "temperature": 0.5, "seed": 0}
    own |= {"edit": 0.5, "stability": 0.75, "top_p": 0.5, "top_k": 3}
    _, row = admitted(asked([9] * 6, max_nfe=9, ignore_eos=True, stop_token_ids=(7, STOP, 7), **own))
    assert row.num == (0.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.75, 0.5)
    assert row.ints == (14, 9, 1, 3, 6, 2**31 - 1, 0, -1)
    assert row.stops == [STOP, 7]
    assert row.seed == 0


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {admitted(asked([9]))[1].seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt", "params", "parts"),
    [
        ([9], {"max_tokens": 0}, ["max_tokens=0", "from 1 to"]),
        ([9], {"threshold": NAN}, ["threshold=nan", "from 0 to 1"]),
        ([], {}, ["the prompt is empty", "pass at least one token"]),
        ([5, 50], {}, ["prompt[1]=50", "from 0 to 49"]),
        ([-1], {}, ["prompt[0]=-1", "from 0 to 49"]),
        ([5, 6, True], {}, ["prompt[2]=True", "from 0 to 49"]),
        (["a"], {}, ["prompt[0]='a'", "pass integers"]),
        ([9, MASK], {}, ["prompt[1]=3", "mask id", "leave it out"]),
        ([9], {"stop_token_ids": (50,)}, ["stop_token_ids has 50", "from 0 to 49"]),
        ([9], {"stop_token_ids": (4, MASK)}, ["stop_token_ids has 3", "other than the mask id"]),
        ([9], {"stop_token_ids": range(4, 12)}, ["9 stop ids", "(2,)", "at most 8"]),
        ([9], {"fixed": ((0, 50),)}, ["fixed has the id 50", "from 0 to 49"]),
        ([9], {"fixed": ((0, 5), (3, MASK))}, ["fixed has the id 3", "other than the mask id"]),
        ([9], {"fixed": ((8, 5),)}, ["offset of fixed=8", "from 0 to 7"]),
        ([9] * 6, {"max_tokens": 59}, ["6 tokens", "max_tokens=59", "max_model_len=64", "shorten", "lower"]),
        ([9] * 6, {"max_tokens": 40}, ["needs 6 pages", "has 5", "lower max_tokens or raise num_pages"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_way_out(
    prompt: list[int], params: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        scheduler(pages=5).check(asked(prompt, **params))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_canvas_holds_no_fixed_tokens() -> None:
    policy = replace(POLICIES["diffusion_gemma"], L=L)
    s = Scheduler(policy, CARD, SHAPES, PagePool(32), max_len=64)
    with pytest.raises(
        RequestError, match=r"fixed has 2 tokens, and a canvas, .* leave fixed out, or use a model that"
    ):
        s.check(asked([9], fixed=((0, 5), (3, 6))))


def test_a_row_is_told_at_which_positions_what_is_fixed_and_ends_behind_the_last_gap() -> None:
    _, row = admitted(asked([9] * 6, 8, fixed=((1, 5), (7, 8), (6, 7))))
    assert (row.fixed, row.ints[0]) == ([(7, 5), (13, 8), (12, 7)], 12)


def test_what_just_fits_is_not_refused() -> None:
    scheduler().check(asked([9] * 6, 58))  # 64 tokens
    scheduler(pages=5).check(asked([9] * 6, 34))  # 40 tokens
    scheduler().check(asked([0, 49, STOP], 1))
    scheduler().check(asked([9], stop_token_ids=(*range(4, 11), STOP)))  # 8 with the model's own
