"""Between the qkv projection and attention: normalise and rotate q and k, write k and v into pages.

    q', k' = rope(rms_norm(q) · q_gain, pos),  rope(rms_norm(k) · k_gain, pos)
    kv[0, page, pos % S] = k',  kv[1, page, pos % S] = v         page = pages[b, pos // S];  only where seen > pos

qkv           [B, C, H+2G, D]        heads of q, then k, then v; contiguous
q_gain, k_gain [D]
pos           [B, C]          int32
frequencies   [D/2]           f32    channel j turns with j + D/2 by pos · frequencies[j]
kv            [2, P, S, G, D]        contiguous; written
pages         [B, W]          int32  page table; rows share no page that is written
seen          [B, C]          int32  leading keys a position sees, itself among them; 0 stores nothing
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

from dlx.ops.op import FLOATS, WIDE, Cost, Op, launch_options, need, need_tensor, power_of_two

HEADS = 8  # that one program takes


def reference(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    pos: Tensor,
    frequencies: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    eps: float,
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

    keep = seen > pos
    page = pages.gather(1, torch.where(keep, pos // kv.shape[2], 0).long())
    at = (page * kv.shape[2] + pos % kv.shape[2])[keep].long()
    flat = kv.flatten(1, 2)
    flat[0, at] = turned(k, k_gain)[keep].to(kv.dtype)
    flat[1, at] = v[keep].to(kv.dtype)
    return turned(q, q_gain)


@triton.jit
def _kv_store(
    qkv_ptr, q_gain_ptr, k_gain_ptr, pos_ptr, freq_ptr, kv_ptr, pages_ptr, seen_ptr, q_ptr, plane, eps, C, W,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr,
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
    pos = tl.load(pos_ptr + at)
    angle = pos.to(tl.float32) * tl.load(freq_ptr + j, mask=j < D // 2, other=0.0)
    cos = tl.cos(angle)[None, :]
    sin = tl.sin(angle)[None, :]
    new_a = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    new_b = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
    out = q_ptr + at * H * D + head[:, None] * D + j[None, :]
    tl.store(out, new_a, mask=ok & is_q)
    tl.store(out + D // 2, new_b, mask=ok & is_q)
    kept = tl.load(seen_ptr + at) > pos
    slot = tl.load(pages_ptr + at // C * W + pos // S, mask=kept, other=0).to(tl.int64) * S + pos % S
    is_k = (head < H + G)[:, None] & ~is_q
    is_v = (head >= H + G)[:, None]
    page = kv_ptr + slot * G * D + j[None, :]
    k_out = page + (head - H)[:, None] * D
    v_out = page + plane + (head - H - G)[:, None] * D
    tl.store(k_out, new_a.to(kv_ptr.dtype.element_ty), mask=ok & is_k & kept)
    tl.store(k_out + D // 2, new_b.to(kv_ptr.dtype.element_ty), mask=ok & is_k & kept)
    tl.store(v_out, raw_a.to(kv_ptr.dtype.element_ty), mask=ok & is_v & kept)
    tl.store(v_out + D // 2, raw_b.to(kv_ptr.dtype.element_ty), mask=ok & is_v & kept)


def kernel(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    pos: Tensor,
    frequencies: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    eps: float,
) -> Tensor:
    B, C, heads, D = qkv.shape
    G = kv.shape[3]
    q = torch.empty(B, C, heads - 2 * G, D, device=qkv.device, dtype=qkv.dtype)
    pdl, options = launch_options(qkv)
    _kv_store[(B * C, -(-heads // HEADS))](
        qkv, q_gain, k_gain, pos, frequencies, kv, pages, seen, q, kv.stride(0), eps, C, pages.shape[1],
        kv.shape[2], heads - 2 * G, G, D, HEADS, power_of_two(D // 2), pdl, num_warps=4, **options,
    )  # fmt: skip
    return q


def fake(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    pos: Tensor,
    frequencies: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    eps: float,
) -> Tensor:
    B, C, heads, D = qkv.shape
    return qkv.new_empty(B, C, heads - 2 * kv.shape[3], D)


def check(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, pos: Tensor, frequencies: Tensor, kv: Tensor, pages: Tensor,
    seen: Tensor, eps: float,
) -> None:  # fmt: skip
    need_tensor("kv_store's qkv", qkv, (None, None, None, None), FLOATS)
    B, C, heads, D = qkv.shape
    need(D % 2 == 0, "kv_store's head dim", D, "an even number")
    need_tensor("kv_store's kv", kv, (2, None, None, None, D), (qkv.dtype,))
    need(
        heads > 2 * kv.shape[3],
        f"kv_store's heads of q, k and v for {kv.shape[3]} key heads",
        heads,
        "more than 2 a key head",
    )
    for name, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        need_tensor(f"kv_store's {name}", gain, (D,), FLOATS)
    need_tensor("kv_store's frequencies", frequencies, (D // 2,), WIDE)
    need_tensor("kv_store's pages", pages, (B, None), (torch.int32,))
    for name, x in (("pos", pos), ("seen", seen)):
        need_tensor(f"kv_store's {name}", x, (B, C), (torch.int32,))


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "dense": _case(2, 4, 4, 2, 32, S=4, W=3),
        "holes": _case(3, 8, 3, 3, 64, S=16, W=2, idle=3),
        "nothing stored, 9 heads": _case(1, 4, 7, 1, 16, S=4, W=2, idle=1),
    }


def _case(B: int, C: int, H: int, G: int, D: int, S: int, W: int, idle: int = 100) -> tuple[Any, ...]:
    """Rows at different starts; every `idle`-th position takes no part."""
    rng = torch.Generator().manual_seed(0)
    pages = torch.randperm(B * W, generator=rng).view(B, W).int()
    pos = (torch.arange(B)[:, None] * 4 + torch.arange(C)).int()
    seen = torch.where(torch.arange(C) % idle == idle - 1, 0, pos + 1).int()
    frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
    gains = 1 + 0.1 * torch.randn(2, D, generator=rng)
    qkv = torch.randn(B, C, H + 2 * G, D, generator=rng)
    kv = torch.randn(2, B * W, S, G, D, generator=rng)
    return qkv, gains[0], gains[1], pos, frequencies, kv, pages, seen, 1e-6


def cost(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    pos: Tensor,
    frequencies: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    eps: float,
) -> Cost:
    return Cost(8 * qkv.numel(), 2 * qkv.numel() * qkv.element_size() + 2 * pos.numel() * 4)


kv_store = Op("kv_store", reference, kernel, fake, check, cases, cost, mutates=("kv",), rtol=1e-2, atol=1e-2)
