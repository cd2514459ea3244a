# pyright: reportAssignmentType=false
"""The Triton kernel: one tile of queries against one stretch of a row's keys, and the sum over the stretches.

A query row of a tile is (position, head of the group). Three things make it fast:

pages     are looked up one tile of keys ahead, in registers: keys whose address is in memory would not be pipelined
masks     tiles of keys that every query of the tile sees have a loop of their own, without masks (FULL)
stretches of a row's keys are `SPLITS` at most, and as many as its keys fill: a program without keys returns at once.
          The others wait for each other, then each adds up its share of the query rows, in the order of the keys.
          A launch starts its programs in order, and those of one sum are neighbours; so all of them get to run if
          the GPU holds `SPLITS` programs at once. Where programs run one after the other (the interpreter) the last
          one adds up all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.attention.fp8 import _whole
from dlx.ops.attention.sums import _add_up


@triton.jit
def _pages(table_ptr, j0, n, high, W, S: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr):
    """The page of each of the keys j0 + n, 0 ≤ n < BN, below high: one number if the tile lies within a page."""
    if S % BN == 0:
        slot = j0 // S
        here = j0 < high
    elif BN % S == 0:
        slot = j0 // S + n // S
        here = j0 + n < high
    else:
        slot = (j0 + n) // S
        here = j0 + n < high
    if CHECK:
        return tl.load(table_ptr + slot, mask=here & (slot < W), other=-1)
    return tl.load(table_ptr + slot, mask=here, other=0)


@triton.jit
def _repeated(x, TIMES: tl.constexpr):
    """Each of x so many times."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], TIMES)), [x.shape[0] * TIMES])


@triton.jit
def _attend(
    acc, top, total, q, seen, first, low, high, edge, hole0, hole1, g, table_ptr, kv_ptr, scales_ptr, scale,
    W, P, plane, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr,
    LIFT: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax over keys low to high - 1 (low is a multiple of BN), continued: acc, top and total after them.

    MASK   some query may not see some key, or low to high is not a whole number of tiles
    first, hole0  None: there is no window, no hole
    FP8    dtype of the pages if it is fp8, else None; LIFT: see `fp8.py`; it is in scale and q, and comes to be in
           acc and total
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    # a scale a page, not a key: a thread of a matmul holds many keys, and Triton 3.6 has it load the scale of each
    EACH: tl.constexpr = scales_ptr is not None and BN % S == 0 and BN > S
    n = tl.arange(0, BN)
    d = tl.arange(0, D)
    page = _pages(table_ptr, low, n, high, W, S, BN, CHECK)
    m = n
    some = page
    if EACH:
        m = tl.arange(0, BN // S) * S
        some = _pages(table_ptr, low, m, high, W, S, BN, CHECK)
    for j0 in range(low, high, BN):
        j = j0 + n
        ahead = _pages(table_ptr, j0 + BN, n, high, W, S, BN, CHECK)
        if CHECK:
            wrong = (page < 0) | (page >= P) | (n < 0)
            page = tl.where((page < 0) | (page >= P), 0, page)
        if S % BN == 0:
            inner = j0 % S + n
        elif BN % S == 0:
            inner = n % S
        else:
            inner = j % S
        at = page.to(tl.int64) * (S * G * D) + inner * (G * D) + g * D
        kv = kv_ptr + at[:, None] + d[None, :]
        if MASK:
            here = j < high
            if first is not None:
                here = here & (j >= edge)
            if hole0 is not None:
                here = here & ((j < hole0) | (j >= hole1))
            k = tl.load(kv, mask=here[:, None], other=0)
            v = tl.load(kv + plane, mask=here[:, None], other=0)
        else:
            k = tl.load(kv)
            v = tl.load(kv + plane)
        if scales_ptr is not None:
            owner = page + 0 * n
            if EACH:
                owner = tl.where((some < 0) | (some >= P), 0, some) if CHECK else some
                some = _pages(table_ptr, j0 + BN, m, high, W, S, BN, CHECK)
            known = scales_ptr + owner * G + g
            if MASK:
                real = here
                if EACH:
                    real = j0 + m < high
                    if hole0 is not None:
                        real = real & ((j0 + m < hole0) | (j0 + m + S > hole1))
                k_scale = tl.load(known, mask=real, other=0.0)
                v_scale = tl.load(known + P * G, mask=real, other=0.0)
            else:
                k_scale = tl.load(known)
                v_scale = tl.load(known + P * G)
            if EACH:
                k_scale = _repeated(k_scale, S)
                v_scale = _repeated(v_scale, S)
        s = tl.dot(q, tl.trans(_whole(k, FP8, q.dtype, LIFT, UPCAST)), input_precision=PRECISION)
        if scales_ptr is not None:
            s = s * k_scale[None, :]
        if MASK:
            visible = here[None, :] & (j[None, :] < seen[:, None])
            if first is not None:
                visible = visible & (j[None, :] >= first[:, None])
            s = tl.where(visible, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new) if MASK else new  # -inf: a row that sees nothing yet
        p = tl.exp2(s * scale - (base - LIFT)[:, None])
        fade = tl.exp2(top - base)
        if CHECK:
            if MASK:
                p = tl.where(wrong[None, :] & visible, float("nan"), p)
            else:
                p = tl.where(wrong[None, :], float("nan"), p)
        total = total * fade + tl.sum(p, 1)
        if scales_ptr is not None:
            p = p * v_scale[None, :]
        p = p.to(q.dtype)
        v = _whole(v, FP8, q.dtype, LIFT, UPCAST)
        acc = tl.dot(p, v, acc * fade[:, None], input_precision=PRECISION)
        top = new
        page = ahead
    return acc, top, total


@triton.jit
def _lifted(q, LIFT: tl.constexpr, UPCAST: tl.constexpr):
    """Queries as `_attend` takes them."""
    if UPCAST:
        q = q.to(tl.float32)
    return (q * 2.0**LIFT).to(q.dtype) if LIFT else q


@triton.jit
def _attention(
    q_ptr, kv_ptr, pages_ptr, seen_ptr, first_ptr, hole_ptr, scales_ptr, out_ptr, part_ptr, stat_ptr, lock_ptr,
    scale_log2, C, W, P, plane, stats,
    G: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, FULL: tl.constexpr, FP8: tl.constexpr, LIFT: tl.constexpr, WAIT: tl.constexpr,
    CHECK: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tiles = tl.num_programs(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    tile = tiles - 1 - tl.program_id(0) // SPLITS  # those with the most keys first, where later queries see more
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    c = row // GROUP
    ok = c < C
    d = tl.arange(0, D)
    at = (b * C + c) * (G * GROUP) + g * GROUP + row % GROUP  # [BM] index into [B, C, H]
    seen = tl.load(seen_ptr + b * C + c, mask=ok, other=0)
    first = None
    edge = 0  # the first key that any query sees, end: behind the last one
    end = tl.max(seen, 0)
    live = seen > 0
    if first_ptr is not None:
        first = tl.load(first_ptr + b * C + c, mask=ok, other=0)
        live = seen > tl.maximum(first, 0)
        edge = tl.maximum(tl.min(tl.where(live, first, end), 0), 0)
    hole0 = None
    hole1 = None
    if hole_ptr is not None:
        hole0 = tl.load(hole_ptr + 2 * b)
        hole1 = tl.load(hole_ptr + 2 * b + 1)
    begin = edge // BN * BN
    deep = tl.cdiv(end - begin, BN)  # tiles of keys
    n = tl.maximum(tl.minimum(deep, SPLITS), 1)  # stretches; a tile without keys has one, which writes zeros
    if split >= n:
        return
    low = begin + split * deep // n * BN
    high = tl.minimum(begin + (split + 1) * deep // n * BN, end)
    q = _lifted(tl.load(q_ptr + at[:, None] * D + d[None, :], mask=ok[:, None], other=0.0), LIFT, UPCAST)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    table_ptr = pages_ptr + b * W
    if FULL:
        # [low, near) and [far, high) need masks; what is between is seen by all that sees anything
        near = low
        far = tl.min(tl.where(live, seen, end), 0)
        if hole_ptr is not None:
            far = tl.where(hole0 < hole1, tl.minimum(far, tl.maximum(hole0, 0)), far)
        far = tl.maximum(tl.minimum(far, high) // BN * BN, low)
        if first_ptr is not None:
            near = tl.cdiv(tl.max(tl.where(live, tl.maximum(first, 0), 0), 0), BN) * BN
            near = tl.minimum(tl.maximum(near, low), far)
            acc, top, total = _attend(
                acc, top, total, q, seen, first, low, near, edge, hole0, hole1, g, table_ptr, kv_ptr, scales_ptr,
                scale_log2, W, P, plane, G, S, D, BN, FP8, LIFT, True, CHECK, EXACT, UPCAST,
            )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, q, seen, first, near, far, edge, hole0, hole1, g, table_ptr, kv_ptr, scales_ptr,
            scale_log2, W, P, plane, G, S, D, BN, FP8, LIFT, False, CHECK, EXACT, UPCAST,
        )  # fmt: skip
        low = far
    acc, top, total = _attend(
        acc, top, total, q, seen, first, low, high, edge, hole0, hole1, g, table_ptr, kv_ptr, scales_ptr,
        scale_log2, W, P, plane, G, S, D, BN, FP8, LIFT, True, CHECK, EXACT, UPCAST,
    )  # fmt: skip
    if LIFT:
        acc = acc * 2.0**LIFT
        total = total * 0.5**LIFT
    if FULL:  # queries that see nothing took part where there are no masks
        top = tl.where(live, top, float("-inf"))
        total = tl.where(live, total, 0.0)
        acc = tl.where(live[:, None], acc, 0.0)
    if SPLITS == 1 or n == 1:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
    else:
        part = at * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=ok[:, None])
        tl.store(stat_ptr + part, top, mask=ok)
        tl.store(stat_ptr + stats + part, total, mask=ok)
        lock = lock_ptr + (b * G + g) * tiles + tile
        tl.debug_barrier()
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if SPLITS <= 8 or n <= 8:
            _add_up(part_ptr, stat_ptr, out_ptr, lock, arrived, split, n, tile, b, g, C, stats, G, GROUP, D, BM, SPLITS,
                    SPLITS if SPLITS < 8 else 8, WAIT)  # fmt: skip
        else:
            _add_up(part_ptr, stat_ptr, out_ptr, lock, arrived, split, n, tile, b, g, C, stats, G, GROUP, D, BM, SPLITS,
                    SPLITS, WAIT)  # fmt: skip
