"""The cases of attention: small, with every option, and NaN wherever nobody looks."""

from __future__ import annotations

from typing import Any

import torch


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "one row, group of 3": _case([21], C=4, H=6, G=2, D=32, S=16, W=3),
        "ragged rows": _case([5, 40, 0], C=8, H=4, G=1, D=16, S=4, W=16),
        "group of 7, page of 32": _case([70], C=4, H=7, G=1, D=64, S=32, W=4),
        "prefill": _case([0], C=48, H=2, G=2, D=16, S=16, W=4),
        "sliding window": _case([3, 100], C=8, H=4, G=2, D=16, S=4, W=28, window=20),
        "hole, page of 128": _case([150, 9], C=8, H=2, G=1, D=16, S=128, W=2, hole=(40, 140)),
        "window and hole, page of 20": _case([150], C=8, H=2, G=1, D=16, S=20, W=8, window=100, hole=(90, 120)),
        "e4m3 pages": _case([70, 20], C=4, H=8, G=1, D=32, S=8, W=10, dtype=torch.float8_e4m3fn),
        "e5m2 pages, window and hole": _case(
            [40], C=4, H=2, G=2, D=32, S=16, W=3, window=30, hole=(20, 30), dtype=torch.float8_e5m2
        ),
        "head dim 256": _case([30], C=4, H=2, G=1, D=256, S=16, W=3),
        "head dim 512": _case([20], C=4, H=8, G=1, D=512, S=256, W=1),
    }


def _case(
    context: list[int],
    C: int,
    H: int,
    G: int,
    D: int,
    S: int,
    W: int,
    window: int | None = None,
    hole: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Rows whose blocks of 4 follow `context` keys; the last of several blocks is idle; unseen keys hold NaN.

    window  keys that a query sees at most, itself the last
    hole    of every row
    dtype   of fp8 pages, with scales
    """
    rng = torch.Generator().manual_seed(0)
    B = len(context)
    P = B * W
    kv = torch.randn(2, P, S, G, D, generator=rng)
    pages = torch.randperm(P, generator=rng).view(B, W).int()
    block = torch.arange(C) // 4
    start = torch.tensor(context)[:, None] // 4 * 4
    seen = start + (block + 1) * 4
    idle = (block == block[-1]) & (block > 0) & (torch.tensor(context)[:, None] > 0)
    seen = torch.where(idle, 0, seen).int()
    first = (start + torch.arange(C) + 1 - window).int() if window else None
    holes = torch.tensor([hole] * B).int() if hole else None
    q = torch.randn(B, C, H, D, generator=rng)
    scales = None
    if dtype:
        scales = 0.5 + torch.rand(2, P, G, generator=rng)
        kv = kv / scales[:, :, None, :, None]
    for b in range(B):
        live = seen[b] > 0
        low = 0 if first is None else int(first[b][live].min())
        unseen = torch.ones(W * S, dtype=torch.bool)
        unseen[max(low, 0) : int(seen[b].max())] = False
        if hole:
            unseen[slice(*hole)] = True
        for i, gone in enumerate(unseen.view(W, S)):
            kv[:, pages[b, i].long(), gone] = float("nan")
            if gone.all() and i * S > seen[b].max():
                pages[b, i] = 1 << 30  # entries past a row's keys are not followed
    kv = kv.to(dtype) if dtype else kv
    return q, kv, pages, seen, D**-0.5, first, holes, scales
