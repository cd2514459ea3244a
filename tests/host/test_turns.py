"""Who is planned: by rank, with a budget for prompts, with pages ahead of the device, and the newest gives way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlx.graphs import buffer
from dlx.graphs.policies import Policy
from dlx.graphs.shapes import Shapes
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.plan import Plan, Reply
from dlx.request import Finish, Request, SamplingParams
from dlx.scheduler import AGEING_S, Scheduler

L, S = 4, 8
CARD = cast(Card, SimpleNamespace(stop_ids=(2,), vocab=50, mask_id=3, shift=False))
SHAPES = Shapes(rows=(1, 2, 4), tokens=(8, 16), C=8, S=S, W=16)


def scheduler(pages: int = 64, policy: Policy = Policy(L=L), **more: Any) -> Scheduler:  # noqa: B008
    return Scheduler(policy, CARD, SHAPES, PagePool(pages), 128, **{"forwards": 2, "caching": True} | more)


def asked(id: int, prompt: int = 6, max_tokens: int = 8, arrived_s: float = 0.0, **params: Any) -> Request:
    ids = [10 + (id + i) % 40 for i in range(prompt)]
    return Request(id, ids, SamplingParams(max_tokens=max_tokens, **params), arrived_s)


def planned(s: Scheduler, *requests: Request) -> Plan:
    for request in requests:
        s.check(request)
        s.add(request)
    plan = s.plan()
    s.check_invariants()
    assert plan is not None
    return plan


def take(s: Scheduler, plan: Plan, blocks: int = 1, why: int = buffer.RUNNING) -> None:
    """Every row commits so many blocks, of which all but the last slid out."""
    replies = [Reply([], 0, 0, 0)] * 4
    for slot, request in plan.running.items():
        known = len(request.prompt) + len(request.out)
        start = known // L * L
        tok = (request.prompt + request.out)[start:] + [9] * (blocks * L - known % L)
        replies[slot] = Reply(tok, len(tok), request.nfe + 1, why, max(start, start + (blocks - 1) * L))
    s.take(plan.running, replies)
    s.check_invariants()


def ids(requests: Any) -> list[int]:
    return [request.id for request in requests]


def test_those_of_higher_priority_come_first_and_waiting_makes_up_for_it() -> None:
    s = scheduler()
    late = asked(2, arrived_s=2 * AGEING_S, priority=-1)
    planned(s, asked(0), asked(1, arrived_s=AGEING_S + 1), late, asked(3, arrived_s=3 * AGEING_S), asked(4, priority=2))
    assert ids(s.running.values()) == [0, 2, 1, 4]
    assert ids(s.waiting) == [3]


def test_a_request_of_higher_priority_takes_the_slot_of_the_newest() -> None:
    s = scheduler()
    plan = planned(s, *(asked(n, arrived_s=float(n)) for n in range(4)))
    take(s, plan)
    plan = planned(s, asked(9, arrived_s=9.0, priority=-1))
    assert plan.preempt == {3: 3} and ids(s.waiting) == [3] and plan.running[3].id == 9
    assert s.preemptions == 1


def test_a_prompt_over_the_budget_is_prefilled_over_several_plans_while_others_decode() -> None:
    s = scheduler(budget=16)
    short, long = asked(0, 6, 60), asked(1, 53, 8)
    plan = planned(s, short, long)
    assert ids(plan.running.values()) == [0]
    assert [(piece.start, len(piece.tok)) for piece in plan.prefill] == [(0, 4), (0, 8)]
    seen = [8]
    while long.id not in ids(plan.running.values()):
        assert plan.admit.keys() <= {0} and ids(plan.running.values()) == [0]
        assert sum(len(piece.tok) for piece in plan.prefill) <= 16
        take(s, plan)
        plan = planned(s)
        seen += [piece.start + len(piece.tok) for piece in plan.prefill]
    assert seen == [8, 24, 40, 52] and list(plan.admit) == [1]


def test_a_prompt_that_sees_itself_whole_stays_in_one_piece_over_the_budget() -> None:
    s = Scheduler(
        Policy(L=L, full=True), CARD, SHAPES._replace(tokens=(8, 128)), PagePool(64), 128, forwards=2, budget=16
    )
    plan = planned(s, asked(0, 6), asked(1, 53))
    assert [len(piece.tok) for piece in plan.prefill] == [6]
    assert [len(piece.tok) for piece in planned(s).prefill] == [53]


def test_a_launch_in_which_nobody_decodes_has_no_rows() -> None:
    plan = planned(scheduler(budget=16), asked(0, 60))
    assert (plan.bucket, plan.running, ids(plan.filling)) == (0, {}, [0])


def test_pages_are_given_ahead_of_the_device_and_told_to_it() -> None:
    s = scheduler()
    request = asked(0, 6, 100)
    plan, before = planned(s, request), list[int]()
    ahead = 2 * L + 2 * L  # two launches of one block, and the window behind them
    assert len(request.pages) == -(-(4 + ahead) // S) == 3
    assert plan.pages == {}
    for _ in range(20):
        take(s, plan)
        before = list(request.pages)
        plan = planned(s)
        assert len(request.pages) * S >= request.final + ahead
        assert plan.pages == ({0: request.pages} if len(request.pages) > len(before) else {})
    assert request.pages[: len(before)] == before


def test_a_row_without_bound_of_forwards_has_all_its_pages_at_once() -> None:
    request = asked(0, 6, 100)
    planned(scheduler(forwards=None), request)
    assert len(request.pages) == -(-106 // S)


def test_the_newest_gives_way_and_goes_on_with_its_row() -> None:
    s = scheduler(pages=16, caching=False)
    old, new = asked(0, 6, 100), asked(1, 6, 100)
    plan = planned(s, old, new)
    while not plan.preempt:
        take(s, plan)
        plan = planned(s)
    assert plan.preempt == {1: 1} and new.kept and ids(plan.running.values()) == [0]
    done, out = new.final, list(new.out)
    while old.finish is None:
        take(s, plan, why=buffer.LENGTH if len(old.out) > 90 else buffer.RUNNING)
        plan = planned(s)
    assert plan.resume == {0: 1} and plan.admit == {} and plan.pages == {0: new.pages}
    assert [t for piece in plan.prefill for t in piece.tok] == (new.prompt + out)[:done]
    assert plan.prefill[0].pages == new.pages


def test_a_row_whose_last_launch_is_not_read_is_not_resumed() -> None:
    s = scheduler(pages=10, caching=False)
    old, new = asked(0, 6, 70), asked(1, 6, 70)
    flying = planned(s, old, new)
    plan = planned(s)
    take(s, flying, blocks=1)
    while not plan.preempt:
        flying, plan = plan, planned(s)
        if not plan.preempt:
            take(s, flying)
    assert new.flying == 1
    s.abort(old.id)
    assert s.plan() is None  # its pages are free, and yet it waits
    out = len(new.out)
    take(s, flying)
    assert len(new.out) == out + L and planned(s).resume == {0: 1}


def test_a_request_that_ends_in_a_launch_sent_before_it_gave_way_is_not_resumed() -> None:
    s = scheduler(pages=10, caching=False)
    plan = planned(s, asked(0, 6, 70), asked(1, 6, 70))
    while not (after := planned(s)).preempt:
        take(s, plan)
        plan = after
    new = s.waiting[0]
    take(s, plan, why=buffer.STOP)
    assert new.finish is Finish.STOP and s.idle and s.pool.used == 0


def test_what_is_kept_is_handed_out_before_anybody_gives_way() -> None:
    s = scheduler(pages=16)
    plan = planned(s, asked(5, 60, 8))
    take(s, plan, blocks=2, why=buffer.LENGTH)
    assert s.pool.cached == 8
    planned(s, asked(0, 6, 100))
    for _ in range(20):
        take(s, planned(s))
    assert s.preemptions == 0 and s.pool.used > 16 - 8


@pytest.mark.parametrize(("why", "known"), [(buffer.STOP, 6), (buffer.BAD, 5)])
def test_a_row_whose_logits_are_not_finite_publishes_nothing_more(why: int, known: int) -> None:
    s = scheduler()
    request = asked(0, 40, 60)
    take(s, planned(s, request))
    take(s, planned(s), blocks=3, why=why)
    assert s.pool.cached == known


@pytest.mark.parametrize("policy", [Policy(L=L, full=True), Policy(L=L)])
def test_prompts_that_see_themselves_whole_are_never_found(policy: Policy) -> None:
    s = scheduler(policy=policy)
    take(s, planned(s, asked(0, 40)), why=buffer.LENGTH)
    assert s.pool.cached == (0 if policy.full else 5)


def test_admissions_of_a_launch_that_was_interrupted_wait_again() -> None:
    s = scheduler(budget=16)
    first, second = asked(0, 6), asked(1, 40)
    plan = planned(s, first, second)
    s.put_back(plan)
    s.check_invariants()
    assert (ids(s.waiting), s.running, s.pool.used) == ([0, 1], {}, 0)
    assert ids(planned(s).running.values()) == [0]


def test_rows_that_have_their_pages_cost_a_plan_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a turn of the loop does for each row, it does a thousand times while the device waits."""
    s = scheduler()
    planned(s, *(asked(id, 6, 100) for id in range(6)))
    looked: list[Request] = []
    pages = s.terms.pages
    monkeypatch.setattr(
        s.terms, "pages", lambda request, ahead=None: (looked.append(request), pages(request, ahead))[1]
    )
    assert s.plan() is not None and not looked
