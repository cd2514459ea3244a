"""Which experts a token goes to, and with what weights: the router's matmul fused with the choice.

    z = x · Wᵀ (/ rms)                            in fp32; divided where `squares` are given, as `project` does
    p = softmax(z) or sigmoid(z);  c = p + bias   the bias decides who is chosen, not the weight
    ids = the K largest c, largest first, within the `top_groups` groups with the largest sum of their two best c
    weights = p[ids] (/ Σ p[ids]) · factor · scale[ids]

x        [T, E]       bf16 or fp32    weight   [X, E]     as x, or fp32
squares  [T, parts]   f32 or None     Σ squares = Σ h², for an x that is not yet divided by its rms
bias     [X]          f32 or None     scale    [X]        f32 or None, a factor of each expert
→        ids [T, K] int32, weights [T, K] f32
Work     2·T·X·E flops; reads weight once: bound by latency
Raises   ShapeError  if groups do not divide X, or the chosen groups hold fewer than K experts
Source   softmax, renormalised (SDAR-MoE), raw (LLaDA-MoE), by `scale` (DiffusionGemma); sigmoid, bias, groups, factor
         2.5 (LLaDA2; DeepSeek-V3's routing)

Ties go to the lowest group and the lowest expert. Programs share a token's logits out by experts and by depth; the last
one to arrive adds the parts up in their order and chooses.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.linear import parts, squared
from dlx.ops.op import FLOATS, WIDE, Cost, Op, launch_options, locks, need, need_tensor, power_of_two, shared_limit
from dlx.ops.tuned import tuned

ROWS = 16  # tokens of a program


def reference(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float,
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
    return ids.int().contiguous(), w.float().contiguous()


@triton.jit
def _logits(part_ptr, at, plane, inside, rms, SPLITS: tl.constexpr):
    """Σ over the splits, in their order: the same bits wherever a logit is needed."""
    z = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    for _ in tl.static_range(SPLITS - 1):  # type: ignore[misc]  (its type says that it returns nothing)
        at += plane
        z += tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    return z * rms


@triton.jit
def _choose(
    part_ptr, t, ok, rms, bias_ptr, scale_ptr, ids_ptr, weights_ptr, plane, X, factor,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    TOP: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, SIGMOID: tl.constexpr, RENORM: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, GP)
    s = tl.arange(0, SP)
    expert = g[:, None] * S + s[None, :]
    named = (g < G)[:, None] & (s < S)[None, :]
    real = named[None, :, :]
    at = (t * X)[:, None, None] + expert[None, :, :]
    z = _logits(part_ptr, at, plane, ok[:, None, None] & real, rms[:, None, None], SPLITS)
    z = tl.where(real, z, float("-inf"))
    top = tl.max(tl.max(z, 2), 1)
    total = tl.sum(tl.sum(tl.exp(z - top[:, None, None]), 2), 1)
    c = z
    if SIGMOID:
        c = 1.0 / (1.0 + tl.exp(-z))
    elif BIAS or G > 1:
        c = tl.exp(z - top[:, None, None]) / total[:, None, None]
    if BIAS:
        c += tl.load(bias_ptr + expert, mask=named, other=0.0).to(tl.float32)[None, :, :]
    c = tl.where(real, c, float("-inf"))
    if G > 1:
        best = tl.max(c, 2)
        first = tl.min(tl.where(c == best[:, :, None], s[None, None, :], SP), 2)
        score = best + tl.max(tl.where(s[None, None, :] == first[:, :, None], float("-inf"), c), 2)
        # a group is kept unless TOP others are better, or as good and before it
        better = score[:, None, :] > score[:, :, None]
        before = (score[:, None, :] == score[:, :, None]) & (g[None, None, :] < g[None, :, None])
        kept = tl.sum((better | before).to(tl.int32), 2) < TOP
        c = tl.where(kept[:, :, None], c, float("-inf"))
    # one integer orders by choice, then by the lowest id: no two are the same, so a maximum is a winner
    c = tl.where(c == 0.0, 0.0, c)
    bits = c.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)[None, :, :]
    LOWEST: tl.constexpr = -(2**63)
    key = tl.reshape(tl.where(real, key, LOWEST), (BT, GP * SP))
    k = tl.arange(0, KP)
    ids = tl.zeros([BT, KP], tl.int32)
    for i in range(K):
        won = tl.max(key, 1)
        key = tl.where(key == won[:, None], LOWEST, key)
        ids = tl.where((k == i)[None, :], (0x7FFFFFFF - (won & 0x7FFFFFFF).to(tl.int32))[:, None], ids)
    inside = ok[:, None] & (k < K)[None, :]
    z = _logits(part_ptr, (t * X)[:, None] + ids, plane, inside, rms[:, None], SPLITS)
    w = 1.0 / (1.0 + tl.exp(-z)) if SIGMOID else tl.exp(z - top[:, None]) / total[:, None]
    w = tl.where(inside, w, 0.0)
    if RENORM:
        w /= tl.sum(w, 1)[:, None] + 1e-20
    w *= factor
    if SCALE:
        w *= tl.load(scale_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    out = (t * K)[:, None] + k[None, :]
    tl.store(ids_ptr + out, ids, mask=inside)
    tl.store(weights_ptr + out, w, mask=inside)


@triton.jit
def _route(
    x_ptr, w_ptr, squares_ptr, bias_ptr, scale_ptr, part_ptr, lock_ptr, ids_ptr, weights_ptr,
    T, X, E, PARTS, plane, eps, factor,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    TOP: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, SPLITS: tl.constexpr,
    SIGMOID: tl.constexpr, RENORM: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.program_id(2)
    n = tile * BX + tl.arange(0, BX)
    t = (rows * BT + tl.arange(0, BT)).to(tl.int64)
    ok = t < T
    e = tl.arange(0, BE)
    steps = tl.cdiv(E, BE)
    acc = tl.zeros([BX, BT], tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        at = step * BE + e
        if EVEN:
            w = tl.load(w_ptr + n[:, None] * E + at[None, :])
            x = tl.load(x_ptr + t[None, :] * E + at[:, None], mask=ok[None, :], other=0.0)
        else:
            here = at < E
            w = tl.load(w_ptr + n[:, None] * E + at[None, :], mask=(n < X)[:, None] & here[None, :], other=0.0)
            x = tl.load(x_ptr + t[None, :] * E + at[:, None], mask=ok[None, :] & here[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    out = part_ptr + split.to(tl.int64) * plane + t[None, :] * X + n[:, None]
    tl.store(out, acc, mask=ok[None, :] & (n < X)[:, None])
    tl.debug_barrier()
    arrived = tl.atomic_add(lock_ptr + rows, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) * SPLITS - 1:
        tl.store(lock_ptr + rows, 0)
        rms = tl.full([BT], 1.0, tl.float32)
        if NORM:
            p = tl.arange(0, BP)
            inside = ok[:, None] & (p < PARTS)[None, :]
            squares = tl.load(squares_ptr + t[:, None] * PARTS + p[None, :], mask=inside, other=0.0)
            rms = tl.rsqrt(tl.sum(squares, 1) / E + eps)
        _choose(part_ptr, t, ok, rms, bias_ptr, scale_ptr, ids_ptr, weights_ptr, plane, X, factor,
                K, KP, G, GP, S, SP, TOP, BT, SPLITS, SIGMOID, RENORM, BIAS, SCALE)  # fmt: skip


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
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float, config: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Route under an explicit configuration."""
    T, E = x.shape
    X = weight.shape[0]
    tiles, deep, members = -(-X // config.BX), -(-T // ROWS), X // groups
    ids = torch.empty(T, K, device=x.device, dtype=torch.int32)
    weights = torch.empty(T, K, device=x.device, dtype=torch.float32)
    part = torch.empty(config.splits * T * X, device=x.device, dtype=torch.float32)
    count = 1 if squares is None else squares.shape[1]
    wide = weight.dtype == torch.float32
    pdl, options = launch_options(x)
    _route[(tiles, config.splits, deep)](
        x, weight, part if squares is None else squares, part if bias is None else bias,
        part if scale is None else scale, part, locks(x.device), ids, weights, T, X, E, count, T * X, eps, factor,
        K, power_of_two(K), groups, power_of_two(groups), members, power_of_two(members), top_groups, ROWS,
        config.BX, config.BE, power_of_two(count), config.splits, sigmoid, renormalise, squares is not None,
        bias is not None, scale is not None, E % config.BE == 0 and X % config.BX == 0, pdl, wide or not x.is_cuda,
        "ieee" if x.dtype == torch.float32 else "tf32x3" if wide else "tf32",
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return ids, weights


def kernel(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    config = choose(x.shape[0], *weight.shape, weight.element_size(), shared_limit(x))
    return launch(x, weight, squares, bias, scale, eps, K, groups, top_groups, sigmoid, renormalise, factor, config)


def fake(x: Tensor, weight: Tensor, squares: Any, bias: Any, scale: Any, eps: float, K: int, *how: Any) -> Any:
    return x.new_empty(x.shape[0], K, dtype=torch.int32), x.new_empty(x.shape[0], K, dtype=torch.float32)


def check(
    x: Tensor, weight: Tensor, squares: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float, K: int,
    groups: int, top_groups: int, sigmoid: bool, renormalise: bool, factor: float,
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
    need(1 <= K <= held, "route's K", K, f"1 to {held}, the experts of {top_groups} of {groups} groups")


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "softmax, renormalised": _case(5, 96, 16, 4, renormalise=True),
        "softmax, raw, odd widths": _case(3, 80, 12, 3),
        "sigmoid, bias, groups, factor": _case(18, 64, 32, 4, 8, 3, sigmoid=True, renormalise=True, factor=2.5),
        "six groups of five": _case(4, 1024, 30, 5, 6, 2, sigmoid=True, renormalise=True),
        "scaled experts, not yet normalised": _case(4, 64, 8, 2, renormalise=True, normalised=False),
        "more experts than a tile": _case(2, 32, 80, 6),
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
