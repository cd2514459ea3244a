"""The pool of K/V pages: who holds which page."""

from __future__ import annotations

from collections import Counter

from dlx.errors import CapacityError, EngineError


class PagePool:
    """`total` pages, each free or held by one request."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # the lowest page is handed out first
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take n pages. Raises CapacityError, and takes none, if fewer are free."""
        if n > len(self._free):
            raise CapacityError(
                f"{n} pages are asked for and {len(self._free)} of {self.total} are free; wait, or raise num_pages"
            )
        pages = [self._free.pop() for _ in range(n)]
        self._held.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back. Raises EngineError, and gives none back, if one is not held."""
        wrong = [page for page, times in Counter(pages).items() if times > 1 or page not in self._held]
        if wrong:
            raise EngineError(f"page {wrong[0]} is released but not held")
        self._held.difference_update(pages)
        self._free += pages
        self._free.sort(reverse=True)

    def check_invariants(self) -> None:
        """Every page is free or held, and none is both."""
        assert len(self._free) + len(self._held) == self.total
        assert self._held.isdisjoint(self._free)
        assert len(set(self._free)) == len(self._free)
