"""Packing blocks with work changes which forwards compute them, and no answer."""

from __future__ import annotations

import random

import pytest
import torch

from dlx import LLM, SamplingParams
from dlx.graphs import buffer, packing, step
from dlx.tasks import sample


def rows(rng: random.Random, B: int, N: int) -> tuple[list[int], list[int]]:
    """(shown, lead) of B rows: leading places with work, and how many of them only commit."""
    shown = [rng.randint(0, N) for _ in range(B)]
    lead = [rng.randint(0, max(0, n - 1)) for n in shown]
    return [n + (m > 0) for n, m in zip(shown, lead, strict=True)], lead


@pytest.mark.parametrize("N", [1, 2, 4])
def test_every_row_gets_its_least_and_seats_are_never_overbooked(N: int) -> None:
    rng = random.Random(N)
    for _ in range(200):
        B = rng.randint(1, 12)
        shown, lead = rows(rng, B, N)
        room = rng.randint(B * N, B * (N + 1))
        taken = packing.fitting(torch.tensor(shown), torch.tensor(lead), room).tolist()
        assert sum(taken) <= room
        left = room - sum(m if m else n for n, m in zip(shown, lead, strict=True))
        for n, m, t in zip(shown, lead, taken, strict=True):  # in order, each as long as what is wanted so far fits
            left -= n - m if m else 0
            assert t == (n if left >= 0 or not m else m)


def test_a_seat_holds_the_block_that_is_computed_there() -> None:
    rng = random.Random(0)
    B, places, L, W = 5, 3, 4, 6
    buf = buffer.allocate(B, places - 1, L, W, 2, torch.device("cpu"))
    buf.tok.random_(0, 100)
    buf.start.copy_(torch.arange(B) * 8)
    buf.pages.copy_(torch.arange(B * W).view(B, W))
    for _ in range(20):
        taken = [rng.randint(0, places) for _ in range(B)]
        room = sum(taken) + rng.randint(0, 3) or 1
        packed = packing.Packed.of(buf, torch.tensor(taken, dtype=torch.int32), room)
        blocks = [(b, p) for b in range(B) for p in range(taken[b])]
        h = torch.randn(room, L, 2)
        spread = packed.places(h, L)
        for s, (b, p) in enumerate(blocks):
            assert packed.pos[s].tolist() == [8 * b + L * p + i for i in range(L)]
            assert packed.seen[s].tolist() == [8 * b + L * (p + 1)] * L
            assert torch.equal(packed.pages[s], buf.pages[b])
            assert torch.equal(packed.tokens(buf.tok)[s], buf.tok[b, p])
            assert torch.equal(spread[b, p], h[s])
        assert not packed.seen[len(blocks) :].any()  # empty seats see and store nothing


@pytest.mark.parametrize(
    ("B", "N", "L", "want"),
    [
        (1, 1, 32, None), (3, 1, 32, None), (4, 1, 32, 5), (5, 1, 32, 7), (16, 1, 32, 20),  # a quarter of the rows
        (16, 1, 4, None), (32, 1, 4, 48), (128, 1, 4, 192), (32, 1, 8, 40), (256, 1, 1, None),
        (16, 4, 4, 72), (64, 4, 4, 288),
    ],
)  # fmt: skip
def test_packing_begins_where_positions_cost(B: int, N: int, L: int, want: int | None) -> None:
    assert packing.seats(B, N, L) == want


@pytest.fixture(params=["as many seats as a step takes", "no seat to spare", "not packed"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no seat to spare":
        monkeypatch.setattr(step, "seats", lambda B, N, L: B * N)
    if request.param == "not packed":
        monkeypatch.setattr(step, "seats", lambda B, N, L: None)
    return request.param


@pytest.mark.parametrize("policy", ["single_bd", pytest.param("multi_bd", marks=pytest.mark.slow)])
def test_packed_rows_answer_as_rows_alone(policy: str, packed: str) -> None:
    rng = random.Random(5)
    mix = {"gsm": 1, "arith": 1, "sort": 1}
    prompts = [[{"role": "user", "content": sample(rng, mix, want_held=True)[1]}] for _ in range(10)]
    params = [SamplingParams(max_tokens=64, temperature=t, seed=7) for t in [0.0] * 7 + [0.8] * 3]
    answers = []
    for slots in (10, 1):
        with LLM(policy=policy, max_num_seqs=slots, graphs="off", device="cpu") as llm:
            answers.append([(o.token_ids, o.nfe) for o in llm.generate(prompts, params)])
            L = llm.policy.L
            assert L is not None and (packing.seats(slots, llm.policy.N, L) is None) == (slots == 1)
    assert answers[0] == answers[1]
