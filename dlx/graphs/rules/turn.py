"""Turn: which part of its sequence does a row compute in a forward, and which in the next? For graphs/sequence.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

ALL, REST, WINDOW, PAIR, SUB = "all", "rest", "window", "pair", "sub"


class Scope(NamedTuple):
    """What a forward computes of a row; s is where its block begins.

    all     the sequence [0, end)
    rest    [s, end)
    window  [s − left, s + L + right), as far as the sequence goes
    pair    [s − L, s + L): block-causally, what was decided before gets its final K/V, and the block is decided
    sub     the first undecided `left` positions of [s, s + L) that begin at a multiple of `left` from s
    """

    kind: str
    left: int = 0
    right: int = 0

    def width(self, L: int) -> int:
        """Positions of a forward; 0 where they depend on the row."""
        return {WINDOW: self.left + L + self.right, PAIR: 2 * L, SUB: self.left}.get(self.kind, 0)


class After(NamedTuple):
    """What a turn may know once a forward is decided."""

    tok: Tensor  # [B, L]  int32  the block that is decoded next
    moved: Tensor  # [B]     bool   it is another one than in this forward
    age: Tensor  # [B]     int32  forwards of the row so far
    mask: int


@runtime_checkable
class Turn(Protocol):
    """→ [B] int32: the number in `scopes` of what a row computes next; it begins with 0."""

    @property
    def blocks(self) -> bool: ...  # the answer is cut into blocks
    @property
    def full(self) -> bool: ...  # for models trained all-to-all
    @property
    def scopes(self) -> tuple[Scope, ...]: ...
    def __call__(self, a: After) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """Every forward computes the whole sequence. blocks=False: nor is the answer cut into blocks, all of it is open.

    Source LLaDA (blocks), Dream (none): what their own samplers do
    """

    blocks: bool = True
    full: bool = field(default=True, init=False, repr=False)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return (Scope(ALL),)

    def __call__(self, a: After) -> Tensor:
        return torch.zeros_like(a.age)


@dataclass(frozen=True)
class Refresh:
    """A new block computes the whole sequence, and so do the first `warm_up` forwards; the others compute the block
    with `left` and `right` positions around it, against K/V that was stored when those were last computed.

    prefix   compute all from the block on, so only what is before it is old
    Source Fast-dLLM (dual cache; prefix cache), dInfer (vicinity refresh). A forward that computes all decides like
           any other; a block that it decides needs no other. Where a token is read off the position before and that
           is not computed anew (left=0), the forward that computes all takes the block's first token and no other,
           as in Fast-dLLM for Dream
    """

    prefix: bool = False
    left: int = 0
    right: int = 0
    warm_up: int = 0
    blocks: bool = field(default=True, init=False, repr=False)
    full: bool = field(default=True, init=False, repr=False)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return Scope(ALL), Scope(REST) if self.prefix else Scope(WINDOW, self.left, self.right)

    def __call__(self, a: After) -> Tensor:
        return torch.where(a.moved | (a.age <= self.warm_up), 0, 1).int()


@dataclass(frozen=True)
class SubBlock:
    """A block is computed whole until the first position of its first undecided sub-block of `size` is decided; then
    that sub-block is computed alone, against K/V of the others as the block last stored it. Block-causal.

    Source Fast-dLLM v2 (use_block_cache)
    """

    size: int = 8
    blocks: bool = field(default=True, init=False, repr=False)
    full: bool = field(default=False, init=False, repr=False)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return Scope(PAIR), Scope(SUB, self.size)

    def __call__(self, a: After) -> Tensor:
        at = first(a.tok == a.mask, self.size)
        begun = a.tok.gather(1, at.long()[:, None])[:, 0] != a.mask
        return (begun & ~a.moved).int()


def first(todo: Tensor, size: int) -> Tensor:
    """[B, L] bool → [B] int32: where the first sub-block of `size` begins that has something to do; 0 if none has."""
    some = todo.unflatten(1, (-1, size)).any(2)
    at = torch.arange(some.shape[1], device=todo.device, dtype=torch.int32)
    found = torch.where(some, at, some.shape[1]).amin(1)
    return torch.where(found < some.shape[1], found * size, 0).int()
