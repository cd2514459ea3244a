"""A page is blank, held or idle, and found while it is known, whatever is asked for and given back."""

from __future__ import annotations

from collections import Counter

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


def digest(n: int) -> bytes:
    return n.to_bytes(32, "little")


def published(pool: PagePool, n: int) -> list[int]:
    """n pages, held, the i-th under digest(i)."""
    pages = pool.allocate(n)
    for at, page in enumerate(pages):
        pool.publish(page, digest(at))
    return pages


def test_a_published_page_is_found_held_or_idle_and_counted_as_free_once_nobody_holds_it() -> None:
    pool = PagePool(4)
    pages = published(pool, 2)
    assert pool.find([digest(0), digest(1), digest(2)]) == pages
    assert (pool.used, pool.cached, pool.free) == (2, 0, 2)
    pool.release(pages)
    assert pool.find([digest(0), digest(1)]) == pages
    assert (pool.used, pool.cached, pool.free, pool.idle(pages)) == (0, 2, 4, 2)


def test_what_is_found_ends_before_the_first_page_that_is_not_there() -> None:
    pool = PagePool(4)
    published(pool, 2)
    assert pool.find([digest(0), digest(7), digest(1)]) == [0]
    assert pool.find([digest(7), digest(0)]) == []


def test_a_shared_page_is_held_until_all_have_given_it_back() -> None:
    pool = PagePool(3)
    pages = published(pool, 1)
    pool.share(pages)
    assert not pool.private(pages[0])
    pool.release(pages)
    assert (pool.used, pool.cached) == (1, 0)
    pool.release(pages)
    assert (pool.used, pool.cached) == (0, 1)


def test_idle_pages_are_handed_out_last_and_the_longest_idle_first() -> None:
    pool = PagePool(4)
    pages = published(pool, 3)
    pool.release([pages[1]])
    pool.release([pages[2], pages[0]])
    assert pool.allocate(1) == [3]
    assert pool.allocate(2) == [1, 2]
    assert (pool.find([digest(0)]), pool.find([digest(1)])) == ([0], [])
    pool.check_invariants()


def test_of_two_pages_with_one_prefix_the_first_is_found_and_the_other_stays_private() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, digest(0))
    pool.publish(second, digest(0))
    assert pool.find([digest(0)]) == [first]
    assert pool.private(second) and not pool.private(first)
    pool.release([first, second])
    assert (pool.cached, pool.free) == (1, 2)


def test_pages_that_nobody_holds_are_not_published_and_those_that_are_not_published_not_shared() -> None:
    pool = PagePool(2)
    with pytest.raises(EngineError, match="page 0 is published but not held"):
        pool.publish(0, digest(0))
    (page,) = pool.allocate(1)
    with pytest.raises(EngineError, match="page 0 is shared but not published"):
        pool.share([page])
    assert pool.private(page)


def test_what_is_forgotten_is_found_no_more_and_no_page_is_lost() -> None:
    pool = PagePool(4)
    pages = published(pool, 3)
    pool.release(pages[:2])
    pool.forget()
    assert (pool.find([digest(0), digest(2)]), pool.cached, pool.free) == ([], 0, 3)
    pool.release(pages[2:])
    assert pool.allocate(4) == [0, 1, 2, 3]


class Pool(RuleBasedStateMachine):
    """Requests come, find and go; `held` is what each of them holds, `known` what is published."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(TOTAL)
        self.held: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.names = 0

    @property
    def holders(self) -> Counter[int]:
        return Counter(page for pages in self.held for page in pages)

    @rule(n=st.integers(0, TOTAL // 2))
    def allocate(self, n: int) -> None:
        free = set(range(TOTAL)) - set(self.holders)
        if n > len(free):
            with pytest.raises(CapacityError, match=f"{n} pages are asked for and {len(free)} of {TOTAL}"):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert set(pages) <= free
        idle = [page for page in self.known.values() if page in free]
        blank = sorted(free - set(idle))
        assert pages[: len(blank)] == blank[:n]  # what is idle goes last
        self.known = {name: page for name, page in self.known.items() if page not in pages}
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        for page in pages[:3]:
            if page not in self.known.values():
                self.names += 1
                self.pool.publish(page, digest(self.names))
                self.known[digest(self.names)] = page

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, max_size=6))
        pages = self.pool.find(names)
        assert pages == [self.known[name] for name in names]
        self.pool.share(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(data.draw(st.permutations(pages)))

    @rule(data=st.data())
    def release_what_nobody_holds(self, data: st.DataObject) -> None:
        free = sorted(set(range(TOTAL)) - set(self.holders))
        if free:
            with pytest.raises(EngineError, match="not held"):
                self.pool.release([data.draw(st.sampled_from(free))])

    @invariant()
    def every_page_is_blank_held_or_idle(self) -> None:
        self.pool.check_invariants()
        holders = self.holders
        assert self.pool.holders() == holders
        assert self.pool.free == TOTAL - len(holders)
        assert self.pool.cached == sum(page not in holders for page in self.known.values())
        assert all(self.pool.find([name]) == [page] for name, page in self.known.items())


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
