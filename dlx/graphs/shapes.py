"""Which graphs exist: buckets of rows for the step, buckets of tokens for the prefill, and what memory they need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dlx.errors import CapacityError


class Shapes(NamedTuple):
    """The fixed sizes of a worker. W is the page-table width: the pages of the longest row."""

    rows: tuple[int, ...]  # step buckets, ascending; the last is the number of slots
    tokens: tuple[int, ...]  # prefill buckets, ascending multiples of C
    C: int  # positions of a prompt that are one row of a prefill, a multiple of L
    S: int  # tokens a page
    W: int


def plan(slots: int, max_len: int, L: int, S: int, chunk: int = 2048, invariant: bool = False) -> Shapes:
    """Powers of two up to `slots` rows, and prefills from 64 tokens to the prompts of all rows (`chunk` at most).

    invariant  the last of each alone: launch configurations follow from shapes, so then none depends on the batch
    """
    rows = [1]
    while rows[-1] < slots:
        rows.append(min(2 * rows[-1], slots))
    C = -(-min(64, max_len) // L) * L
    longest = -(-min(chunk, max_len if invariant else slots * max_len) // C) * C
    tokens = [C]
    while tokens[-1] < longest:  # 128 would cost nearly what 256 do: the weights are read for either
        tokens.append(min((4 if tokens[-1] == C else 2) * tokens[-1], longest))
    least = -1 if invariant else 0
    return Shapes(tuple(rows[least:]), tuple(tokens[least:]), C, S, -(-max_len // S))


def bucket(sizes: tuple[int, ...], n: int) -> int:
    """The smallest size that holds n. Raises CapacityError if none does."""
    for size in sizes:
        if size >= n:
            return size
    raise CapacityError(
        f"{n} is over the largest bucket {sizes[-1]}; split it, or raise max_num_seqs (of rows) or "
        "max_num_batched_tokens (of prompts)"
    )


def page_bytes(heads: Iterable[tuple[int, int]], S: int, itemsize: int) -> int:
    """Bytes of one page of K and V over all layers, given each one's (G, D); of fp8 with its scales."""
    return 2 * sum(S * G * D * itemsize + (4 * G if itemsize == 1 else 0) for G, D in heads)
