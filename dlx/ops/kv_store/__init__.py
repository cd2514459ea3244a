"""Between the qkv projection and attention: normalise and rotate q and k, write k and v into pages.

    q', k' = rope(rms_norm(q) · q_gain, pos),  rope(rms_norm(k) · k_gain, pos)
    kv[0, page, pos % S] = k',  kv[1, page, pos % S] = v         page = pages[b, pos // S];  only where seen > pos ≥ 0

qkv           [B, C, H+2G, D]        heads of q, then k, then v; contiguous
q_gain, k_gain [D]                   None: neither is normalised
pos           [B, C]          int32
frequencies   [R/2]           f32    channel j < R/2 turns with j + R/2 by pos · frequencies[j]; from R on they stay
kv            [2, P, S, G, D]        contiguous; written; in qkv's dtype, e4m3 or e5m2
pages         [B, W]          int32  page table; rows share no page that is written; a page below 0 stores nothing
seen          [B, C]          int32  leading keys a position sees, itself among them; 0 stores nothing
scales        [2, P, G]       f32    of fp8 pages, by page and head: stored = value / scale, clamped; None is 1
v_norm                               whether v is divided by its rms (DiffusionGemma)
→ q'          [B, C, H, D]
Work   reads qkv and writes as much: bandwidth-bound, 1 pass
Raises ShapeError  shapes, dtypes, strides; e4m3 pages need sm_89
Source vLLM's reshape_and_cache (idea)

Between load and store all is fp32 and nothing is rounded: LLaDA's full-precision rotation, for every family. With
DLX_DEBUG=1 a page index that the cache does not have is not followed: nothing is stored, and the position's q' is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.ops.kv_store.cases import cases
from dlx.ops.kv_store.kernels import kernel
from dlx.ops.kv_store.reference import cost, reference
from dlx.ops.op import FLOATS, FP8, WIDE, Op, need, need_fp8, need_tensor


def fake(
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
    B, C, heads, D = qkv.shape
    return qkv.new_empty(B, C, heads - 2 * kv.shape[3], D)


def check(
    qkv: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, pos: Tensor, frequencies: Tensor, kv: Tensor,
    pages: Tensor, seen: Tensor, eps: float, scales: Tensor | None = None, v_norm: bool = False,
) -> None:  # fmt: skip
    need_tensor("kv_store's qkv", qkv, (None, None, None, None), FLOATS)
    B, C, heads, D = qkv.shape
    need_tensor("kv_store's kv", kv, (2, None, None, None, D), (qkv.dtype, *FP8))
    _, P, _, G, _ = kv.shape
    need(heads > 2 * G, f"kv_store's heads of q, k and v for {G} key heads", heads, "more than 2 a key head")
    need((q_gain is None) == (k_gain is None), "kv_store's q_gain and k_gain", (q_gain, k_gain), "both or neither")
    if q_gain is not None and k_gain is not None:
        need_tensor("kv_store's q_gain", q_gain, (D,), FLOATS)
        need_tensor("kv_store's k_gain", k_gain, (D,), (q_gain.dtype,))
    need_tensor("kv_store's frequencies", frequencies, (None,), WIDE)
    half = frequencies.shape[0]
    need(1 <= half <= D // 2, "the length of kv_store's frequencies", half, f"1 to D / 2 = {D // 2}")
    need_tensor("kv_store's pages", pages, (B, None), (torch.int32,))
    for name, x in (("pos", pos), ("seen", seen)):
        need_tensor(f"kv_store's {name}", x, (B, C), (torch.int32,))
    if scales is not None:
        need_tensor("kv_store's scales", scales, (2, P, G), WIDE)
        need(kv.dtype in FP8, "the dtype of kv_store's kv with scales", kv.dtype, "torch.float8_e4m3fn or _e5m2")
    need_fp8("kv_store's kv", kv)


kv_store = Op(
    "kv_store", reference, kernel, fake, check, cases, cost, mutates=("kv",), wide=("scales",), rtol=1e-2, atol=1e-2
)
