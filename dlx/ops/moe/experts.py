"""What the chosen experts give, for few tokens: an expert's weights are read once for all tokens that chose it.

    [g; u] = gate_up[e] · x[t] (/ rms(t)),   y[t] = Σₖ weights[t, k] · down[e] · (act(g) · u),   e = ids[t, k]

x        [T, E]         bf16 or fp32
ids      [T, K]         int32         experts of a token; one outside 0 to X - 1 gives nothing and is not read
weights  [T, K]         f32
gate_up  [X, 2F, E]     as x or fp8   rows of the gate, then as many of up
down     [X, E, F]      as x or fp8
squares  [T, parts]     f32 or None   Σ squares = Σ h², for an x that is not yet divided by its rms, as in `project`
gelu                                  act is tanh-GELU instead of SiLU
gate_up_scale  [X, 2F]  f32 or None   a factor of each row of an expert's weight: value = stored · scale
down_scale     [X, E]   f32 or None
→        y [T, E] as x, distinct [1] int32: how many experts were read
Work     6·T·K·E·F flops; reads 3·E·F elements of each distinct expert: bandwidth-bound for T·K / X up to about 64
Source   token lists on the device, weights on the side of the matmul that is tiled in 64 (swap-AB)

Four kernels whose grids need no count from the host: `listed` names the experts in use and the rows of each; two
matmuls have a program an item of that list and tile of the weight, and programs beyond its end leave at once;
`_experts_combine` adds a token's K parts up in fp32, in its own order. No sum depends on which other tokens there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.ops.linear import parts, squared
from dlx.ops.moe.tiles import run
from dlx.ops.op import FLOATS, FP8, WIDE, Cost, Op, need, need_fp8, need_tensor


def reference(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None = None,
    eps: float = 1e-6, gelu: bool = False, gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    norm = rows.new_ones(x.shape[0], 1)
    if squares is not None:
        norm = torch.rsqrt(squares.to(wide).sum(1, keepdim=True) / x.shape[1] + eps)

    def weight(of: Tensor, scale: Tensor | None, e: int) -> Tensor:
        return of[e].to(wide) if scale is None else of[e].to(wide) * scale[e].to(wide)[:, None]

    given = rows.new_zeros(*ids.shape, x.shape[1])
    used = ids[(ids >= 0) & (ids < gate_up.shape[0])].unique()
    for e in used.tolist():
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (rows[t] @ weight(gate_up, gate_up_scale, e).T * norm[t]).chunk(2, 1)
        h = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
        given[t, k] = h.to(x.dtype).to(wide) @ weight(down, down_scale, e).T
    y = (given * weights.to(wide)[..., None]).sum(1)
    return y.to(x.dtype), torch.full((1,), len(used), dtype=torch.int32, device=x.device)


def kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None = None,
    eps: float = 1e-6, gelu: bool = False, gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run(x, ids, weights, gate_up, down, squares, eps, gelu, gate_up_scale, down_scale)


def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1, dtype=torch.int32)


def check(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None = None,
    eps: float = 1e-6, gelu: bool = False, gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> None:  # fmt: skip
    need_tensor("experts' x", x, (None, None), FLOATS)
    T, E = x.shape
    need_tensor("experts' ids", ids, (T, None), (torch.int32,))
    need_tensor("experts' weights", weights, tuple(ids.shape), WIDE)
    need_tensor("experts' gate_up", gate_up, (None, None, E), (x.dtype, *FP8))
    X, wide, _ = gate_up.shape
    need(wide % 2 == 0, "experts' gate and up rows", wide, "an even number")
    need_tensor("experts' down", down, (X, E, wide // 2), (x.dtype, *FP8))
    if squares is not None:
        need_tensor("experts' squares", squares, (T, parts(E)), WIDE)
    for name, weight, scale in (("gate_up", gate_up, gate_up_scale), ("down", down, down_scale)):
        need_fp8(f"experts' {name}", weight)
        if scale is not None:
            need_tensor(f"experts' {name}_scale", scale, (X, weight.shape[1]), WIDE)


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "few tokens": _case(4, 64, 64, 8, 2),
        "odd widths, gelu": _case(3, 48, 40, 5, 3, gelu=True),
        "not yet normalised, slots without an expert": _case(5, 64, 32, 6, 2, normalised=False, vacant=True),
        "more rows than an item": _case(70, 32, 16, 3, 2),
        "one expert for all": _case(18, 32, 16, 1, 1),
        "fp8": _case(6, 64, 64, 7, 3, fp8=True),
    }


def _case(
    T: int, E: int, F: int, X: int, K: int, gelu: bool = False, normalised: bool = True, vacant: bool = False,
    fp8: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(T, E, generator=rng)
    ids = torch.rand(T, X, generator=rng).argsort(1)[:, :K].int().contiguous()
    if vacant:
        ids[0, 0], ids[1, 1], ids[2] = -1, X, -1
    weights = torch.rand(T, K, generator=rng)
    gate_up = torch.randn(X, 2 * F, E, generator=rng) * E**-0.5
    down = torch.randn(X, E, F, generator=rng) * F**-0.5
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if fp8:
        scales = (gate_up.abs().amax(2) / 448, down.abs().amax(2) / 448)
        gate_up, down = ((w / s[..., None]).to(FP8[0]) for w, s in zip((gate_up, down), scales) if s is not None)
    return x, ids, weights, gate_up, down, None if normalised else squared(x), 1e-6, gelu, *scales


def cost(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, squares: Tensor | None = None,
    eps: float = 1e-6, gelu: bool = False, gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> Cost:  # fmt: skip
    """Of these very ids: the weights of the distinct experts among them."""
    X, wide, E = gate_up.shape
    used = int(ids[(ids >= 0) & (ids < X)].unique().numel())
    read = used * (gate_up.nbytes + down.nbytes) // X
    return Cost(3 * ids.numel() * wide * E, read + 2 * x.nbytes + 8 * ids.numel())


experts = Op(
    "experts", reference, kernel, fake, check, cases, cost,
    wide=("weights", "squares", "gate_up_scale", "down_scale"), rtol=2e-2, atol=2e-2,
)  # fmt: skip
