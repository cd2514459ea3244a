"""What a rule is and what it may know: c [B, N, L] candidates, w the window, for the N places that may decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

NEVER = float("-inf")
Memory = dict[str, Tensor]  # what rules keep of each block, by name


class Candidates(NamedTuple):
    """What the sampler proposes for each position looked at."""

    tok: Tensor  # [B, N, L]  int32
    conf: Tensor  # [B, N, L]  f32    probability of `tok` after temperature
    entropy: Tensor | None = None  # [B, N, L]     f32    of the distribution; where a rule asks for it, or of a canvas
    margin: Tensor | None = None  # [B, N, L]     f32    of the likeliest over the next; where it is asked for
    top: Tensor | None = None  # [B, N, L, k]  int32  the likeliest ids, in order; −1: no more; where asked for
    likely: Tensor | None = None  # [B, N, L, k]  f32    their probabilities
    rank: Tensor | None = None  # [B, N, L]     f32    what ranks positions instead of `conf`; see Policy.confidence

    def order(self) -> Tensor:
        """[B, N, L] f32: larger is surer; what ranks are taken of."""
        return self.conf if self.rank is None else self.rank


class Seen(NamedTuple):
    """What a rule may know of the window. The first numbers are a request's own; see SamplingParams."""

    tok: Tensor  # [B, N, L]  int32  tokens before this forward
    todo: Tensor  # [B, N, L]  bool   undecided positions of open blocks
    live: Tensor  # [B, N, L]  bool   positions of open blocks that are not given and not final
    before: Tensor  # [B, N]     f32    how complete the block before each block is
    accept: Tensor  # [B]        f32
    force_at: Tensor  # [B]        f32
    mask: int
    calm: Tensor | None = None  # [B, N]     int32  forwards in which the likeliest tokens stayed; of a canvas only
    edit: Tensor | None = None  # [B]        f32    None of a canvas, as what follows
    remask: Tensor | None = None  # [B]        f32
    temp: Tensor | None = None  # [B]        f32
    age: Tensor | None = None  # [B]        int32  forwards of the row before this one
    mem: Memory = {}  # noqa: RUF012  # [B, N, …] each  what rules keep, zeros before a block's first forward
    turn: Tensor | None = None  # [B]        int32  forwards spent on the block; with a turn, as what follows
    span: Tensor | None = None  # [B]        int32  positions of the block, or of the answer without its fixed end
    draw: Tensor | None = None  # [B, N, L]  f32    uniform random numbers below 1

    def ready(self) -> Tensor:
        """[B, N, 1] bool: blocks that must accept something, for the block before is far enough."""
        return (self.before >= self.force_at[:, None])[..., None]


class Asks(NamedTuple):
    """What a rule asks for besides tokens and confidences."""

    k: int = 0  # Candidates.top and likely
    entropy: bool = False
    margin: bool = False
    numbers: tuple[str, ...] = ()  # that it reads, of edit, remask and stability

    def also(self, other: Asks) -> Asks:
        """What both ask for."""
        numbers = tuple(dict.fromkeys(self.numbers + other.numbers))
        return Asks(max(self.k, other.k), self.entropy or other.entropy, self.margin or other.margin, numbers)


@runtime_checkable
class Asking(Protocol):
    """A rule that needs more of the sampler, or numbers of the request's own."""

    @property
    def asks(self) -> Asks: ...


@runtime_checkable
class Keeping(Protocol):
    """A rule that remembers: what `keep` returns it finds in `w.mem`, or `mem`, in the next forward, moved along."""

    def memory(self, L: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → the shape behind [B, N], dtype."""
        ...

    def keep(self, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Memory:
        """c as the sampler made them, tok [B, N, L] as rewritten, whole [B, N] as settled → [B, N, …] by name."""
        ...


@runtime_checkable
class Score(Protocol):
    """What are the candidates worth, all considered? → Candidates."""

    def __call__(self, c: Candidates, w: Seen) -> Candidates: ...


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
    """What does the network see? → [B, C, E] for tokens [B, C], with what this rule keeps, [B, C, …] each."""

    def __call__(self, embed: Callable[[Tensor], Tensor], tok: Tensor, mem: Memory) -> Tensor: ...


def paired(ids: Tensor, values: Tensor) -> Tensor:
    """[..., k] int32 and f32 → [..., 2, k] f32, which tells ids apart below 2²⁴: a step moves one tensor, not two."""
    return torch.where(torch.arange(2, device=ids.device)[:, None] == 0, ids[..., None, :], values[..., None, :])


def rank(conf: Tensor) -> Tensor:
    """[..., L] → int [..., L]: how many positions are surer; ties go to the lower position."""
    if conf.shape[-1] > 256:  # L² comparisons are many then
        return conf.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return ahead(conf).sum(-1)


def ahead(conf: Tensor) -> Tensor:
    """[..., L] → bool [..., L, L]: is the position of the last axis surer than the one before it?"""
    at = torch.arange(conf.shape[-1], device=conf.device)
    mine, other = conf[..., :, None], conf[..., None, :]
    return (other > mine) | (other == mine) & (at < at[:, None])
