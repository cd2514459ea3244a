"""Weights in fp8: e4m3, with an fp32 factor a row."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[…, out, in] → e4m3 of the same shape, and scales […, out] f32: weight ≈ e4m3 · scale.

    scale = max |row| / 448, or 1 for a row of zeros
    """
    wide = weight.float()
    scale = wide.abs().amax(-1) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale[..., None]).to(FP8), scale


def scale_of(param: str) -> str:
    """The name of a weight's scales: X.scale of X.weight, X_scale of X."""
    stem = param.removesuffix(".weight")
    return f"{param}_scale" if stem == param else f"{stem}.scale"
