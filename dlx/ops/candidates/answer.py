"""The second kernel: one program a row makes one record of many, or the answer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.candidates.parts import EMPTY, gumbel, packed, unpacked
from dlx.ops.candidates.reference import Parts
from dlx.ops.op import launch_options, power_of_two


@triton.jit
def _candidates_answer(
    stats_ptr, tok_ptr, top_z_ptr, top_i_ptr, temp_ptr, seed_ptr, pos_ptr, age_ptr, top_k_ptr, top_p_ptr,
    tok_out_ptr, conf_ptr, top_out_ptr, likely_ptr, entropy_ptr, margin_ptr, COUNT, k,
    BLOCK: tl.constexpr, KEEP: tl.constexpr, LISTS: tl.constexpr, ENTROPY: tl.constexpr, MARGIN: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, FINAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < COUNT
    at = t * COUNT + i
    stats = stats_ptr + at * (5 if ENTROPY else 4)
    top = tl.load(stats, mask=ok, other=float("-inf"))
    total = tl.load(stats + 1, mask=ok, other=0.0)
    best = tl.load(stats + 2, mask=ok, other=float("-inf"))
    won = tl.load(stats + 3, mask=ok, other=float("-inf"))
    tok = tl.load(tok_ptr + at, mask=ok, other=2147483647)
    lead = tl.max(best, 0)
    most = tl.max(top, 0)
    first = tl.min(tl.where(best == lead, tok, 2147483647), 0)
    z_first = tl.max(tl.where(ok & (best == lead) & (tok == first), won, float("-inf")), 0)
    anchor = tl.where(most == float("-inf"), 0.0, most)
    fall = tl.where(top == float("-inf"), 0.0, top - anchor)
    scale = tl.exp(fall)
    mass = tl.sum(total * scale, 0)
    spread = 0.0
    if ENTROPY:
        spread = tl.load(stats + 4, mask=ok, other=0.0)
        spread = tl.sum(scale * (spread + fall * total), 0)
    if KEEP:  # the largest of all lists, one by one
        j = tl.arange(0, LISTS)
        z = tl.load(top_z_ptr + t * COUNT * KEEP + j, mask=j < COUNT * KEEP, other=float("-inf"))
        id = tl.load(top_i_ptr + t * COUNT * KEEP + j, mask=j < COUNT * KEEP, other=2147483647)
        rest = packed(z, id)
        r = tl.arange(0, KEEP)
        keys = tl.full([KEEP], EMPTY, tl.int64)
        for rank in range(KEEP):
            lead_key = tl.max(rest, 0)
            keys = tl.where(r == rank, lead_key, keys)
            rest = tl.where(rest == lead_key, EMPTY, rest)
    if not FINAL:
        out = tok_out_ptr + t
        tl.store(out, first)
        stats = conf_ptr + t * (5 if ENTROPY else 4)
        tl.store(stats, most)
        tl.store(stats + 1, mass)
        tl.store(stats + 2, lead)
        tl.store(stats + 3, z_first)
        if ENTROPY:
            tl.store(stats + 4, spread)
        if KEEP:
            z, id = unpacked(keys)
            tl.store(likely_ptr + t * KEEP + r, z)
            tl.store(top_out_ptr + t * KEEP + r, id)
    else:
        first = tl.where(first < 2147483647, first, 0)  # no number at all: any id, conf tells
        conf = tl.exp(z_first - most) / mass
        doubt = tl.log(mass) - spread / mass
        if KEEP:
            z, id = unpacked(keys)
            real = id < 2147483647
            p = tl.where(real, tl.exp(z - most), 0.0) / mass
            if TOP_K or TOP_P:
                n = tl.load(top_k_ptr + t) if TOP_K else 0
                limit = tl.load(top_p_ptr + t).to(tl.float32) if TOP_P else 1.0
                some = tl.where(n > 0, 1, 0) + tl.where(limit < 1, 1, 0) > 0
                n = tl.where(n > 0, n, KEEP)
                limit = tl.where(limit < 1, limit, 2.0)  # a sum of p may pass 1 by rounding
                inside = real & (r < n) & ((r == 0) | (tl.cumsum(p, 0) - p <= limit))
                q = tl.where(inside, p, 0.0)
                q = q / tl.sum(q, 0)
                temp = tl.load(temp_ptr + t).to(tl.float32)
                zero = tl.zeros([KEEP], tl.uint32)
                noise = gumbel(tl.load(seed_ptr + t), id, tl.load(pos_ptr + t), tl.load(age_ptr + t), zero)
                key = tl.where(inside, tl.where(temp > 0, z + noise, z), float("-inf"))
                who = tl.min(tl.where(key == tl.max(key, 0), id, 2147483647), 0)
                who = tl.where(who < 2147483647, who, 0)
                first = tl.where(some, who, first)
                its = tl.sum(tl.where(inside & (id == who), q, 0.0), 0)
                conf = tl.where(some, tl.where(mass == mass, its, mass), conf)
                doubt = tl.where(some, -tl.sum(q * tl.log(tl.where(q > 0, q, 1.0)), 0), doubt)
                p = tl.where(some, q, p)
            tl.store(top_out_ptr + t * k + r, tl.where(real, id, -1), mask=r < k)
            tl.store(likely_ptr + t * k + r, p, mask=r < k)
            if MARGIN:
                tl.store(margin_ptr + t, tl.sum(tl.where(r == 0, p, tl.where(r == 1, -p, 0.0)), 0))
        tl.store(tok_out_ptr + t, first)
        tl.store(conf_ptr + t, conf)
        if ENTROPY:
            tl.store(entropy_ptr + t, tl.maximum(doubt, 0.0))


def fold(parts: Parts) -> Parts:
    """Parts [T, count, …] as one [T, …], which combines with others as they would."""
    one = Parts(*(x.new_empty(x.shape[:1] + x.shape[2:]) for x in parts))
    _launch(parts, (parts.stats,) * 6, (one.tok, one.stats, one.top_i, one.top_z, one.stats, one.stats),
            0, parts.stats.shape[2] == 5, False, False, False, False)  # fmt: skip
    return one


def answer(
    parts: Parts, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, k: int, entropy: bool, margin: bool,
    top_k: Tensor | None, top_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What parts [T, count, …] of a whole vocabulary answer."""
    out = empty(parts.stats, parts.stats.shape[0], k, entropy, margin)
    dummy = parts.stats
    rows = (temp, seed, pos, age, dummy if top_k is None else top_k, dummy if top_p is None else top_p)
    _launch(parts, rows, out, k, entropy, margin, top_k is not None, top_p is not None, True)
    return out


def empty(
    x: Tensor, T: int, k: int, entropy: bool, margin: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six outputs for T rows on x's device; what is not asked for has no elements."""

    def made(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(size, dtype=dtype)

    tok, conf = made(T, dtype=torch.int32), made(T)
    top, likely = made(T, k, dtype=torch.int32), made(T, k)
    return tok, conf, top, likely, made(T) if entropy else made(T, 0), made(T) if margin else made(T, 0)


def _launch(
    parts: Parts, rows: tuple[Tensor, ...], out: tuple[Tensor, ...], k: int, entropy: bool, margin: bool,
    by_k: bool, by_p: bool, final: bool,
) -> None:  # fmt: skip
    T, count, _ = parts.stats.shape
    keep = parts.top_z.shape[2]
    lists = power_of_two(count * keep) if keep else 0
    pdl, options = launch_options(parts.stats)
    _candidates_answer[(T,)](
        *parts, *rows, *out, count, k, power_of_two(count), keep, lists, entropy, margin, by_k, by_p, final, pdl,
        num_warps=16 if lists > 4096 else 4, **options,
    )  # fmt: skip
