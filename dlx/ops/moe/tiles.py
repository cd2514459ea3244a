"""The kernels of `experts`: two matmuls over the items of a list, and the sum of a token's parts."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.moe.listing import listed
from dlx.ops.op import launch_options, power_of_two, shared_limit
from dlx.ops.tuned import tuned

MOST_ROWS = 64  # of an expert that one item takes
SHARED_BYTES = 96 << 10  # of the 99 KiB that a program may have on sm_86
COLUMNS = 256  # of a token that one program sums up


@triton.jit
def _experts_matmul(
    x_ptr, w_ptr, scale_ptr, table_ptr, pairs_ptr, squares_ptr, out_ptr, N, K, PARTS, eps,
    SLOTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, UP: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """UP: h[place] = act(g) · u for x of the place's token; otherwise part[pair] = down · h[place].

    A place is a row of an item, a pair the (token, slot) that stands there.
    """
    tile = tl.program_id(0)
    item = tl.program_id(1)
    i = tl.arange(0, BN)
    k = tl.arange(0, BK)
    r = tl.arange(0, BT)
    if UP:  # rows of the tile: BN / 2 of the gate, then as many of up
        n = tl.where(i < BN // 2, tile * (BN // 2) + i, N // 2 + tile * (BN // 2) + i - BN // 2)
        real = tile * (BN // 2) + i % (BN // 2) < N // 2
    else:
        n = tile * BN + i
        real = n < N
    place = item.to(tl.int64) * BT + r
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # all that a program must know comes with one latency; what lies beyond the list's end is never used
    items = tl.load(table_ptr)
    expert = tl.load(table_ptr + 2 + 2 * item).to(tl.int64)
    ok = r < tl.load(table_ptr + 3 + 2 * item)
    pair = tl.load(pairs_ptr + place)
    if item >= items:
        return
    source = (pair // SLOTS).to(tl.int64) if UP else place
    row = expert * N + n
    acc = tl.zeros([BN, BT], tl.float32)
    for step in range(tl.cdiv(K, BK)):
        at = step * BK + k
        if EVEN:
            w = tl.load(w_ptr + (row * K)[:, None] + at[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + (source * K)[None, :] + at[:, None], mask=ok[None, :], other=0.0)
        else:
            here = at < K
            w = tl.load(w_ptr + (row * K)[:, None] + at[None, :], mask=real[:, None] & here[None, :], other=0.0)
            x = tl.load(x_ptr + (source * K)[None, :] + at[:, None], mask=ok[None, :] & here[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        elif FP8:
            w = w.to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee" if EXACT else "tf32")
    if SCALE:
        acc *= tl.load(scale_ptr + row, mask=real, other=0.0)[:, None]
    if UP:
        if NORM:
            p = tl.arange(0, BP)
            inside = ok[:, None] & (p < PARTS)[None, :]
            squares = tl.load(squares_ptr + (source * PARTS)[:, None] + p[None, :], mask=inside, other=0.0)
            acc *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BN // 2, BT)), (1, 2, 0)))
        z = gate
        if GELU:  # (1 + tanh(a)) / 2 = sigmoid(2a), with a = √(2 / π) · (gate + 0.044715 gate³)
            z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        h = gate / (1.0 + tl.exp(-z)) * up
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        out = out_ptr + (place * (N // 2))[None, :] + n[:, None]
        tl.store(out, h.to(out_ptr.dtype.element_ty), mask=ok[None, :] & (n < N // 2)[:, None])
    else:
        out = out_ptr + (pair.to(tl.int64) * N)[None, :] + n[:, None]
        tl.store(out, acc, mask=ok[None, :] & real[:, None])


@triton.jit
def _experts_combine(
    part_ptr, ids_ptr, weights_ptr, y_ptr, X, E, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A token's parts, weighted and added up in the order of its slots."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SLOTS):
        e = tl.load(ids_ptr + t * SLOTS + s)
        known = (e >= 0) & (e < X)
        weight = tl.load(weights_ptr + t * SLOTS + s)
        part = tl.load(part_ptr + (t * SLOTS + s) * E + n, mask=(n < E) & known, other=0.0)
        y += tl.where(known, weight, 0.0) * part
    tl.store(y_ptr + t * E + n, y.to(y_ptr.dtype.element_ty), mask=n < E)


class Launch(NamedTuple):
    """A launch configuration of one of the two matmuls: rows and depth of a weight tile, warps, stages."""

    BN: int
    BK: int
    warps: int
    stages: int


def choose_rows(T: int) -> int:
    """Rows that one item takes at most: a token chooses an expert once, so up to 64 tokens are one item an expert."""
    return min(MOST_ROWS, max(16, power_of_two(T)))


def shared_bytes(config: Launch, BT: int, itemsize: int, w_itemsize: int) -> int:
    """Shared memory of a program's pipeline."""
    return config.stages * config.BK * (config.BN * w_itemsize + BT * itemsize)


@cache
def choose(up: bool, T: int, BT: int, N: int, K: int, itemsize: int, w_itemsize: int, limit: int) -> Launch:
    """The recorded configuration for a weight [N, K] an expert, else tiles of 16 KiB and two programs a processor."""
    BN, BK = 64, 128
    BK = BK * 2 // max(2, itemsize)
    while K % BK and BK > 32:
        BK //= 2
    stages = SHARED_BYTES // shared_bytes(Launch(BN, BK, 4, 1), BT, itemsize, w_itemsize)
    default = Launch(BN, BK, 4, max(2, min(6, stages)))
    key = (T, int(up), N, K, w_itemsize)

    def fits(config: Launch) -> bool:
        tiled = config.BN >= 32 and config.BK >= 32
        return tiled and shared_bytes(config, BT, itemsize, w_itemsize) <= limit

    return tuned("experts", key, default, fits)


def run(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None, eps: float,
    gelu: bool, up_scale: Tensor | None, down_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, distinct), under the configurations that are best known."""
    T, itemsize, limit = x.shape[0], x.element_size(), shared_limit(x)
    BT = choose_rows(T)
    first = choose(True, T, BT, *gate_up.shape[1:], itemsize, gate_up.element_size(), limit)
    second = choose(False, T, BT, *down.shape[1:], itemsize, down.element_size(), limit)
    return launch(x, ids, weights, gate_up, down, squares, eps, gelu, up_scale, down_scale, BT, first, second)


def launch(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None, eps: float,
    gelu: bool, up_scale: Tensor | None, down_scale: Tensor | None, BT: int, first: Launch, second: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the four kernels with BT rows an item, under explicit configurations of the two matmuls."""
    (T, E), (X, wide, _), K = x.shape, gate_up.shape, ids.shape[1]
    pdl, options = launch_options(x)
    table, pairs, distinct = listed(ids, X, BT, pdl, options)
    h = torch.empty(pairs.numel(), wide // 2, device=x.device, dtype=x.dtype)
    part = torch.empty(T * K, E, device=x.device, dtype=torch.float32)
    y = torch.empty_like(x)
    matmul(x, gate_up, up_scale, table, pairs, squares, h, K, eps, True, gelu, first, pdl, options)
    matmul(h, down, down_scale, table, pairs, None, part, K, eps, False, gelu, second, pdl, options)
    _experts_combine[(T, -(-E // COLUMNS))](part, ids, weights, y, X, E, K, COLUMNS, pdl, num_warps=2, **options)
    return y, distinct


def matmul(
    x: Tensor, weight: Tensor, scale: Tensor | None, table: Tensor, pairs: Tensor, squares: Tensor | None, out: Tensor,
    slots: int, eps: float, up: bool, gelu: bool, config: Launch, pdl: bool, options: dict[str, bool],
) -> None:  # fmt: skip
    """Write `out`: h for the rows of the list, or the part of each (token, slot)."""
    _, N, K = weight.shape
    count = 1 if squares is None else squares.shape[1]
    even = K % config.BK == 0 and N % config.BN == 0
    _experts_matmul[(-(-N // config.BN), pairs.shape[0])](
        x, weight, out if scale is None else scale, table, pairs, out if squares is None else squares, out, N, K, count,
        eps, slots, pairs.shape[1], config.BN, config.BK, power_of_two(count), up, gelu, squares is not None,
        scale is not None, weight.dtype != x.dtype, even, pdl, x.dtype == torch.float32, not weight.is_cuda,
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
