"""A page is free or held by one request, whatever is asked for and given back in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dlx.errors import CapacityError, EngineError
from dlx.pages import PagePool

TOTAL = 24


def test_a_new_pool_is_free_and_hands_out_its_pages_in_order() -> None:
    pool = PagePool(5)
    assert (pool.total, pool.free) == (5, 5)
    assert pool.allocate(2) + pool.allocate(3) == [0, 1, 2, 3, 4]
    assert pool.free == 0


def test_no_pages_may_be_asked_for() -> None:
    pool = PagePool(1)
    assert pool.allocate(0) == []
    pool.release([])
    assert pool.free == 1


def test_freed_pages_are_handed_out_again_the_lowest_first() -> None:
    pool = PagePool(6)
    first, second, third = pool.allocate(2), pool.allocate(2), pool.allocate(2)
    pool.release(third)
    pool.release(first)
    assert pool.allocate(3) == [0, 1, 4]
    pool.release(second)
    assert pool.allocate(3) == [2, 3, 5]


def test_asking_for_more_than_is_free_takes_nothing_and_says_what_is_there() -> None:
    pool = PagePool(4)
    held = pool.allocate(1)
    with pytest.raises(CapacityError) as caught:
        pool.allocate(4)
    assert str(caught.value) == "4 pages are asked for and 3 of 4 are free; wait, or raise num_pages"
    assert pool.free == 3
    pool.release(held)
    assert len(pool.allocate(4)) == 4


@pytest.mark.parametrize("page", [0, 3, 4, -1])
def test_a_page_that_is_not_held_cannot_be_released(page: int) -> None:
    pool = PagePool(4)
    pool.release(pool.allocate(1))
    with pytest.raises(EngineError, match=f"page {page} is released but not held"):
        pool.release([page])
    assert pool.free == 4
    pool.check_invariants()


def test_a_release_that_fails_gives_nothing_back() -> None:
    for pages in ([0, 1, 0], [0, 1, 3]):
        pool = PagePool(4)
        pool.allocate(2)
        with pytest.raises(EngineError, match="released but not held"):
            pool.release(pages)
        assert pool.free == 2
        pool.release([0, 1])
        pool.check_invariants()


class Pool(RuleBasedStateMachine):
    """Requests come and go; `held` is what each of them holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(TOTAL)
        self.held: list[list[int]] = []
        self.free = set(range(TOTAL))

    @rule(n=st.integers(0, TOTAL // 2))
    def allocate(self, n: int) -> None:
        if n > len(self.free):
            with pytest.raises(CapacityError, match=f"{n} pages are asked for and {len(self.free)} of {TOTAL}"):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert pages == sorted(self.free)[:n]
        self.free.difference_update(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(data.draw(st.permutations(pages)))
        self.free.update(pages)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def release_what_is_free(self, data: st.DataObject) -> None:
        with pytest.raises(EngineError, match="not held"):
            self.pool.release([data.draw(st.sampled_from(sorted(self.free)))])

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        self.pool.check_invariants()
        assert self.pool.free == len(self.free) == TOTAL - sum(map(len, self.held))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
