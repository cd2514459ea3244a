"""The candidates ops in plain torch: whole rows of logits, sorts, sums. Also the CPU backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = float("-inf")
LAST = 2**31 - 1  # the id of nobody
NUCLEUS = 64  # a filtered row keeps this many ids at most


class Parts(NamedTuple):
    """What one part of the vocabulary tells of each position; combined, several parts tell what the whole would.

    stats  [T, …, 4 or 5]  f32    max z; Σ exp(z − max); max z + noise; its z; for entropy Σ (z − max) exp(z − max)
    tok    [T, …]          int32  the id of max z + noise
    top_z  [T, …, keep]    f32    the largest z; −inf where there are no more
    top_i  [T, …, keep]    int32  their ids
    """

    stats: Tensor
    tok: Tensor
    top_z: Tensor
    top_i: Tensor


def listed(k: int, margin: bool, filtered: bool) -> int:
    """How many of its likeliest ids a part must list (`keep`) for what is asked of the whole: 0, or a power of two."""
    if filtered:
        return NUCLEUS
    most = max(k, 2 * margin)
    return max(2, 1 << (most - 1).bit_length()) if most else 0


def candidates_reference(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int,
    k: int = 0, entropy: bool = False, margin: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z = logits(h, head, temp, mask, 0, vocab, softcap, bias_tok, bias, forbidden)
    key = z
    if top_k is not None or top_p is not None:
        order = z.argsort(dim=-1, descending=True, stable=True)
        inside = kept(z.softmax(-1).gather(1, order), top_k, top_p)
        key = z.masked_fill(~torch.zeros_like(inside).scatter(1, order, inside), NEVER)
    p = key.softmax(-1)
    tok = drawn(key, torch.arange(vocab, device=h.device), temp, seed, pos, age).argmax(-1)
    conf = p.gather(1, tok[:, None])[:, 0]
    order = z.argsort(dim=-1, descending=True, stable=True)[:, : max(k, 2)] if k or margin else tok[:, None]
    top = torch.where(z.gather(1, order) == NEVER, -1, order)[:, :k].int().contiguous()
    likely = p.gather(1, order)
    return (
        tok.int(), conf.float(), top, likely[:, :k].float().contiguous(),
        torch.special.entr(p).sum(-1).float() if entropy else z.new_empty(len(z), 0, dtype=torch.float32),
        (likely[:, 0] - likely[:, 1]).float() if margin else z.new_empty(len(z), 0, dtype=torch.float32),
    )  # fmt: skip


def partial_reference(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, first: int, vocab: int,
    keep: int = 0, entropy: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None, forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z = logits(h, head, temp, mask, first, vocab, softcap, bias_tok, bias, forbidden)
    ids = first + torch.arange(z.shape[1], device=h.device)
    # one id of nobody behind them, so that no row is empty
    z = torch.cat((z, z.new_full((z.shape[0], 1), NEVER)), 1)
    ids = torch.cat((ids, ids.new_full((1,), LAST)))
    key = drawn(z, ids, temp, seed, pos, age)
    at = key.argmax(-1, keepdim=True)
    most = z.amax(-1, keepdim=True)
    away = torch.where(z == NEVER, NEVER, z - most)
    stats = [most, away.exp().sum(-1, keepdim=True), key.gather(1, at), z.gather(1, at)]
    if entropy:
        stats.append(torch.where(away == NEVER, 0.0, away * away.exp()).sum(-1, keepdim=True))
    ids = torch.where(z == NEVER, LAST, ids)
    order = z.argsort(dim=-1, descending=True, stable=True)[:, :keep]
    more = (0, keep - order.shape[1])
    top_z = torch.nn.functional.pad(z.gather(1, order), more, value=NEVER)
    top_i = torch.nn.functional.pad(ids.gather(1, order), more, value=LAST)
    return torch.cat(stats, 1).float(), ids.gather(1, at)[:, 0].int(), top_z.float(), top_i.int()


def combine_reference(
    stats: Tensor, tok: Tensor, top_z: Tensor, top_i: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor,
    k: int = 0, entropy: bool = False, margin: bool = False, top_k: Tensor | None = None, top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = stats.double()
    most = wide[..., 0].amax(1)
    away = torch.where(wide[..., 0] == NEVER, 0.0, wide[..., 0] - most[:, None])
    scale = torch.where(wide[..., 0] == NEVER, 0.0, away.exp())
    mass = (scale * wide[..., 1]).sum(1)
    ahead = wide[..., 2] == wide[..., 2].amax(1, keepdim=True)
    first = torch.where(ahead, tok, LAST).amin(1)
    mine = ahead & (tok == first[:, None])
    conf = (torch.where(mine, wide[..., 3], NEVER).amax(1) - most).exp() / mass
    H = mass.log() - (scale * (wide[..., 4] + away * wide[..., 1])).sum(1) / mass if entropy else conf
    # the lists of all parts as one: by id, then stably by z
    z, ids = (x.flatten(1) for x in (top_z.double(), top_i))
    z, ids = (x.gather(1, ids.argsort(dim=-1, stable=True)) for x in (z, ids))
    order = z.argsort(dim=-1, descending=True, stable=True)[:, : top_z.shape[2]]
    z, ids = z.gather(1, order), ids.gather(1, order)
    p = (z - most[:, None]).exp() / mass[:, None]
    if top_k is not None or top_p is not None:
        some = chosen(top_k, top_p, first)
        inside = kept(p, top_k, top_p) & (z != NEVER)
        key = torch.where(inside, z, NEVER)
        q = key.softmax(-1)
        at = drawn(key, ids, temp, seed, pos, age).argmax(-1, keepdim=True)
        first = torch.where(some, ids.gather(1, at)[:, 0], first)
        conf = torch.where(some, q.gather(1, at)[:, 0], conf)
        H = torch.where(some, torch.special.entr(q).sum(-1), H)
        p = torch.where(some[:, None], q, p)
    top = torch.where(z == NEVER, -1, ids)[:, :k].int().contiguous()
    return (
        torch.where(first == LAST, 0, first).int(), conf.float(), top, p[:, :k].float().contiguous(),
        H.clamp_min(0).float() if entropy else z.new_empty(len(z), 0, dtype=torch.float32),
        (p[:, 0] - p[:, 1]).float() if margin else z.new_empty(len(z), 0, dtype=torch.float32),
    )  # fmt: skip


def logits(
    h: Tensor, head: Tensor, temp: Tensor, mask: int, first: int, vocab: int, softcap: float,
    bias_tok: Tensor | None, bias: Tensor | None, forbidden: Tensor | None,
) -> Tensor:  # fmt: skip
    """[T, n] z of the head's ids from `first` on that are below vocab; −inf where an id may not be chosen."""
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    n = max(0, min(head.shape[0], vocab - first))
    z = h.to(acc) @ head[:n].to(acc).T
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if bias_tok is not None and bias is not None and n:
        at = bias_tok.long() - first
        inside = (at >= 0) & (at < n)
        z = z.scatter_add(1, torch.where(inside, at, 0), torch.where(inside, bias.to(acc), 0.0))
    z = z / torch.where(temp > 0, temp, 1.0).to(acc)[:, None]
    ids = first + torch.arange(n, device=h.device)
    never = ids == mask
    if forbidden is not None:
        never = never | (ids[:, None] == forbidden).any(-1)
    return z.masked_fill(never, NEVER)


def chosen(top_k: Tensor | None, top_p: Tensor | None, like: Tensor) -> Tensor:
    """[T] bool: the rows that are filtered at all."""
    some = torch.zeros_like(like, dtype=torch.bool)
    if top_k is not None:
        some = some | (top_k > 0)
    if top_p is not None:
        some = some | (top_p < 1)
    return some


def kept(p: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[T, n] bool: which ids the filters keep, given their probabilities in descending order."""
    rank = torch.arange(p.shape[1], device=p.device)
    inside = (rank < NUCLEUS) | ~chosen(top_k, top_p, p[:, 0])[:, None]
    if top_k is not None:
        inside = inside & ((top_k <= 0)[:, None] | (rank < top_k[:, None]))
    if top_p is not None:
        before = torch.nn.functional.pad(p.cumsum(-1)[:, :-1], (1, 0))
        inside = inside & ((top_p >= 1)[:, None] | (before <= top_p[:, None]) | (rank == 0))
    return inside


def drawn(z: Tensor, ids: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor) -> Tensor:
    """z plus Gumbel noise in the rows whose temperature is above 0; its argmax is a draw from softmax(z)."""
    if not bool((temp > 0).any()):
        return z
    return torch.where((temp > 0)[:, None], z + gumbel(ids, seed, pos, age).to(z.dtype), z)


def gumbel(ids: Tensor, seed: Tensor, pos: Tensor, age: Tensor) -> Tensor:
    """[T, n] f32 Gumbel noise of ids [n] or [T, n]: Philox4x32-10, keyed by `seed`, counted by (token, pos, age)."""
    counter = (ids.long().expand(seed.shape[0], -1), pos.long()[:, None], age.long()[:, None], 0)
    u = ((philox(counter, seed[:, None]) >> 9).float() + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
    return -torch.log(-torch.log(u))


def philox(counter: tuple[Tensor | int, ...], seed: Tensor) -> Tensor:
    """The first of Philox4x32-10's four words, int64 from 0 to 2³² − 1: four counter words keyed by `seed` int64.

    The words are token, position, forward and stream: 0 for the noise of draws, 1 for a canvas' random tokens.
    """
    low32 = 0xFFFFFFFF
    c = list(counter)
    k0, k1 = seed & low32, seed >> 32 & low32
    for _ in range(10):
        (ahead, a), (behind, b) = halves(c[0], 0xD2511F53), halves(c[2], 0xCD9E8D57)
        c = [behind ^ c[1] ^ k0, b, ahead ^ c[3] ^ k1, a]
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return torch.as_tensor(c[0])


def halves(x: Tensor | int, times: int) -> tuple[Tensor | int, Tensor | int]:
    """The upper and the lower 32 bits of x · times, both below 2³²; no step overflows, which C++ leaves undefined."""
    p, q = x * (times & 0xFFFF), x * (times >> 16)
    return q + (p >> 16) >> 16, ((q & 0xFFFF) << 16) + p & 0xFFFFFFFF
