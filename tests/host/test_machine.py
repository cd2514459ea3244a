"""Whatever comes, ends and fails in whatever order, pages, prefixes and rows stay consistent and everybody is served.

The scheduler runs against a device in plain Python that checks every read and write of K/V (see tests/simulated.py).
"""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dlx.graphs.policies import Policy
from dlx.graphs.shapes import Shapes
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.request import Finish, Request, SamplingParams
from dlx.scheduler import Scheduler, rank
from tests.simulated import Device

L, S, MASK = 2, 4, 3
CARD = cast(Card, SimpleNamespace(stop_ids=(), vocab=50, mask_id=MASK, shift=False))
SHAPES = Shapes(rows=(1, 2, 4), tokens=(4, 8), C=4, S=S, W=10)
LONGEST = 40
STEMS = [[10 + (7 * stem + at) % 40 for at in range(LONGEST)] for stem in range(2)]
TURNS = 4000  # after which everything that was asked must have ended


class Machine(RuleBasedStateMachine):
    """Requests that share prefixes, a pool that is too small for them, and launches of which one may be unread."""

    @initialize(seed=st.integers(0, 2**16), pages=st.integers(10, 16), N=st.integers(1, 2), forwards=st.integers(1, 2))
    def build(self, seed: int, pages: int, N: int, forwards: int) -> None:
        self.draw = Random(seed)
        policy = Policy(L=L, N=N)
        self.s = Scheduler(
            policy, CARD, SHAPES, PagePool(pages), LONGEST, forwards=2 * forwards, budget=8, caching=seed % 4 > 0
        )
        self.device = Device(self.s, self.draw, forwards)
        self.asked: list[Request] = []
        self.now = 0.0

    @rule(
        stem=st.integers(0, 1), prompt=st.integers(1, 20), most=st.integers(1, 39), salt=st.sampled_from(["", "", "b"])
    )
    def ask(self, stem: int, prompt: int, most: int, salt: str) -> None:
        if len(self.s.waiting) > 8:
            return
        priority = self.draw.choice([0, 0, 0, -1, 1])
        params = SamplingParams(max_tokens=min(most, LONGEST - prompt), priority=priority, cache_salt=salt)
        self.now += self.draw.random() * 20
        request = Request(len(self.asked), STEMS[stem][:prompt], params, self.now)
        self.s.check(request)
        self.s.add(request)
        self.asked.append(request)

    @precondition(lambda self: any(r.finish and r.out for r in self.asked))
    @rule(most=st.integers(1, 10))
    def ask_further(self, most: int) -> None:
        """The next turn of a conversation: what was answered is part of the prompt."""
        before = self.draw.choice([r for r in self.asked if r.finish and r.out])
        prompt = (before.prompt + before.out)[: LONGEST - most]
        params = SamplingParams(max_tokens=most, cache_salt=before.params.cache_salt)
        request = Request(len(self.asked), prompt, params, self.now)
        if len(self.s.waiting) <= 8:
            self.s.add(request)
            self.asked.append(request)

    @rule()
    def turn(self) -> None:
        """What an engine does in a step."""
        oldest = min((*self.s.waiting, *self.s.running.values()), key=rank, default=None)
        before = None if oldest is None else (oldest.filled, oldest.decodes, oldest.flying)
        plan = self.s.plan()
        if plan is not None:
            self.device.launch(plan)
            if oldest is not None and before is not None and not before[2]:
                assert oldest.decodes or oldest.filled > before[0], "the first of all is not served"
        if oldest is not None and before is not None and before[1]:
            assert oldest.decodes, "the first of all is preempted"
        while len(self.device.flights) > (plan is not None):
            self.harvest()

    @rule()
    def turn_that_fails(self) -> None:
        """A launch that raises before it has done anything but keep rows aside."""
        plan = self.s.plan()
        if plan is None:
            return
        self.device.launch(plan._replace(prefill=[], admit={}, resume={}, pages={}, bucket=0))
        for slot in (*plan.admit, *plan.resume, *plan.preempt):
            self.device.stop(slot)
        self.s.put_back(plan)

    @precondition(lambda self: self.device.flights)
    @rule()
    def harvest(self) -> None:
        plan, replies = self.device.harvest()
        for request, ids in self.s.take(plan.running, replies):
            assert ids or request.finish is not None
            assert len(request.out) <= request.params.max_tokens
            if request.finish is Finish.LENGTH:
                assert len(request.out) == request.params.max_tokens

    @precondition(lambda self: self.device.flights)
    @rule()
    def harvest_that_fails(self) -> None:
        """The rows of the launch are lost."""
        plan, _ = self.device.harvest()
        for request in plan.running.values():
            request.flying -= 1
            slot = self.s.abort(request.id, Finish.ERROR)
            if slot is not None:
                self.device.stop(slot)

    @precondition(lambda self: self.asked)
    @rule()
    def abort(self) -> None:
        request = self.draw.choice(self.asked)
        ended, slot = request.finish, self.s.abort(request.id)
        if slot is not None:
            self.device.stop(slot)
        assert request.finish is (ended or Finish.ABORT)

    @invariant()
    def all_is_consistent(self) -> None:
        if not hasattr(self, "s"):
            return
        self.s.check_invariants()
        for request in self.asked:
            assert (request.finish is None) == (request in self.s.waiting or request in self.s.running.values())

    def teardown(self) -> None:
        """Everybody is served in the end, and nothing is left behind."""
        for _ in range(TURNS):
            if self.s.idle:
                break
            self.turn()
            self.s.check_invariants()
        assert self.s.idle and all(request.finish is not None for request in self.asked)
        assert self.s.pool.free == self.s.pool.total
        while self.device.flights:
            self.harvest()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def driven(seed: int, transitions: int) -> Scheduler:
    """The machine driven by chance, which draws faster than hypothesis and does not shrink; its scheduler."""
    draw = Random(seed)
    m: Any = Machine()
    m.build(seed, draw.randint(10, 16), draw.randint(1, 2), draw.randint(1, 2))
    for _ in range(transitions):
        pick = draw.random()
        if pick < 0.25:
            m.ask(draw.randrange(2), draw.randint(1, 20), draw.randint(1, 39), draw.choice(["", "", "b"]))
        elif pick < 0.3 and any(r.finish and r.out for r in m.asked):
            m.ask_further(draw.randint(1, 10))
        elif pick < 0.33:
            m.turn_that_fails()
        elif pick < 0.36 and m.device.flights:
            m.harvest_that_fails()
        elif pick < 0.42 and m.asked:
            m.abort()
        elif pick < 0.5 and m.device.flights:
            m.harvest()
        else:
            m.turn()
        m.all_is_consistent()
    m.teardown()
    return m.s


def served(transitions: int) -> None:
    """Machines of 200 transitions each; among them all that is to be shown happens."""
    schedulers = [driven(seed, 200) for seed in range(transitions // 200)]
    assert sum(s.preemptions for s in schedulers) > transitions // 200
    assert sum(s.prefix_hits for s in schedulers) > transitions // 10


def test_ten_thousand_transitions_leave_all_consistent_and_everybody_served() -> None:
    served(10_000)


@pytest.mark.long
def test_a_hundred_thousand_transitions_leave_all_consistent_and_everybody_served() -> None:
    served(100_000)
