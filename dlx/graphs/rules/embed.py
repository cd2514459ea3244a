"""Embed: what does the network see?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Asks, Candidates, Memory, Seen, paired

SOFT = "soft"  # [B, N, L, 2, k] f32: the ids that a position is mixed of, paired with their shares; 0: not mixed


@dataclass(frozen=True)
class Hard:
    """The network sees the tokens themselves."""

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor, mem: Memory) -> Tensor:
        return embed(tok)


@dataclass(frozen=True)
class Merge:
    """A decided token of probability p that is not final yet is seen as p of itself and 1 − p of a mask.

        e = p · E(token) + (1 − p) · E(mask)          renormalise: · (p · ‖E(token)‖ + (1 − p) · ‖E(mask)‖) / ‖e‖

    Only if the forward before proposed the token. Source DMax (dmax_topk); a final token is seen as itself, always
    """

    renormalise: bool = True

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {SOFT: ((L, 2, 2), torch.float32)}

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        mixed = w.live & (tok == c.tok) & ~whole[..., None]
        share = torch.where(mixed[..., None], torch.stack((c.conf, 1 - c.conf), -1), 0.0)
        return {SOFT: paired(torch.stack((tok, torch.full_like(tok, w.mask)), -1), share)}

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor, mem: Memory) -> Tensor:
        (ids, share), hard = mem[SOFT].unbind(-2), embed(tok)
        each = embed(ids.int().flatten(1)).float().unflatten(1, (-1, 2))
        soft = (share[..., None] * each).sum(-2)
        if self.renormalise:
            norm = (share * each.norm(dim=-1)).sum(-1) / soft.norm(dim=-1).clamp_min(1e-12)
            soft = soft * norm[..., None]
        return torch.where((share.sum(-1) > 0)[..., None], soft.to(hard.dtype), hard)


@dataclass(frozen=True)
class Smooth:
    """A position is seen as its token and, weighed, what the forward before thought of it.

        e = E(token) + weight · Σ p · E(id)           over its k likeliest ids

    of       tokens: decided ones that are not final yet; masks: what is undecided yet
    weight   min(first + growth · forwards of the row before that one, weight)
    Source Diffulex (iter_smooth_topk), dInfer (IterSmooth, `of` masks), which takes all ids
    """

    k: int = 4
    weight: float = 1.0
    first: float = 1.0
    growth: float = 0.0
    of: str = "tokens"

    @property
    def asks(self) -> Asks:
        return Asks(k=self.k)

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {SOFT: ((L, 2, self.k), torch.float32)}

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        assert c.top is not None and c.likely is not None and w.age is not None, "the step gives what asks says"
        mixed = w.live & ((tok == w.mask) == (self.of == "masks")) & ~whole[..., None]
        weight = (self.first + self.growth * w.age.float()).clamp_max(self.weight)[:, None, None, None]
        share = torch.where(mixed[..., None] & (c.top >= 0), weight * c.likely, 0.0)
        return {SOFT: paired(c.top.clamp_min(0), share)}

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor, mem: Memory) -> Tensor:
        (ids, share), hard = mem[SOFT].unbind(-2), embed(tok)
        each = embed(ids.int().flatten(1)).float().unflatten(1, (-1, self.k))
        return hard + (share[..., None] * each).sum(-2).to(hard.dtype)
