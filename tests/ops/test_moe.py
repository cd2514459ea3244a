"""Routing and experts, held against plain loops over tokens, groups, slots and experts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.errors import ShapeError
from dlx.ops import OPS
from dlx.ops.linear import squared
from dlx.ops.moe import listing, tiles
from dlx.ops.moe.route import Launch, launch
from dlx.ops.op import FP8


class Router(NamedTuple):
    """How a family routes, at its own number of experts."""

    X: int
    K: int
    groups: int = 1
    top_groups: int = 1
    sigmoid: bool = False
    bias: bool = False
    renormalise: bool = True
    factor: float = 1.0
    scale: bool = False


FAMILIES = {
    "SDAR-MoE": Router(128, 8),
    "LLaDA-MoE": Router(64, 8, renormalise=False),
    "LLaDA2": Router(256, 8, 8, 4, sigmoid=True, bias=True, factor=2.5),
    "DiffusionGemma": Router(128, 8, scale=True),
    "softmax with bias and groups": Router(24, 3, 4, 2, bias=True, renormalise=False, factor=0.5),
}
each_family = pytest.mark.parametrize("how", FAMILIES.values(), ids=FAMILIES)


def routed(z: list[float], how: Router, bias: list[float], scale: list[float]) -> tuple[list[int], list[float]]:
    """One token's experts and weights, from its logits, by definition."""
    if how.sigmoid:
        p = [1 / (1 + math.exp(-v)) for v in z]
    else:
        total = sum(math.exp(v - max(z)) for v in z)
        p = [math.exp(v - max(z)) / total for v in z]
    choice = [a + b for a, b in zip(p, bias, strict=True)]
    size = how.X // how.groups
    score = {}
    for g in range(how.groups):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        score[g] = sum(members[:2])
    kept = sorted(score, key=lambda g: (-score[g], g))[: how.top_groups]
    open_to = [e for e in range(how.X) if e // size in kept]
    ids = sorted(open_to, key=lambda e: (-choice[e], e))[: how.K]
    weights = [p[e] for e in ids]
    if how.renormalise:
        weights = [w / sum(weights) for w in weights]
    return ids, [w * how.factor * scale[e] for w, e in zip(weights, ids, strict=True)]


def question(how: Router, T: int = 6, E: int = 32, normalised: bool = True) -> tuple[Any, ...]:
    """route's arguments: random, so that no two experts are near each other."""
    rng = torch.Generator().manual_seed(11)
    x = torch.randn(T, E, generator=rng)
    weight = torch.randn(how.X, E, generator=rng) * E**-0.5 * 1.5
    bias = 0.3 * torch.randn(how.X, generator=rng) if how.bias else None
    scale = 1 + 0.2 * torch.randn(how.X, generator=rng) if how.scale else None
    squares = None if normalised else squared(x)
    static = (how.K, how.groups, how.top_groups, how.sigmoid, how.renormalise, how.factor)
    return x, weight, squares, bias, scale, 1e-6, *static


def agree(got: tuple[Tensor, Tensor], args: tuple[Any, ...], how: Router) -> None:
    """`got` is what the loops give for route's arguments."""
    x, weight, squares, bias, scale = (None if a is None else a.double() for a in args[:5])
    assert x is not None and weight is not None
    z = x @ weight.T
    if squares is not None:
        z = z / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    for t in range(len(x)):
        ids, weights = routed(
            z[t].tolist(),
            how,
            [0.0] * how.X if bias is None else bias.tolist(),
            [1.0] * how.X if scale is None else scale.tolist(),
        )
        assert got[0][t].tolist() == ids, t
        torch.testing.assert_close(got[1][t].double(), torch.tensor(weights).double(), rtol=3e-5, atol=1e-7)


@each_family
@pytest.mark.parametrize("normalised", [True, False], ids=["", "not yet normalised"])
def test_routing_is_what_the_loops_give(how: Router, normalised: bool) -> None:
    args = question(how, normalised=normalised)
    agree(OPS["route"](*args), args, how)


@pytest.mark.interp
@each_family
def test_the_interpreted_router_is_what_the_loops_give(how: Router) -> None:
    args = question(how, T=3, normalised=False)
    agree(OPS["route"].kernel(*args), args, how)


@pytest.mark.interp
@pytest.mark.parametrize("splits", [1, 3])
def test_the_router_chooses_the_same_for_any_split_of_its_depth(splits: int) -> None:
    how = FAMILIES["LLaDA2"]
    args = question(how, T=18, E=96)
    agree(launch(*args, 0, None, Launch(BX=64, BE=32, splits=splits, warps=4, stages=2)), args, how)


@each_family
def test_ties_go_to_the_lowest_expert_of_the_lowest_groups(how: Router) -> None:
    args = question(how._replace(bias=False), T=2)
    ids, weights = OPS["route"](torch.zeros_like(args[0]), *args[1:])
    assert ids.tolist() == [list(range(how.K))] * 2
    assert weights.isfinite().all()


@pytest.mark.interp
@each_family
def test_the_interpreted_router_breaks_ties_to_the_lowest(how: Router) -> None:
    args = question(how._replace(bias=False), T=2)
    ids, _ = OPS["route"].kernel(torch.zeros_like(args[0]), *args[1:])
    assert ids.tolist() == [list(range(how.K))] * 2


def test_equal_experts_are_taken_in_their_order() -> None:
    weight = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0, 3.0])[:, None].repeat(1, 4)
    ids, weights = OPS["route"](torch.ones(1, 4), weight, None, None, None, 1e-6, 4, 1, 1, False, True, 1.0)
    assert ids.tolist() == [[1, 3, 5, 2]]
    assert torch.equal(weights[0, :3], weights[0, :1].expand(3))


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_token_without_numbers_still_gets_distinct_experts() -> None:
    x, *rest = question(FAMILIES["LLaDA2"], T=2)
    x[0] = math.nan
    ids, _ = OPS["route"].kernel(x, *rest)
    assert all(0 <= e < 256 for e in ids[0].tolist())
    assert len(set(ids[0].tolist())) == 8


@pytest.mark.interp
def test_a_router_in_fp32_reads_narrow_activations() -> None:
    how = FAMILIES["SDAR-MoE"]
    x, *rest = question(how)
    args = (x.bfloat16(), *rest)
    agree(OPS["route"].kernel(*args), args, how)


@pytest.mark.parametrize(
    ("K", "groups", "top_groups", "message"),
    [
        (4, 5, 1, "number of groups is 5; expected a divisor of the 16 experts"),
        (4, 16, 4, "number of groups is 16; expected 8 at most"),
        (4, 4, 5, "number of chosen groups is 5; expected 1 to the 4 groups"),
        (9, 4, 2, "route's K is 9; expected 1 to 8, the experts of 2 of 4 groups"),
    ],
)
def test_groups_that_cannot_be_are_refused(K: int, groups: int, top_groups: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        OPS["route"](
            torch.ones(1, 4), torch.ones(16, 4), None, None, None, 1e-6, K, groups, top_groups, True, True, 1.0
        )


def mixed(args: tuple[Any, ...]) -> Tensor:
    """[T, E] fp64: what the experts give, token by token and slot by slot."""
    x, ids, weights, gate_up, down, squares, eps, gelu, up_scale, down_scale = args
    X = len(gate_up)
    gate_up, down = gate_up.double(), down.double()
    if up_scale is not None:
        gate_up, down = gate_up * up_scale.double()[..., None], down * down_scale.double()[..., None]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        row = x[t].double()
        if squares is not None:
            row = row / (squares[t].double().sum() / len(row) + eps).sqrt()
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if not 0 <= e < X:
                continue
            both = F.linear(row, gate_up[e])
            gate, up = both[: len(both) // 2], both[len(both) // 2 :]
            cube = 0.044715 * gate**3
            act = (
                0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + cube))) if gelu else gate * gate.sigmoid()
            )
            y[t] += weights[t, k].double() * F.linear(act * up, down[e])
    return y


@pytest.mark.parametrize("case", OPS["experts"].cases())
def test_the_experts_give_what_the_loops_give(case: str) -> None:
    args = OPS["experts"].cases()[case]
    y, distinct = OPS["experts"](*args)
    torch.testing.assert_close(y.double(), mixed(args), rtol=1e-4, atol=1e-5)
    assert distinct.tolist() == [len({e for e in args[1].flatten().tolist() if 0 <= e < len(args[3])})]


@pytest.mark.interp
@pytest.mark.parametrize(("BT", "case"), [(16, case) for case in OPS["experts"].cases()] + [(32, "fp8")])
def test_the_interpreted_experts_give_what_the_loops_give(BT: int, case: str) -> None:
    args = OPS["experts"].cases()[case]
    first, second = tiles.Launch(BN=32, BK=32, warps=4, stages=2), tiles.Launch(BN=64, BK=16, warps=4, stages=2)
    y, distinct = tiles.launch(*args, BT, first, second)
    torch.testing.assert_close(y.double(), mixed(args), rtol=1e-4, atol=1e-5)
    assert distinct.tolist() == [len({e for e in args[1].flatten().tolist() if 0 <= e < len(args[3])})]


def test_a_token_whose_slots_are_all_vacant_gets_zeros_and_reads_nothing() -> None:
    x, ids, weights, *rest = OPS["experts"].cases()["few tokens"]
    y, distinct = OPS["experts"](x, torch.full_like(ids, -1), torch.full_like(weights, math.nan), *rest)
    assert distinct.tolist() == [0]
    assert torch.equal(torch.nan_to_num(y), torch.zeros_like(y))


@pytest.mark.interp
def test_vacant_slots_give_zeros_whatever_their_weight() -> None:
    x, ids, weights, *rest = OPS["experts"].cases()["few tokens"]
    y, distinct = OPS["experts"].kernel(x, torch.full_like(ids, -1), torch.full_like(weights, math.nan), *rest)
    assert distinct.tolist() == [0]
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.interp
@pytest.mark.parametrize(("T", "K", "X", "BT"), [(4, 2, 9, 16), (400, 6, 3, 16), (3, 1, 1, 16)])
def test_the_list_names_every_row_of_every_expert_once(T: int, K: int, X: int, BT: int) -> None:
    rng = torch.Generator().manual_seed(T)
    ids = torch.randint(-1, X + 1, (T, K), generator=rng, dtype=torch.int32)  # some slots vacant, some experts twice
    table, pairs, distinct = listing.listed(ids, X, BT, False, {})
    flat = ids.flatten().tolist()
    want = []
    for e in range(X):
        mine = [i for i, other in enumerate(flat) if other == e]
        want += [(e, mine[i : i + BT]) for i in range(0, len(mine), BT)]
    n = int(table[0, 0])
    assert n == len(want) <= len(pairs)
    found = [(int(table[i + 1, 0]), pairs[i, : int(table[i + 1, 1])].tolist()) for i in range(n)]
    assert found == want
    assert distinct.tolist() == [len({e for e, _ in want})]


@pytest.mark.parametrize(("pairs", "X", "BT"), [(32, 256, 16), (512, 128, 64), (2400, 3, 16), (5, 2, 16), (17, 1, 16)])
def test_the_list_is_as_long_as_the_worst_case_and_no_longer(pairs: int, X: int, BT: int) -> None:
    most = 0
    for used in range(1, min(X, pairs) + 1):  # one row for all but one expert, whose rest is whole items and a bit
        most = max(most, used - 1 + -(-(pairs - used + 1) // BT))
    assert listing.most_items(pairs, X, BT) == most


@pytest.mark.parametrize(
    ("argument", "broken", "message"),
    [
        ("ids", lambda x: x.long(), "dtype of experts' ids"),
        ("weights", lambda x: x.half(), "dtype of experts' weights"),
        ("gate_up", lambda x: x.half(), "dtype of experts' gate_up"),
        ("gate_up", lambda x: x[:, 1:].contiguous(), "experts' gate and up rows is 127; expected an even number"),
        ("down", lambda x: x.transpose(1, 2), "strides of experts' down"),
        ("squares", lambda x: torch.ones(4, 9), "shape of experts' squares"),
        ("down_scale", lambda x: torch.ones(8), "shape of experts' down_scale"),
    ],
)
def test_a_wrong_argument_of_the_experts_is_named(argument: str, broken: Any, message: str) -> None:
    args = list(OPS["experts"].cases()["few tokens"])
    at = list(OPS["experts"].reference.__annotations__).index(argument)
    args[at] = broken(args[at])
    with pytest.raises(ShapeError, match=message):
        OPS["experts"](*args)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("T", [4, 32, 64, 256])
@pytest.mark.parametrize(("F", "E"), [(512, 2048), (768, 2048), (1024, 4096), (704, 2816)])
def test_the_default_tiles_let_programs_share_a_processor(F: int, E: int, T: int, itemsize: int) -> None:
    BT = tiles.choose_rows(T)
    for up, N, K in ((True, 2 * F, E), (False, E, F)):
        for w_itemsize in {itemsize, FP8[0].itemsize}:
            config = tiles.choose(up, T, BT, N, K, itemsize, w_itemsize, 99 << 10)
            assert tiles.shared_bytes(config, BT, itemsize, w_itemsize) <= 99 << 10
            assert K % config.BK == 0 and N % config.BN == 0, "the fast path takes whole tiles"
