"""The layers that every family is made of, and rotary positions."""

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


def rotation(pos: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, C, 1, D/2] of positions [B, C] int32; fp32 inside, cast to `dtype`."""
    angle = pos[..., None, None].float() * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, C, H, D]: channel j pairs with j + D/2."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
