"""Each rule against a twin written as loops over rows, blocks and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlx.graphs.rules import Candidates, Filled, Fixed, Hard, Keep, Seen, Threshold, rank

MASK = 63


def scene(seed: int, B: int = 3, N: int = 4, L: int = 8) -> tuple[Candidates, Seen]:
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


@pytest.mark.parametrize("seed", range(100))
def test_threshold_equals_its_twin(seed: int) -> None:
    c, w = scene(seed)
    assert torch.equal(Threshold()(c, w), threshold_twin(c, w))


@pytest.mark.parametrize("k", [1, 3, 8, 20])
@pytest.mark.parametrize("seed", range(25))
def test_fixed_equals_its_twin(seed: int, k: int) -> None:
    c, w = scene(seed)
    assert torch.equal(Fixed(k)(c, w), fixed_twin(c, w, k))


def test_threshold_is_strict_and_leaves_nan_alone() -> None:
    c, w = scene(0, B=1, N=1, L=4)
    todo = torch.ones(1, 1, 4, dtype=torch.bool)
    w = w._replace(todo=todo, accept=torch.tensor([0.5]), force_at=torch.tensor([0.9]), before=torch.zeros(1, 1))
    c = c._replace(conf=torch.tensor([[[0.5, 0.51, float("nan"), 0.2]]]))
    assert Threshold()(c, w).tolist() == [[[False, True, False, False]]]


def test_rank_counts_the_surer_ones_and_ties_go_to_the_lower_position() -> None:
    assert rank(torch.tensor([0.1, 0.5, 0.5, 0.9])).tolist() == [3, 1, 2, 0]


def test_keep_writes_what_is_taken_and_nothing_else() -> None:
    c, w = scene(4)
    take = Threshold()(c, w)
    tok = Keep()(c, w, take)
    assert torch.equal(tok[take], c.tok[take])
    assert torch.equal(tok[~take], w.tok[~take])


def test_filled_means_no_mask_is_left() -> None:
    c, w = scene(5, B=1, N=2, L=4)
    tok = torch.tensor([[[1, 2, 3, 4], [1, MASK, 3, 4]]], dtype=torch.int32)
    assert Filled()(c, w, tok).tolist() == [[True, False]]


def test_hard_shows_the_tokens_as_they_are() -> None:
    table = torch.randn(8, 3)
    tok = torch.tensor([[1, 5]])
    assert torch.equal(Hard()(lambda t: table[t], tok), table[tok])
