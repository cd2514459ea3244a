"""Rules of whole sequences against twins: loops over the lists of one row. The rows have one block."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from torch import Tensor

from dlx.graphs import loop
from dlx.graphs.buffer import FACTS, LENGTH
from dlx.graphs.rules import (
    Annealed,
    Candidates,
    Even,
    Factor,
    Refresh,
    Seen,
    Select,
    SubBlock,
    Threshold,
    Whole,
    Within,
)
from dlx.graphs.rules.seen import ahead, rank
from dlx.graphs.rules.turn import After

MASK, STATES, B, L = 63, 500, 5, 8


def scene(seed: int) -> tuple[Candidates, Seen]:
    """Five rows, from all masks to none; every other scene has ties."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        x = torch.rand(*shape, generator=rng)
        return (x * 8).round() / 8 if seed % 2 else x

    share = torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0])[:, None, None]
    masked = torch.rand(B, 1, L, generator=rng) < share
    tok = torch.where(masked, MASK, torch.randint(0, 60, (B, 1, L), generator=rng)).int()
    live = torch.rand(B, 1, L, generator=rng) < 0.9
    c = Candidates(tok, rand(B, 1, L), rank=rand(B, 1, L) - 0.5 if seed % 3 else None)
    turn, span = (torch.randint(0, high, (B,), generator=rng).int() for high in (7, 9))
    one = torch.ones(B, 1)
    w = Seen(
        tok,
        live & (tok == MASK),
        live,
        one,
        rand(B),
        one[:, 0],
        MASK,
        turn=turn,
        span=span,
        draw=rand(B, 1, L).clamp_max(0.99),
    )
    return c, w


def lists(c: Candidates, w: Seen, b: int) -> tuple[list[int], list[float], list[float], list[float]]:
    """Undecided positions; confidence, rank and draw of each position."""
    assert w.draw is not None
    todo = [i for i in range(L) if w.todo[b, 0, i]]
    return todo, c.conf[b, 0].tolist(), c.order()[b, 0].tolist(), w.draw[b, 0].tolist()


def surest(todo: list[int], by: list[float], n: int) -> set[int]:
    return set(sorted(todo, key=lambda i: (-by[i], i))[: max(n, 0)])


def factor(c: Candidates, w: Seen, b: int) -> set[int]:
    todo, conf, _, _ = lists(c, w, b)
    order, n = sorted(todo, key=lambda i: (-conf[i], i)), 1
    while n < len(order) and conf[order[n]] >= 1 - 1.5 / (n + 2):
        n += 1
    return set(order[:n])


def within(c: Candidates, w: Seen, b: int) -> set[int]:
    todo, conf, order, _ = lists(c, w, b)
    first = [i for i in todo if i // 4 == min(todo) // 4]
    return {i for i in first if conf[i] > w.accept[b]} or surest(first, order, 1)


def even(steps: int | None, random: bool):
    def twin(c: Candidates, w: Seen, b: int) -> set[int]:
        assert w.turn is not None and w.span is not None
        todo, _, order, draw = lists(c, w, b)
        left = max(1, (int(w.span[b]) if steps is None else steps) - int(w.turn[b]))
        return surest(todo, draw if random else order, math.ceil(len(todo) / left))

    return twin


def annealed(steps: int | None, random: bool):
    def twin(c: Candidates, w: Seen, b: int) -> set[int]:
        assert w.turn is not None and w.span is not None
        todo, _, order, draw = lists(c, w, b)
        n, of = int(w.turn[b]), int(w.span[b]) if steps is None else steps
        if n + 1 >= of:
            return set(todo)
        now, then = (1 - (1 - 1e-3) * i / of for i in (n, n + 1))
        if random:
            return {i for i in todo if draw[i] < 1 - then / now}
        return surest(todo, order, int(len(todo) * (1 - then / now)))

    return twin


@pytest.mark.parametrize(
    ("rule", "twin"),
    [
        (Factor(1.5), factor),
        (Within(4), within),
        (Even(), even(None, False)),
        (Even(5), even(5, False)),
        (Even(3, random=True), even(3, True)),
        (Annealed(), annealed(None, False)),
        (Annealed(4), annealed(4, False)),
        (Annealed(6, random=True), annealed(6, True)),
    ],
)
def test_a_rule_equals_its_twin(rule: Select, twin) -> None:
    taken = 0
    for seed in range(STATES // B + 1):
        c, w = scene(seed)
        take = rule(c, w)
        for b in range(B):
            want = twin(c, w, b) if w.todo[b].any() else set()
            assert {i for i in range(L) if take[b, 0, i]} == want, (rule, seed, b)
            taken += len(want)
    assert taken > STATES // 3


@pytest.mark.parametrize(("masks", "steps"), [(8, 8), (8, 3), (7, 3), (5, 8), (1, 4), (8, 1)])
def test_an_even_split_gives_the_remainder_to_the_first_steps(masks: int, steps: int) -> None:
    tok = torch.full((1, 1, 8), MASK, dtype=torch.int32)
    tok[0, 0, masks:] = 1
    shares = []
    for turn in range(steps):
        todo = tok == MASK
        one = torch.ones(1)
        w = Seen(
            tok, todo, todo, one[None], one, one, MASK, turn=torch.tensor([turn]), span=torch.tensor([8]),
            draw=torch.rand(1, 1, 8),
        )  # fmt: skip
        take = Even(steps)(Candidates(tok, torch.rand(1, 1, 8)), w)
        shares.append(int(take.sum()))
        tok = torch.where(take, 1, tok)
    assert shares == [masks // steps + (i < masks % steps) for i in range(steps)]


def test_within_takes_any_rule() -> None:
    c, w = scene(0)
    assert torch.equal(Within(8, Even(3))(c, w), Even(3)(c, w))
    assert torch.equal(Within(8)(c, w), Threshold()(c, w))


def test_ranks_of_many_are_the_same_by_sorting() -> None:
    conf = (torch.rand(3, 300) * 50).round()
    assert torch.equal(rank(conf), ahead(conf).sum(-1))


def test_a_turn_equals_its_twin() -> None:
    rng = Random(0)
    for _ in range(STATES // B):
        tok = [[MASK if rng.random() < 0.5 else 1 for _ in range(L)] for _ in range(B)]
        moved, age = [rng.random() < 0.3 for _ in range(B)], [rng.randrange(1, 6) for _ in range(B)]
        a = After(torch.tensor(tok, dtype=torch.int32), torch.tensor(moved), torch.tensor(age, dtype=torch.int32), MASK)
        assert Whole()(a).tolist() == [0] * B
        assert Refresh(warm_up=3)(a).tolist() == [int(not m and n > 3) for m, n in zip(moved, age, strict=True)]
        want = []
        for row, gone in zip(tok, moved, strict=True):
            at = row.index(MASK) // 4 * 4 if MASK in row else 0
            want.append(int(row[at] != MASK and not gone))
        assert SubBlock(4)(a).tolist() == want


def test_a_launch_tells_the_last_scope_that_a_row_wants_and_why_it_ended() -> None:
    out = torch.zeros(3, 8 + FACTS, dtype=torch.int32)
    for whys in ((-1, 0, LENGTH), (-2, -1, 0), (0, -1, 0)):
        loop.gather_(out, torch.tensor([[7, 7, 1, 5, why, 0] for why in whys], dtype=torch.int32))
    assert out[:, -2].tolist() == [0, -1, LENGTH]
    assert out[:, :3].tolist() == [[7, 7, 7]] * 3
