"""Scales of fp8 pages: one a layer's head, from a bound of what the head can hold, the same for all of its pages.

    value = stored · scale      scale = the power of two from bound / the largest fp8 number on

The bound comes from the weights alone (`Layer.bounds`), so whichever tokens come, in whichever order, forward by
forward, nothing is clamped and no scale changes: a page is written over several forwards, and what it holds must stay
readable. Numbers of fp8 have an exponent of their own: a scale that is larger than it need be moves them towards
subnormals and costs no precision before. Being a power of two it rounds nothing itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.models.decoder import Decoder
from dlx.models.gemma.network import DiffusionGemma


def scale(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two that bring numbers within bounds into the range of an fp8 dtype; f32 of the same shape."""
    least = torch.finfo(torch.float32).tiny  # a head of zeros
    return torch.exp2((bounds.float().clamp_min(least) / torch.finfo(dtype).max).log2().ceil())


@torch.no_grad()
def scale_(net: Decoder | DiffusionGemma, pages: int, dtype: torch.dtype) -> None:
    """Give every layer the scales of so many pages of fp8; with another dtype, none."""
    for layer in net.layers:
        layer.attn.scales = None
        if dtype.itemsize == 1:
            each = scale(layer.bounds(), dtype)
            layer.attn.scales = each[:, None].repeat(1, pages, 1)
