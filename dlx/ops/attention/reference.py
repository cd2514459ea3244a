"""Attention over pages in plain torch, and the least work for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.ops.op import DEBUG, Cost


def reference(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None = None,
    hole: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    B, C, H, D = q.shape
    _, P, S, G, _ = kv.shape
    used = max(1, -(-int(seen.max()) // S))  # pages any query sees; the rest of the table is not read
    visible = seeable(seen, used * S, first, hole)  # [B, C, J]
    read = visible.any(1)
    table = pages[:, :used]
    if DEBUG and used > pages.shape[1]:
        table = torch.nn.functional.pad(table, (0, used - pages.shape[1]), value=-1)
    table = torch.where(read.unflatten(1, (used, S)).any(2), table, 0).long()
    poison = visible.new_zeros(B, C)
    if DEBUG:
        wrong = (table < 0) | (table >= P)
        poison = (visible & wrong.repeat_interleave(S, 1)[:, None]).any(2)
        table = torch.where(wrong, 0, table)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (kv[i][table].to(acc) for i in (0, 1))  # [B, used, S, G, D]
    if scales is not None:
        k, v = (x * scales[i][table].to(acc)[:, :, None, :, None] for i, x in enumerate((k, v)))
    k, v = k.flatten(1, 2), torch.where(read[..., None, None], v.flatten(1, 2), 0.0)  # what nobody sees may be anything
    scores = torch.einsum("bcgrd,bjgd->bcgrj", q.view(B, C, G, H // G, D).to(acc), k) * scale
    scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(~visible[:, :, None, None], 0.0)
    out = torch.einsum("bcgrj,bjgd->bcgrd", weights, v).reshape(B, C, H, D).to(q.dtype)
    return out.masked_fill(poison[..., None, None], float("nan")).contiguous()


def seeable(seen: Tensor, keys: int, first: Tensor | None, hole: Tensor | None) -> Tensor:
    """[B, C, keys] bool: who sees which key."""
    j = torch.arange(keys, device=seen.device)
    visible = j < seen[..., None]
    if first is not None:
        visible = visible & (j >= first[..., None])
    if hole is not None:
        low, high = hole[:, None, :1], hole[:, None, 1:]
        visible = visible & ((j < low) | (j >= high))
    return visible


def cost(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None = None,
    hole: Tensor | None = None,
    scales: Tensor | None = None,
) -> Cost:
    _, _, H, D = q.shape
    S, G = kv.shape[2], kv.shape[3]
    visible = seeable(seen, int(seen.max()), first, hole)
    keys = int(visible.any(1).sum())
    moved = 2 * q.numel() * q.element_size() + 2 * keys * G * D * kv.element_size()
    moved += 0 if scales is None else 2 * 4 * -(-keys // S) * G
    return Cost(4 * int(visible.sum()) * H * D, moved)
