# pyright: reportAssignmentType=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
"""The matmuls on sm_90: bulk copies (TMA) keep a ring of weight tiles full, wgmma empties it.

A program owns `SUB` rows of the weight (of gate and of up with SwiGLU) and a share of the depth. The weight part of the
ring is asked for before `gdc_wait`: weights are no kernel's output, so their first tiles travel while the kernel before
still runs. `ahead` steps before its end a program lets the next kernel start.

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

from dlx.ops.linear.e4m3 import columns, ordered, rows, widened
from dlx.ops.linear.reference import parts
from dlx.ops.op import launch_options, locks, power_of_two

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # 3.6 and from 3.7 on
GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def _channel(acc, row, rows, scale_ptr, bias_ptr, norm, SCALE: gl.constexpr, BIAS: gl.constexpr):
    """acc [SUB, BT] · scale of the channel · norm of the position + bias of the channel."""
    if SCALE:
        acc = acc * gl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    acc = acc * norm[None, :]
    if BIAS:
        acc = acc + gl.load(bias_ptr + row, mask=row < rows, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _finish(
    acc, up, h, gain, tile, t, norm, scale_ptr, bias_ptr, out_ptr, scaled_ptr, sums_ptr, T, N, PARTS,
    SUB: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr, BIAS: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    i = gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))
    n = tile * SUB + i
    ok = t < T
    out_type = out_ptr.dtype.element_ty
    if KIND == 1:
        half = N // 2
        inside = ok[None, :] & (n < half)[:, None]
        gate = _channel(acc, n, half, scale_ptr, bias_ptr, norm, SCALE, BIAS)
        up = _channel(up, n, half, scale_ptr + half, bias_ptr + half, norm, SCALE, BIAS)
        z = gate / (1.0 + gl.exp(-gate)) * up
        gl.store(out_ptr + t[None, :] * half + n[:, None], z.to(out_type), mask=inside)
    else:
        at = t[None, :] * N + n[:, None]
        inside = ok[None, :] & (n < N)[:, None]
        y = _channel(acc, n, N, scale_ptr, bias_ptr, norm, SCALE, BIAS)
        if KIND == 0:
            gl.store(out_ptr + at, y.to(out_type), mask=inside)
        else:
            new = (h.to(gl.float32) + y).to(out_type)
            gl.store(out_ptr + at, new, mask=inside)
            wide = gl.where(inside, new.to(gl.float32), 0.0)
            gl.store(scaled_ptr + at, (wide * gain.to(gl.float32)[:, None]).to(out_type), mask=inside)
            for part in gl.static_range(SUB // 64):
                sums = gl.sum(gl.where((i // 64 == part)[:, None], wide * wide, 0.0), 0)
                entry = tile * (SUB // 64) + part
                gl.store(sums_ptr + t * PARTS + entry, sums, mask=ok & (entry < PARTS))


@gluon.jit
def _linear_stream(
    w_desc, x_desc, squares_ptr, scale_ptr, bias_ptr, h_ptr, gain_ptr, out_ptr, scaled_ptr, sums_ptr, part_ptr,
    lock_ptr, T, N, K, PARTS, eps, SPLITS,
    SUB: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    BP: gl.constexpr, SPLIT: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr, BIAS: gl.constexpr,
    FP8: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    split = gl.program_id(1)
    deep = gl.program_id(2)
    NARROW: gl.constexpr = FP8 and BT <= 16  # both operands from registers, so that a thread may take 4 fp8 in a row
    if NARROW:
        ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    else:
        ACC: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BT, 16]
        )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    FLAT: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    NORM: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    NACC: gl.constexpr = 2 if KIND == 1 else 1
    BYTES: gl.constexpr = (NACC * SUB * (1 if FP8 else 2) + BT * 2) * BK
    steps = gl.cdiv(K, BK)
    low = split * steps // SPLITS
    count = (split + 1) * steps // SPLITS - low
    first = low * BK
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES * NACC, SUB, BK], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BT, BK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES, i < count)
        for j in gl.static_range(NACC):
            row = tile * SUB + j * (N // 2)
            into = w.index(i * NACC + j)
            tma.async_copy_global_to_shared(w_desc, [row, first + i * BK], full.index(i), into, i < count)
    n = tile * SUB + gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))
    t = deep * BT + gl.arange(0, BT, layout=gl.SliceLayout(0, FLAT))
    h = n
    gain = n
    if KIND == 2:
        gain = gl.load(gain_ptr + n, mask=n < N, other=0.0)
    if PDL:
        gdc_wait()
    if KIND == 2:
        h = gl.load(h_ptr + t[None, :] * N + n[:, None], mask=(t < T)[None, :] & (n < N)[:, None], other=0.0)
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [deep * BT, first + i * BK], full.index(i), x.index(i), i < count)
    if KIND == 2:
        norm = gl.full([BT], 1.0, gl.float32, layout=gl.SliceLayout(0, FLAT))
    else:
        row = deep * BT + gl.arange(0, BT, layout=gl.SliceLayout(1, NORM))
        p = gl.arange(0, BP, layout=gl.SliceLayout(0, NORM))
        inside = (row < T)[:, None] & (p < PARTS)[None, :]
        squares = gl.load(squares_ptr + row[:, None] * PARTS + p[None, :], mask=inside, other=0.0)
        norm = gl.convert_layout(gl.rsqrt(gl.sum(squares, 1) / K + eps), gl.SliceLayout(0, FLAT))
    acc = gl.zeros([SUB, BT], gl.float32, layout=ACC)
    acc_up = gl.zeros([SUB, BT], gl.float32, layout=ACC)
    trigger = gl.maximum(count - AHEAD, 0)
    for step in range(count):
        if PDL:  # noqa: SIM102  (PDL is known when the kernel is compiled, step is not)
            if step == trigger:
                gdc_launch_dependents()
        stage = step % STAGES
        here = full.index(stage)
        mbarrier.wait(here, (step // STAGES) & 1)
        right = x.index(stage).permute((1, 0))
        if NARROW:
            x_low, x_high = columns(right, ACC, BK, BT, WARPS)
            w_low, w_high = rows(w.index(stage * NACC), x_desc.dtype, ACC, SUB, BK)
            acc = mma_v2(w_low, x_low, acc)
            if NACC == 2:
                acc = mma_v2(w_high, x_high, acc)
                w_low, w_high = rows(w.index(stage * NACC + 1), x_desc.dtype, ACC, SUB, BK)
                acc_up = mma_v2(w_low, x_low, acc_up)
            acc_up = mma_v2(w_high, x_high, acc_up)
        else:
            if FP8:
                left = widened(w.index(stage * NACC).load(A), x_desc.dtype, 2)
                acc = warpgroup_mma(left, right, acc, is_async=True)
                if NACC == 2:
                    left = widened(w.index(stage * NACC + 1).load(A), x_desc.dtype, 2)
                    acc_up = warpgroup_mma(left, right, acc_up, is_async=True)
            else:
                acc = warpgroup_mma(w.index(stage * NACC), right, acc, is_async=True)
                if NACC == 2:
                    acc_up = warpgroup_mma(w.index(stage * NACC + 1), right, acc_up, is_async=True)
            if NACC == 2:
                acc, acc_up = warpgroup_mma_wait(0, deps=(acc, acc_up))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
        more = step + STAGES < count
        k = first + (step + STAGES) * BK
        mbarrier.expect(here, BYTES, more)
        for j in gl.static_range(NACC):
            tma.async_copy_global_to_shared(
                w_desc, [tile * SUB + j * (N // 2), k], here, w.index(stage * NACC + j), more
            )
        tma.async_copy_global_to_shared(x_desc, [deep * BT, k], here, x.index(stage), more)
    if NARROW:
        acc = ordered(acc, SUB, BT)
        acc_up = ordered(acc_up, SUB, BT)
        if NACC == 1:  # two halves of K
            acc += acc_up
    total = gl.convert_layout(acc, FLAT)
    total_up = gl.convert_layout(acc_up, FLAT)
    if not SPLIT:
        _finish(total, total_up, h, gain, tile, t, norm, scale_ptr, bias_ptr, out_ptr, scaled_ptr, sums_ptr, T, N,
                PARTS, SUB, KIND, SCALE, BIAS, FLAT)  # fmt: skip
    else:
        # whoever comes last adds the splits up, in their order: the same bits every time
        SIZE: gl.constexpr = SUB * BT
        cell = (t - deep * BT)[None, :] * SUB + gl.arange(0, SUB, layout=gl.SliceLayout(1, FLAT))[:, None]
        lock = lock_ptr + deep * gl.num_programs(0) + tile
        slab = part_ptr + (deep * gl.num_programs(0) + tile).to(gl.int64) * SPLITS * (NACC * SIZE)
        gl.store(slab + split * (NACC * SIZE) + cell, total)
        if NACC == 2:
            gl.store(slab + split * (NACC * SIZE) + SIZE + cell, total_up)
        barrier()
        arrived = gl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = gl.zeros([SUB, BT], gl.float32, layout=FLAT)
            total_up = gl.zeros([SUB, BT], gl.float32, layout=FLAT)
            for other in range(SPLITS):
                total += gl.load(slab + other * (NACC * SIZE) + cell, cache_modifier=".cg")
                if NACC == 2:
                    total_up += gl.load(slab + other * (NACC * SIZE) + SIZE + cell, cache_modifier=".cg")
            gl.store(lock, 0)
            _finish(total, total_up, h, gain, tile, t, norm, scale_ptr, bias_ptr, out_ptr, scaled_ptr, sums_ptr, T, N,
                    PARTS, SUB, KIND, SCALE, BIAS, FLAT)  # fmt: skip


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
    scale: Tensor | None, bias: Tensor | None, config: Stream,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel under an explicit configuration; kind 0 projects, 1 with SwiGLU, 2 accumulates."""
    T, K = x.shape
    N = weight.shape[0]
    BT, SUB, BK = rows_of(T), config.SUB, config.BK
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
        descriptor(weight, SUB, BK), descriptor(x, BT, BK), out if squares is None else squares,
        out if scale is None else scale, out if bias is None else bias, out if h is None else h,
        out if gain is None else gain, out, scaled, sums, part, locks(x.device), T, N, K, count, eps, config.splits,
        SUB, BT, BK, config.stages, config.ahead, power_of_two(count), config.splits > 1, kind, scale is not None,
        bias is not None, weight.dtype == torch.float8_e4m3fn, SUB // 16, pdl, num_warps=SUB // 16, **options,
    )  # fmt: skip
    return out, scaled, sums
