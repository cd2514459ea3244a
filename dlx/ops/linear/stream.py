# pyright: reportAssignmentType=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
"""The matmuls on sm_90: bulk copies (TMA) keep a ring of weight tiles full, wgmma empties it.

A program owns `SUB` rows of the weight (of gate and of up with SwiGLU) and a share of the depth. The weight part of the
ring is asked for before `gdc_wait`: weights are no kernel's output, so their first tiles travel while the kernel before
still runs. `ahead` steps before its end a program lets the next kernel start. With `live`, 64 positions are two halves:
if none of the second is live, its part of x is not fetched (a block that only commits is idle in most forwards).

Written in Gluon, Triton's dialect with explicit copies and layouts; `tiles.py` is the same in plain Triton, for every
other device and dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.linear.ends import before, finish, summed
from dlx.ops.linear.reference import parts
from dlx.ops.op import launch_options, locks, power_of_two

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # 3.6 and from 3.7 on
GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def _expect(bar, want, both, BYTES: gl.constexpr, X_BYTES: gl.constexpr, HALVES: gl.constexpr):
    """A stage of the ring is full after so many bytes; the second half of x is counted if it comes."""
    if HALVES == 2:
        mbarrier.expect(bar, BYTES + X_BYTES, want & both)
        want = want & (both == 0)
    mbarrier.expect(bar, BYTES, want)


@gluon.jit
def _fetch(x_desc, deep, k, bar, x, stage, want, both, BT: gl.constexpr, HALVES: gl.constexpr):
    """Ask for the part of x that a stage of the ring holds."""
    tma.async_copy_global_to_shared(x_desc, [deep * BT * HALVES, k], bar, x.index(stage * HALVES), want)
    if HALVES == 2:
        row = deep * BT * HALVES + BT
        tma.async_copy_global_to_shared(x_desc, [row, k], bar, x.index(stage * HALVES + 1), want & both)


@gluon.jit
def _linear_stream(
    w_desc, x_desc, squares_ptr, live_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr,
    part_ptr, lock_ptr, T, N, K, PARTS, eps, SPLITS,
    SUB: gl.constexpr, BT: gl.constexpr, HALVES: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, BP: gl.constexpr, SPLIT: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr,
    BIAS: gl.constexpr, LIVE: gl.constexpr, FP8: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    split = gl.program_id(1)
    deep = gl.program_id(2)
    if FP8 and BT <= 16:  # both operands from registers, so that a thread may take 8 fp8 in a row
        ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    else:
        ACC: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BT, 16]
        )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=8 if BT <= 16 else 2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=8)
    FLAT: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    NORM: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    NACC: gl.constexpr = 2 if KIND == 1 else 1
    X_BYTES: gl.constexpr = BT * 2 * BK
    BYTES: gl.constexpr = NACC * SUB * (1 if FP8 else 2) * BK + X_BYTES
    steps = gl.cdiv(K, BK)
    low = split * steps // SPLITS
    count = (split + 1) * steps // SPLITS - low
    first = low * BK
    n = tile * SUB + gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))
    t = deep * BT * HALVES + gl.arange(0, BT, layout=gl.SliceLayout(0, FLAT))
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES * NACC, SUB, BK], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * HALVES, BT, BK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    both = False  # whether a position of the second half is live
    if HALVES == 2:  # loads of one number each: a reduction would cost more than it saves
        both = gl.load(live_ptr + deep * BT * 2 + BT, mask=deep * BT * 2 + BT < T, other=0) > 0
        for i in gl.static_range(1, BT):
            row = deep * BT * 2 + BT + i
            both = both | (gl.load(live_ptr + row, mask=row < T, other=0) > 0)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        for j in gl.static_range(NACC):
            row = tile * SUB + j * (N // 2)
            into = w.index(i * NACC + j)
            tma.async_copy_global_to_shared(w_desc, [row, first + i * BK], full.index(i), into, i < count)
    gain = n
    if KIND == 2:
        gain = gl.load(gain_ptr + n, mask=n < N, other=0.0)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _expect(full.index(i), i < count, both, BYTES, X_BYTES, HALVES)
        _fetch(x_desc, deep, first + i * BK, full.index(i), x, i, i < count, both, BT, HALVES)
    h, norm, alive = before(squares_ptr, live_ptr, h_ptr, t, n, T, N, K, PARTS, eps, BT, BP, KIND, LIVE, NORM, FLAT)
    h1 = h
    norm1 = norm
    alive1 = alive
    if HALVES == 2:
        h1, norm1, alive1 = before(
            squares_ptr, live_ptr, h_ptr, t + BT, n, T, N, K, PARTS, eps, BT, BP, KIND, LIVE, NORM, FLAT
        )
    acc = gl.zeros([SUB, BT], gl.float32, layout=ACC)
    acc_up = gl.zeros([SUB, BT], gl.float32, layout=ACC)
    acc1 = gl.zeros([SUB, BT], gl.float32, layout=ACC)  # of the second half
    acc1_up = gl.zeros([SUB, BT], gl.float32, layout=ACC)
    trigger = gl.maximum(count - AHEAD, 0)
    for step in range(count):
        if PDL:  # noqa: SIM102  (PDL is known when the kernel is compiled, step is not)
            if step == trigger:
                gdc_launch_dependents()
        stage = step % STAGES
        here = full.index(stage)
        mbarrier.wait(here, (step // STAGES) & 1)
        right = x.index(stage * HALVES).permute((1, 0))
        if FP8 and BT <= 16:
            right = right.load(B)
            acc = mma_v2(w.index(stage * NACC).load(A).to(x_desc.dtype), right, acc)
            if NACC == 2:
                acc_up = mma_v2(w.index(stage * NACC + 1).load(A).to(x_desc.dtype), right, acc_up)
        else:
            if FP8:  # noqa: SIM108  (a constant)
                left = w.index(stage * NACC).load(A).to(x_desc.dtype)
            else:
                left = w.index(stage * NACC)
            acc = warpgroup_mma(left, right, acc, is_async=True)
            if HALVES == 2:
                right1 = x.index(stage * HALVES + 1).permute((1, 0))
                acc1 = warpgroup_mma(left, right1, acc1, is_async=True)
            if NACC == 2:
                if FP8:  # noqa: SIM108
                    left_up = w.index(stage * NACC + 1).load(A).to(x_desc.dtype)
                else:
                    left_up = w.index(stage * NACC + 1)
                acc_up = warpgroup_mma(left_up, right, acc_up, is_async=True)
                if HALVES == 2:
                    acc1_up = warpgroup_mma(left_up, right1, acc1_up, is_async=True)
            if NACC == 2 and HALVES == 2:
                acc, acc_up, acc1, acc1_up = warpgroup_mma_wait(0, deps=(acc, acc_up, acc1, acc1_up))
            elif NACC == 2:
                acc, acc_up = warpgroup_mma_wait(0, deps=(acc, acc_up))
            elif HALVES == 2:
                acc, acc1 = warpgroup_mma_wait(0, deps=(acc, acc1))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
        more = step + STAGES < count
        k = first + (step + STAGES) * BK
        _expect(here, more, both, BYTES, X_BYTES, HALVES)
        for j in gl.static_range(NACC):
            tma.async_copy_global_to_shared(
                w_desc, [tile * SUB + j * (N // 2), k], here, w.index(stage * NACC + j), more
            )
        _fetch(x_desc, deep, k, here, x, stage, more, both, BT, HALVES)
    total = gl.convert_layout(acc, FLAT)
    total_up = gl.convert_layout(acc_up, FLAT)
    total1 = total
    total1_up = total
    if HALVES == 2:
        total1 = gl.convert_layout(acc1, FLAT)
        total1_up = gl.convert_layout(acc1_up, FLAT)
    last = True
    if SPLIT:
        # whoever comes last adds the splits up, in their order: the same bits every time
        SIZE: gl.constexpr = SUB * BT
        ALL: gl.constexpr = HALVES * NACC * SIZE
        cell = gl.arange(0, BT, layout=gl.SliceLayout(0, FLAT))[None, :] * SUB
        cell = cell + gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))[:, None]
        lock = lock_ptr + deep * gl.num_programs(0) + tile
        slab = part_ptr + (deep * gl.num_programs(0) + tile).to(gl.int64) * SPLITS * ALL
        mine = slab + split * ALL + cell
        gl.store(mine, total)
        if NACC == 2:
            gl.store(mine + SIZE, total_up)
        if HALVES == 2:
            gl.store(mine + NACC * SIZE, total1)
            if NACC == 2:
                gl.store(mine + (NACC + 1) * SIZE, total1_up)
        barrier()
        last = gl.atomic_add(lock, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = summed(slab, cell, SPLITS, ALL, SUB, BT, FLAT)
            if NACC == 2:
                total_up = summed(slab + SIZE, cell, SPLITS, ALL, SUB, BT, FLAT)
            if HALVES == 2:
                total1 = summed(slab + NACC * SIZE, cell, SPLITS, ALL, SUB, BT, FLAT)
                if NACC == 2:
                    total1_up = summed(slab + (NACC + 1) * SIZE, cell, SPLITS, ALL, SUB, BT, FLAT)
            gl.store(lock, 0)
    if last:
        finish(total, total_up, h, gain, tile, t, norm, alive, scale_ptr, bias_ptr, out_ptr, scaled_ptr, sums_ptr, T,
                N, PARTS, SUB, KIND, SCALE, BIAS, FLAT)  # fmt: skip
        if HALVES == 2:
            finish(total1, total1_up, h1, gain, tile, t + BT, norm1, alive1, scale_ptr, bias_ptr, out_ptr,
                    scaled_ptr, sums_ptr, T, N, PARTS, SUB, KIND, SCALE, BIAS, FLAT)  # fmt: skip


class Stream(NamedTuple):
    """A launch configuration: weight rows and depth of a tile, splits of K, tiles in the ring, steps from the end at
    which the next kernel may start."""

    SUB: int
    BK: int
    splits: int
    stages: int
    ahead: int


def rows_of(T: int) -> int:
    """Positions of one tile."""
    return min(64, max(8, power_of_two(T)))


def shared_bytes(config: Stream, T: int, swiglu: bool, itemsize: int) -> int:
    """Shared memory of a program."""
    return config.stages * config.BK * ((2 if swiglu else 1) * config.SUB * itemsize + rows_of(T) * 2)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel can run: sm_90, 16-bit activations, 16-bit or fp8 weights, rows of whole 16 bytes."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype in (x.dtype, torch.float8_e4m3fn)
        and x.shape[1] % 16 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How bulk copies read tiles of a matrix."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON[x.dtype])
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, columns], layout)


def launch(
    kind: int, x: Tensor, weight: Tensor, squares: Tensor | None, h: Tensor | None, gain: Tensor | None, eps: float,
    scale: Tensor | None, bias: Tensor | None, live: Tensor | None, config: Stream,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel under an explicit configuration; kind 0 projects, 1 with SwiGLU, 2 accumulates."""
    T, K = x.shape
    N = weight.shape[0]
    BT, SUB, BK = rows_of(T), config.SUB, config.BK
    halves = 2 if live is not None and BT == 64 else 1
    width = N // 2 if kind == 1 else N
    tiles, deep = -(-width // SUB), -(-T // BT)
    out = torch.empty(T, width, device=x.device, dtype=x.dtype)
    scaled, sums, part = out, out, out
    if kind == 2:
        scaled = torch.empty_like(out)
        sums = torch.empty(T, parts(N), device=x.device, dtype=torch.float32)
    if config.splits > 1:
        size = deep * tiles * config.splits * (2 if kind == 1 else 1) * SUB * BT
        part = torch.empty(size, device=x.device, dtype=torch.float32)
    count = parts(N) if squares is None else squares.shape[1]
    pdl, options = launch_options(x)
    _linear_stream[(tiles, config.splits, deep)](
        descriptor(weight, SUB, BK), descriptor(x, BT // halves, BK), out if squares is None else squares,
        out if live is None else live, out if scale is None else scale, out if bias is None else bias,
        out if h is None else h, out if gain is None else gain, out, scaled, sums, part, locks(x.device),
        T, N, K, count, eps, config.splits, SUB, BT // halves, halves, BK, config.stages, config.ahead,
        power_of_two(count), config.splits > 1, kind, scale is not None, bias is not None, live is not None,
        weight.dtype == torch.float8_e4m3fn, SUB // 16, pdl, num_warps=SUB // 16, **options,
    )  # fmt: skip
    return out, scaled, sums
