"""The pool of K/V pages: who holds which page, and which prefix a page that is final ends."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from dlx.errors import CapacityError, EngineError


class PagePool:
    """`total` pages, each blank, held by requests, or idle.

    blank   nothing is known of it; the lowest is handed out first
    held    by one request that writes it, or by several that read it
    idle    held by nobody, and kept for the prefix that it ends; handed out where no page is blank, the one that
            nobody has held for longest first

    A page is `publish`ed under the digest of all tokens up to its end (see prefix.py), once they are final in it, and
    is never written again until it has been handed out anew; then it is published no more.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._blank = list(range(total))  # a heap
        self._holders: dict[int, int] = {}  # page → how many hold it, 1 at least
        self._idle: dict[int, None] = {}  # the one that is handed out next comes first
        self._digests: dict[int, bytes] = {}  # page → what it is published under
        self._pages: dict[bytes, int] = {}  # and the other way

    @property
    def free(self) -> int:
        """How many pages can be handed out: blank ones and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """How many pages are held."""
        return len(self._holders)

    @property
    def cached(self) -> int:
        """How many pages are idle."""
        return len(self._idle)

    def allocate(self, n: int) -> list[int]:
        """Take n pages for one holder. Raises CapacityError, and takes none, if fewer are free."""
        if n > self.free:
            raise CapacityError(
                f"{n} pages are asked for and {self.free} of {self.total} are free; wait, or raise num_pages"
            )
        pages = [heapq.heappop(self._blank) if self._blank else self._evicted() for _ in range(n)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages published under the first of these digests, up to one that is not there."""
        pages: list[int] = []
        for digest in digests:
            page = self._pages.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these pages are idle, and so counted as free."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages that were found. Raises EngineError, and holds none, for one that is not published."""
        wrong = [page for page in pages if page not in self._digests]
        if wrong:
            raise EngineError(f"page {wrong[0]} is shared but not published")
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find a held page. The first page of a prefix stays the one that is found.

        Raises EngineError  if it is not held
        """
        if page not in self._holders:
            raise EngineError(f"page {page} is published but not held")
        if page not in self._digests and digest not in self._pages:
            self._digests[page] = digest
            self._pages[digest] = page

    def private(self, page: int) -> bool:
        """Whether one request alone holds the page and nobody else can find it: it may be written."""
        return self._holders.get(page) == 1 and page not in self._digests

    def holders(self) -> Counter[int]:
        """How many hold each page that is held."""
        return Counter(self._holders)

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back, once each; of those that become idle the first is handed out first.

        Raises EngineError  if one is not held, and gives none back
        """
        wrong = [page for page, times in Counter(pages).items() if times > 1 or page not in self._holders]
        if wrong:
            raise EngineError(f"page {wrong[0]} is released but not held")
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._digests:
                self._idle[page] = None
            else:
                heapq.heappush(self._blank, page)

    def forget(self) -> None:
        """Publish nothing any more: what is idle becomes blank, what is held is found no more."""
        for page in self._idle:
            heapq.heappush(self._blank, page)
        self._idle.clear()
        self._digests.clear()
        self._pages.clear()

    def recount(self, held: Iterable[Sequence[int]]) -> None:
        """Set right what an interrupt left between two lines: these lists are what is held, once each."""
        self._holders = dict(Counter(page for pages in held for page in pages))
        kept = {**self._holders, **self._idle}
        self._digests = {page: name for page, name in self._digests.items() if page in kept}
        self._digests = {page: name for page, name in self._digests.items() if self._pages.get(name) == page}
        self._pages = {name: page for page, name in self._digests.items()}
        self._idle = {page: None for page in self._idle if page in self._digests and page not in self._holders}
        self._blank = sorted(set(range(self.total)) - {*self._holders, *self._idle})  # which is a heap

    def check_invariants(self) -> None:
        """Every page is blank, held or idle, and one of them only; what is published is held or idle."""
        blank, held, idle = set(self._blank), set(self._holders), set(self._idle)
        assert len(blank) == len(self._blank)
        assert len(blank) + len(held) + len(idle) == self.total == len(blank | held | idle)
        assert all(n > 0 for n in self._holders.values())
        assert idle <= set(self._digests) <= held | idle
        assert {page: digest for digest, page in self._pages.items()} == self._digests
        assert all(page in self._digests for page, n in self._holders.items() if n > 1)

    def _evicted(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page], self._pages[self._digests.pop(page)]
        return page
