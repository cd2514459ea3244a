"""What a rule is and what it may know: c [B, N, L] candidates, w the window, for the N places that may decode."""

from __future__ import annotations

from collections.abc import Callable
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
    turn: Tensor | None = None  # [B]        int32  forwards spent on the block; of whole sequences only, as what follows
    span: Tensor | None = None  # [B]        int32  positions of the block, given ones among them
    draw: Tensor | None = None  # [B, N, L]  f32    uniform random numbers below 1


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
