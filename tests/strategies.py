"""Whole decoding loops at T = 0, block after block, written from the papers' formulas: lists, fp32, no cache.

Nothing here is shared with dlx. A block is denoised by itself behind all that is decided; every forward runs
transformers' network over the whole sequence up to the block's end. What a strategy remembers it keeps in `Block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference import Qwen3


@dataclass
class Block:
    """The block that is being denoised, and what strategies remember of it."""

    ids: list[int]
    given: int  # leading positions of the prompt
    mask: int
    forward: int  # of the whole answer, from 0
    accept: float
    p: Tensor = field(default_factory=lambda: torch.empty(0))  # [L, V] probabilities, the mask id and padding at 0
    turn: int = 0
    edits: int = 0
    soft: dict[int, Tensor] = field(default_factory=dict)  # position → embedding, instead of its token's
    credit: Tensor | None = None  # [L, V]
    held: frozenset[int] = frozenset()  # positions that are fixed

    def own(self) -> list[int]:
        return [i for i in range(self.given, len(self.ids)) if i not in self.held]

    def masks(self) -> list[int]:
        return [i for i, tok in enumerate(self.ids) if tok == self.mask]

    def best(self, i: int) -> tuple[float, int]:
        """(probability, id) of the likeliest id; the lowest of equal ones."""
        p = self.p[i].max().item()
        return p, self.p[i].tolist().index(p)

    def conf(self, i: int) -> float:
        return self.best(i)[0]

    def write(self, where: set[int]) -> None:
        for i in where:
            self.ids[i] = self.best(i)[1]


Rule = Callable[..., bool]  # (block, embeddings [V, E]) → decided; writes the block


def surest(b: Block, n: int = 1) -> set[int]:
    return set(sorted(b.masks(), key=lambda i: (-b.conf(i), i))[:n])


def above(b: Block, bar: float) -> set[int]:
    return {i for i in b.masks() if b.conf(i) > bar}


def threshold(b: Block, E: Tensor) -> bool:
    b.write(above(b, b.accept) or surest(b))
    return not b.masks()


def edit(b: Block, E: Tensor, over: float = 0.9, cap: int = 16) -> bool:
    """LLaDA2.1: masks to tokens above one threshold, tokens to tokens above another, until a pass without edits."""
    before, masks = list(b.ids), b.masks()
    b.edits += not masks
    change = above(b, b.accept) or surest(b)
    change |= {i for i in b.own() if before[i] != b.mask and b.conf(i) > over}
    b.write(change)
    return not masks and (b.ids == before or b.edits >= cap)


def dmax(b: Block, E: Tensor, cap: int = 16) -> bool:
    """DMax: masks from the left while they are sure, decided tokens anew each time; blocks end stable or all sure."""
    before, masks = list(b.ids), b.masks()
    b.edits += not masks
    conf = [b.conf(i) for i in range(len(b.ids))]
    n = 0
    while n < len(masks) and conf[masks[n]] >= b.accept:
        n += 1
    b.write({i for i in b.own() if before[i] != b.mask} | set(masks[: max(n, 1)]))
    sure = all(conf[i] >= 0.9 for i in b.own())
    return not b.masks() and (b.ids == before or sure or b.edits >= cap)


def merged(b: Block, E: Tensor, cap: int = 16) -> bool:
    """DMax with its token merge: p · E(token) + (1 − p) · E(mask), brought back to the mean of their norms."""
    over = dmax(b, E, cap)
    b.soft = {}
    for i in b.own():
        p, tok = b.best(i)
        if b.ids[i] == tok:
            e = p * E[tok] + (1 - p) * E[b.mask]
            b.soft[i] = e * (p * E[tok].norm() + (1 - p) * E[b.mask].norm()) / e.norm()
    return over


def likely(b: Block, i: int, k: int, E: Tensor) -> Tensor:
    """Σ p · E(id) over the k likeliest ids."""
    p, ids = b.p[i].topk(k)
    return p @ E[ids]


def smoothed(b: Block, E: Tensor, cap: int = 16) -> bool:
    """DMax's decoding with iter_smooth_topk: E(token) + Σ p · E(id) over four ids, weight 1."""
    over = dmax(b, E, cap)
    decided = [i for i in b.own() if b.ids[i] != b.mask]
    b.soft = {i: E[b.ids[i]] + likely(b, i, 4, E) for i in decided}
    return over


def iter_smooth(b: Block, E: Tensor) -> bool:
    """dInfer: the bar falls by 0.02 a forward, masks are seen with a weight that grows by 0.02, of eight ids."""
    b.write(above(b, max(1 - 0.02 * b.forward, b.accept)) or surest(b))
    weight = min(0.15 + 0.02 * b.forward, 0.3)
    b.soft = {i: E[b.mask] + weight * likely(b, i, 8, E) for i in b.masks()}
    return not b.masks()


def hierarchical(b: Block, E: Tensor) -> bool:
    """dInfer: of every run of masks the surest, above 0.4."""
    take, run = above(b, b.accept), list[int]()
    masks = b.masks()
    for i in masks:
        run.append(i)
        if i + 1 not in masks:
            top = min(run, key=lambda j: (-b.conf(j), j))
            take |= {top} if b.conf(top) > 0.4 else set()
            run = []
    b.write(take or surest(b))
    return not b.masks()


def credit(b: Block, E: Tensor) -> bool:
    """dInfer: logits + 0.7 · ln(1 + C); C of the whole vocabulary, of which the eight likeliest ids count."""
    C = torch.zeros_like(b.p) if b.credit is None else 0.8 * b.credit
    for i in b.masks():
        p, tok = b.best(i)
        C[i, tok] += p**0.2
    b.credit = C
    for i in b.masks():
        few = b.p[i].topk(8).indices
        logits = b.p[i].log()
        logits[few] += 0.7 * torch.log(C[i, few] + 1)
        b.p[i] = logits.softmax(0)
    return threshold(b, E)


def sequential(b: Block, E: Tensor) -> bool:
    b.write(set(b.masks()[:1]))
    return not b.masks()


def static(b: Block, E: Tensor) -> bool:
    b.write(surest(b))
    return not b.masks()


def within(b: Block, E: Tensor, size: int = 8) -> bool:
    """Fast-dLLM v2 without its block cache: of the first sub-block that has masks, what is sure, or the surest."""
    masks = b.masks()
    here = {i for i in masks if i // size == masks[0] // size}
    best = sorted(here, key=lambda i: (-b.conf(i), i))[:1]
    b.write(above(b, b.accept) & here or set(best))
    return not b.masks()


def entropy_bounded(b: Block, E: Tensor) -> bool:
    entropy = {i: -sum(p * math.log(p) for p in b.p[i].tolist() if p > 0) for i in b.masks()}
    ranked = sorted(entropy, key=lambda i: (entropy[i], i))
    k = sum(sum(entropy[j] for j in ranked[: n + 1]) < b.accept for n in range(len(ranked)))
    b.write(set(ranked[: max(k, 1)]))
    return not b.masks()


STRATEGIES: dict[str, Rule] = {
    "single_bd": threshold,
    "edit": edit,
    "dmax": merged,
    "token_merge": smoothed,
    "iter_smooth": iter_smooth,
    "hierarchical": hierarchical,
    "credit": credit,
    "sequential": sequential,
    "low_confidence_static": static,
    "low_confidence_dynamic": threshold,  # a share of one token a forward: all that are sure, or the surest
    "entropy_bounded": entropy_bounded,
    "fast_dllm_v2": within,
}


class Trail(NamedTuple):
    """An answer, and after each forward all that is decided or masked behind the prompt, without masks at its end."""

    tokens: list[int]
    steps: list[list[int]]


def trimmed(ids: list[int], mask: int) -> list[int]:
    while ids and ids[-1] == mask:
        ids = ids[:-1]
    return ids


def decode(
    net: Qwen3,
    rule: Rule,
    prompt: list[int],
    most: int,
    accept: float,
    stop: int,
    jitter: float = 0,
    stays: bool = False,
    fixed: Mapping[int, int] | None = None,
) -> Trail:
    """Decode one prompt by one rule; `jitter` moves each logit by up to so much.

    stays  decided tokens stay: the answer ends as soon as its stop id, or its last token, has no mask before it
    fixed  offset in the answer → token that stands there beforehand; no stop id, and behind the last gap not decoded
    """
    L, mask, fixed, P, total = net.L, net.mask_id, fixed or {}, len(prompt), most
    while most > 1 and most - 1 in fixed:
        most -= 1
    limit = P + most
    E = net.net.get_input_embeddings().weight.detach()
    rng = torch.Generator().manual_seed(0)
    done, steps = list(prompt), list[list[int]]()
    base = len(prompt) // L * L
    while True:
        given = len(done) - base
        block = [fixed.get(p - P, mask) for p in range(len(done), base + L)]
        held = frozenset(p - base for p in range(len(done), base + L) if p - P in fixed)
        b = Block(done[base:] + block, given, mask, len(steps), accept, held=held)
        over = False
        while not over:
            b.forward = len(steps)
            b.p = probabilities(net, done[:base], b, E, rng, jitter)
            over = rule(b, E)
            b.turn += 1
            steps.append(trimmed((done[:base] + b.ids)[len(prompt) :], mask))
            settled = [*(done[:base] + b.ids)[len(prompt) : limit], mask]
            settled = settled[: settled.index(mask)]
            over = over or (stays and (ends(settled, stop, fixed) is not None or len(settled) == most))
        done, base = done[:base] + b.ids, base + L
        out = done[len(prompt) : limit]
        end = ends(out, stop, fixed)
        if end is not None or len(done) >= limit:
            return Trail(out[:end] if end is not None else out + [fixed[i] for i in range(most, total)], steps)


def ends(out: list[int], stop: int, fixed: Mapping[int, int]) -> int | None:
    """Where the first stop id is that is not fixed."""
    return next((i for i, tok in enumerate(out) if tok == stop and i not in fixed), None)


def probabilities(net: Qwen3, done: list[int], b: Block, E: Tensor, rng: torch.Generator, jitter: float) -> Tensor:
    """[L, V] of the block; final tokens are seen as they are, those of the block as `b.soft` says."""
    n, L = len(done) + len(b.ids), len(b.ids)
    x = E[torch.tensor(done + b.ids)].clone()
    for i, e in b.soft.items():
        x[len(done) + i] = e
    block = torch.arange(n) // net.L
    bias = torch.zeros(1, 1, n, n).masked_fill(block[None, :] > block[:, None], torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = net.net(inputs_embeds=x[None], attention_mask=bias).logits[0, -L:].float()
    logits = logits + jitter * (2 * torch.rand(logits.shape, generator=rng) - 1)
    logits[:, b.mask] = -math.inf
    logits[:, net.vocab :] = -math.inf
    return logits.softmax(-1).clone()
