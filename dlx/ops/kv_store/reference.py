"""Norm, rope and the store into pages in plain torch, and the least work for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.ops.op import DEBUG, FP8, Cost


def reference(
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
    wide = torch.promote_types(qkv.dtype, torch.float32)
    _, P, S, G, _ = kv.shape
    q, k, v = (x.to(wide) for x in qkv.split((qkv.shape[2] - 2 * G, G, G), 2))
    R = 2 * frequencies.shape[0]
    angle = pos[..., None, None].float() * frequencies
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)

    def normal(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def turned(x: Tensor, gain: Tensor | None) -> Tensor:
        x = x if gain is None else normal(x) * gain.to(wide)
        a, b, rest = x.split((R // 2, R // 2, x.shape[-1] - R), -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    keep = (seen > pos) & (pos >= 0)
    slot = torch.where(keep, pos // S, 0).long()
    page = pages.gather(1, slot.clamp_max(pages.shape[1] - 1) if DEBUG else slot)
    poison = torch.zeros_like(keep)
    if DEBUG:
        poison = keep & ((slot >= pages.shape[1]) | (page >= P))
    keep = keep & (page >= 0) & ~poison
    page, inner = page[keep].long(), (pos % S)[keep].long()
    for i, x in enumerate((turned(k, k_gain), normal(v) if v_norm else v)):
        x = x[keep] if scales is None else x[keep] / scales[i, page].to(wide)[..., None]
        if kv.dtype in FP8:
            x = x.clamp(-torch.finfo(kv.dtype).max, torch.finfo(kv.dtype).max)
        kv[i, page, inner] = x.to(kv.dtype)
    return turned(q, q_gain).to(qkv.dtype).masked_fill(poison[..., None, None], float("nan"))


def cost(
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
) -> Cost:
    G, D = kv.shape[3:]
    written = 2 * int((seen > pos).sum()) * G * D * kv.element_size()
    queries = (qkv.shape[2] - 2 * G) * D * pos.numel() * qkv.element_size()
    return Cost(8 * qkv.numel(), qkv.numel() * qkv.element_size() + queries + written + 2 * pos.numel() * 4)
