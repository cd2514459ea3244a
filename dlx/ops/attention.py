"""Attention of a few queries a row over K/V pages: write first, then attend.

    out[b, c, h] = Σ_j softmax_j(scale · q[b, c, h] · k[j, g]) · v[j, g]      j < seen[b, c],  g = h // (H / G)

q      [B, C, H, D]            queries, contiguous
kv     [2, P, S, G, D]         key and value pages
pages  [B, W]           int32  page table; entries past a row's keys are not read
seen   [B, C]           int32  how many leading keys a query sees; 0 gives zeros
→      [B, C, H, D]
Work   4·Σ seen·H·D flops; reads max(seen)·G·D·2 elements a row once

Block-causal, causal and full visibility differ in `seen` alone. The H / G queries of a group that share a key head
are packed with the positions into the rows of one matmul, and a row's keys are split over programs (flash decoding),
so that one request fills the GPU. How a row is split depends on the launch configuration and on its own `seen`, not
on its neighbours.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import FLOATS, Cost, Op, launch_options, locks, need, need_tensor, processors


class View(NamedTuple):
    """All that attention knows of a forward: where its positions are and what they see."""

    pos: Tensor  # [B, C]  int32  absolute positions
    pages: Tensor  # [B, W]  int32
    seen: Tensor  # [B, C]  int32  leading keys a position sees, itself among them; 0 takes no part and is not stored


def reference(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float) -> Tensor:
    B, C, H, D = q.shape
    S, G = kv.shape[2], kv.shape[3]
    used = max(1, -(-int(seen.max()) // S))  # pages any query sees; the rest of the table is not read
    k, v = (kv[i][pages[:, :used].long()].flatten(1, 2) for i in (0, 1))  # [B, J, G, D]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bcgrd,bjgd->bcgrj", q.view(B, C, G, H // G, D).to(acc), k.to(acc)) * scale
    visible = torch.arange(k.shape[1], device=q.device) < seen[..., None]  # [B, C, J]
    scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0).masked_fill(~visible[:, :, None, None], 0.0)
    v = torch.where(visible.any(1)[..., None, None], v, 0.0)  # what nobody sees may be anything
    return torch.einsum("bcgrj,bjgd->bcgrd", weights, v.to(acc)).reshape(B, C, H, D).to(q.dtype).contiguous()


@triton.jit
def _attention(
    q_ptr, kv_ptr, pages_ptr, seen_ptr, out_ptr, part_ptr, max_ptr, sum_ptr, lock_ptr, scale_log2, C, W, plane,
    G: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)  # a query row is (position, head of the group)
    c = row // GROUP
    ok = c < C
    d = tl.arange(0, D)
    at = (b * C + c) * (G * GROUP) + g * GROUP + row % GROUP  # [BM] index into [B, C, H]
    seen = tl.load(seen_ptr + b * C + c, mask=ok, other=0)
    end = tl.max(seen, 0)
    span = tl.cdiv(tl.cdiv(end, SPLITS), BN) * BN
    low = split * span
    high = tl.minimum(low + span, end)
    q = tl.load(q_ptr + at[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for first in range(low, high, BN):
        j = first + tl.arange(0, BN)
        here = j < high
        page = tl.load(pages_ptr + b * W + j // S, mask=here, other=0).to(tl.int64)
        key = (page * S + j % S) * (G * D) + g * D
        k = tl.load(kv_ptr + key[None, :] + d[:, None], mask=here[None, :], other=0.0)
        v = tl.load(kv_ptr + plane + key[:, None] + d[None, :], mask=here[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale_log2
        s = tl.where(j[None, :] < seen[:, None], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that sees nothing here
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee" if EXACT else "tf32")
        top = new
    if SPLITS > 1:
        # whoever comes last combines the splits, in their order: the same bits every time
        part = at * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=ok[:, None])
        tl.store(max_ptr + part, top, mask=ok)
        tl.store(sum_ptr + part, total, mask=ok)
        lock = lock_ptr + (b * G + g) * (tl.num_programs(0) // SPLITS) + tile
        tl.debug_barrier()
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            best = tl.full([BM], float("-inf"), tl.float32)
            for i in range(SPLITS):
                best = tl.maximum(
                    best, tl.load(max_ptr + at * SPLITS + i, mask=ok, other=float("-inf"), cache_modifier=".cg")
                )
            best = tl.where(best == float("-inf"), 0.0, best)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, D], tl.float32)
            for i in range(SPLITS):
                part = at * SPLITS + i
                w = tl.exp2(tl.load(max_ptr + part, mask=ok, other=float("-inf"), cache_modifier=".cg") - best)
                total += w * tl.load(sum_ptr + part, mask=ok, other=0.0, cache_modifier=".cg")
                acc += w[:, None] * tl.load(
                    part_ptr + part[:, None] * D + d[None, :], mask=ok[:, None], other=0.0, cache_modifier=".cg"
                )
            out = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out_ptr + at[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
            tl.store(lock, 0)
    else:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None])


class Launch(NamedTuple):
    """A launch configuration: query rows and keys a tile, splits of the keys, warps, pipeline stages."""

    BM: int
    BN: int
    splits: int
    warps: int
    stages: int


@cache
def choose(B: int, C: int, H: int, G: int, keys: int, processors: int) -> Launch:
    """The default configuration: enough splits that the programs fill the GPU once."""
    rows = C * (H // G)
    BM = 16 if rows <= 64 else 64  # 16: 1.3 times as fast as 32 for 32 rows
    programs = B * G * triton.cdiv(rows, BM)
    most = max(1, min(32, triton.cdiv(keys, 64)))  # a split of fewer than 64 keys is not worth its launch
    splits = 1
    while splits * 2 <= most and programs * splits < processors:
        splits *= 2
    return Launch(BM, 64, splits, 4, 3)


def kernel(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float) -> Tensor:
    B, C, H, _ = q.shape
    keys = pages.shape[1] * kv.shape[2]
    return launch(q, kv, pages, seen, scale, choose(B, C, H, kv.shape[3], keys, processors(q)))


def launch(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float, config: Launch) -> Tensor:
    """Run the kernel under an explicit configuration."""
    B, C, H, D = q.shape
    _, _, S, G, _ = kv.shape
    need(D >= 16 and D & (D - 1) == 0, "attention's head dim", D, "a power of two from 16 on")
    splits = config.splits
    out = torch.empty_like(q)
    part, top, total = out, out, out
    if splits > 1:
        part = torch.empty(B, C, H, splits, D, device=q.device, dtype=torch.float32)
        top = torch.empty(2, B, C, H, splits, device=q.device, dtype=torch.float32)
        top, total = top[0], top[1]
    pdl, options = launch_options(q)
    tiles = triton.cdiv(C * (H // G), config.BM)
    _attention[(tiles * splits, G, B)](
        q, kv, pages, seen, out, part, top, total, locks(q.device), scale * 1.4426950408889634, C,
        pages.shape[1], kv.stride(0), G, H // G, S, D, config.BM, config.BN, splits, pdl,
        q.dtype == torch.float32, not q.is_cuda, num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return out


def fake(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def check(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float) -> None:
    need_tensor("attention's q", q, (None, None, None, None), FLOATS)
    B, C, H, D = q.shape
    need_tensor("attention's kv", kv, (2, None, None, None, D), (q.dtype,))
    need(H % kv.shape[3] == 0, f"attention's number of key heads for {H} heads", kv.shape[3], "a divisor")
    need_tensor("attention's pages", pages, (B, None), (torch.int32,))
    need_tensor("attention's seen", seen, (B, C), (torch.int32,))


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "one row, group of 3": _case([21], C=4, H=6, G=2, D=32, S=16, W=3),
        "ragged rows": _case([5, 40, 0], C=8, H=4, G=1, D=16, S=4, W=16),
        "group of 7, page of 32": _case([70], C=4, H=7, G=1, D=64, S=32, W=4),
        "prefill": _case([0], C=48, H=2, G=2, D=16, S=16, W=4),
    }


def _case(context: list[int], C: int, H: int, G: int, D: int, S: int, W: int) -> tuple[Any, ...]:
    """Rows whose blocks of 4 follow `context` keys; the last block of a row is idle; unused pages hold NaN."""
    rng = torch.Generator().manual_seed(0)
    B = len(context)
    P = B * W
    kv = torch.randn(2, P, S, G, D, generator=rng)
    pages = torch.randperm(P, generator=rng).view(B, W).int()
    block = torch.arange(C) // 4
    seen = torch.tensor(context)[:, None] // 4 * 4 + (block + 1) * 4
    seen = torch.where((block == block[-1]) & (torch.tensor(context)[:, None] > 0), 0, seen).int()
    for b in range(B):
        for i in range(-(-int(seen[b].max()) // S), W):
            kv[:, pages[b, i].long()] = float("nan")
    return torch.randn(B, C, H, D, generator=rng), kv, pages, seen, D**-0.5


def cost(q: Tensor, kv: Tensor, pages: Tensor, seen: Tensor, scale: float) -> Cost:
    _, _, H, D = q.shape
    keys = int(seen.amax(1).sum())
    moved = 2 * q.numel() * q.element_size() + 2 * keys * kv.shape[3] * D * kv.element_size()
    return Cost(4 * int(seen.sum()) * H * D, moved)


attention = Op("attention", reference, kernel, fake, check, cases, cost, rtol=1e-2, atol=1e-2)
