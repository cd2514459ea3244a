"""Each rule against a twin written as loops over rows, blocks and positions, on STATES random rows or more."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dlx.graphs.rules import (
    Candidates,
    Canvas,
    EntropyBound,
    Filled,
    Fixed,
    Hard,
    Keep,
    Plain,
    Renoise,
    Seen,
    Stable,
    Threshold,
    rank,
)

MASK, STATES, ROWS = 63, 500, 3
SEEDS = range(STATES // ROWS + 1)


def scene(seed: int, B: int = ROWS, N: int = 4, L: int = 8) -> tuple[Candidates, Seen]:
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    tok = torch.where(rand(B, N, L) < 0.6, MASK, torch.randint(0, 60, (B, N, L), generator=rng)).int()
    live = rand(B, N, L) < 0.9
    conf = (rand(B, N, L) * 8).round() / 8 if seed % 2 else rand(B, N, L)  # every other scene has ties
    c = Candidates(torch.randint(0, 60, (B, N, L), generator=rng).int(), conf)
    return c, Seen(tok, live & (tok == MASK), live, rand(B, N), rand(B), rand(B), MASK)


def threshold_twin(c: Candidates, w: Seen) -> Tensor:
    take = torch.zeros_like(w.todo)
    for b in range(take.shape[0]):
        for n in range(take.shape[1]):
            todo = [i for i in range(take.shape[2]) if w.todo[b, n, i]]
            sure = [i for i in todo if c.conf[b, n, i] > w.accept[b]]
            if not sure and todo and w.before[b, n] >= w.force_at[b]:
                sure = [max(todo, key=lambda i: (float(c.conf[b, n, i]), -i))]
            for i in sure:
                take[b, n, i] = True
    return take


def fixed_twin(c: Candidates, w: Seen, k: int) -> Tensor:
    take = torch.zeros_like(w.todo)
    for b in range(take.shape[0]):
        for n in range(take.shape[1]):
            todo = [i for i in range(take.shape[2]) if w.todo[b, n, i]]
            if todo:
                for i in sorted(todo, key=lambda i: (-float(c.conf[b, n, i]), i))[:k]:
                    take[b, n, i] = True
                break
    return take


def test_threshold_equals_its_twin() -> None:
    for seed in SEEDS:
        c, w = scene(seed)
        assert torch.equal(Threshold()(c, w), threshold_twin(c, w)), seed


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_fixed_equals_its_twin(k: int) -> None:
    for seed in SEEDS:
        c, w = scene(seed)
        assert torch.equal(Fixed(k)(c, w), fixed_twin(c, w, k)), seed


def test_threshold_is_strict_and_leaves_nan_alone() -> None:
    c, w = scene(0, B=1, N=1, L=4)
    todo = torch.ones(1, 1, 4, dtype=torch.bool)
    w = w._replace(todo=todo, accept=torch.tensor([0.5]), force_at=torch.tensor([0.9]), before=torch.zeros(1, 1))
    c = c._replace(conf=torch.tensor([[[0.5, 0.51, float("nan"), 0.2]]]))
    assert Threshold()(c, w).tolist() == [[[False, True, False, False]]]


def test_rank_counts_the_surer_ones_and_ties_go_to_the_lower_position() -> None:
    assert rank(torch.tensor([0.1, 0.5, 0.5, 0.9])).tolist() == [3, 1, 2, 0]


def places(x: Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, x.shape)))


def test_keep_equals_its_twin() -> None:
    for seed in SEEDS:
        c, w = scene(seed)
        take = Threshold()(c, w)
        tok = Keep()(c, w, take)
        for at in places(tok):
            assert tok[at] == (c.tok[at] if take[at] else w.tok[at]), (seed, at)


def test_filled_equals_its_twin() -> None:
    seen = set[bool]()
    for seed in SEEDS:
        c, w = scene(seed, L=3)
        tok = Keep()(c, w, Threshold()(c, w))
        whole = Filled()(c, w, tok)
        for b, n in places(whole):
            want = MASK not in tok[b, n].tolist()
            assert whole[b, n] == want, (seed, b, n)
            seen.add(want)
    assert seen == {True, False}


def test_hard_equals_its_twin_and_plain_says_what_the_sampler_says() -> None:
    table = torch.randn(MASK + 1, 3, generator=torch.Generator().manual_seed(0))
    for seed in SEEDS:
        c, w = scene(seed)
        shown = Hard()(lambda ids: table[ids.long()], w.tok.flatten(1), {}).view(*w.tok.shape, 3)
        for at in places(w.tok):
            assert shown[at].tolist() == table[int(w.tok[at])].tolist(), (seed, at)
        assert Plain()(c, w) is c


def canvas_scene(seed: int) -> tuple[Candidates, Seen]:
    """A scene with entropies, some of them equal, and calm forwards; block n has entropies of about 0.06 · 4ⁿ."""
    c, w = scene(seed)
    rng = torch.Generator().manual_seed(seed + 1000)
    entropy = torch.rand(w.tok.shape, generator=rng) * (0.06 * 4.0 ** torch.arange(w.tok.shape[1])[:, None])
    if seed % 2:
        entropy = (entropy * 16).round() / 16
    return c._replace(entropy=entropy), w._replace(calm=torch.randint(0, 4, w.before.shape, generator=rng).int())


def test_entropy_bound_equals_its_twin() -> None:
    share = 0.0
    for seed in SEEDS:
        c, w = canvas_scene(seed)
        assert c.entropy is not None
        take = torch.zeros_like(w.todo)
        for b, n in places(take[..., 0]):
            H, total = c.entropy[b, n].tolist(), 0.0
            for i in sorted(range(len(H)), key=lambda i: (H[i], i)):
                take[b, n, i] = bool(w.live[b, n, i]) and total <= w.accept[b]
                total += H[i]
        assert torch.equal(EntropyBound()(c, w), take), seed
        share += float(take.float().mean()) / len(SEEDS)
    assert 0.1 < share < 0.9


def test_renoise_equals_its_twin() -> None:
    for seed in SEEDS:
        c, w = canvas_scene(seed)
        take = w.live & (c.conf > 0.5)
        tok = Renoise()(c, w, take)
        for at in places(take):
            assert tok[at] == (c.tok[at] if take[at] else MASK), (seed, at)


@pytest.mark.parametrize(("forwards", "below"), [(0, 0.1), (1, 0.05), (2, 0.5), (3, 10.0)])
def test_stable_equals_its_twin(forwards: int, below: float) -> None:
    seen = set[bool]()
    for seed in SEEDS:
        c, w = canvas_scene(seed)
        assert c.entropy is not None and w.calm is not None
        whole = Stable(forwards, below)(c, w, c.tok)
        for b, n in places(whole):
            H = c.entropy[b, n].tolist()
            want = int(w.calm[b, n]) >= forwards and sum(H) / len(H) < below
            assert whole[b, n] == want, (seed, b, n)
            seen.add(want)
    assert seen == {True, False}


def test_a_canvas_cools_from_hot_towards_cold() -> None:
    heat = Canvas(steps=4, hot=0.8, cold=0.4).heat(torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    torch.testing.assert_close(heat, torch.tensor([0.8, 0.7, 0.6, 0.5]))
