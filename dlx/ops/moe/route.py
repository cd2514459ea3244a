"""Which experts a token goes to, and with what weights: the router's matmul fused with the choice.

    z = x · Wᵀ (/ rms)                            in fp32; divided where `squares` are given, as `project` does
    p = softmax(z) or sigmoid(z);  c = p + bias   the bias decides who is chosen, not the weight
    ids = the K largest c, largest first, within the `top_groups` groups with the largest sum of their two best c
    weights = p[ids] (/ Σ p[ids]) · factor · scale[ids]

x        [T, E]       bf16 or fp32    weight   [X, E]     as x, or fp32
squares  [T, parts]   f32 or None     Σ squares = Σ h², for an x that is not yet divided by its rms
bias     [X]          f32 or None     scale    [X]        f32 or None, a factor of each expert
always                                how many experts X, X + 1 … every token goes to besides, with weight 1
live     [T]          i32 or None     where it is 0 or less the token is idle: its ids are -1, its weights 0
→        ids [T, K + always] int32, weights [T, K + always] f32
Work     2·T·X·E flops; reads weight once: bound by latency
Raises   ShapeError  if groups do not divide X, or the chosen groups hold fewer than K experts
Source   softmax, renormalised (SDAR-MoE), raw (LLaDA-MoE), by `scale` (DiffusionGemma); sigmoid, bias, groups, factor
         2.5 (LLaDA2; DeepSeek-V3's routing)

Ties go to the lowest group and the lowest expert.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.ops.linear import parts, squared
from dlx.ops.moe.choosing import _route
from dlx.ops.op import FLOATS, WIDE, Cost, Op, launch_options, locks, need, need_tensor, power_of_two, shared_limit
from dlx.ops.tuned import tuned

ROWS = 16  # tokens of a program


def reference(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float, always: int = 0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) @ weight.to(wide).T
    if squares is not None:
        z = z * torch.rsqrt(squares.to(wide).sum(1, keepdim=True) / x.shape[1] + eps)
    p = z.sigmoid() if sigmoid else z.softmax(-1)
    choice = z if bias is None and not sigmoid and groups == 1 else p  # softmax keeps the order, and may round it away
    if bias is not None:
        choice = choice + bias
    if groups > 1:
        members = choice.unflatten(1, (groups, -1))
        best = members.sort(-1, descending=True).values[..., :2].sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = members.masked_fill(out[..., None], float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :K]
    w = p.gather(1, ids)
    if renormalise:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    w = w * factor
    if scale is not None:
        w = w * scale.to(wide)[ids]
    if always:
        last = torch.arange(weight.shape[0], weight.shape[0] + always, device=ids.device)
        ids, w = torch.cat([ids, last.expand(len(ids), -1)], 1), F.pad(w, (0, always), value=1.0)
    if live is not None:
        idle = live[:, None] <= 0
        ids, w = ids.masked_fill(idle, -1), w.masked_fill(idle, 0.0)
    return ids.int().contiguous(), w.float().contiguous()


class Launch(NamedTuple):
    """A launch configuration: experts and depth of a weight tile, splits of the depth, warps, stages."""

    BX: int
    BE: int
    splits: int
    warps: int
    stages: int


def shared_bytes(config: Launch, itemsize: int) -> int:
    """Shared memory of a program's pipeline; the weights may be wider than x."""
    return config.stages * config.BE * (config.BX + ROWS) * itemsize


@cache
def choose(T: int, X: int, E: int, itemsize: int, limit: int) -> Launch:
    """The default: all tiles of a token in flight at once, in tiles of 64 experts and 512 deep."""
    BX = min(64, max(16, power_of_two(X)))
    splits = max(1, min(8, E // 512))
    default = Launch(BX, 128 if itemsize < 4 else 64, splits, 4, 4)
    while shared_bytes(default, itemsize) > limit:
        default = default._replace(stages=default.stages - 1)
    return tuned("route", (T, X, E), default, lambda c: min(c.BX, c.BE) >= 16 and shared_bytes(c, itemsize) <= limit)


def launch(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float, always: int, live: Tensor | None,
    config: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Route under an explicit configuration."""
    T, E = x.shape
    X = weight.shape[0]
    tiles, deep, members = -(-X // config.BX), -(-T // ROWS), X // groups
    ids = torch.empty(T, K + always, device=x.device, dtype=torch.int32)
    weights = torch.empty(T, K + always, device=x.device, dtype=torch.float32)
    part = torch.empty(config.splits * T * X, device=x.device, dtype=torch.float32)
    count = 1 if squares is None else squares.shape[1]
    wide = weight.dtype == torch.float32
    pdl, options = launch_options(x)
    _route[(tiles, config.splits, deep)](
        x, weight, part if squares is None else squares, part if bias is None else bias,
        part if scale is None else scale, ids if live is None else live, part, locks(x.device), ids, weights,
        T, X, E, count, T * X, eps, factor, K, always, power_of_two(K + always), groups, power_of_two(groups), members,
        power_of_two(members), top_groups, ROWS, config.BX, config.BE, power_of_two(count), config.splits, sigmoid,
        renormalise, squares is not None, bias is not None, scale is not None, live is not None,
        E % config.BE == 0 and X % config.BX == 0, pdl, wide or not x.is_cuda,
        "ieee" if x.dtype == torch.float32 else "tf32x3" if wide else "tf32",
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return ids, weights


def kernel(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float, always: int = 0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    config = choose(x.shape[0], *weight.shape, weight.element_size(), shared_limit(x))
    return launch(x, weight, squares, bias, scale, eps, K, groups, top_groups, sigmoid, renormalise, factor,
                  always, live, config)  # fmt: skip


def fake(
    x: Tensor, weight: Tensor, squares: Any, bias: Any, scale: Any, eps: float, K: int, groups: int, top_groups: int,
    sigmoid: bool, renormalise: bool, factor: float, always: int = 0, live: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = x.shape[0], K + always
    return x.new_empty(size, dtype=torch.int32), x.new_empty(size, dtype=torch.float32)


def check(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float, always: int = 0,
    live: Tensor | None = None,
) -> None:  # fmt: skip
    need_tensor("route's x", x, (None, None), FLOATS)
    need_tensor("route's weight", weight, (None, x.shape[1]), (x.dtype, torch.float32))
    X = weight.shape[0]
    if squares is not None:
        need_tensor("route's squares", squares, (x.shape[0], parts(x.shape[1])), WIDE)
    for name, row in (("bias", bias), ("scale", scale)):
        if row is not None:
            need_tensor(f"route's {name}", row, (X,), FLOATS)
    need(groups >= 1 and X % groups == 0, "route's number of groups", groups, f"a divisor of the {X} experts")
    need(groups == 1 or 2 * groups <= X, "route's number of groups", groups, f"{X // 2} at most: two experts in each")
    need(1 <= top_groups <= groups, "route's number of chosen groups", top_groups, f"1 to the {groups} groups")
    held = X // groups * top_groups
    need(always >= 0, "route's number of experts for all", always, "0 or more")
    if live is not None:
        need_tensor("route's live", live, (x.shape[0],), (torch.int32,))
    need(1 <= K <= held, "route's K", K, f"1 to {held}, the experts of {top_groups} of {groups} groups")


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "softmax, renormalised": _case(5, 96, 16, 4, renormalise=True),
        "softmax, raw, odd widths": _case(3, 80, 12, 3),
        "sigmoid, bias, groups, factor": _case(18, 64, 32, 4, 8, 3, sigmoid=True, renormalise=True, factor=2.5),
        "six groups of five": _case(4, 1024, 30, 5, 6, 2, sigmoid=True, renormalise=True),
        "scaled experts, not yet normalised": _case(4, 64, 8, 2, renormalise=True, normalised=False),
        "more experts than a tile": _case(2, 32, 80, 6),
        "one more for all, idle tokens": (
            *_case(5, 64, 16, 4, renormalise=True),
            1,
            torch.tensor([3, 0, 7, 1, 0]).int(),
        ),
    }


def _case(
    T: int, E: int, X: int, K: int, groups: int = 1, top_groups: int = 1, sigmoid: bool = False,
    renormalise: bool = False, factor: float = 1.0, normalised: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Small integers, so that the logits are exact in any dtype and a tie is one in each; scaled by a power of two."""
    rng = torch.Generator().manual_seed(4)
    x = torch.randint(-4, 5, (T, E), generator=rng).float()
    weight = torch.randint(-4, 5, (X, E), generator=rng) * 2.0**-6
    bias = 0.3 * torch.randn(X, generator=rng) if sigmoid else None
    squares, scale = (None, None) if normalised else (squared(x), 1 + 0.1 * torch.randn(X, generator=rng))
    return x, weight, squares, bias, scale, 1e-6, K, groups, top_groups, sigmoid, renormalise, factor


def cost(x: Tensor, weight: Tensor, squares: Any, bias: Any, scale: Any, eps: float, K: int, *how: Any) -> Cost:
    moved = x.numel() * x.element_size() + weight.numel() * weight.element_size()
    return Cost(2 * x.numel() * weight.shape[0], moved + 8 * x.shape[0] * K)


route = Op("route", reference, kernel, fake, check, cases, cost, wide=("squares",), rtol=1e-4, atol=1e-6)
