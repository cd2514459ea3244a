"""Settle: which blocks are decided?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Asks, Candidates, Memory, Seen

EDITS = "edits"  # [B, N] int32  forwards of a block without masks
SAME = "same"  # [B, N] f32    share of a block's decided tokens that the last forward proposed again


@dataclass(frozen=True)
class Filled:
    """A block is decided once no mask is left in it."""

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor:
        return (tok != w.mask).all(-1)


@dataclass(frozen=True)
class Calm:
    """A block is decided once it has no mask and a forward left it as it was, or `limit` forwards without masks passed.

    sure  also once it has no mask and every candidate of it is at least so sure; None: never
    Tells `stability` which share of the decided tokens was proposed again; 1 where there is none.
    Source LLaDA2.1 (post-edit cap), DMax (stability, sure = 0.9)
    """

    limit: int = 16
    sure: float | None = None
    asks = Asks(numbers=("stability",))

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {EDITS: ((), torch.int32), SAME: ((), torch.float32)}

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        old = w.live & ~w.todo
        n = old.sum(-1)
        same = torch.where(n > 0, (old & (c.tok == w.tok)).sum(-1).float() / n.clamp_min(1), 1.0)
        return {EDITS: self._edits(w), SAME: same}

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor:
        over = (tok == w.tok).all(-1) | (self._edits(w) >= self.limit)
        if self.sure is not None:
            over = over | ((c.conf >= self.sure) | ~w.live).all(-1)
        return over & (tok != w.mask).all(-1)

    def _edits(self, w: Seen) -> Tensor:
        return w.mem[EDITS] + (w.tok != w.mask).all(-1).int()


@dataclass(frozen=True)
class Stable:
    """A canvas is decided once its likeliest tokens stayed for `forwards` and its mean entropy is below `below`.

    Source transformers' StableAndConfidentStoppingCriteria
    """

    forwards: int = 1
    below: float = 0.005

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor:
        assert c.entropy is not None and w.calm is not None, "Policy refuses this rule without a canvas"
        return (w.calm >= self.forwards) & (c.entropy.mean(-1) < self.below)
