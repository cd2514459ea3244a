"""The kernel of `route`: programs share a token's logits out by experts and by depth; the last to arrive chooses."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _logits(part_ptr, at, plane, inside, rms, SPLITS: tl.constexpr):
    """Σ over the splits, in their order: the same bits wherever a logit is needed."""
    z = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    for _ in tl.static_range(SPLITS - 1):  # type: ignore[misc]  (its type says that it returns nothing)
        at += plane
        z += tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    return z * rms


@triton.jit
def decide(
    part_ptr, t, ok, rms, bias_ptr, scale_ptr, live_ptr, ids_ptr, weights_ptr, plane, X, factor,
    K: tl.constexpr, ALWAYS: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, SIGMOID: tl.constexpr,
    RENORM: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, GP)
    s = tl.arange(0, SP)
    expert = g[:, None] * S + s[None, :]
    named = (g < G)[:, None] & (s < S)[None, :]
    real = named[None, :, :]
    at = (t * X)[:, None, None] + expert[None, :, :]
    z = _logits(part_ptr, at, plane, ok[:, None, None] & real, rms[:, None, None], SPLITS)
    z = tl.where(real, z, float("-inf"))
    top = tl.max(tl.max(z, 2), 1)
    total = tl.sum(tl.sum(tl.exp(z - top[:, None, None]), 2), 1)
    c = z
    if SIGMOID:
        c = 1.0 / (1.0 + tl.exp(-z))
    elif BIAS or G > 1:
        c = tl.exp(z - top[:, None, None]) / total[:, None, None]
    if BIAS:
        c += tl.load(bias_ptr + expert, mask=named, other=0.0).to(tl.float32)[None, :, :]
    c = tl.where(real, c, float("-inf"))
    if G > 1:
        best = tl.max(c, 2)
        first = tl.min(tl.where(c == best[:, :, None], s[None, None, :], SP), 2)
        score = best + tl.max(tl.where(s[None, None, :] == first[:, :, None], float("-inf"), c), 2)
        # a group is kept unless TOP others are better, or as good and before it
        better = score[:, None, :] > score[:, :, None]
        before = (score[:, None, :] == score[:, :, None]) & (g[None, None, :] < g[None, :, None])
        kept = tl.sum((better | before).to(tl.int32), 2) < TOP
        c = tl.where(kept[:, :, None], c, float("-inf"))
    # one integer orders by choice, then by the lowest id: no two are the same, so a maximum is a winner
    c = tl.where(c == 0.0, 0.0, c)
    bits = c.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)[None, :, :]
    LOWEST: tl.constexpr = -(2**63)
    key = tl.reshape(tl.where(real, key, LOWEST), (BT, GP * SP))
    k = tl.arange(0, KP)
    ids = tl.zeros([BT, KP], tl.int32)
    for i in range(K):
        won = tl.max(key, 1)
        key = tl.where(key == won[:, None], LOWEST, key)
        ids = tl.where((k == i)[None, :], (0x7FFFFFFF - (won & 0x7FFFFFFF).to(tl.int32))[:, None], ids)
    inside = ok[:, None] & (k < K)[None, :]
    z = _logits(part_ptr, (t * X)[:, None] + ids, plane, inside, rms[:, None], SPLITS)
    w = 1.0 / (1.0 + tl.exp(-z)) if SIGMOID else tl.exp(z - top[:, None]) / total[:, None]
    w = tl.where(inside, w, 0.0)
    if RENORM:
        w /= tl.sum(w, 1)[:, None] + 1e-20
    w *= factor
    if SCALE:
        w *= tl.load(scale_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    if ALWAYS:
        more = (k >= K)[None, :]
        ids = tl.where(more, (X + k - K)[None, :], ids)
        w = tl.where(more, 1.0, w)
    if LIVE:
        alive = tl.load(live_ptr + t, mask=ok, other=0) > 0
        ids = tl.where(alive[:, None], ids, -1)
        w = tl.where(alive[:, None], w, 0.0)
    out = (t * (K + ALWAYS))[:, None] + k[None, :]
    inside = ok[:, None] & (k < K + ALWAYS)[None, :]
    tl.store(ids_ptr + out, ids, mask=inside)
    tl.store(weights_ptr + out, w, mask=inside)


@triton.jit
def _route(
    x_ptr, w_ptr, squares_ptr, bias_ptr, scale_ptr, live_ptr, part_ptr, lock_ptr, ids_ptr, weights_ptr,
    T, X, E, PARTS, plane, eps, factor,
    K: tl.constexpr, ALWAYS: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr,
    SPLITS: tl.constexpr,
    SIGMOID: tl.constexpr, RENORM: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    LIVE: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.program_id(2)
    n = tile * BX + tl.arange(0, BX)
    t = (rows * BT + tl.arange(0, BT)).to(tl.int64)
    ok = t < T
    e = tl.arange(0, BE)
    steps = tl.cdiv(E, BE)
    acc = tl.zeros([BX, BT], tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        at = step * BE + e
        if EVEN:
            w = tl.load(w_ptr + n[:, None] * E + at[None, :])
            x = tl.load(x_ptr + t[None, :] * E + at[:, None], mask=ok[None, :], other=0.0)
        else:
            here = at < E
            w = tl.load(w_ptr + n[:, None] * E + at[None, :], mask=(n < X)[:, None] & here[None, :], other=0.0)
            x = tl.load(x_ptr + t[None, :] * E + at[:, None], mask=ok[None, :] & here[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    out = part_ptr + split.to(tl.int64) * plane + t[None, :] * X + n[:, None]
    tl.store(out, acc, mask=ok[None, :] & (n < X)[:, None])
    tl.debug_barrier()
    arrived = tl.atomic_add(lock_ptr + rows, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) * SPLITS - 1:
        tl.store(lock_ptr + rows, 0)
        rms = tl.full([BT], 1.0, tl.float32)
        if NORM:
            p = tl.arange(0, BP)
            inside = ok[:, None] & (p < PARTS)[None, :]
            squares = tl.load(squares_ptr + t[:, None] * PARTS + p[None, :], mask=inside, other=0.0)
            rms = tl.rsqrt(tl.sum(squares, 1) / E + eps)
        decide(part_ptr, t, ok, rms, bias_ptr, scale_ptr, live_ptr, ids_ptr, weights_ptr, plane, X, factor,
               K, ALWAYS, KP, G, GP, S, SP, TOP, BT, SPLITS, SIGMOID, RENORM, BIAS, SCALE, LIVE)  # fmt: skip
