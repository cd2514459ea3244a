"""The layers that every family is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter that never needs a gradient."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """x [..., in] → x · weightᵀ [..., out]; weight [out, in]."""

    def __init__(self, n_in: int, n_out: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(n_out, n_in, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis: mean square in fp32, cast to x's dtype, then weighted."""

    def __init__(self, n: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(n, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x); gate and up are one matrix [2F, E]."""

    def __init__(self, n: int, ffn: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(n, 2 * ffn, device, dtype)
        self.down = Linear(ffn, n, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
