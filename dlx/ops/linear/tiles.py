"""The matmuls in plain Triton, for every device and dtype: a pipeline of loads, the weight on the M side of the dot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.linear.reference import parts
from dlx.ops.op import launch_options, locks, power_of_two


@triton.jit
def _channel(acc, row, real, scale_ptr, bias_ptr, norm, SCALE: tl.constexpr, BIAS: tl.constexpr):
    """acc [BN, BT] · scale of the channel · norm of the position + bias of the channel."""
    if SCALE:
        acc = acc * tl.load(scale_ptr + row, mask=real, other=0.0)[:, None]
    acc = acc * norm[None, :]
    if BIAS:
        acc = acc + tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def _finish(
    acc, tile, n, real, t, ok, squares_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr,
    N, K, PARTS, eps, BT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    norm = tl.full([BT], 1.0, tl.float32)
    if KIND < 2:
        p = tl.arange(0, BP)
        squares = tl.load(
            squares_ptr + t[:, None] * PARTS + p[None, :], mask=ok[:, None] & (p < PARTS)[None, :], other=0.0
        )
        norm = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    y = _channel(acc, n, real, scale_ptr, bias_ptr, norm, SCALE, BIAS)
    if KIND == 1:  # rows of the tile: BN / 2 of the gate, then as many of up
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BN // 2, BT)), (1, 2, 0)))
        z = gate / (1.0 + tl.exp(-gate)) * up
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        at = t[None, :] * (N // 2) + n[:, None]
        tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=ok[None, :] & (n < N // 2)[:, None])
    else:
        at = t[None, :] * N + n[:, None]
        inside = ok[None, :] & real[:, None]
        if KIND == 0:
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            new = (h + y).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, new, mask=inside)
            gain = tl.load(gain_ptr + n, mask=real, other=0.0).to(tl.float32)
            wide = tl.where(inside, new.to(tl.float32), 0.0)
            tl.store(scaled_ptr + at, (wide * gain[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
            sums = tl.sum(tl.reshape(wide * wide, (BN // 64, 64, BT)), 1)
            part = tile * (BN // 64) + tl.arange(0, BN // 64)
            tl.store(sums_ptr + t[None, :] * PARTS + part[:, None], sums, mask=ok[None, :] & (part < PARTS)[:, None])


@triton.jit
def _linear_tiles(
    x_ptr, w_ptr, squares_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, part_ptr, lock_ptr,
    T, N, K, PARTS, eps, SPLITS,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, SPLIT: tl.constexpr, KIND: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.program_id(2)
    i = tl.arange(0, BN)
    k = tl.arange(0, BK)
    if KIND == 1:
        n = tl.where(i < BN // 2, tile * (BN // 2) + i, N // 2 + tile * (BN // 2) + i - BN // 2)
        real = tile * (BN // 2) + i % (BN // 2) < N // 2
    else:
        n = tile * BN + i
        real = n < N
    steps = tl.cdiv(K, BK)
    low = split * steps // SPLITS
    high = (split + 1) * steps // SPLITS
    row_ptr = w_ptr + n.to(tl.int64) * K
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = rows * BT + tl.arange(0, BT)
    ok = t < T
    acc = tl.zeros([BN, BT], tl.float32)
    for step in range(low, high):
        at = step * BK + k
        if EVEN:
            w = tl.load(row_ptr[:, None] + at[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + t[None, :] * K + at[:, None], mask=ok[None, :], other=0.0)
        else:
            here = at < K
            w = tl.load(row_ptr[:, None] + at[None, :], mask=real[:, None] & here[None, :], other=0.0)
            x = tl.load(x_ptr + t[None, :] * K + at[:, None], mask=ok[None, :] & here[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        elif FP8:
            w = w.to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee" if EXACT else "tf32")
    if not SPLIT:
        _finish(acc, tile, n, real, t, ok, squares_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr,
                sums_ptr, N, K, PARTS, eps, BT, BN, BP, KIND, SCALE, BIAS)  # fmt: skip
    else:
        # whoever comes last adds the splits up, in their order: the same bits every time
        cell = i[:, None] * BT + tl.arange(0, BT)[None, :]
        lock = lock_ptr + rows * tl.num_programs(0) + tile
        slab = part_ptr + (rows * tl.num_programs(0) + tile).to(tl.int64) * SPLITS * BN * BT
        tl.store(slab + split * BN * BT + cell, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros([BN, BT], tl.float32)
            for s in range(SPLITS):
                total += tl.load(slab + s * BN * BT + cell, cache_modifier=".cg")
            tl.store(lock, 0)
            _finish(total, tile, n, real, t, ok, squares_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr,
                    scaled_ptr, sums_ptr, N, K, PARTS, eps, BT, BN, BP, KIND, SCALE, BIAS)  # fmt: skip


class Tiles(NamedTuple):
    """A launch configuration: rows and depth of a weight tile, splits of K, warps, stages."""

    BN: int
    BK: int
    splits: int
    warps: int
    stages: int


def rows_of(T: int) -> int:
    """Positions of one tile."""
    return min(64, max(16, power_of_two(T)))


def shared_bytes(config: Tiles, T: int, itemsize: int, w_itemsize: int) -> int:
    """Shared memory of a program's pipeline."""
    return config.stages * config.BK * (config.BN * w_itemsize + rows_of(T) * itemsize)


def launch(
    kind: int, x: Tensor, weight: Tensor, squares: Tensor | None, h: Tensor | None, gain: Tensor | None, eps: float,
    scale: Tensor | None, bias: Tensor | None, config: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel under an explicit configuration; kind 0 projects, 1 with SwiGLU, 2 accumulates."""
    T, K = x.shape
    N = weight.shape[0]
    BT, BN = rows_of(T), config.BN
    tiles, deep = -(-N // BN), -(-T // BT)
    out = torch.empty(T, N // 2 if kind == 1 else N, device=x.device, dtype=x.dtype)
    scaled, sums, part = out, out, out
    if kind == 2:
        scaled = torch.empty_like(out)
        sums = torch.empty(T, parts(N), device=x.device, dtype=torch.float32)
    if config.splits > 1:
        part = torch.empty(deep * tiles * config.splits * BN * BT, device=x.device, dtype=torch.float32)
    count = parts(N) if squares is None else squares.shape[1]
    pdl, options = launch_options(x)
    even = K % config.BK == 0 and N % (2 * BN) == 0
    _linear_tiles[(tiles, config.splits, deep)](
        x, weight, out if squares is None else squares, out if scale is None else scale,
        out if bias is None else bias, out if h is None else h, out if gain is None else gain,
        out, scaled, sums, part, locks(x.device), T, N, K, count, eps, config.splits,
        BT, BN, config.BK, power_of_two(count), config.splits > 1, kind, scale is not None, bias is not None,
        weight.dtype != x.dtype, even, pdl, x.dtype == torch.float32, not x.is_cuda,
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return out, scaled, sums
