"""Rewrite: what do the tokens become?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Asks, Candidates, Seen, rank


@dataclass(frozen=True)
class Keep:
    """Accepted candidates are written; decided tokens stay."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.tok)


@dataclass(frozen=True)
class Edit:
    """Accepted candidates are written, and over decided tokens those that are surer than `edit`.

    Source LLaDA2.1 (joint thresholds: mask to token, token to token); DMax with edit = 0; strict `>`
    """

    asks = Asks(numbers=("edit",))

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        assert w.edit is not None, "Policy refuses this rule with a canvas"
        over = w.live & ~w.todo & (c.conf > w.edit[:, None, None])
        return torch.where(take | over, c.tok, w.tok)


@dataclass(frozen=True)
class Remask:
    """Accepted candidates are written; decided positions whose candidate is less sure than `remask` are masked again.

    The least sure first, and fewer of a block than it accepts, so that every forward decides something.
    Source dInfer (hierarchy with remasking), which accepts more where it remasks more
    """

    asks = Asks(numbers=("remask",))

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        assert w.remask is not None, "Policy refuses this rule with a canvas"
        weak = w.live & ~w.todo & (c.conf < w.remask[:, None, None])
        least = rank(torch.where(weak, -c.conf, float("-inf"))) < take.sum(-1, keepdim=True) - 1
        return torch.where(take, c.tok, torch.where(weak & least, w.mask, w.tok))


@dataclass(frozen=True)
class Renoise:
    """Of a canvas: what is not accepted now is masked again, whatever it was, and seen as a new random token."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.mask)
