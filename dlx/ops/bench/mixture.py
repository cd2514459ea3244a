"""Cases of a mixture of experts: routing, and the experts that the tokens chose."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.ops import OPS
from dlx.ops.bench.case import Case, normal
from dlx.ops.bench.chain import Built, copies
from dlx.ops.bench.shapes import SHAPES, Experts
from dlx.ops.op import Cost

ROWS = (4, 32, 64)


def moe(name: str) -> Iterator[Case]:
    """Nothing for a dense model."""
    shape = SHAPES[name]
    if shape.experts is None:
        return
    layers = shape.layers - shape.experts.dense_layers
    for T in ROWS:
        yield Case("moe", name, "route", T, partial(_route, shape.experts, shape.E, T), layers)
        yield Case("moe", name, "experts", T, partial(_experts, shape.experts, shape.E, T), layers)


def _route(mix: Experts, E: int, T: int, device: torch.device) -> Built:
    n = copies(2 * mix.X * E)
    routers = [normal(device, mix.X, E, scale=E**-0.5) for _ in range(n)]
    x = normal(device, T, E)
    args = [(x, w, *how(mix, device)) for w in routers]
    op = OPS["route"]

    def eager(i: int) -> Tensor:
        return torch.topk(F.linear(x, routers[i]).float().softmax(-1), mix.K).values

    return Built(lambda i: op(*args[i]), {"torch, softmax": eager}, n, op.cost(*args[0]))


def how(
    mix: Experts, device: torch.device
) -> tuple[None, Tensor | None, None, float, int, int, int, bool, bool, float, int]:
    """What `route` is told after x and the router's weight."""
    bias = torch.zeros(mix.X, device=device) if mix.sigmoid else None
    return None, bias, None, 1e-6, mix.K, mix.groups, mix.top_groups, mix.sigmoid, True, mix.scaling, mix.shared


def _experts(mix: Experts, E: int, T: int, device: torch.device) -> Built:
    """Tokens choose experts at random, all alike: the most distinct experts that there can be expected."""
    X, K, wide = mix.X + mix.shared, mix.K + mix.shared, mix.F
    n = copies(6 * min(X, T * K) * wide * E)
    x = normal(device, T, E)
    chosen = torch.rand(n, T, mix.X, device=device).argsort(-1)[..., : mix.K].int()
    always = torch.arange(mix.X, X, device=device, dtype=torch.int32).expand(n, T, -1)
    chosen = torch.cat([chosen, always], -1).contiguous()
    weights = torch.full((T, K), 1 / K, device=device)
    up = [normal(device, X, 2 * wide, E, scale=E**-0.5) for _ in range(n)]
    down = [normal(device, X, E, wide, scale=wide**-0.5) for _ in range(n)]
    args = [(x, chosen[i], weights, up[i], down[i], None, 1e-6, False) for i in range(n)]
    op = OPS["experts"]
    flat = [ids.flatten().long() for ids in chosen]
    others = {"grouped_mm": lambda i: _grouped(x, flat[i], weights, up[i], down[i])}
    costs = [op.cost(*one) for one in args]  # of the experts really touched, which differ
    cost = Cost(sum(c.flops for c in costs) // n, sum(c.bytes for c in costs) // n)
    facts = {"experts touched": sum(ids.unique().numel() for ids in flat) / n}
    return Built(lambda i: op(*args[i]), others, n, cost, facts)


def _grouped(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts as torch has them: tokens sorted by expert, grouped matmuls, weights in fp32."""
    T, K = weights.shape
    order = ids.argsort(stable=True)
    ends = torch.searchsorted(ids[order], torch.arange(up.shape[0], device=x.device), right=True).int()
    gate, rest = F.grouped_mm(x[order // K], up.mT, offs=ends).chunk(2, 1)
    y = F.grouped_mm(F.silu(gate) * rest, down.mT, offs=ends)
    back = torch.empty_like(y, dtype=torch.float32).index_copy_(0, order, y.float())
    return (back.view(T, K, -1) * weights[..., None]).sum(1).to(x.dtype)
