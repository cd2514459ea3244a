"""The cases of kv_store: small, with every option."""

from __future__ import annotations

from typing import Any

import torch


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "dense": _case(2, 4, 4, 2, 32, S=4, W=3),
        "holes": _case(2, 6, 3, 3, 64, S=16, W=2, idle=3),
        "nothing stored, 9 heads": _case(1, 4, 7, 1, 16, S=4, W=2, idle=1),
        "no norm": _case(2, 4, 2, 2, 32, S=8, W=1, norm=False),
        "half of the channels turn": _case(1, 8, 4, 1, 32, S=4, W=3, R=16),
        "6 of 40 channels turn, v normalised": _case(2, 4, 2, 1, 40, S=4, W=3, R=6, v_norm=True),
        "no norm but of v": _case(1, 4, 2, 1, 16, S=4, W=1, norm=False, v_norm=True),
        "e4m3 pages": _case(2, 4, 4, 2, 32, S=4, W=3, dtype=torch.float8_e4m3fn),
        "e5m2 pages, half of the channels turn": _case(1, 8, 2, 2, 32, S=16, W=1, R=16, dtype=torch.float8_e5m2),
    }


def _case(
    B: int, C: int, H: int, G: int, D: int, S: int, W: int, idle: int = 100, norm: bool = True, R: int | None = None,
    v_norm: bool = False, dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Rows at different starts; every `idle`-th position takes no part; R channels turn; fp8 pages have scales."""
    rng = torch.Generator().manual_seed(0)
    pages = torch.randperm(B * W, generator=rng).view(B, W).int()
    pos = (torch.arange(B)[:, None] * 4 + torch.arange(C)).int()
    seen = torch.where(torch.arange(C) % idle == idle - 1, 0, pos + 1).int()
    R = R or D
    frequencies = 10000.0 ** -(torch.arange(0, R, 2) / R)
    gains = 1 + 0.1 * torch.randn(2, D, generator=rng)
    qkv = torch.randn(B, C, H + 2 * G, D, generator=rng)
    kv = torch.randn(2, B * W, S, G, D, generator=rng)
    scales = None
    if dtype:
        most = torch.finfo(dtype).max
        scales = (0.5 + torch.rand(2, B * W, G, generator=rng)) * 3 / most  # a few values are out of range
        kv = kv.to(dtype)
    q_gain, k_gain = gains if norm else (None, None)
    return qkv, q_gain, k_gain, pos, frequencies, kv, pages, seen, 1e-6, scales, v_norm
