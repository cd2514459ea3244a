"""Rules: frozen values with one pure tensor function. What is static is a field; what is a number is a column.

A rule sees the N places that may decode in this forward: c [B, N, L] candidates, w what it may know of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

NEVER = float("-inf")


class Candidates(NamedTuple):
    """What the sampler proposes for each position looked at."""

    tok: Tensor  # [B, N, L]  int32
    conf: Tensor  # [B, N, L]  f32    probability of `tok` after temperature
    entropy: Tensor | None = None  # [B, N, L]  f32    of the distribution; of a canvas only


class Seen(NamedTuple):
    """What a rule may know of the window."""

    tok: Tensor  # [B, N, L]  int32  tokens before this forward
    todo: Tensor  # [B, N, L]  bool   undecided positions of open blocks
    live: Tensor  # [B, N, L]  bool   positions of open blocks that are not given and not final
    before: Tensor  # [B, N]     f32    how complete the block before each block is
    accept: Tensor  # [B]        f32
    force_at: Tensor  # [B]        f32
    mask: int
    calm: Tensor | None = None  # [B, N]     int32  forwards in which the likeliest tokens stayed; of a canvas only


@runtime_checkable
class Select(Protocol):
    """Which candidates are accepted now? → [B, N, L] bool, within `w.todo`."""

    def __call__(self, c: Candidates, w: Seen) -> Tensor: ...


@runtime_checkable
class Rewrite(Protocol):
    """What do the tokens become? → [B, N, L] int32."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor: ...


@runtime_checkable
class Settle(Protocol):
    """Which blocks are decided? → [B, N] bool, given the rewritten tokens."""

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor: ...


@runtime_checkable
class Embed(Protocol):
    """What does the network see? → [B, C, E] for tokens [B, C]."""

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor) -> Tensor: ...


def rank(conf: Tensor) -> Tensor:
    """[..., L] → int [..., L]: how many positions are surer; ties go to the lower position."""
    at = torch.arange(conf.shape[-1], device=conf.device)
    mine, other = conf[..., :, None], conf[..., None, :]
    return ((other > mine) | (other == mine) & (at < at[:, None])).sum(-1)


@dataclass(frozen=True)
class Threshold:
    """Accept what is surer than `accept`; if the block before is `force_at` complete and nothing is, accept the best.

    Source Fast-dLLM (threshold), Diffulex (forced progress of the running set); strict `>`
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        take = conf > w.accept[:, None, None]
        stuck = (w.before >= w.force_at[:, None]) & ~take.any(-1)
        return w.todo & (take | (rank(conf) == 0) & stuck[..., None])


@dataclass(frozen=True)
class Fixed:
    """Accept the `k` surest positions of the first undecided block: the forced schedule of benchmarks."""

    k: int = 1

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        conf = torch.where(w.todo, c.conf, NEVER)
        some = w.todo.any(-1)
        first = some & (some.int().cumsum(-1) == 1)
        return w.todo & (rank(conf) < self.k) & first[..., None]


@dataclass(frozen=True)
class Keep:
    """Accepted candidates are written; decided tokens stay."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.tok)


@dataclass(frozen=True)
class Filled:
    """A block is decided once no mask is left in it."""

    def __call__(self, c: Candidates, w: Seen, tok: Tensor) -> Tensor:
        return (tok != w.mask).all(-1)


@dataclass(frozen=True)
class EntropyBound:
    """Of a canvas: accept the positions of least entropy whose predecessors' entropies sum up to `accept` at most.

    Source transformers' EntropyBoundSampler (arXiv 2505.24857); the position of least entropy is always accepted
    """

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        assert c.entropy is not None, "Policy refuses this rule without a canvas"
        at = torch.arange(c.entropy.shape[-1], device=c.entropy.device)
        mine, other = c.entropy[..., :, None], c.entropy[..., None, :]
        ahead = (other < mine) | (other == mine) & (at < at[:, None])
        return w.live & (torch.where(ahead, other, 0.0).sum(-1) <= w.accept[:, None, None])


@dataclass(frozen=True)
class Renoise:
    """Of a canvas: what is not accepted now is masked again, whatever it was, and seen as a new random token."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.mask)


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


@dataclass(frozen=True)
class Hard:
    """The network sees the tokens themselves."""

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor) -> Tensor:
        return embed(tok)


@dataclass(frozen=True)
class Canvas:
    """How a canvas is denoised: `steps` forwards at most, at temperatures that fall from `hot` towards `cold`.

    Forward n of a canvas, counted from 0, has cold + (hot − cold) · (steps − n) / steps. Source transformers'
    LinearTemperatureScheduleLogitsProcessor
    """

    steps: int = 48
    hot: float = 0.8
    cold: float = 0.4

    def heat(self, turn: Tensor) -> Tensor:
        """[B] int32 forwards spent on the canvas → [B] f32 temperature of the next."""
        return self.cold + (self.hot - self.cold) * ((self.steps - turn).float() / self.steps)
