"""What several parts of a row's keys gave, in one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_up(
    part_ptr, stat_ptr, out_ptr, lock_ptr, arrived, split, n, tile, b, g, C, stats,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """This program's share of the sum over n stretches, MOST at most, once all are there."""
    ROWS: tl.constexpr = (BM + MOST - 1) // MOST  # rows of a share
    SHARES: tl.constexpr = BM // ROWS
    i = tl.arange(0, MOST)[:, None]
    d = tl.arange(0, D)[None, None, :]
    begin = split
    step = n
    if WAIT:
        if split < SHARES:
            while tl.atomic_add(lock_ptr, 0, sem="acquire") < n:
                pass
    else:
        begin = tl.where(arrived == n - 1, 0, SHARES)
        step = 1
    for share in range(begin, SHARES, step):
        row = tile * BM + share * ROWS + tl.arange(0, ROWS)
        c = row // GROUP
        ok = c < C
        at = (b * C + c) * (G * GROUP) + g * GROUP + row % GROUP
        part = at[None, :] * SPLITS + i  # [MOST, ROWS]
        real = ok[None, :] & (i < n)
        # all loads before the first use: one round trip
        top = tl.load(stat_ptr + part, mask=real, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(stat_ptr + stats + part, mask=real, other=0.0, cache_modifier=".cg")
        each = tl.load(part_ptr + part[:, :, None] * D + d, mask=real[:, :, None], other=0.0, cache_modifier=".cg")
        best = tl.max(top, 0)
        w = tl.exp2(top - tl.where(best == float("-inf"), 0.0, best)[None, :])
        total = tl.sum(w * total, 0)
        out = tl.sum(w[:, :, None] * each, 0) / tl.where(total > 0, total, 1.0)[:, None]
        out_at = out_ptr + at[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
    # whoever leaves last, leaves the lock as it was
    if WAIT:
        if split < SHARES:  # noqa: SIM102  (`and` would add for all)
            if tl.atomic_add(lock_ptr, 1, sem="acq_rel") == n + tl.minimum(n, SHARES) - 1:
                tl.store(lock_ptr, 0)
    else:
        tl.store(lock_ptr, 0, mask=arrived == n - 1)
