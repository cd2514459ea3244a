"""Matmuls of few rows at the speed of reading their weights, fused with what stands around them.

`project` reads a normalised stream, `accumulate` adds to it and prepares the next norm; so a norm costs no kernel.
For h [T, K], gain g and a = h · g:

    project     y = (a · Wᵀ) / rms(h) = RMSNorm(h) · Wᵀ;   with `swiglu` silu(y₁) · y₂ of its halves
    accumulate  h' = h + y · Wᵀ,   a' = h' · g,   q'[p] = Σ h'² over columns 32p to 32p + 31

a, h, y  [T, K]  bf16 or fp32       weight [N, K]       gain [E]       squares [T, parts] f32, Σ squares = Σ h²
Work     2·T·N·K flops; reads weight once: bandwidth-bound for T ≤ 256
Source   split-K with an ordered last-block reduction (stream-K's fix-up); programmatic dependent launch

T is 256 at most; wider ones belong to cuBLAS.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import FLOATS, WIDE, Cost, Op, launch_options, locks, need, need_tensor, power_of_two, processors

GROUP = 32  # columns that one entry of `squares` sums up
MOST_ROWS = 256
SHARED_BYTES = 200 << 10  # of the 227 KiB that a program may have on sm_90


def parts(E: int) -> int:
    """How many entries of `squares` a stream of width E has."""
    return -(-E // GROUP)


def squared(h: Tensor) -> Tensor:
    """[T, E] → [T, parts] f32 sums of squares, as `accumulate` gives them."""
    wide = F.pad(h.to(torch.promote_types(h.dtype, torch.float32)), (0, -h.shape[1] % GROUP))
    return wide.square().unflatten(1, (-1, GROUP)).sum(-1)


def project_reference(a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    scale = torch.rsqrt(squares.to(wide).sum(1, keepdim=True) / a.shape[1] + eps)
    y = (a.to(wide) @ weight.to(wide).T) * scale
    if swiglu:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y.to(a.dtype).contiguous()


def accumulate_reference(y: Tensor, weight: Tensor, h: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    out = (h.to(wide) + y.to(wide) @ weight.to(wide).T).to(h.dtype)
    return out, out * gain, squared(out)


@triton.jit
def _finish(
    acc, tile, t, ok, squares_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, N, K, PARTS, eps,
    BT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    if KIND == 2:  # accumulate
        n = tile * BN + tl.arange(0, BN)
        at = t[None, :] * N + n[:, None]
        inside = ok[None, :] & (n < N)[:, None]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        new = (h + acc).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, new, mask=inside)
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        wide = tl.where(inside, new.to(tl.float32), 0.0)
        tl.store(scaled_ptr + at, (wide * gain[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
        sums = tl.sum(tl.reshape(wide * wide, (BN // 32, 32, BT)), 1)
        part = tile * (BN // 32) + tl.arange(0, BN // 32)
        tl.store(sums_ptr + t[None, :] * PARTS + part[:, None], sums, mask=ok[None, :] & (part < PARTS)[:, None])
    else:
        p = tl.arange(0, BP)
        squares = tl.load(
            squares_ptr + t[:, None] * PARTS + p[None, :], mask=ok[:, None] & (p < PARTS)[None, :], other=0.0
        )
        y = acc * tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
        if KIND == 1:  # rows of the tile: BN / 2 of the gate, then as many of up
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, BN // 2, BT)), (1, 2, 0)))
            z = gate / (1.0 + tl.exp(-gate)) * up
            n = tile * (BN // 2) + tl.arange(0, BN // 2)
            at = t[None, :] * (N // 2) + n[:, None]
            tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=ok[None, :] & (n < N // 2)[:, None])
        else:
            n = tile * BN + tl.arange(0, BN)
            at = t[None, :] * N + n[:, None]
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok[None, :] & (n < N)[:, None])


@triton.jit
def _linear(
    x_ptr, w_ptr, squares_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, part_ptr, lock_ptr,
    T, N, K, PARTS, eps, SPLITS,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, SPLIT: tl.constexpr,
    KIND: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
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
        acc = tl.dot(w, x, acc, input_precision="ieee" if EXACT else "tf32")
    if not SPLIT:
        _finish(acc, tile, t, ok, squares_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, N, K, PARTS, eps,
                BT, BN, BP, KIND)  # fmt: skip
    else:
        # whoever comes last adds the splits up, in their order: the same bits every time
        cell = i[:, None] * BT + tl.arange(0, BT)[None, :]
        lock = lock_ptr + rows * tl.num_programs(0) + tile
        slab = part_ptr + (rows * tl.num_programs(0) + tile) * SPLITS * BN * BT
        tl.store(slab + split * BN * BT + cell, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros([BN, BT], tl.float32)
            for s in range(SPLITS):
                total += tl.load(slab + s * BN * BT + cell, cache_modifier=".cg")
            tl.store(lock, 0)
            _finish(total, tile, t, ok, squares_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, N, K, PARTS, eps,
                    BT, BN, BP, KIND)  # fmt: skip


class Launch(NamedTuple):
    """A launch configuration: rows and depth of a weight tile, splits of K, warps, stages."""

    BN: int
    BK: int
    splits: int
    warps: int
    stages: int


@cache
def choose(T: int, N: int, K: int, itemsize: int, processors: int) -> Launch:
    """The default: tiles of 64 rows; K split in two where tiles are few, a shorter pipeline where they are many."""
    tiles = -(-N // 64) * -(-T // 64)
    splits = 2 if tiles < 0.7 * processors and K >= 1024 else 1
    stage_bytes = 128 * (64 + min(64, max(16, T))) * itemsize
    stages = 5 if tiles * splits <= processors else 3
    return Launch(64, 128, splits, 4, min(stages, SHARED_BYTES // stage_bytes))


def launch(
    kind: int, x: Tensor, weight: Tensor, squares: Tensor | None, h: Tensor | None, gain: Tensor | None, eps: float,
    config: Launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a kernel under an explicit configuration; kind 0 projects, 1 with SwiGLU, 2 accumulates."""
    T, K = x.shape
    N = weight.shape[0]
    BT = min(64, max(16, power_of_two(T)))
    BN = config.BN
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
    _linear[(tiles, config.splits, deep)](
        x, weight, out if squares is None else squares, out if h is None else h, out if gain is None else gain,
        out, scaled, sums, part, locks(x.device), T, N, K, count, eps, config.splits,
        BT, BN, config.BK, power_of_two(count), config.splits > 1, kind, even, pdl, x.dtype == torch.float32,
        not x.is_cuda, num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return out, scaled, sums


def project_kernel(a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    config = choose(a.shape[0], weight.shape[0], a.shape[1], a.element_size(), processors(a))
    return launch(int(swiglu), a, weight, squares, None, None, eps, config)[0]


def accumulate_kernel(y: Tensor, weight: Tensor, h: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    config = choose(y.shape[0], weight.shape[0], y.shape[1], y.element_size(), processors(y))
    return launch(2, y, weight, None, h, gain, 0.0, config)


def project_fake(a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    return a.new_empty(a.shape[0], weight.shape[0] // 2 if swiglu else weight.shape[0])


def accumulate_fake(y: Tensor, weight: Tensor, h: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[0], parts(h.shape[1]), dtype=wide)


def project_check(a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool) -> None:
    need_tensor("project's a", a, (None, None), FLOATS)
    need(a.shape[0] <= MOST_ROWS, "project's number of rows", a.shape[0], f"{MOST_ROWS} at most; F.linear takes more")
    need_tensor("project's squares", squares, (a.shape[0], parts(a.shape[1])), WIDE)
    need_tensor("project's weight", weight, (None, a.shape[1]), (a.dtype,))
    need(not swiglu or weight.shape[0] % 2 == 0, "project's gate and up rows", weight.shape[0], "an even number")


def accumulate_check(y: Tensor, weight: Tensor, h: Tensor, gain: Tensor) -> None:
    need_tensor("accumulate's y", y, (None, None), FLOATS)
    need(
        y.shape[0] <= MOST_ROWS,
        "accumulate's number of rows",
        y.shape[0],
        f"{MOST_ROWS} at most; use F.linear for more",
    )
    need_tensor("accumulate's weight", weight, (None, y.shape[1]), (y.dtype,))
    need_tensor("accumulate's h", h, (y.shape[0], weight.shape[0]), (y.dtype,))
    need_tensor("accumulate's gain", gain, (weight.shape[0],), FLOATS)


def project_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "plain": _project_case(4, 128, 192, swiglu=False),
        "swiglu": _project_case(5, 256, 256, swiglu=True),
        "odd width, swiglu": _project_case(3, 96, 2 * 80, swiglu=True),
        "more rows than a tile": _project_case(70, 64, 128, swiglu=False),
    }


def _project_case(T: int, K: int, N: int, swiglu: bool) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(2)
    h = torch.randn(T, K, generator=rng)
    gain = 1 + 0.1 * torch.randn(K, generator=rng)
    return h * gain, squared(h), torch.randn(N, K, generator=rng) * K**-0.5, 1e-6, swiglu


def accumulate_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "few rows": _accumulate_case(4, 256, 128),
        "odd widths": _accumulate_case(7, 80, 96),
        "more rows than a tile": _accumulate_case(70, 128, 64),
    }


def _accumulate_case(T: int, K: int, E: int) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(E, K, generator=rng) * K**-0.5
    y, h = torch.randn(T, K, generator=rng), torch.randn(T, E, generator=rng)
    return y, weight, h, 1 + 0.1 * torch.randn(E, generator=rng)


def project_cost(a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Cost:
    out = a.shape[0] * weight.shape[0] // (2 if swiglu else 1)
    return Cost(2 * a.shape[0] * weight.numel(), (weight.numel() + a.numel() + out) * a.element_size())


def accumulate_cost(y: Tensor, weight: Tensor, h: Tensor, gain: Tensor) -> Cost:
    return Cost(2 * y.shape[0] * weight.numel(), (weight.numel() + y.numel() + 3 * h.numel()) * y.element_size())


project = Op(
    "project", project_reference, project_kernel, project_fake, project_check, project_cases, project_cost,
    wide=("squares",), rtol=2e-2, atol=2e-2,
)  # fmt: skip
accumulate = Op(
    "accumulate", accumulate_reference, accumulate_kernel, accumulate_fake, accumulate_check, accumulate_cases,
    accumulate_cost, rtol=2e-2, atol=2e-2,
)  # fmt: skip
