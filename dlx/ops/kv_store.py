"""Write K and V of the positions looked at into pages.

    kv[0, slot] = k,  kv[1, slot] = v        slot = page · S + offset;  slot < 0 writes nothing

k, v   [B, C, G, D]        any strides with D contiguous
kv     [2, P, S, G, D]     contiguous; written
slots  [B, C]       int32  no slot twice, else the last write is undefined
Work   reads and writes 2·B·C·G·D elements once: bandwidth-bound
Source vLLM's reshape_and_cache (idea)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlx.ops.op import Cost, Op, power_of_two


def reference(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    keep = slots >= 0
    at = slots[keep].long()
    flat = kv.flatten(1, 2)
    flat[0, at] = k[keep].to(kv.dtype)
    flat[1, at] = v[keep].to(kv.dtype)


@triton.jit
def _kv_store(
    k_ptr, v_ptr, kv_ptr, slots_ptr, stride_kb, stride_kc, stride_kg, stride_vb, stride_vc, stride_vg, plane, C,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    slot = tl.load(slots_ptr + b * C + c).to(tl.int64)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        g = i // D
        d = i % D
        ok = i < G * D
        k = tl.load(k_ptr + b * stride_kb + c * stride_kc + g * stride_kg + d, mask=ok)
        v = tl.load(v_ptr + b * stride_vb + c * stride_vc + g * stride_vg + d, mask=ok)
        out = kv_ptr + slot * G * D + i
        tl.store(out, k, mask=ok)
        tl.store(out + plane, v, mask=ok)


def kernel(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    B, C, G, D = k.shape
    block = power_of_two(G * D)
    _kv_store[(C, B)](
        k, v, kv, slots, k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), kv.stride(0), C,
        G, D, block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip


def fake(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    return None


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "dense": _case(2, 4, 2, 32, P=4, S=4, holes=False),
        "holes": _case(3, 8, 3, 64, P=4, S=16, holes=True),
        "none": _case(1, 4, 1, 16, P=2, S=4, holes=False, none=True),
    }


def _case(B: int, C: int, G: int, D: int, P: int, S: int, holes: bool, none: bool = False) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, C, 3 * G, D, generator=rng)  # k and v are views of one projection, as in the model
    slots = torch.randperm(P * S, generator=rng)[: B * C].view(B, C).int()
    if holes:
        slots[:, ::3] = -1
    if none:
        slots.fill_(-1)
    return qkv[:, :, G : 2 * G], qkv[:, :, 2 * G :], torch.randn(2, P, S, G, D, generator=rng), slots


def cost(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Cost:
    return Cost(0, 2 * k.numel() * (k.element_size() + kv.element_size()) + slots.numel() * 4)


kv_store = Op("kv_store", reference, kernel, fake, cases, cost, mutates=("kv",))
