"""Rules of editing, merging, scoring and SDAR's schedules against twins: loops over the lists of one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx.graphs.rules import (
    Calm,
    Candidates,
    Credit,
    Edit,
    EntropyFirst,
    Hierarchical,
    Keeping,
    Leading,
    Merge,
    Quota,
    Remask,
    Seen,
    Select,
    Smooth,
    Threshold,
)

MASK, WORDS, K, STATES = 63, 60, 6, 500
B, N, L = 5, 4, 8


def scene(seed: int, keeper: Keeping | None = None) -> tuple[Candidates, Seen]:
    """A random state of B · N blocks; every other one has ties, and blocks from all masks to none."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        x = torch.rand(*shape, generator=rng)
        return (x * 8).round() / 8 if seed % 2 else x

    def words(*shape: int) -> Tensor:
        return torch.randint(0, WORDS, shape, generator=rng).int()

    share = torch.tensor([1.0, 0.7, 0.3, 0.0]).repeat(B, 1)[..., None]
    tok = torch.where(torch.rand(B, N, L, generator=rng) < share, MASK, words(B, N, L))
    live = torch.rand(B, N, L, generator=rng) < 0.9
    key = torch.rand(B, N, L, WORDS, generator=rng)
    again = (torch.rand(B, N, L, generator=rng) < 0.5) & (tok != MASK)  # the likeliest id is the token that is there
    key.scatter_add_(-1, tok.clamp_max(WORDS - 1)[..., None].long(), again[..., None].float())
    top = key.argsort(-1, descending=True)[..., :K].int().contiguous()
    likely = rand(B, N, L, K).sort(-1, descending=True).values / K + 1e-3
    best = top[..., 0]
    mem = {}
    for name, (shape, kind) in ({} if keeper is None else keeper.memory(L)).items():
        drawn = words(B, N, *shape) % 5 if kind == torch.int32 else rand(B, N, *shape) * 2
        mem[name] = drawn.to(kind)
    c = Candidates(best, rand(B, N, L), rand(B, N, L), rand(B, N, L), top, likely, rand(B, N, L) if seed % 3 else None)
    temp = torch.tensor([0.0, 0.0, 0.5, 1.0, 2.0])
    numbers = [rand(B) for _ in range(4)]
    age = torch.randint(0, 40, (B,), generator=rng).int()
    w = Seen(
        tok, live & (tok == MASK), live, rand(B, N), numbers[0], numbers[1], MASK, None, numbers[2], numbers[3], temp,
        age, mem,
    )  # fmt: skip
    return c, w


class Block(NamedTuple):
    """One block of a state, in plain Python."""

    tok: list[int]
    todo: list[int]  # positions
    old: list[int]  # decided positions that may change
    new: list[int]
    conf: list[float]
    order: list[float]
    entropy: list[float]
    top: list[list[int]]
    likely: list[list[float]]
    ready: bool
    accept: float
    edit: float
    remask: float
    temp: float
    age: int
    mem: dict[str, Any]


def blocks(c: Candidates, w: Seen) -> Iterator[tuple[int, int, Block]]:
    assert c.entropy is not None and c.top is not None and c.likely is not None
    assert w.edit is not None and w.remask is not None and w.temp is not None and w.age is not None
    order = c.conf if c.rank is None else c.rank
    for b in range(B):
        for n in range(N):
            yield b, n, Block(
                w.tok[b, n].tolist(),
                [i for i in range(L) if w.live[b, n, i] and w.tok[b, n, i] == MASK],
                [i for i in range(L) if w.live[b, n, i] and w.tok[b, n, i] != MASK],
                *(x[b, n].tolist() for x in (c.tok, c.conf, order, c.entropy, c.top, c.likely)),
                bool(w.before[b, n] >= w.force_at[b]),
                *(float(x[b]) for x in (w.accept, w.edit, w.remask, w.temp)),
                int(w.age[b]),
                {name: kept[b, n].tolist() for name, kept in w.mem.items()},
            )  # fmt: skip


def surest(block: Block, n: int = 1) -> set[int]:
    return set(sorted(block.todo, key=lambda i: (-block.order[i], i))[:n])


def decaying(x: Block) -> set[int]:
    bar = max(torch.tensor(1.0) - torch.tensor(0.02) * x.age, torch.tensor(x.accept))
    return {i for i in x.todo if x.conf[i] > bar} or (surest(x) if x.ready else set())


def leading(x: Block) -> set[int]:
    n = next((n for n, i in enumerate(x.todo) if x.conf[i] < x.accept), len(x.todo))
    return set(x.todo[: max(n, int(x.ready))])


def hierarchical(x: Block) -> set[int]:
    runs: list[list[int]] = [[]]
    for i in range(L):
        runs[-1].append(i) if i in x.todo else runs.append([])
    take = {i for i in x.todo if x.conf[i] > x.accept}
    for run in filter(None, runs):
        best = min(run, key=lambda i: (-x.conf[i], i))
        take |= {best} if x.conf[best] > 0.4 else set()
    return take or (surest(x) if x.ready else set())


def shares(steps: int | None, turn: int) -> int:
    """The tokens of forward `turn`, L shared out evenly, the remainder to the first."""
    quota = [L // (steps or L) + (i < L % (steps or L)) for i in range(steps or L)]
    return max(1, quota[turn] if turn < len(quota) else L // (steps or L))


def quota(steps: int | None, by: str) -> Callable[[Block], set[int]]:
    def twin(x: Block) -> set[int]:
        n = shares(steps, x.mem.get("turn", 0))
        if by == "place":
            return {i for i in x.todo if i < x.todo[0] + n} if x.ready else set()
        most = surest(x, n) if x.ready else set()
        sure = {i for i in x.todo if x.conf[i] > x.accept}
        return most if by == "rank" else sure if len(sure) >= n else most | sure

    return twin


def entropy_first(x: Block) -> set[int]:
    take, total = set[int](), 0.0
    for i in sorted(x.todo, key=lambda i: (x.entropy[i], i)):
        total += x.entropy[i]
        if total < x.accept or (not take and x.ready):
            take.add(i)
    return take


SELECTS: list[tuple[Select, Callable[[Block], set[int]]]] = [
    (Threshold(decay=0.02), decaying),
    (Leading(), leading),
    (Hierarchical(), hierarchical),
    (EntropyFirst(), entropy_first),
    *[(Quota(steps, by), quota(steps, by)) for steps in (None, 2, 3, 20) for by in ("rank", "place", "threshold")],
]


@pytest.mark.parametrize(("rule", "twin"), SELECTS, ids=[repr(rule) for rule, _ in SELECTS])
def test_a_select_equals_its_twin(rule: Select, twin: Callable[[Block], set[int]]) -> None:
    some = 0
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed, rule if isinstance(rule, Keeping) else None)
        take = rule(c, w)
        for b, n, x in blocks(c, w):
            assert set(take[b, n].nonzero().flatten().tolist()) == twin(x), (seed, b, n, x)
            some += 0 < len(twin(x)) < len(x.todo)
    assert some > STATES / 8


def test_edit_equals_its_twin() -> None:
    edited = 0
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed)
        take = Threshold()(c, w)
        tok = Edit()(c, w, take)
        for b, n, x in blocks(c, w):
            over = [i for i in x.old if x.conf[i] > x.edit]
            want = [x.new[i] if take[b, n, i] or i in over else x.tok[i] for i in range(L)]
            assert tok[b, n].tolist() == want
            edited += any(want[i] != x.tok[i] for i in over)
    assert edited > STATES / 4


def test_remask_equals_its_twin_and_every_forward_decides_something() -> None:
    masked = 0
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed)
        take = Threshold()(c, w)
        tok = Remask()(c, w, take)
        for b, n, x in blocks(c, w):
            weak = sorted((i for i in x.old if x.conf[i] < x.remask), key=lambda i: (x.conf[i], i))
            weak = weak[: max(int(take[b, n].sum()) - 1, 0)]
            assert tok[b, n].tolist() == [
                x.new[i] if take[b, n, i] else MASK if i in weak else x.tok[i] for i in range(L)
            ]
            assert (tok[b, n] == MASK).sum() < (w.tok[b, n] == MASK).sum() or not take[b, n].any()
            masked += len(weak)
    assert masked > 50


@pytest.mark.parametrize(("limit", "sure"), [(16, None), (3, None), (3, 0.5), (0, 0.9)])
def test_calm_equals_its_twin(limit: int, sure: float | None) -> None:
    rule, seen = Calm(limit, sure), set[bool]()
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed, rule)
        if sure is not None:
            c = c._replace(conf=c.conf.clamp_min(0.4).sqrt())
        tok = Edit()(c, w, Threshold()(c, w))
        whole, kept = rule(c, w, tok), rule.keep(c, w, tok, torch.zeros(B, N, dtype=torch.bool))
        for b, n, x in blocks(c, w):
            after = tok[b, n].tolist()
            edits = x.mem["edits"] + (MASK not in x.tok)
            calm = after == x.tok or edits >= limit
            calm = calm or (sure is not None and all(x.conf[i] >= sure for i in x.todo + x.old))
            assert whole[b, n] == (calm and MASK not in after)
            same = [x.new[i] == x.tok[i] for i in x.old]
            assert kept["edits"][b, n] == edits
            assert kept["same"][b, n] == pytest.approx(sum(same) / len(same) if same else 1.0)
            seen.add(bool(whole[b, n]))
    assert seen == {True, False}


def table(E: int = 5) -> Tensor:
    return torch.randn(MASK + 1, E, generator=torch.Generator().manual_seed(9))


def mixed(rule: Merge | Smooth, c: Candidates, w: Seen, tok: Tensor, whole: Tensor) -> Tensor:
    """What the network sees of the rewritten tokens, [B, N · L, E]."""
    mem = {name: kept.flatten(1, 2) for name, kept in rule.keep(c, w, tok, whole).items()}
    return rule(lambda ids: table()[ids.long()], tok.flatten(1), mem)


@pytest.mark.parametrize("renormalise", [False, True])
def test_merge_equals_its_twin(renormalise: bool) -> None:
    E, soft = table().double(), 0
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed)
        tok = Edit()(c, w, Threshold()(c, w))
        whole = torch.arange(B * N).view(B, N) % 3 == seed % 3
        got = mixed(Merge(renormalise), c, w, tok, whole).view(B, N, L, -1)
        for b, n, x in blocks(c, w):
            for i in range(L):
                t, p = int(tok[b, n, i]), x.conf[i]
                e = E[t]
                if i in x.todo + x.old and t == x.new[i] and not whole[b, n]:
                    e = p * E[t] + (1 - p) * E[MASK]
                    if renormalise:
                        e = e * (p * E[t].norm() + (1 - p) * E[MASK].norm()) / e.norm()
                    soft += 1
                torch.testing.assert_close(got[b, n, i].double(), e, rtol=1e-4, atol=1e-5)
    assert soft > STATES


@pytest.mark.parametrize("of", ["tokens", "masks"])
def test_smooth_equals_its_twin(of: str) -> None:
    E, soft = table().double(), 0
    rule = Smooth(k=K, weight=0.3, first=0.15, growth=0.02, of=of)
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed)
        assert c.top is not None
        c.top[..., -1] = torch.where(torch.rand(B, N, L) < 0.2, -1, c.top[..., -1])  # a vocabulary of fewer ids
        tok = Edit()(c, w, Threshold()(c, w))
        whole = torch.arange(B * N).view(B, N) % 3 == seed % 3
        got = mixed(rule, c, w, tok, whole).view(B, N, L, -1)
        for b, n, x in blocks(c, w):
            weight = min(0.15 + 0.02 * x.age, 0.3)
            for i in range(L):
                t = int(tok[b, n, i])
                e = E[t]
                if i in x.todo + x.old and (t == MASK) == (of == "masks") and not whole[b, n]:
                    e = e + weight * sum(p * E[j] for j, p in zip(x.top[i], x.likely[i]) if j >= 0)
                    soft += 1
                torch.testing.assert_close(got[b, n, i].double(), e, rtol=1e-4, atol=1e-5)
    assert soft > STATES


def test_credit_equals_its_twin() -> None:
    rule, moved = Credit(slots=3, k=K), 0
    for seed in range(STATES // (B * N) + 1):
        c, w = scene(seed, rule)
        assert c.top is not None
        held_ids, held_sums = w.mem["credit"].unbind(-2)
        held_ids.copy_(  # of likely ids some have credit; no id has two places
            torch.cat((c.top[..., 1:3] + 1, torch.full_like(c.top[..., :1], WORDS + 2)), -1)
        )
        held_sums[..., 2].mul_(torch.arange(L) % 2)
        odd = (torch.arange(L) % 3 == 0) & (torch.arange(B)[:, None, None] > 1)  # drawn, and not among the likeliest
        c = c._replace(tok=torch.where(odd, WORDS, c.tok))
        got, kept = rule(c, w), rule.keep(c, w, c.tok, torch.zeros(B, N, dtype=torch.bool))
        for b, n, x in blocks(c, w):
            for i in range(L):
                ids, sums = x.mem["credit"][i][0], [0.8 * s for s in x.mem["credit"][i][1]]
                if i in x.todo:
                    best, p = x.top[i][0] + 1, x.likely[i][0]
                    at = ids.index(best) if best in ids else sums.index(min(sums))
                    sums[at] = (sums[at] if best in ids else 0.0) + p**0.2
                    ids[at] = best
                assert kept["credit"][b, n, i].tolist() == [ids, pytest.approx(sums, rel=1e-5)]
                credit = dict(zip(ids, sums))
                rise = [math.exp(0.7 / (x.temp or 1) * math.log1p(credit.get(j + 1, 0.0))) for j in x.top[i]]
                worth = [p * r for p, r in zip(x.likely[i], rise)]
                total = 1 + sum(worth) - sum(x.likely[i])
                at = max(range(K), key=lambda j: (worth[j], -j))
                tok, value = x.top[i][at], worth[at]
                if x.temp:
                    tok, value = x.new[i], dict(zip(x.top[i], worth)).get(x.new[i], x.conf[i])
                assert got.tok[b, n, i] == tok
                assert float(got.conf[b, n, i]) == pytest.approx(value / total, rel=1e-4)
                moved += tok != x.top[i][0]
    assert moved > 20
