"""The step on a network that is a table: what it decides, commits and stores is known beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dlx.graphs import buffer
from dlx.graphs.buffer import BlockBuffer, Row
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Fixed
from dlx.graphs.step import Ids, leading, step_
from dlx.ops.attention import View

MASK, V, L, S, W = 31, 32, 4, 8, 8
STOP = 30


class Table(nn.Module):
    """Predicts `script[position]`, with a confidence that the position alone decides; K and V are the token ids."""

    def __init__(self, script: list[int], sharp: list[float]) -> None:
        super().__init__()
        self.script, self.sharp = torch.tensor(script), torch.tensor(sharp)
        self.forwards = 0
        self.views: list[View] = []

    def embed(self, tok: Tensor) -> Tensor:
        return tok[..., None].float()

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        self.forwards += 1
        self.views.append(view)
        row, c = (view.seen > view.pos).nonzero(as_tuple=True)
        pos = view.pos[row, c].long()
        kv[0][:, view.pages[row, pos // S].long(), pos % S, 0, 0] = x[row, c, 0]
        pos = view.pos.long().clamp_max(len(self.script) - 1)
        return nn.functional.one_hot(self.script[pos], V).float() * self.sharp[pos][..., None]

    def head(self) -> Tensor:
        return torch.eye(V)


def begin(policy: Policy, rows: list[dict[str, object]]) -> tuple[BlockBuffer, tuple[Tensor, ...], Tensor]:
    """A buffer with these rows, K/V pages of NaN, and an outbox."""
    B, N = len(rows), policy.N
    buf = buffer.allocate(B, N, L, W, 8, torch.device("cpu"), mem=replace(policy, L=L).memory(), T=S * W + 1)
    usual = {"accept": 0.9, "open_at": 0.1, "force_at": 0.9, "temp": 0.0, "top_p": 1.0}
    usual |= {name: getattr(policy, name) for name in buffer.NUMBERS if name not in usual}
    for slot, r in enumerate(rows):
        prompt = [1] * int(r.get("prompt", 0))  # type: ignore[call-overload]
        start = len(prompt) // L * L
        row = Row(
            tok=prompt[start:],
            start=start,
            pages=[slot * W + i for i in range(W)],
            num=tuple(float(r.get(name, usual[name])) for name in buffer.NUMBERS),  # type: ignore[arg-type]
            ints=(
                len(prompt) + int(r.get("max_tokens", 12)),
                int(r.get("max_nfe", 1000)),
                int(r.get("ignore_eos", 0)),
                0,
                len(prompt),
                int(r.get("max_repetition_run", buffer.UNLIMITED)),
                0,
                -1,
            ),  # type: ignore[call-overload]
            stops=[STOP],
            seed=slot,
        )
        fixed: Any = r.get("fixed")
        fixed = None if fixed is None else torch.tensor(fixed, dtype=torch.int32)
        buffer.admit_(buf, slot, buffer.pack(row, L, W, 8), MASK, fixed)
    kv = (torch.full((2, B * W, S, 1, 1), float("nan")),)
    return buf, kv, torch.zeros(B, N * L + buffer.FACTS, dtype=torch.int32)


def decode(
    policy: Policy, net: Table, rows: list[dict[str, object]], most: int = 64
) -> list[tuple[list[int], int, int]]:
    """(positions' tokens delivered, forwards, why) of each row."""
    buf, kv, out = begin(policy, rows)
    text: list[list[int]] = [[] for _ in rows]
    ends = [(0, 0)] * len(rows)
    for _ in range(most):
        step_(policy, Ids(MASK, V), net, buf, kv, out)
        for b, row in enumerate(out.tolist()):
            n, nfe, why, _ = row[-buffer.FACTS :]
            text[b] += row[:n]
            if why:
                ends[b] = (nfe, why)
        if bool(buf.done.all()):
            break
    return [(t, *e) for t, e in zip(text, ends)]


def sure(n: int) -> Table:
    return Table(list(range(1, 21)) * (n // 20 + 1), [50.0] * (n + 20))


def test_a_block_a_forward_and_none_for_the_commit() -> None:
    assert decode(POLICIES["single_bd"], sure(64), [{"max_tokens": 12}]) == [(list(range(1, 13)), 3, buffer.LENGTH)]


def test_fixed_takes_k_tokens_a_forward() -> None:
    for k, forwards in ((1, 12), (2, 6), (4, 3), (3, 6)):
        policy = replace(POLICIES["fixed"], select=Fixed(k))
        assert decode(policy, sure(64), [{"max_tokens": 12}]) == [(list(range(1, 13)), forwards, buffer.LENGTH)]


def test_the_answer_is_cut_at_the_limit() -> None:
    for n in (1, 3, 4, 5, 11):
        (text, nfe, why), *_ = decode(POLICIES["single_bd"], sure(64), [{"max_tokens": n}])
        assert (text, nfe, why) == (list(range(1, n + 1)), -(-n // L), buffer.LENGTH)


def test_the_answer_ends_after_the_stop_id_in_the_forward_that_decides_its_block() -> None:
    net = Table([1, 2, 3, 4, 5, STOP, 7, 8] + [9] * 16, [50.0] * 24)
    assert decode(POLICIES["single_bd"], net, [{}]) == [([1, 2, 3, 4, 5, STOP], 2, buffer.STOP)]
    text, nfe, why = decode(POLICIES["single_bd"], net, [{"ignore_eos": 1}])[0]
    assert (len(text), nfe, why) == (12, 3, buffer.LENGTH)


def test_a_stop_id_in_the_prompt_tail_ends_nothing() -> None:
    policy = POLICIES["single_bd"]
    buf, kv, out = begin(policy, [{"prompt": 6}])
    buf.tok[0, 0, 1] = STOP
    step_(policy, Ids(MASK, V), sure(64), buf, kv, out)
    assert out[0].tolist()[-buffer.FACTS :] == [4, 1, buffer.RUNNING, 4]


def test_spent_forwards_deliver_the_decided_tokens_before_the_first_mask() -> None:
    sharp = [3.0] * 24
    sharp[0], sharp[1], sharp[3] = 9.0, 8.0, 7.0  # decided one a forward in this order: 0, 1, 3, …
    net = Table(list(range(1, 25)), sharp)
    row = {"accept": 1.0, "max_nfe": 3}
    assert decode(POLICIES["single_bd"], net, [row]) == [([1, 2], 3, buffer.MAX_NFE)]


def test_thresholds_are_columns_of_the_row() -> None:
    low = Table(list(range(1, 25)), [4.0] * 24)  # p(argmax) ≈ 0.65
    one, two = decode(POLICIES["single_bd"], low, [{"accept": 0.5}, {"accept": 0.9}])
    assert (one[0], two[0]) == (list(range(1, 13)),) * 2
    assert (one[1], two[1]) == (3, 12)


def test_later_blocks_open_while_the_first_decodes() -> None:
    slow_first = Table(list(range(1, 25)), [4.0, 4.0, 50.0, 50.0] + [50.0] * 20)
    text, nfe, _ = decode(POLICIES["multi_bd"], slow_first, [{"max_tokens": 16, "accept": 0.9}])[0]
    # 1: half of block 0 · 2: one more of it, and block 1 · 3: its last, and block 2 · 4: block 3
    assert (text, nfe) == (list(range(1, 17)), 4)


def test_a_block_past_the_limit_is_never_opened() -> None:
    policy = POLICIES["multi_bd"]
    buf, kv, out = begin(policy, [{"max_tokens": 6}])
    net = sure(64)
    while not bool(buf.done.all()):
        step_(policy, Ids(MASK, V), net, buf, kv, out)
        assert int(buf.start[0]) + int(buf.open[0]) * L <= 8
    assert not kv[0][:, 1:].isfinite().any()  # nothing beyond position 7, in page 0


def test_final_kv_is_of_the_decided_tokens() -> None:
    policy = POLICIES["single_bd"]
    buf, kv, out = begin(policy, [{"max_tokens": 16}])
    net = Table(list(range(1, 25)), [5.0] * 24)  # one token a forward: every forward before the last sees masks
    while int(buf.start[0]) < 12:
        step_(policy, Ids(MASK, V), net, buf, kv, out)
    assert kv[0][0].flatten()[:12].tolist() == list(range(1, 13))


def test_a_finished_row_is_inert() -> None:
    policy = POLICIES["multi_bd"]
    buf, kv, out = begin(policy, [{"max_tokens": 4}, {"max_tokens": 16, "accept": 1.0}])
    net = sure(64)
    step_(policy, Ids(MASK, V), net, buf, kv, out)
    assert buf.done.tolist() == [True, False]
    still = [t[0].clone() for t in (*buf[:-1], *buf.mem.values())]
    pages = kv[0][:, :W].clone()
    for _ in range(3):
        step_(policy, Ids(MASK, V), net, buf, kv, out)
        assert out[0].tolist()[-buffer.FACTS : -1] == [0, 1, buffer.RUNNING]
    assert all(torch.equal(a, b[0]) for a, b in zip(still, (*buf[:-1], *buf.mem.values())))
    assert torch.equal(pages.nan_to_num(), kv[0][:, :W].nan_to_num())
    assert (net.views[-1].seen[0] == 0).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    sharp = [2.0 + (7 * i) % 5 for i in range(64)]
    rows = [{"prompt": p, "accept": a, "max_tokens": 14} for p, a in ((0, 0.5), (3, 0.8), (9, 0.97), (4, 0.9))]
    for name in ("single_bd", "multi_bd"):
        together = decode(POLICIES[name], Table(list(range(1, 30)) * 3, sharp), rows)
        alone = [decode(POLICIES[name], Table(list(range(1, 30)) * 3, sharp), [row])[0] for row in rows]
        assert together == alone


def test_logits_that_are_not_finite_end_their_row_alone() -> None:
    policy = POLICIES["single_bd"]
    net = sure(64)
    net.sharp[4:] = float("nan")  # positions of the row without a prompt; the other stands behind 16 tokens… of NaN too
    (text, _, why), (_, _, other) = decode(policy, net, [{}, {"prompt": 0, "max_tokens": 4}])
    assert (text, why, other) == ([1, 2, 3, 4], buffer.BAD, buffer.LENGTH)


def test_leading_counts_whole_places_up_to_the_first_that_is_not() -> None:
    whole = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert leading(whole).tolist() == [2, 0, 4]


def test_a_row_packs_and_unpacks_to_the_same() -> None:
    buf = buffer.allocate(2, 2, L, W, 8, torch.device("cpu"))
    num = (0.25, 0.5, 0.75, 1.5, 0.875, 0.125, 0.375, 1.0)
    ints = (40, 17, 1, 3, 6, 9, 0, -1)
    row = Row([7, 8], 20, [3, 1, 4], num, ints, [5, 6], 2**61 + 12345)
    buffer.admit_(buf, 1, buffer.pack(row, L, W, 8), MASK)
    assert buf.tok[1].tolist() == [[7, 8, MASK, MASK], [MASK] * 4, [MASK] * 4]
    assert buf.held[1].sum().item() == 2
    assert buf.held[1, 0, :2].all()
    assert (buf.start[1].item(), buf.open[1].item(), buf.seed[1].item()) == (20, 1, 2**61 + 12345)
    assert buf.pages[1].tolist() == [3, 1, 4, 0, 0, 0, 0, 0]
    assert buf.num[1].tolist() == list(num)
    assert buf.ints[1].tolist() == list(ints)
    assert buf.stops[1].tolist() == [5, 6, -1, -1, -1, -1, -1, -1]
    assert buf.done.tolist() == [True, False]
