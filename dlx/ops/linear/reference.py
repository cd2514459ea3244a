"""What the two matmuls compute, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # columns that one entry of `squares` sums up


def parts(E: int) -> int:
    """How many entries of `squares` a stream of width E has."""
    return -(-E // GROUP)


def squared(h: Tensor) -> Tensor:
    """[T, E] → [T, parts] f32 sums of squares, as `accumulate` gives them."""
    wide = F.pad(h.to(torch.promote_types(h.dtype, torch.float32)), (0, -h.shape[1] % GROUP))
    return wide.square().unflatten(1, (-1, GROUP)).sum(-1)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x · (weight · scale)ᵀ in fp32, or fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return y if scale is None else y * scale.to(wide)


def project(
    a: Tensor,
    squares: Tensor,
    weight: Tensor,
    eps: float,
    swiglu: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    y = _product(a, weight, scale)
    y = y * torch.rsqrt(squares.to(y.dtype).sum(1, keepdim=True) / a.shape[1] + eps)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if swiglu:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y.to(a.dtype).contiguous()


def accumulate(
    y: Tensor, weight: Tensor, h: Tensor, gain: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    product = _product(y, weight, scale)
    if bias is not None:
        product = product + bias.to(product.dtype)
    out = (h.to(product.dtype) + product).to(h.dtype)
    return out, (out * gain).to(out.dtype), squared(out)
