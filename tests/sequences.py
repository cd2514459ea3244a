"""The reference of strategies that compute a whole sequence or parts of it: plain loops, one request, and transformers'
network with a K/V store that is as old as the strategy says. It shares no code with dlx.

    s    where the block begins;  L  its length;  end  where prompt and answer end
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.draws import philox
from tests.families import MASK, STOP, VOCAB

NEAR = 1e-5  # decisions nearer than this may fall either way


@dataclass(frozen=True)
class How:
    """A strategy. scope: dual, prefix, all; sub: sub-blocks of `size`, cached or not, block-causally."""

    L: int
    scope: str = "dual"
    left: int = 0
    right: int = 0
    warm_up: int = 0
    blocks: bool = True
    rule: str = "threshold"  # or factor, even, annealed
    by: str = "prob"  # or margin, entropy, random
    threshold: float = 0.9
    factor: float = 1.0
    steps: int | None = None
    size: int = 8
    cached: bool = True
    shift: bool = False
    vocab: int = VOCAB  # ids from here on are padding of the vocabulary
    smooth: bool = (
        False  # dInfer's iter_smooth: a falling bar, and masks of the block seen with what was thought of them
    )


class Decoded(NamedTuple):
    """The answer, the sequence after each forward, and how near each forward's decisions were to falling otherwise."""

    tokens: list[int]
    finish: str
    states: list[list[int]]
    gaps: list[float]


class Store:
    """The network, and K/V of every position as it was when it was last computed."""

    def __init__(self, net: Any, T: int) -> None:
        self.net, self.kv = net, {}  # layer → (k, v), [1, G, T, D] each
        self.T = T
        # transformers 5 has renamed it, and warns of the old name
        self.cache = "cache" if "cache" in inspect.signature(net.forward).parameters else "past_key_values"

    def __call__(self, ids: list[int], at: list[int], sees: list[int], soft: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute the positions `at`, each of which sees so many leading keys → their logits; stores their K/V.

        soft  position → its embedding, instead of its token's
        """
        known = max(sees)
        others = [p for p in range(known) if p not in at]
        cache = DynamicCache()
        for layer, (k, v) in self.kv.items() if others else ():
            cache.update(k[:, :, others], v[:, :, others], layer)
        keys = torch.tensor(others + at)
        mask = keys[None] < torch.tensor(sees)[:, None]
        E = self.net.get_input_embeddings().weight
        out = self.net(
            inputs_embeds=torch.stack([soft.get(p, E[ids[p]]) for p in at])[None], position_ids=torch.tensor([at]),
            attention_mask=mask[None, None], use_cache=True,
            cache_position=torch.arange(len(others), len(keys)), **{self.cache: cache},
        )  # fmt: skip
        for layer, one in enumerate(cache.layers):
            k, v = one.keys, one.values
            if layer not in self.kv:
                nothing = torch.full((1, k.shape[1], self.T, k.shape[3]), math.nan)
                self.kv[layer] = nothing.clone(), nothing.clone()
            for whole, new in zip(self.kv[layer], (k, v), strict=True):
                whole[:, :, at] = new[:, :, len(others) :]
        return dict(zip(at, out.logits[0], strict=True))


class Choice(NamedTuple):
    """A position's candidate: how probable, by what it is ranked, and how far the next id is behind it."""

    pos: int
    tok: int
    conf: float
    rank: float
    gap: float


def choice(logits: Tensor, pos: int, how: How, seed: int, age: int) -> Choice:
    z = logits.float().clone()
    z[MASK] = -math.inf
    z[how.vocab :] = -math.inf
    p = z.softmax(0)
    top = p.topk(2)
    tok = p.tolist().index(float(top.values[0]))
    conf = float(p[tok])
    rank = conf
    if how.by == "margin":
        rank = float(top.values[0] - top.values[1])
    elif how.by == "entropy":
        rank = sum(q * math.log(q) for q in p.tolist() if q > 0)
    elif how.by == "random":
        rank = (philox((0, pos, age, 2), seed) >> 8) * 2.0**-24
    second = z.topk(2).values
    return Choice(pos, tok, conf, rank, float(second[0] - second[1]))


def likely(logits: Tensor, how: How, k: int = 8) -> list[tuple[float, int]]:
    """(probability, id) of the k likeliest ids."""
    z = logits.float().clone()
    z[MASK] = -math.inf
    z[how.vocab :] = -math.inf
    p, ids = z.softmax(0).topk(k)
    return list(zip(p.tolist(), ids.tolist(), strict=True))


def accepted(
    found: list[Choice], how: How, turn: int, span: int, draws: dict[int, float]
) -> tuple[list[Choice], float]:
    """Which candidates are accepted, and how near that was to another choice."""
    ranked = sorted(found, key=lambda c: (-c.rank, c.pos))
    gap = math.inf
    if how.rule == "threshold":
        tau = torch.tensor(how.threshold).item()
        take = [c for c in found if c.conf > tau] or ranked[:1]
        gap = min(abs(c.conf - tau) for c in found)
        if len(take) == 1 and len(ranked) > 1:
            gap = min(gap, ranked[0].conf - ranked[1].conf)
    elif how.rule == "factor":
        n = 1
        while n < len(ranked) and ranked[n].conf >= 1 - how.factor / (n + 2):
            n += 1
        take = ranked[:n]
        gap = min([abs(c.conf - 1 + how.factor / (i + 1)) for i, c in enumerate(ranked, 1)] + [gap])
        gap = min([gap, *(a.rank - b.rank for a, b in itertools.pairwise(ranked))])
    elif how.rule == "even":
        n = math.ceil(len(found) / max(1, (how.steps or span) - turn))
        take = ranked[:n]
        gap = ranked[n - 1].rank - ranked[n].rank if n < len(ranked) else gap
    else:
        steps = how.steps or span
        t = [1 - (1 - 1e-3) * i / steps for i in range(steps + 1)]
        share = 1 - t[turn + 1] / t[turn] if turn + 1 < steps else 1.0
        if how.by == "random":
            take = [c for c in found if draws[c.pos] < share]
            gap = min(abs(draws[c.pos] - share) for c in found)
        else:
            n = int(len(found) * share)
            take = ranked[:n]
            gap = abs(len(found) * share - round(len(found) * share)) if share < 1 else gap
            gap = min(gap, ranked[n - 1].rank - ranked[n].rank) if 0 < n < len(ranked) else gap
    return take, min([gap, *(c.gap / 10 for c in take)])


@torch.no_grad()
def decode(
    net: Any, prompt: list[int], most: int, how: How, fixed: dict[int, int] | None = None, seed: int = 0,
    max_nfe: int | None = None, stop: int | None = STOP,
) -> Decoded:  # fmt: skip
    """Decode one prompt."""
    P, L = len(prompt), how.L
    end = P + most
    causal = how.scope == "sub"
    ids = prompt + [(fixed or {}).get(i, MASK) for i in range(most)]
    limit = P + max([i + 1 for i in range(most) if i not in (fixed or {})], default=1)
    given = {i for i, tok in enumerate(ids) if tok != MASK}
    s = P
    if causal:
        ids += [MASK] * L
        s = P // L * L
    store = Store(net, len(ids))
    states, gaps = [], []
    age = turn = 0
    refresh = True
    soft: dict[int, Tensor] = {}
    while True:
        # a block, and what is computed now
        block = list(range(s, s + L if causal else min(s + L, end))) if how.blocks else list(range(P, end))
        if causal:
            todo = [p for p in block if ids[p] == MASK]
            first = s + (todo[0] - s) // how.size * how.size
            sub = list(range(first, first + how.size))
            alone = how.cached and not refresh and ids[first] != MASK
            at = sub if alone else list(range(s + L))
            logits = store(ids, at, [(p // L + 1) * L for p in at], soft)
            open_now = sub
        else:
            whole = how.scope == "all" or refresh or age <= how.warm_up
            low = max(0, s - how.left)
            high = end if how.scope == "prefix" else min(end, block[-1] + 1 + how.right)
            at = list(range(end)) if whole else list(range(low, high))
            logits = store(ids, at, [end] * len(at), soft)
            only = how.shift and whole and how.scope in ("dual", "prefix") and how.left == 0
            open_now = block[:1] if only else block
        back = int(how.shift)
        found = [
            choice(logits[p - back], p, how, seed, age)
            for p in open_now
            if ids[p] == MASK and p - back in logits
        ]  # fmt: skip
        draws = {p: (philox((0, p, age, 2), seed) >> 8) * 2.0**-24 for p in open_now}
        if not causal and only:
            take, gap = found, min((c.gap / 10 for c in found), default=math.inf)
        else:
            now = replace(how, threshold=max(1 - 0.02 * age, how.threshold)) if how.smooth else how
            take, gap = (
                accepted(found, now, turn, min(block[-1] + 1, limit) - block[0], draws) if found else ([], math.inf)
            )
        for c in take:
            ids[c.pos] = c.tok
        if how.smooth:
            E, weight = net.get_input_embeddings().weight, min(0.15 + 0.02 * age, 0.3)
            seen = {p: likely(logits[p - back], how) for p in block if ids[p] == MASK and p - back in logits}
            soft = {p: E[MASK] + weight * sum(q * E[tok] for q, tok in few) for p, few in seen.items()}
        age, turn = age + 1, turn + 1
        states.append(ids[:end])
        gaps.append(gap)

        # what ends the answer
        leading = P
        while leading < min(limit, block[-1] + 1) and ids[leading] != MASK:
            leading += 1
        stops = [p for p in range(P, leading) if ids[p] == stop and p not in given]
        if stops:
            return Decoded(ids[P : stops[0] + 1], "stop", states, gaps)
        if leading == limit:
            return Decoded(ids[P:end], "length", states, gaps)
        if age == max_nfe:
            return Decoded(ids[P:leading], "max_nfe", states, gaps)
        refresh = all(ids[p] != MASK for p in block)
        if refresh:
            s, turn, soft = s + L, 0, {}
