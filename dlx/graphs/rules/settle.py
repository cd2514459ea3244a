"""Settle: which blocks are decided?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlx.graphs.rules.seen import Candidates, Seen


@dataclass(frozen=True)
class Filled:
    """A block is decided once no mask is left in it."""

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor:
        return (tok != w.mask).all(-1)


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
