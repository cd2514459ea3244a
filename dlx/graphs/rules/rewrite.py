"""Rewrite: what do the tokens become?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Candidates, Seen


@dataclass(frozen=True)
class Keep:
    """Accepted candidates are written; decided tokens stay."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.tok)


@dataclass(frozen=True)
class Renoise:
    """Of a canvas: what is not accepted now is masked again, whatever it was, and seen as a new random token."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.mask)
