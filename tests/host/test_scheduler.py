"""Slots and pages go to those who came first, and what a launch brings back is booked once."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlx.graphs import buffer
from dlx.graphs.policies import Policy
from dlx.graphs.shapes import Shapes
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.request import Finish, Request, SamplingParams
from dlx.scheduler import Plan, Reply, Scheduler

L, S, MASK, STOP = 4, 8, 3, 2
CARD = cast(Card, SimpleNamespace(stop_ids=(STOP,), vocab=50, mask_id=MASK, shift=False))
POLICY = Policy(L=L, accept=0.7, open_at=0.2, force_at=0.6)
SHAPES = Shapes(rows=(1, 2, 4), tokens=(8, 16), C=8, S=S, W=8)


def scheduler(pages: int = 32, max_len: int = 64) -> Scheduler:
    return Scheduler(POLICY, CARD, SHAPES, PagePool(pages), max_len)


def asked(id: int, prompt: int = 6, max_tokens: int = 8, **params: Any) -> Request:
    """A request whose prompt is 10, 11, 12, …, 49, 10, …"""
    return Request(id, [10 + i % 40 for i in range(prompt)], SamplingParams(max_tokens=max_tokens, **params), 0.0)


def planned(s: Scheduler) -> Plan:
    plan = s.plan()
    assert plan is not None
    return plan


def queued(s: Scheduler, *requests: Request) -> Plan:
    for request in requests:
        s.check(request)
        s.add(request)
    return planned(s)


def replies(rows: int = 4, **changed: Reply) -> list[Reply]:
    """Replies in which nothing happened, but for the rows named: r2=Reply(…)."""
    quiet = Reply([MASK] * L, 0, 1, buffer.RUNNING)
    return [changed.get(f"r{row}", quiet) for row in range(rows)]


def end(s: Scheduler, request: Request, why: int = buffer.LENGTH) -> None:
    assert request.slot is not None
    s.take({request.slot: request}, replies(**{f"r{request.slot}": Reply([9] * L, L, 1, why)}))


def ids(plan: Plan) -> dict[int, int]:
    return {slot: request.id for slot, request in plan.running.items()}


def test_with_nothing_to_do_there_is_no_plan() -> None:
    s = scheduler()
    assert s.idle
    assert s.plan() is None


def test_requests_are_admitted_in_order_of_arrival_into_the_lowest_slots() -> None:
    s = scheduler()
    requests = [asked(id) for id in (7, 3, 5, 4, 6, 1)]
    for at, request in enumerate(requests):
        request.arrived_s = float(at)
    plan = queued(s, *requests[3:], *requests[:3])
    assert ids(plan) == {0: 7, 1: 3, 2: 5, 3: 4}
    assert list(plan.admit) == [0, 1, 2, 3]
    assert [request.id for request in s.waiting] == [6, 1]
    assert all(r.admitted_s is not None for r in plan.running.values())
    assert all(r.admitted_s is None and r.slot is None and r.pages == [] for r in s.waiting)


def test_a_row_is_admitted_and_its_prompt_prefilled_in_one_plan_only() -> None:
    s = scheduler()
    queued(s, asked(0))
    plan = planned(s)
    assert (plan.prefill, plan.admit, ids(plan)) == ([], {}, {0: 0})


def test_slots_are_used_again_the_lowest_first() -> None:
    s = scheduler()
    running = queued(s, *(asked(id) for id in range(8))).running
    for slot in (3, 0, 2):
        end(s, running[slot])
    plan = planned(s)
    assert list(plan.admit) == [0, 2, 3]
    assert ids(plan) == {0: 4, 1: 1, 2: 5, 3: 6}


def test_pages_are_used_again_the_lowest_first() -> None:
    s = scheduler()
    a, b, c, d = (asked(id, 6, 8) for id in range(4))
    queued(s, a, b, c)
    assert [r.pages for r in (a, b, c)] == [[0, 1], [2, 3], [4, 5]]
    end(s, b)
    end(s, a)
    queued(s, d)
    assert d.pages == [0, 1]


def test_the_bucket_is_the_smallest_that_holds_the_highest_running_slot() -> None:
    s = scheduler()
    requests = [asked(id) for id in range(4)]
    assert queued(s, *requests).bucket == 4
    for leaves, bucket in ((1, 4), (3, 4), (2, 1)):  # left are 0 2 3 · 0 2 · 0
        end(s, requests[leaves])
        assert planned(s).bucket == bucket
    assert queued(s, asked(9)).bucket == 2


def test_a_request_waits_until_all_its_pages_are_free_and_nobody_overtakes_it() -> None:
    s = scheduler(pages=5)
    first, large, small = asked(0, 6, 16), asked(1, 6, 16), asked(2, 2, 2)
    assert ids(queued(s, first, large, small)) == {0: 0}
    assert s.pool.free == 2
    assert large.pages == small.pages == []
    end(s, first)
    assert ids(planned(s)) == {0: 1, 1: 2}
    assert large.pages + small.pages == [0, 1, 2, 3]


def test_the_prompts_tail_is_skipped_once() -> None:
    s = scheduler()
    request = asked(0, prompt=6, max_tokens=10)  # the first block is 14, 15 and two new ones
    running = queued(s, request).running
    assert s.take(running, replies()) == []
    assert (request.tail, request.out, request.first_s) == (2, [], None)
    assert s.take(running, replies(r0=Reply([14, 15, 20, 21], 4, 2, 0))) == [(request, [20, 21])]
    assert request.tail == 0
    assert s.take(running, replies(r0=Reply([22, 23, 24, 25], 4, 3, 0))) == [(request, [22, 23, 24, 25])]
    assert (request.out, request.nfe) == ([20, 21, 22, 23, 24, 25], 3)
    assert request.first_s is not None


def test_only_what_is_committed_is_taken() -> None:
    s = scheduler()
    request = asked(0, prompt=5, max_tokens=10, max_nfe=4)
    running = queued(s, request).running
    last = Reply([14, 20, MASK, 21], 2, 4, buffer.MAX_NFE)
    assert s.take(running, replies(r0=last)) == [(request, [20])]
    assert (request.finish, request.out) == (Finish.MAX_NFE, [20])


def test_forwards_are_counted_also_where_nothing_was_committed() -> None:
    s = scheduler()
    one, two = asked(0), asked(1)
    running = queued(s, one, two).running
    quiet = Reply([MASK] * L, 0, 5, 0)
    assert s.take(running, replies(r0=quiet, r1=Reply([14, 15, 8, 9], 4, 6, 0))) == [(two, [8, 9])]
    assert (one.nfe, two.nfe) == (5, 6)


@pytest.mark.parametrize(
    ("why", "finish"),
    [
        (buffer.STOP, Finish.STOP),
        (buffer.LENGTH, Finish.LENGTH),
        (buffer.MAX_NFE, Finish.MAX_NFE),
        (buffer.BAD, Finish.ERROR),
    ],
)
def test_a_request_that_ends_is_told_even_without_a_token_and_leaves_its_place(why: int, finish: Finish) -> None:
    s = scheduler()
    request = asked(0)
    running = queued(s, request).running
    assert s.take(running, replies(r0=Reply([MASK] * L, 0, 1, why))) == [(request, [])]
    assert (request.finish, request.slot, request.pages, request.first_s) == (finish, None, [], None)
    assert s.idle
    assert s.pool.free == 32


def test_replies_of_launches_in_flight_when_a_request_ended_are_ignored() -> None:
    s = scheduler()
    first, other, heir = asked(0), asked(1), asked(2)
    queued(s, first, other)
    flying = planned(s)  # sent before it is known that the first has ended
    end(s, first)
    plan = queued(s, heir)
    assert ids(plan) == {1: 1, 0: 2}
    assert ids(flying) == {0: 0, 1: 1}
    late = replies(r0=Reply([8] * L, L, 9, buffer.STOP), r1=Reply([14, 15, 20, 21], L, 2, 0))
    assert s.take(flying.running, late) == [(other, [20, 21])]
    assert (first.nfe, first.finish, len(first.out)) == (1, Finish.LENGTH, 2)
    assert (heir.nfe, heir.finish, heir.out, heir.slot) == (0, None, [], 0)


def test_a_waiting_request_is_aborted_without_a_slot() -> None:
    s = scheduler()
    requests = [asked(id) for id in range(6)]
    queued(s, *requests)
    assert s.abort(4) is None
    assert requests[4].finish is Finish.ABORT
    assert [request.id for request in s.waiting] == [5]


def test_a_running_request_is_aborted_with_the_slot_to_stop() -> None:
    s = scheduler()
    requests = [asked(id) for id in range(5)]
    flying = queued(s, *requests)
    assert s.abort(2) == 2
    assert requests[2].finish is Finish.ABORT
    assert s.take(flying.running, replies(r2=Reply([9] * L, L, 1, buffer.LENGTH))) == []
    assert requests[2].out == []
    assert ids(planned(s)) == {0: 0, 1: 1, 3: 3, 2: 4}


def test_unknown_ended_and_aborted_requests_are_aborted_without_effect() -> None:
    s = scheduler()
    requests = [asked(id) for id in range(5)]
    queued(s, *requests)
    end(s, requests[0])
    s.abort(1)
    s.abort(4)
    free, waiting, running = s.pool.free, list(s.waiting), dict(s.running)
    for id in (99, -1, 0, 1, 4):
        assert s.abort(id) is None
    assert (s.pool.free, list(s.waiting), s.running) == (free, waiting, running)
    assert requests[0].finish is Finish.LENGTH


def test_all_requests_end_in_turn_whatever_ends_when_and_nothing_leaks() -> None:
    """Launches of which the last is always unread, random ends and random aborts."""
    for seed in range(100):
        draw = random.Random(seed)
        s = scheduler(pages=draw.randint(8, 20))
        requests = [asked(id, draw.randint(1, 30), draw.randint(1, 34)) for id in range(20)]
        for request in requests:
            s.add(request)
        admitted: list[int] = []
        flying: list[Plan] = []
        while (plan := s.plan()) is not None:
            admitted += [plan.running[slot].id for slot in plan.admit]
            held = [page for request in s.running.values() for page in request.pages]
            assert len(held) == len(set(held)) == s.pool.total - s.pool.free
            assert max(plan.running) < plan.bucket
            flying.append(plan)
            if draw.random() < 0.2:
                s.abort(draw.randrange(20))
            if len(flying) > 1:
                why = [draw.choice([0, 0, buffer.STOP, buffer.LENGTH]) for _ in range(4)]
                s.take(flying.pop(0).running, [Reply([9] * L, L, 1, w) for w in why])
            s.pool.check_invariants()
        assert admitted == sorted(admitted)
        assert all(request.finish is not None and request.slot is None for request in requests)
        assert {r.id for r in requests if r.finish is not Finish.ABORT} <= set(admitted)
        assert s.pool.free == s.pool.total
