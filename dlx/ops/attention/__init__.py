"""Attention of a row's queries over its K/V pages: write first, then attend.

    out[b, c, h] = Σ_j softmax_j(scale · q[b, c, h] · k[j, g]) · v[j, g]      g = h // (H / G)
    over first[b, c] ≤ j < seen[b, c],  j not in [hole[b, 0], hole[b, 1])

q      [B, C, H, D]            queries, contiguous; D a power of two from 16 on
kv     [2, P, S, G, D]         key and value pages, in q's dtype, e4m3 or e5m2
pages  [B, W]           int32  page table; entries of keys that nobody sees are not followed
seen   [B, C]           int32  how many leading keys a query sees; 0 gives zeros
first  [B, C]           int32  the first key it sees (a sliding window); None or below 0: from the first on
hole   [B, 2]           int32  keys from hole[b, 0] to hole[b, 1] - 1 are seen by nobody (they are replaced elsewhere)
scales [2, P, G]        f32    of fp8 pages, by page and head: value = stored · scale; None is 1
                              (bf16 queries on a GPU read a NaN of fp8 as a large number, see `fp8.py`)
→      [B, C, H, D]
Work   4·Σ visible·H·D flops; reads the keys that a row sees, ·G·D·2 elements, once
Raises ShapeError  shapes, dtypes, strides; e4m3 pages need sm_89
Source FlashAttention-2 (softmax as the keys come), flash decoding (keys split over programs)

Block-causal, causal and full visibility differ in `seen` alone. The H / G queries of a group that share a key head
are packed with the positions into the rows of one matmul, and a row's keys are split over programs, so that one
request fills the GPU. A prompt takes wide tiles and no splits, and masks only where some query sees less. How a row
is split depends on the launch configuration and on its own keys, not on its neighbours. With DLX_DEBUG=1 a page index
outside the cache is not followed: a query that sees a key there becomes NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlx.ops.attention.cases import cases
from dlx.ops.attention.launches import Launch, choose, kernel, launch
from dlx.ops.attention.reference import cost, reference
from dlx.ops.op import FLOATS, FP8, WIDE, Op, need, need_fp8, need_tensor

__all__ = ["Launch", "View", "attention", "choose", "kernel", "launch", "reference"]


class View(NamedTuple):
    """What a network knows of a forward: where its positions are and what they see; whose adapter a row takes."""

    pos: Tensor  # [B, C]  int32  absolute positions
    pages: Tensor  # [B, W]  int32
    seen: Tensor  # [B, C]  int32  leading keys a position sees, itself among them; 0 takes no part and is not stored
    lora: Tensor | None = None  # [B]  int32  adapter slot, 0 is none; attention does not read it
    encode: Tensor | None = None  # [B]     bool   DiffusionGemma: rows of committed tokens, not of a canvas; None: all


def fake(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None = None,
    hole: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(q)


def check(
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    seen: Tensor,
    scale: float,
    first: Tensor | None = None,
    hole: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    need_tensor("attention's q", q, (None, None, None, None), FLOATS)
    B, C, H, D = q.shape
    need_tensor("attention's kv", kv, (2, None, None, None, D), (q.dtype, *FP8))
    _, P, _, G, _ = kv.shape
    need(H % G == 0, f"attention's number of key heads for {H} heads", G, "a divisor")
    need_tensor("attention's pages", pages, (B, None), (torch.int32,))
    need_tensor("attention's seen", seen, (B, C), (torch.int32,))
    need(scale > 0, "attention's scale", scale, "a number above 0")
    if first is not None:
        need_tensor("attention's first", first, (B, C), (torch.int32,))
    if hole is not None:
        need_tensor("attention's hole", hole, (B, 2), (torch.int32,))
    if scales is not None:
        need_tensor("attention's scales", scales, (2, P, G), WIDE)
        need(kv.dtype in FP8, "the dtype of attention's kv with scales", kv.dtype, "torch.float8_e4m3fn or _e5m2")
    need_fp8("attention's kv", kv)


attention = Op("attention", reference, kernel, fake, check, cases, cost, wide=("scales",), rtol=1e-2, atol=1e-2)
