"""Which graphs exist: buckets of rows for the step, buckets of tokens for the prefill, and what memory they need."""

from __future__ import annotations

from typing import NamedTuple

from dlx.errors import CapacityError


class Shapes(NamedTuple):
    """The fixed sizes of a worker. W is the page-table width: the pages of the longest row."""

    rows: tuple[int, ...]  # step buckets, ascending; the last is the number of slots
    tokens: tuple[int, ...]  # prefill buckets, ascending multiples of L
    S: int  # tokens a page
    W: int


def plan(slots: int, max_len: int, L: int, S: int, chunk: int = 2048) -> Shapes:
    """Powers of two up to `slots` rows, and prefill chunks from 64 tokens to the longest prompt (`chunk` at most)."""
    rows = [1]
    while rows[-1] < slots:
        rows.append(min(2 * rows[-1], slots))
    unit = -(-64 // L) * L
    longest = min(-(-max_len // L) * L, -(-chunk // L) * L)
    tokens = [min(unit, longest)]
    while tokens[-1] < longest:
        tokens.append(min(4 * tokens[-1], longest))
    return Shapes(tuple(rows), tuple(tokens), S, -(-max_len // S))


def bucket(sizes: tuple[int, ...], n: int) -> int:
    """The smallest size that holds n. Raises CapacityError if none does."""
    for size in sizes:
        if size >= n:
            return size
    raise CapacityError(f"{n} is over the largest bucket {sizes[-1]}; split it or raise max_num_seqs")


def page_bytes(layers: int, S: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one page of K and V over all layers."""
    return 2 * layers * S * kv_heads * head_dim * itemsize
