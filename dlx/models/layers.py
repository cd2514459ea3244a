"""The layers that every family is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlx.models.card import Mixture
from dlx.ops import OPS
from dlx.ops.linear import squared


def parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter that never needs a gradient."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)


def normalised(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) · gain over the last axis: mean square in fp32, cast to x's dtype, then weighted."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias; W is the weight, or weight · scale where that is there: see Linear."""
    if scale is not None:
        weight = (weight.float() * scale[:, None]).to(x.dtype)
    return F.linear(x, weight, bias)


class LowRank(nn.Module):
    """What adapters add to a matrix, each to the rows that chose it; slot 0 adds nothing.

        y[t] = Σ x[t] · a[r]ᵀ · b[r]   over the R ranks r of the slot of row t

    a [S·R, in], b [S·R, out]: slots 1 to S, their ranks padded with zeros to the same R. All slots are computed and the
    others' ranks left out, so shapes are static and a matmul takes every row.
    """

    a: Tensor
    b: Tensor
    slots: Tensor

    def __init__(self, a: Tensor, b: Tensor, S: int) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        of = torch.arange(1, S + 1, dtype=torch.int32, device=a.device).repeat_interleave(len(a) // S)
        self.register_buffer("slots", of, persistent=False)

    def forward(self, x: Tensor, slot: Tensor | None) -> Tensor:
        """x [..., in], slot [...] int32 (its axes may be 1) → [..., out]."""
        assert slot is not None, "a network with adapters must be told whose rows it computes"
        return torch.where(slot[..., None] == self.slots, F.linear(x, self.a), 0.0) @ self.b

    def bounds(self, gain: Tensor) -> Tensor:
        """[out] f32: what no slot adds more than; see Linear.bounds."""
        S = int(self.slots.max())  # at load
        norms = torch.linalg.vector_norm(self.a.float() * gain.float(), dim=-1, keepdim=True)
        return gain.numel() ** 0.5 * (norms * self.b.float().abs()).unflatten(0, (S, -1)).sum(1).amax(0)


class Linear(nn.Module):
    """x [..., in] → x · weightᵀ (+ bias) [..., out]; weight [out, in], bias [out] if there is one.

    fp8: the weight is e4m3, and a row of it stands for weight · scale, scale [out] f32. With `adapters` each row of x
    adds what its slot says; only then does a call need `slot`.
    """

    def __init__(
        self, n_in: int, n_out: int, device: torch.device, dtype: torch.dtype, bias: bool = False, fp8: bool = False
    ) -> None:
        super().__init__()
        self.weight = parameter(n_out, n_in, device=device, dtype=torch.float8_e4m3fn if fp8 else dtype)
        self.scale = parameter(n_out, device=device, dtype=torch.float32) if fp8 else None
        self.bias = parameter(n_out, device=device, dtype=dtype) if bias else None
        self.adapters: LowRank | None = None

    def forward(self, x: Tensor, slot: Tensor | None = None) -> Tensor:
        y = linear(x, self.weight, self.scale, self.bias)
        return y if self.adapters is None else y + self.adapters(x, slot)

    def bounds(self, gain: Tensor) -> Tensor:
        """[out] f32: what no |y| passes where x is x' / rms(x') · gain [in], whatever x'."""
        weight = self.weight.float() if self.scale is None else self.weight.float() * self.scale[:, None]
        y = gain.numel() ** 0.5 * torch.linalg.vector_norm(weight * gain.float(), dim=-1)
        y = y if self.bias is None else y + self.bias.float().abs()
        return y if self.adapters is None else y + self.adapters.bounds(gain)

    def project(
        self,
        a: Tensor,
        squares: Tensor,
        eps: float,
        swiglu: bool = False,
        slot: Tensor | None = None,
    ) -> Tensor:
        """The op of that name, for few rows; adapters see what the matrix sees, and come before SwiGLU."""
        alone = self.adapters is None
        y = OPS["project"](a, squares, self.weight, eps, swiglu and alone, self.scale, self.bias)
        if self.adapters is None:
            return y
        y = y + self.adapters((a * torch.rsqrt(squares.sum(1, keepdim=True) / a.shape[1] + eps)).to(a.dtype), slot)
        return F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if swiglu else y

    def accumulate(
        self, y: Tensor, h: Tensor, gain: Tensor, slot: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op of that name, for few rows."""
        if self.adapters is not None:
            h = h + self.adapters(y, slot)
        return OPS["accumulate"](y, self.weight, h, gain, self.scale, self.bias)


class RMSNorm(nn.Module):
    """`normalised` by a weight of its own."""

    def __init__(self, n: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(n, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x); gate and up are one matrix [2F, E]."""

    def __init__(self, n: int, ffn: int, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(n, 2 * ffn, device, dtype, fp8=fp8)
        self.down = Linear(ffn, n, device, dtype, fp8=fp8)

    def forward(self, x: Tensor, slot: Tensor | None = None) -> Tensor:
        gate, up = self.gate_up(x, slot).chunk(2, -1)
        return self.down(F.silu(gate) * up, slot)

    def narrow(
        self,
        a: Tensor,
        squares: Tensor,
        h: Tensor,
        gain: Tensor,
        eps: float,
        seen: Tensor,
        slot: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Few rows: h + MLP(norm h), its product with the next gain, and its squares; a = h · gain of this norm.

        seen [T]  keys that each row sees; one that sees none is idle
        """
        return self.down.accumulate(self.gate_up.project(a, squares, eps, True, slot), h, gain, slot)


class MoE(nn.Module):
    """Experts of which a token takes a few, and shared ones that it always takes.

    gate_up [X, 2F, E] and down [X, E, F] are stacked, with a shared expert that is as wide as the others behind them;
    router [X, E] and bias [X] are fp32 whatever the dtype.
    """

    def __init__(self, n: int, mixture: Mixture, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> None:
        super().__init__()
        m = self.mixture = mixture
        self.router = parameter(m.experts, n, device=device, dtype=torch.float32)
        self.bias = parameter(m.experts, device=device, dtype=torch.float32) if m.bias else None
        X, stored = m.experts + m.joined, torch.float8_e4m3fn if fp8 else dtype
        self.gate_up = parameter(X, 2 * m.ffn, n, device=device, dtype=stored)
        self.down = parameter(X, n, m.ffn, device=device, dtype=stored)
        self.gate_up_scale = parameter(X, 2 * m.ffn, device=device, dtype=torch.float32) if fp8 else None
        self.down_scale = parameter(X, n, device=device, dtype=torch.float32) if fp8 else None
        self.shared = MLP(n, m.shared, device, dtype, fp8) if m.shared and not m.joined else None

    def forward(self, x: Tensor, slot: Tensor | None = None) -> Tensor:
        y = self._chosen(x.flatten(0, -2), None, 0.0, None).view_as(x)
        return y if self.shared is None else y + self.shared(x, slot)

    def narrow(
        self,
        a: Tensor,
        squares: Tensor,
        h: Tensor,
        gain: Tensor,
        eps: float,
        seen: Tensor,
        slot: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As MLP.narrow; an idle row chooses no expert."""
        h = h + self._chosen(a, squares, eps, seen)
        if self.shared is not None:
            return self.shared.narrow(a, squares, h, gain, eps, seen, slot)
        return h, h * gain, squared(h)

    def _chosen(self, x: Tensor, squares: Tensor | None, eps: float, seen: Tensor | None) -> Tensor:
        """[T, E] → [T, E]: what the experts of each token give."""
        m = self.mixture
        ids, weights = OPS["route"](
            x, self.router, squares, self.bias, None, eps, m.active, m.groups, m.top_groups, m.sigmoid, m.renormalise,
            m.factor, int(m.joined), seen,
        )  # fmt: skip
        scales = self.gate_up_scale, self.down_scale
        return OPS["experts"](x, ids, weights, self.gate_up, self.down, squares, eps, False, *scales)[0]
