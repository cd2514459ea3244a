"""Arguments to test the candidates ops with, small enough for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlx.ops.candidates.reference import listed, partial_reference

MASK = 3


def candidates_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "greedy": _case(4, 32, 320, 320, temp=0.0),
        "padded vocabulary": _case(5, 48, 192, 150, temp=0.0),
        "drawn": _case(6, 32, 256, 256, temp=0.7),
        "mixed rows, ties": _case(20, 16, 128, 128, temp=0.0, mixed=True, ties=True),
        "list with ties, entropy, margin": (*_case(5, 16, 128, 128, temp=0.0, mixed=True, ties=True), 7, True, True),
        "softcap, pairs, forbidden": (
            *_case(5, 32, 320, 300, temp=0.0, mixed=True), 0, False, False, 5.0, *_pairs(5, 300), None, None,
            torch.tensor([7, 299, 64], dtype=torch.int32),
        ),
        "filtered": (
            *_case(5, 32, 64, 60, temp=0.8), 4, True, True, 0.0, None, None,
            torch.tensor([0, 0, 3, 90, 2], dtype=torch.int32), torch.tensor([1.0, 0.7, 1.0, 1.0, 0.0]),
        ),
    }  # fmt: skip


def partial_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "the first part": _part(5, 96, 0, 90, keep=8, entropy=True),
        "a middle part, no list": _part(5, 130, 200, 500, keep=0, entropy=False),
        "the last part, padded": _part(5, 64, 256, 300, keep=64, entropy=True),
        "padding alone": _part(5, 64, 300, 300, keep=4, entropy=True),
    }


def combine_cases() -> dict[str, tuple[Any, ...]]:
    return {
        "one part": _parts([320], k=0, entropy=False, margin=False),
        "three parts, filtered": _parts([40, 17, 63], k=4, entropy=True, margin=True, filtered=True),
    }


def _case(T: int, E: int, V: int, vocab: int, temp: float, mixed: bool = False, ties: bool = False) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(1)
    head = torch.randn(V, E, generator=rng)
    h = torch.randn(T, E, generator=rng)
    if ties:  # every token has a twin of which the lower id must win; small integers make the products exact
        head, h = (4 * head).round(), (2 * h).round()
        head[V // 2 :] = head[: V // 2]
    temps = torch.full((T,), temp)
    if mixed:
        temps[::3] = 1.3
    seed = torch.randint(-(2**62), 2**62, (T,), generator=rng)
    pos = torch.arange(T, dtype=torch.int32) + 40
    return h, head, temps, seed, pos, torch.arange(T, dtype=torch.int32) // 4, MASK, vocab


def _pairs(T: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Pairs of which some are none, some twice, one the mask, one padding."""
    rng = torch.Generator().manual_seed(4)
    tok = torch.randint(0, vocab, (T, 5), generator=rng, dtype=torch.int32)
    tok[1] = -1
    tok[2, 1] = tok[2, 0]
    tok[2, 2:4] = torch.tensor([MASK, vocab])
    return tok, 8 * torch.randn(T, 5, generator=rng)


def _part(T: int, rows: int, first: int, vocab: int, keep: int, entropy: bool) -> tuple[Any, ...]:
    h, head, *row, mask, _ = _case(T, 32, rows, rows, temp=0.0, mixed=True)
    tok, bias = _pairs(T, vocab)
    return (
        h, head, *row, mask, first, vocab, keep, entropy, 20.0, tok, bias, torch.tensor([first + 1], dtype=torch.int32)
    )  # fmt: skip


def _parts(rows: list[int], k: int, entropy: bool, margin: bool, filtered: bool = False) -> tuple[Any, ...]:
    """What shards of so many rows of one head tell, stacked."""
    h, head, *row, mask, vocab = _case(5, 32, sum(rows), sum(rows), temp=0.0, mixed=True)
    keep = listed(k, margin, filtered)
    told, first = [], 0
    for n in rows:
        told.append(partial_reference(h, head[first : first + n], *row, mask, first, vocab, keep, entropy))
        first += n
    stacked = tuple(torch.stack(x, 1) for x in zip(*told, strict=True))
    filters = (None, None)
    if filtered:
        filters = (torch.tensor([0, 2, 0, 5, 0], dtype=torch.int32), torch.tensor([0.8, 1.0, 1.0, 0.6, 0.4]))
    return *stacked, *row, k, entropy, margin, *filters
