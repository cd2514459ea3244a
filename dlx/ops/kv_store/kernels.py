"""The Triton kernel: one position and some of its heads a program."""

from __future__ import annotations

from functools import cache
from math import log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import DEBUG, FP8, launch_options, power_of_two
from dlx.ops.tuned import tuned


@triton.jit
def _stored(x, scale, MOST: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, ROUND: tl.constexpr):
    """x as fp8 pages take it: divided by the scale and within ±MOST; NaN stays NaN. MOST = 0: as it is.

    ROUND  to MANTISSA bits and not below 2^LEAST: for the interpreter, whose cast to fp8 drops carries
    """
    if MOST > 0:
        x = tl.clamp(x / scale, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        if ROUND:
            power = tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, LEAST) - MANTISSA
            unit = ((power + 127) << 23).to(tl.float32, bitcast=True)
            x = ((x / unit + 12582912.0) - 12582912.0) * unit  # 1.5 · 2^23: fp32 has no bits below 1 there
    return x


@triton.jit
def _kv_store(
    qkv_ptr, q_gain_ptr, k_gain_ptr, pos_ptr, freq_ptr, kv_ptr, pages_ptr, seen_ptr, scales_ptr, q_ptr, plane, eps, C,
    W, P, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, V_NORM: tl.constexpr, MOST: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, ROUND: tl.constexpr, CHECK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64)  # (b, c)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < H + 2 * G)[:, None]
    is_q = (head < H)[:, None]
    is_v = (head >= H + G)[:, None]
    # a head is three parts: a and b turn with each other, c stays
    j = tl.arange(0, HALF)[None, :]
    i = R + tl.arange(0, REST)[None, :]
    turns = j < R // 2
    stays = i < D
    # all loads before the first use: one round trip, and one more for the page
    pos = tl.load(pos_ptr + at)
    kept = (tl.load(seen_ptr + at) > pos) & (pos >= 0)
    slot = pos // S
    source = qkv_ptr + at * (H + 2 * G) * D + head[:, None] * D
    a = tl.load(source + j, mask=real & turns, other=0.0).to(tl.float32)
    b = tl.load(source + R // 2 + j, mask=real & turns, other=0.0).to(tl.float32)
    c = tl.load(source + i, mask=real & stays, other=0.0).to(tl.float32) if R < D else a
    frequency = tl.load(freq_ptr + j, mask=turns, other=0.0)
    gain_a = 1.0
    gain_b = 1.0
    gain_c = 1.0
    if q_gain_ptr is not None:
        gain_ptr = tl.where(is_q, q_gain_ptr, k_gain_ptr)
        gained = real & ~is_v
        gain_a = tl.load(gain_ptr + j, mask=gained & turns, other=1.0).to(tl.float32)
        gain_b = tl.load(gain_ptr + R // 2 + j, mask=gained & turns, other=1.0).to(tl.float32)
        gain_c = tl.load(gain_ptr + i, mask=gained & stays, other=1.0).to(tl.float32) if R < D else gain_a
    if CHECK:
        page = tl.load(pages_ptr + at // C * W + slot, mask=kept & (slot < W), other=P)
    else:
        page = tl.load(pages_ptr + at // C * W + slot, mask=kept, other=-1)
    if q_gain_ptr is not None or V_NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if R < D:
            squares += tl.sum(c * c, 1)
        rms = tl.rsqrt(squares / D + eps)[:, None]
        if q_gain_ptr is None:
            rms = tl.where(is_v, rms, 1.0)
        if not V_NORM:
            rms = tl.where(is_v, 1.0, rms)
        a *= rms
        b *= rms
        c *= rms
    a *= gain_a
    b *= gain_b
    c *= gain_c
    angle = pos.to(tl.float32) * frequency
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    new_a = tl.where(is_v, a, a * cos - b * sin)
    new_b = tl.where(is_v, b, b * cos + a * sin)
    if CHECK:
        bad = kept & (page >= P)
        kept = kept & ~bad
        new_a = tl.where(bad, float("nan"), new_a)
        new_b = tl.where(bad, float("nan"), new_b)
        c = tl.where(bad, float("nan"), c)
    kept = kept & (page >= 0)
    out = q_ptr + at * H * D + head[:, None] * D
    tl.store(out + j, new_a.to(q_ptr.dtype.element_ty), mask=is_q & turns)
    tl.store(out + R // 2 + j, new_b.to(q_ptr.dtype.element_ty), mask=is_q & turns)
    if R < D:
        tl.store(out + i, c.to(q_ptr.dtype.element_ty), mask=is_q & stays)
    # k and v: the head within its plane
    g = head[:, None] - H - tl.where(is_v, G, 0)
    written = real & ~is_q & kept
    row = page.to(tl.int64) * S + pos % S
    target = kv_ptr + tl.where(is_v, plane, 0) + row * G * D + g * D
    scale = 1.0
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + (tl.where(is_v, P, 0) + page) * G + g, mask=written, other=1.0)
    new_a = _stored(new_a, scale, MOST, MANTISSA, LEAST, ROUND)
    new_b = _stored(new_b, scale, MOST, MANTISSA, LEAST, ROUND)
    tl.store(target + j, new_a.to(kv_ptr.dtype.element_ty), mask=written & turns)
    tl.store(target + R // 2 + j, new_b.to(kv_ptr.dtype.element_ty), mask=written & turns)
    if R < D:
        c = _stored(c, scale, MOST, MANTISSA, LEAST, ROUND)
        tl.store(target + i, c.to(kv_ptr.dtype.element_ty), mask=written & stays)


class Launch(NamedTuple):
    """A launch configuration: heads a program, warps."""

    HEADS: int
    warps: int


@cache
def choose(positions: int, heads: int, D: int) -> Launch:
    """The recorded configuration, or the default: small programs answer soonest."""
    return tuned("kv_store", (positions, heads, D), Launch(8, 2 if D <= 128 else 4))


def kernel(
    qkv: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    pos: Tensor,
    frequencies: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    eps: float,
    scales: Tensor | None = None,
    v_norm: bool = False,
) -> Tensor:
    B, C, heads, D = qkv.shape
    _, P, S, G, _ = kv.shape
    R = 2 * frequencies.shape[0]
    q = torch.empty(B, C, heads - 2 * G, D, device=qkv.device, dtype=qkv.dtype)
    most, mantissa, least = 0.0, 0, 0
    if kv.dtype in FP8:
        kind = torch.finfo(kv.dtype)
        most, mantissa, least = kind.max, round(-log2(kind.eps)), round(log2(kind.tiny))
    pdl, options = launch_options(qkv)
    c = choose(B * C, heads, D)
    _kv_store[(B * C, -(-heads // c.HEADS))](
        qkv, q_gain, k_gain, pos, frequencies, kv, pages, seen, scales, q, kv.stride(0), eps, C, pages.shape[1], P,
        S, heads - 2 * G, G, D, R, c.HEADS, power_of_two(R // 2), power_of_two(D - R), v_norm, most, mantissa,
        least, not qkv.is_cuda, DEBUG, pdl, num_warps=c.warps, **options,
    )  # fmt: skip
    return q
