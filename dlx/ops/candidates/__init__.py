"""The LM head fused with the sampler: candidate tokens and their confidences for each position.

    z     = (softcap(h · headᵀ) + bias) / temp     softcap(x) = c · tanh(x / c), none at 0; temp 0 counts as 1
    p     = softmax(z) of the ids that the row's filters keep; all, where it has none
    tok   = argmax z + noise over those ids        noise = 0 at temp 0, else Gumbel(seed, v, pos, age)
    conf  = p[tok]

Never chosen, and outside every sum: the id `mask`, ids in `forbidden`, padding (ids from `vocab` on).
Ties go to the lowest id.

h      [T, E]               hidden states after the last norm
head   [V, E]               contiguous
temp   [T]       f32        0 is greedy
seed   [T]       int64      key of the draws
pos    [T]       int32      absolute position, counter of the draws
age    [T]       int32      forwards of the row so far, counter of the draws
bias_tok, bias [T, M] int32, f32   added to the logits of these ids; below 0: none; named twice: both
top_k  [T]       int32      keep so many of the likeliest ids; 0 is off
top_p  [T]       f32        keep the likeliest ids up to the first that brings Σ softmax(z) above it; 1 is off
forbidden [F]    int32
→      tok [T] int32, conf [T] f32
       top [T, k] int32, likely [T, k] f32   the k largest z, in order: id (−1: no more), p (0: filtered out)
       entropy [T] f32                       −Σ p ln p; its negative is the confidence that Dream calls entropy
       margin [T] f32                        p of the likeliest id minus that of the next
       [T, 0] where not asked for
Work   2·T·V·E flops; reads V·E + T·E elements once; logits stay in registers
Source Philox4x32-10 (Salmon et al., 2011); Gumbel-max: argmax of z + noise is a draw from softmax(z). Filters as in
       Dream's sampler: temperature, then top_p, then top_k, then softmax, of which confidence, entropy and margin are
       taken, greedy or not: at top_k = 1 all are sure. What differs: a filtered row keeps its 64 likeliest ids at most
       (NUCLEUS), exactly top_k of them where some are equal, and a draw is renormalised among them.

Vocabulary in parallel: `candidates_partial` tells of ids `first` to `first` + rows of its head, `candidates_combine`
makes the answer of several such parts, stacked [T, S, …]. `listed` says how long their lists must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.ops.candidates.answer import answer, empty, fold
from dlx.ops.candidates.cases import candidates_cases, combine_cases, partial_cases
from dlx.ops.candidates.checks import candidates_check, combine_check, partial_check
from dlx.ops.candidates.parts import Launch, choose, walk
from dlx.ops.candidates.reference import (
    NUCLEUS,
    Parts,
    candidates_reference,
    combine_reference,
    listed,
    partial_reference,
)
from dlx.ops.op import Cost, Op

__all__ = [
    "NUCLEUS", "Launch", "Parts", "candidates", "candidates_combine", "candidates_partial", "choose", "listed", "walk",
]  # fmt: skip

Answer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def candidates_kernel(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int,
    k: int = 0, entropy: bool = False, margin: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, forbidden: Tensor | None = None,
) -> Answer:  # fmt: skip
    keep = listed(k, margin, top_k is not None or top_p is not None)
    rows = (temp, seed, pos, age)
    parts = walk(h, head, *rows, mask, 0, vocab, keep, entropy, softcap, bias_tok, bias, forbidden)
    return answer(parts, *rows, k, entropy, margin, top_k, top_p)


def candidates_fake(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int,
    k: int = 0, entropy: bool = False, margin: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, forbidden: Tensor | None = None,
) -> Answer:  # fmt: skip
    return empty(h, h.shape[0], k, entropy, margin)


def partial_kernel(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, first: int, vocab: int,
    keep: int = 0, entropy: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None, forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = (temp, seed, pos, age)
    return fold(walk(h, head, *rows, mask, first, vocab, keep, entropy, softcap, bias_tok, bias, forbidden))


def partial_fake(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, first: int, vocab: int,
    keep: int = 0, entropy: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None, forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T = h.shape[0]
    stats = temp.new_empty(T, 5 if entropy else 4, dtype=torch.float32)
    tok, top_i = pos.new_empty(T), pos.new_empty(T, keep)
    return stats, tok, torch.empty_like(top_i, dtype=torch.float32), top_i


def combine_kernel(
    stats: Tensor, tok: Tensor, top_z: Tensor, top_i: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor,
    k: int = 0, entropy: bool = False, margin: bool = False, top_k: Tensor | None = None, top_p: Tensor | None = None,
) -> Answer:  # fmt: skip
    return answer(Parts(stats, tok, top_z, top_i), temp, seed, pos, age, k, entropy, margin, top_k, top_p)


def combine_fake(
    stats: Tensor, tok: Tensor, top_z: Tensor, top_i: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor,
    k: int = 0, entropy: bool = False, margin: bool = False, top_k: Tensor | None = None, top_p: Tensor | None = None,
) -> Answer:  # fmt: skip
    return empty(stats, stats.shape[0], k, entropy, margin)


def candidates_cost(h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int,
                    vocab: int, k: int = 0, *options: object) -> Cost:  # fmt: skip
    T, E = h.shape
    return Cost(2 * T * vocab * E, (vocab * E + T * E) * h.element_size() + T * (28 + 8 * k))


def partial_cost(h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int,
                 first: int, vocab: int, keep: int = 0, *options: object) -> Cost:  # fmt: skip
    T, E = h.shape
    ids = max(0, min(head.shape[0], vocab - first))
    return Cost(2 * T * ids * E, (ids * E + T * E) * h.element_size() + T * (40 + 8 * keep))


def combine_cost(stats: Tensor, tok: Tensor, top_z: Tensor, top_i: Tensor, *options: object) -> Cost:
    return Cost(stats.numel(), 4 * sum(x.numel() for x in (stats, tok, top_z, top_i)) + 28 * tok.shape[0])


candidates = Op(
    "candidates", candidates_reference, candidates_kernel, candidates_fake, candidates_check, candidates_cases,
    candidates_cost, wide=("bias",), rtol=1e-2, atol=1e-4,
)  # fmt: skip
candidates_partial = Op(
    "candidates_partial", partial_reference, partial_kernel, partial_fake, partial_check, partial_cases, partial_cost,
    wide=("bias",), rtol=1e-2, atol=1e-3,
)  # fmt: skip
candidates_combine = Op(
    "candidates_combine", combine_reference, combine_kernel, combine_fake, combine_check, combine_cases, combine_cost,
    wide=("stats", "top_z"), rtol=1e-2, atol=1e-4,
)  # fmt: skip
