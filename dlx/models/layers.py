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


def live_of(seen: Tensor) -> Tensor | None:
    """seen [T] for matmuls that leave idle rows out, where that pays: from the second half of 64 rows on."""
    return seen if len(seen) > 32 else None


class Linear(nn.Module):
    """x [..., in] → x · weightᵀ (+ bias) [..., out]; weight [out, in], bias [out] if there is one.

    fp8: the weight is e4m3, and a row of it stands for weight · scale, scale [out] f32.
    """

    def __init__(
        self, n_in: int, n_out: int, device: torch.device, dtype: torch.dtype, bias: bool = False, fp8: bool = False
    ) -> None:
        super().__init__()
        self.weight = parameter(n_out, n_in, device=device, dtype=torch.float8_e4m3fn if fp8 else dtype)
        self.scale = parameter(n_out, device=device, dtype=torch.float32) if fp8 else None
        self.bias = parameter(n_out, device=device, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = (weight.float() * self.scale[:, None]).to(x.dtype)
        return F.linear(x, weight, self.bias)

    def project(
        self, a: Tensor, squares: Tensor, eps: float, swiglu: bool = False, live: Tensor | None = None
    ) -> Tensor:
        """The op of that name, for few rows."""
        return OPS["project"](a, squares, self.weight, eps, swiglu, self.scale, self.bias, live)

    def accumulate(
        self, y: Tensor, h: Tensor, gain: Tensor, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op of that name, for few rows."""
        return OPS["accumulate"](y, self.weight, h, gain, self.scale, self.bias, live)


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

    def __init__(self, n: int, ffn: int, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(n, 2 * ffn, device, dtype, fp8=fp8)
        self.down = Linear(ffn, n, device, dtype, fp8=fp8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def narrow(
        self, a: Tensor, squares: Tensor, h: Tensor, gain: Tensor, eps: float, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Few rows: h + MLP(norm h), its product with the next gain, and its squares; a = h · gain of this norm.

        seen [T]  keys that each row sees; one that sees none is idle
        """
        live = live_of(seen)
        return self.down.accumulate(self.gate_up.project(a, squares, eps, True, live), h, gain, live)


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

    def forward(self, x: Tensor) -> Tensor:
        y = self._chosen(x.flatten(0, -2), None, 0.0, None).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def narrow(
        self, a: Tensor, squares: Tensor, h: Tensor, gain: Tensor, eps: float, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As MLP.narrow; an idle row chooses no expert."""
        h = h + self._chosen(a, squares, eps, seen)
        if self.shared is not None:
            return self.shared.narrow(a, squares, h, gain, eps, seen)
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
