"""Which experts are in use, and which tokens chose each, found on the device.

    table     [items + 1, 2]  int32   (number of items, -), then (expert, rows) of each item
    pairs     [items, BT]     int32   the item's rows: (token, slot) as token · K + slot, in that order
    distinct  [1]             int32   experts in use

An item is at most BT rows of one expert; items lie by expert. Both tensors are as long as there may ever be items, and
hold nothing of meaning beyond the last item and beyond an item's rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import power_of_two


@triton.jit
def _experts_list(
    ids_ptr, table_ptr, pairs_ptr, distinct_ptr, N, X, BT,
    BLOCK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program an expert: its items into the table, its (token, slot) pairs into the list."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    b = tl.arange(0, BINS)
    pairs = tl.zeros([BINS], tl.int32)  # that each expert has
    for first in range(0, N, BLOCK):
        ids = tl.load(ids_ptr + first + i, mask=first + i < N, other=-1)
        known = (ids >= 0) & (ids < X)
        pairs += tl.histogram(tl.where(known, ids, 0), BINS, mask=known)
    items = (pairs + BT - 1) // BT
    if e == 0:
        tl.store(distinct_ptr, tl.sum((pairs > 0).to(tl.int32), 0))
        tl.store(table_ptr, tl.sum(items, 0))
    count = tl.sum(tl.where(b == e, pairs, 0), 0)
    if count > 0:
        item = tl.sum(tl.where(b < e, items, 0), 0)
        out = pairs_ptr + item.to(tl.int64) * BT
        for first in range(0, N, BLOCK):
            mine = (tl.load(ids_ptr + first + i, mask=first + i < N, other=-1) == e).to(tl.int32)
            tl.store(out + tl.cumsum(mine, 0) - 1, first + i, mask=mine > 0)
            out += tl.sum(mine, 0)
        for done in range(0, count, BT):
            item += 1
            tl.store(table_ptr + 2 * item, e)
            tl.store(table_ptr + 2 * item + 1, tl.minimum(count - done, BT))


def most_items(pairs: int, X: int, BT: int) -> int:
    """The most items that so many pairs may fall into: every expert begins one, whatever is left fills whole ones."""
    used = min(X, pairs)
    return used + (pairs - used) // BT


def listed(ids: Tensor, X: int, BT: int, pdl: bool, options: dict[str, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(table, pairs, distinct) of the experts that the tokens chose; ids outside 0 to X - 1 are in none."""
    n = ids.numel()
    items = most_items(n, X, BT)
    table = torch.empty(items + 1, 2, device=ids.device, dtype=torch.int32)
    pairs = torch.empty(items, BT, device=ids.device, dtype=torch.int32)
    distinct = torch.empty(1, device=ids.device, dtype=torch.int32)
    # no fewer ids than threads and no fewer bins than lanes, as histograms like it
    block, bins = min(2048, max(128, power_of_two(n))), max(32, power_of_two(X))
    _experts_list[(X,)](ids, table, pairs, distinct, n, X, BT, block, bins, pdl, num_warps=4, **options)
    return table, pairs, distinct
