"""Between the qkv projection and attention: normalise and rotate q and k, write k and v into pages.

    q', k' = rope(rms_norm(q) · q_gain, pos),  rope(rms_norm(k) · k_gain, pos)
    kv[0, slot] = k',  kv[1, slot] = v         slot = page · S + offset;  slot < 0 writes nothing

qkv           [B, C, H+2G, D]        heads of q, then k, then v; contiguous
q_gain, k_gain [D]
pos           [B, C]          int32
frequencies   [D/2]           f32    channel j turns with j + D/2 by pos · frequencies[j]
kv            [2, P, S, G, D]        contiguous; written
slots         [B, C]          int32  no slot twice, else the last write is undefined
→ q'          [B, C, H, D]
Work   reads qkv and writes as much: bandwidth-bound, 1 pass
Source vLLM's reshape_and_cache (idea)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import Cost, Op, launch_options, power_of_two

HEADS = 8  # that one program takes


def reference(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, pos: Tensor, frequencies: Tensor, kv: Tensor, slots: Tensor, eps: float
) -> Tensor:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    G = kv.shape[3]
    H = qkv.shape[2] - 2 * G
    q, k, v = qkv.split((H, G, G), 2)
    angle = pos[..., None, None].float() * frequencies
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)

    def turned(x: Tensor, gain: Tensor) -> Tensor:
        x = x.to(wide)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.to(wide)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(qkv.dtype)

    keep = slots >= 0
    at = slots[keep].long()
    flat = kv.flatten(1, 2)
    flat[0, at] = turned(k, k_gain)[keep].to(kv.dtype)
    flat[1, at] = v[keep].to(kv.dtype)
    return turned(q, q_gain)


@triton.jit
def _kv_store(
    qkv_ptr, q_gain_ptr, k_gain_ptr, pos_ptr, freq_ptr, kv_ptr, slots_ptr, q_ptr, plane, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64)  # (b, c)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    j = tl.arange(0, HALF)
    ok = (head < H + 2 * G)[:, None] & (j < D // 2)[None, :]
    source = qkv_ptr + at * (H + 2 * G) * D + head[:, None] * D + j[None, :]
    raw_a = tl.load(source, mask=ok, other=0.0)
    raw_b = tl.load(source + D // 2, mask=ok, other=0.0)
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
    is_q = (head < H)[:, None]
    half = (j < D // 2)[None, :]
    gain_a = tl.load(tl.where(is_q, q_gain_ptr + j[None, :], k_gain_ptr + j[None, :]), mask=half, other=0.0)
    gain_b = tl.load(
        tl.where(is_q, q_gain_ptr + D // 2 + j[None, :], k_gain_ptr + D // 2 + j[None, :]), mask=half, other=0.0
    )
    a = a * scale * gain_a.to(tl.float32)
    b = b * scale * gain_b.to(tl.float32)
    angle = tl.load(pos_ptr + at).to(tl.float32) * tl.load(freq_ptr + j, mask=j < D // 2, other=0.0)
    cos = tl.cos(angle)[None, :]
    sin = tl.sin(angle)[None, :]
    new_a = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    new_b = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
    out = q_ptr + at * H * D + head[:, None] * D + j[None, :]
    tl.store(out, new_a, mask=ok & is_q)
    tl.store(out + D // 2, new_b, mask=ok & is_q)
    slot = tl.load(slots_ptr + at).to(tl.int64)
    is_k = (head < H + G)[:, None] & ~is_q
    is_v = (head >= H + G)[:, None]
    page = kv_ptr + slot * G * D + j[None, :]
    k_out = page + (head - H)[:, None] * D
    v_out = page + plane + (head - H - G)[:, None] * D
    tl.store(k_out, new_a.to(kv_ptr.dtype.element_ty), mask=ok & is_k & (slot >= 0))
    tl.store(k_out + D // 2, new_b.to(kv_ptr.dtype.element_ty), mask=ok & is_k & (slot >= 0))
    tl.store(v_out, raw_a.to(kv_ptr.dtype.element_ty), mask=ok & is_v & (slot >= 0))
    tl.store(v_out + D // 2, raw_b.to(kv_ptr.dtype.element_ty), mask=ok & is_v & (slot >= 0))


def kernel(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, pos: Tensor, frequencies: Tensor, kv: Tensor, slots: Tensor, eps: float
) -> Tensor:
    B, C, heads, D = qkv.shape
    G = kv.shape[3]
    q = torch.empty(B, C, heads - 2 * G, D, device=qkv.device, dtype=qkv.dtype)
    pdl, options = launch_options(qkv)
    _kv_store[(B * C, -(-heads // HEADS))](
        qkv, q_gain, k_gain, pos, frequencies, kv, slots, q, kv.stride(0), eps,
        heads - 2 * G, G, D, HEADS, power_of_two(D // 2), pdl, num_warps=4, **options,
    )  # fmt: skip
    return q


def fake(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, pos: Tensor, frequencies: Tensor, kv: Tensor, slots: Tensor, eps: float
) -> Tensor:
    B, C, heads, D = qkv.shape
    return qkv.new_empty(B, C, heads - 2 * kv.shape[3], D)


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "dense": _case(2, 4, 4, 2, 32, P=4, S=4),
        "holes": _case(3, 8, 3, 3, 64, P=4, S=16, holes=True),
        "nothing stored, 9 heads": _case(1, 4, 7, 1, 16, P=2, S=4, none=True),
    }


def _case(
    B: int, C: int, H: int, G: int, D: int, P: int, S: int, holes: bool = False, none: bool = False
) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(0)
    slots = torch.randperm(P * S, generator=rng)[: B * C].view(B, C).int()
    if holes:
        slots[:, ::3] = -1
    if none:
        slots.fill_(-1)
    frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
    gains = 1 + 0.1 * torch.randn(2, D, generator=rng)
    pos = torch.randint(0, 500, (B, C), generator=rng).int()
    qkv = torch.randn(B, C, H + 2 * G, D, generator=rng)
    return qkv, gains[0], gains[1], pos, frequencies, torch.randn(2, P, S, G, D, generator=rng), slots, 1e-6


def cost(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, pos: Tensor, frequencies: Tensor, kv: Tensor, slots: Tensor, eps: float
) -> Cost:
    return Cost(8 * qkv.numel(), 2 * qkv.numel() * qkv.element_size() + 2 * slots.numel() * 4)


kv_store = Op("kv_store", reference, kernel, fake, cases, cost, mutates=("kv",), rtol=1e-2, atol=1e-2)
