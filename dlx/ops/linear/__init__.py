"""Matmuls of few rows at the speed of reading their weights, fused with what stands around them.

`project` reads a normalised stream, `accumulate` adds to it and prepares the next norm; so a norm costs no kernel.
For h [T, K], gain g and a = h · g:

    project     y = (a · Wᵀ) / rms(h) + b = RMSNorm(h) · Wᵀ + b;   with `swiglu` silu(y₁) · y₂ of its halves
    accumulate  h' = h + y · Wᵀ + b,   a' = h' · g,   q'[p] = Σ h'² over columns 64p to 64p + 63

a, h, y  [T, K]  bf16 or fp32       weight [N, K]  their dtype, or fp8 (e4m3) with a scale a channel: W = weight · scale
gain [N]       squares [T, parts] f32, Σ squares = Σ h²       scale [N] f32 or None       bias b [N] or None
Work     2·T·N·K flops; reads weight once: bandwidth-bound for T ≤ 256
Source   split-K with an ordered last-block reduction (stream-K's fix-up); programmatic dependent launch

T is 256 at most; wider ones belong to cuBLAS. Weight, gain, scale and bias are parameters: they are read before the
kernel before has ended, so no kernel in flight may write them.

`stream.py` is the kernel for sm_90 (`e4m3.py`: its fp8 weights), `tiles.py` the one for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlx.ops.linear import reference
from dlx.ops.linear.choose import run
from dlx.ops.linear.reference import parts, squared
from dlx.ops.op import FLOATS, WIDE, Cost, Op, need, need_fp8, need_tensor

__all__ = ["MOST_ROWS", "accumulate", "parts", "project", "squared"]

MOST_ROWS = 256
FP8 = torch.float8_e4m3fn


def project_kernel(
    a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool, scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return run(int(swiglu), a, weight, squares, None, None, eps, scale, bias)[0]


def accumulate_kernel(
    y: Tensor, weight: Tensor, h: Tensor, gain: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return run(2, y, weight, None, h, gain, 0.0, scale, bias)


def project_fake(
    a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool, scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[0], weight.shape[0] // 2 if swiglu else weight.shape[0])


def accumulate_fake(
    y: Tensor, weight: Tensor, h: Tensor, gain: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[0], parts(h.shape[1]), dtype=wide)


def project_check(
    a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool, scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    _check("project", a, weight, scale, bias)
    need_tensor("project's squares", squares, (a.shape[0], parts(a.shape[1])), WIDE)
    need(not swiglu or weight.shape[0] % 2 == 0, "project's gate and up rows", weight.shape[0], "an even number")


def accumulate_check(
    y: Tensor, weight: Tensor, h: Tensor, gain: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> None:
    _check("accumulate", y, weight, scale, bias)
    need_tensor("accumulate's h", h, (y.shape[0], weight.shape[0]), (y.dtype,))
    need_tensor("accumulate's gain", gain, (weight.shape[0],), FLOATS)


def _check(op: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    need_tensor(f"{op}'s input", x, (None, None), FLOATS)
    need(x.shape[0] <= MOST_ROWS, f"{op}'s number of rows", x.shape[0], f"{MOST_ROWS} at most; F.linear takes more")
    need_tensor(f"{op}'s weight", weight, (None, x.shape[1]), (x.dtype, FP8))
    need_fp8(f"{op}'s weight", weight)
    if scale is not None:
        need_tensor(f"{op}'s scale", scale, (weight.shape[0],), WIDE)
    need(weight.dtype != FP8 or scale is not None, f"{op}'s scale of an fp8 weight", scale, "a factor a channel")
    if bias is not None:
        need_tensor(f"{op}'s bias", bias, (weight.shape[0],), FLOATS)


def project_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "plain": _project_case(4, 128, 192, swiglu=False),
        "swiglu": _project_case(5, 256, 256, swiglu=True),
        "odd width, swiglu": _project_case(3, 96, 2 * 80, swiglu=True),
        "more rows than a tile": _project_case(70, 64, 128, swiglu=False),
        "bias": _project_case(4, 64, 96, swiglu=False, bias=True),
        "fp8, swiglu, bias": _project_case(9, 128, 128, swiglu=True, bias=True, fp8=True),
    }


def _project_case(T: int, K: int, N: int, swiglu: bool, bias: bool = False, fp8: bool = False) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(2)
    h = torch.randn(T, K, generator=rng)
    gain = 1 + 0.1 * torch.randn(K, generator=rng)
    weight, scale = _weight(N, K, fp8, rng)
    add = 0.3 * torch.randn(N, generator=rng) if bias else None
    return h * gain, squared(h), weight, 1e-6, swiglu, scale, add


def accumulate_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "few rows": _accumulate_case(4, 256, 128),
        "odd widths": _accumulate_case(7, 80, 96),
        "more rows than a tile": _accumulate_case(70, 128, 64),
        "fp8, bias": _accumulate_case(6, 128, 192, bias=True, fp8=True),
    }


def _accumulate_case(T: int, K: int, E: int, bias: bool = False, fp8: bool = False) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(3)
    weight, scale = _weight(E, K, fp8, rng)
    y, h = torch.randn(T, K, generator=rng), torch.randn(T, E, generator=rng)
    add = 0.3 * torch.randn(E, generator=rng) if bias else None
    return y, weight, h, 1 + 0.1 * torch.randn(E, generator=rng), scale, add


def _weight(N: int, K: int, fp8: bool, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(N, K, generator=rng) * K**-0.5
    if not fp8:
        return weight, None
    scale = weight.abs().amax(1) / 448
    return (weight / scale[:, None]).to(FP8), scale


def project_cost(
    a: Tensor, squares: Tensor, weight: Tensor, eps: float, swiglu: bool, scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Cost:  # fmt: skip
    out = a.shape[0] * weight.shape[0] // (2 if swiglu else 1)
    return Cost(2 * a.shape[0] * weight.numel(), weight.nbytes + (a.numel() + out) * a.element_size())


def accumulate_cost(
    y: Tensor, weight: Tensor, h: Tensor, gain: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Cost:
    return Cost(2 * y.shape[0] * weight.numel(), weight.nbytes + (y.numel() + 3 * h.numel()) * y.element_size())


project = Op(
    "project", reference.project, project_kernel, project_fake, project_check, project_cases, project_cost,
    wide=("squares",), rtol=2e-2, atol=2e-2,
)  # fmt: skip
accumulate = Op(
    "accumulate", reference.accumulate, accumulate_kernel, accumulate_fake, accumulate_check, accumulate_cases,
    accumulate_cost, rtol=2e-2, atol=2e-2,
)  # fmt: skip
