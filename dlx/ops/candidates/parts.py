"""The first kernel: the head's matmul, of which each program keeps what a stretch of the vocabulary tells of its rows.

A program walks over its stretch tile by tile and carries a running record (and a running list of the most likely ids)
in registers, so neither logits nor tiles reach memory. Programs of the same stretch and other rows are neighbours in
the grid: the weights come from memory once. Few rows are the matmul's N, so that little of it is padding; from 64 on
they are its M, which leaves the reductions over the vocabulary within a warp.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.candidates.reference import Parts
from dlx.ops.op import launch_options, power_of_two, processors, shared_limit
from dlx.ops.tuned import tuned

PIECE_ELEMENTS = 8 * 32  # of a tile a warp draws for at a time
SHORT = 16  # ids up to which a list takes few registers
EMPTY = tl.constexpr(-(0x7F800001 << 32))  # packed(−inf, the id of nobody)


@triton.jit
def packed(z, v):
    """z and id v as one int64: in the order of z, then of the lowest id. −inf is nobody's."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(z == float("-inf"), EMPTY, (order << 32) | (2147483647 - v).to(tl.int64))


@triton.jit
def unpacked(key):
    """(z, v) of what `packed` made."""
    bits = (key >> 32).to(tl.int32)
    z = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return z, 2147483647 - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def gumbel(seed, v, pos, age, zero):
    """Gumbel noise by Philox4x32-10, keyed by seed, counted by (token, pos, age); of the shape of zero, uint32.

    A loop, not tl.philox: unrolled ten times it takes long to compile and many registers.
    """
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0 = v.to(tl.uint32) + zero
    c1 = pos.to(tl.uint32) + zero
    c2 = age.to(tl.uint32) + zero
    c3 = zero
    for _ in range(10):
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0, c2 = tl.umulhi(c2, zero + 0xCD9E8D57) ^ c1 ^ key0, tl.umulhi(c0, zero + 0xD2511F53) ^ c3 ^ key1
        c1 = low2
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    u = ((c0 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def draw(z, first, temp, seed, pos, age, AX: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr):
    """(the largest z + noise, its id, its z) of each row of a tile of N ids; in pieces, for want of registers."""
    if N <= PIECE:
        v = tl.expand_dims(first + tl.arange(0, N), 1 - AX)
        key0, c1, c2 = tl.expand_dims(seed, AX), tl.expand_dims(pos, AX), tl.expand_dims(age, AX)
        noise = gumbel(key0, v, c1, c2, tl.zeros_like(z).to(tl.uint32))
        key = tl.where(tl.expand_dims(temp > 0, AX), z + noise, z)
        lead = tl.max(key, AX)
        who = tl.min(tl.where(key == tl.expand_dims(lead, AX), v, 2147483647), AX)
        its = tl.sum(tl.where(v == tl.expand_dims(who, AX), z, 0.0), AX)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, N // 2)), (0, 2, 1)))
        ours = draw(left, first, temp, seed, pos, age, AX, N // 2, PIECE)
        theirs = draw(right, first + N // 2, temp, seed, pos, age, AX, N // 2, PIECE)
        lead, who, its = ours
        more, other, that = theirs
        its = tl.where(more > lead, that, its)
        who = tl.where(more > lead, other, who)
        lead = tl.where(more > lead, more, lead)
    return lead, who, its


@triton.jit
def _candidates(
    h_ptr, head_ptr, temp_ptr, seed_ptr, pos_ptr, age_ptr, pair_ptr, bias_ptr, forbidden_ptr,
    stats_ptr, tok_ptr, top_z_ptr, top_i_ptr, mask, first, ids, span, T, COUNT, DEEP, M, F, softcap,
    E: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BE: tl.constexpr, AX: tl.constexpr, PIECE: tl.constexpr,
    KEEP: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, PAIRS: tl.constexpr, FORBIDDEN: tl.constexpr,
    BARE: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    stretch = tl.program_id(0) // DEEP
    t = tl.program_id(0) % DEEP * BT + tl.arange(0, BT)
    real = t < T
    t = tl.minimum(t, T - 1)
    e = tl.arange(0, BE)
    h_row = t.to(tl.int64) * E
    low = stretch * span
    high = tl.minimum(low + span, ids)
    temp = tl.load(temp_ptr + t).to(tl.float32)
    drawing = tl.max(temp, 0) > 0
    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    spread = tl.zeros([BT], tl.float32)
    best = tl.full([BT], float("-inf"), tl.float32)
    won = tl.full([BT], float("-inf"), tl.float32)
    tok = tl.full([BT], 2147483647, tl.int32)
    if KEEP:  # places of their own, so that one at a time is replaced
        keys = tl.zeros([BT, KEEP], tl.int64) + EMPTY + tl.arange(0, KEEP)[None, :]
    for base in tl.range(low, high, BV, disable_licm=True):
        v = base + tl.arange(0, BV)
        v_row = v.to(tl.int64) * E
        acc = tl.zeros([BT, BV] if AX else [BV, BT], tl.float32)
        for e0 in range(0, E, BE):
            at = e0 + e
            w_ptr = head_ptr + tl.expand_dims(v_row, 1 - AX) + tl.expand_dims(at, AX)
            x_ptr = h_ptr + tl.expand_dims(h_row, AX) + tl.expand_dims(at, 1 - AX)
            inside = tl.expand_dims(v < high, 1 - AX)
            if E % BE == 0:
                w = tl.load(w_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptr)
            else:
                w = tl.load(w_ptr, mask=inside & tl.expand_dims(at < E, AX), other=0.0)
                x = tl.load(x_ptr, mask=tl.expand_dims(at < E, 1 - AX), other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
                x = x.to(tl.float32)
            if AX:
                acc = tl.dot(x, w, acc, input_precision="ieee" if EXACT else "tf32")
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee" if EXACT else "tf32")
        if BARE:
            top = tl.maximum(top, tl.max(acc, AX))
        else:
            id = first + v
            z = acc
            if SOFTCAP:
                away = tl.exp(tl.abs(z) * (-2.0 / softcap))
                z = tl.where(z < 0, -softcap, softcap) * ((1.0 - away) / (1.0 + away))
            if PAIRS:
                m = tl.arange(0, PAIRS)
                pair = t.to(tl.int64)[:, None] * M + m[None, :]
                near = tl.load(pair_ptr + pair, mask=(m < M)[None, :], other=-1) - (first + base)
                if tl.max(tl.max(((near >= 0) & (near < BV)).to(tl.int32), 1), 0) > 0:
                    for j in range(M):
                        who = tl.load(pair_ptr + t.to(tl.int64) * M + j)
                        add = tl.load(bias_ptr + t.to(tl.int64) * M + j).to(tl.float32)
                        hit = tl.expand_dims(who, AX) == tl.expand_dims(id, 1 - AX)
                        z += tl.where(hit, tl.expand_dims(add, AX), 0.0)
            ok = (v < high) & (id != mask)
            if FORBIDDEN:
                f = tl.arange(0, FORBIDDEN)
                never = tl.load(forbidden_ptr + f, mask=f < F, other=-1)
                ok = ok & (tl.max((id[:, None] == never[None, :]).to(tl.int32), 1) == 0)
            id = tl.expand_dims(id, 1 - AX)
            z = tl.where(tl.expand_dims(ok, 1 - AX), z, float("-inf"))
            if drawing:
                z = z / tl.expand_dims(tl.where(temp > 0, temp, 1.0), AX)
                seed = tl.load(seed_ptr + t)
                pos = tl.load(pos_ptr + t)
                age = tl.load(age_ptr + t)
                most = tl.max(z, AX)
                lead, who, its = draw(z, first + base, temp, seed, pos, age, AX, BV, PIECE)
            else:
                most = tl.max(z, AX)
                lead = most
                who = tl.min(tl.where(z == tl.expand_dims(most, AX), id, 2147483647), AX)
                its = most
            gain = lead > best
            tok = tl.where(gain, who, tok)
            won = tl.where(gain, its, won)
            best = tl.where(gain, lead, best)
            # sums of exp(z − top), moved along as top grows
            most = tl.maximum(top, most)
            anchor = tl.where(most == float("-inf"), 0.0, most)
            fall = tl.where(top == float("-inf"), 0.0, top - anchor)
            away = z - tl.expand_dims(anchor, AX)
            mass = tl.exp(away)
            if ENTROPY:
                spread = tl.exp(fall) * (spread + fall * total)
                spread += tl.sum(tl.where(z == float("-inf"), 0.0, away) * mass, AX)
            total = total * tl.exp(fall) + tl.sum(mass, AX)
            top = most
            if KEEP:  # the best of the tile replaces the worst of the list, while it is better in any row
                more = 1
                while more > 0:
                    lead = tl.max(z, AX)
                    who = tl.min(tl.where(z == tl.expand_dims(lead, AX), id, 2147483647), AX)
                    z = tl.where(id == tl.expand_dims(who, AX), float("-inf"), z)
                    new = tl.where(lead == lead, packed(lead, who), EMPTY)
                    worst = tl.min(keys, 1)
                    better = new > worst
                    keys = tl.where((keys == worst[:, None]) & better[:, None], new[:, None], keys)
                    more = tl.max(better.to(tl.int32), 0)
    out = t.to(tl.int64) * COUNT + stretch
    stats = stats_ptr + out * (5 if ENTROPY else 4)
    tl.store(stats, top, mask=real)
    if not BARE:
        tl.store(stats + 1, total, mask=real)
        tl.store(stats + 2, best, mask=real)
        tl.store(stats + 3, won, mask=real)
        if ENTROPY:
            tl.store(stats + 4, spread, mask=real)
        tl.store(tok_ptr + out, tok, mask=real)
        if KEEP:
            z, id = unpacked(keys)
            cell = out[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
            tl.store(top_z_ptr + cell, z, mask=real[:, None])
            tl.store(top_i_ptr + cell, tl.where(z == float("-inf"), 2147483647, id), mask=real[:, None])


class Launch(NamedTuple):
    """A launch configuration: positions, vocabulary and hidden width of a tile, programs a multiprocessor (each walks
    over an equal stretch; more than there are tiles: one tile each), warps, pipeline stages."""

    BT: int
    BV: int
    BE: int
    programs: int
    warps: int
    stages: int


def fits(config: Launch, itemsize: int, limit: int) -> bool:
    """Whether its tiles are large enough for a matmul, and its pipeline stays below so many bytes of shared memory."""
    if min(config.BT, config.BV, config.BE) < 16:
        return False
    return config.stages * (config.BT + config.BV) * config.BE * itemsize <= limit


@cache
def choose(T: int, ids: int, E: int, keep: int, itemsize: int, limit: int) -> Launch:
    """The configuration for T positions: the recorded one, or the default."""
    rows = power_of_two(T)
    if keep <= SHORT:  # as without lists: narrower tiles would read the rows through L2 more often
        keep = 0
    if keep:
        default = Launch(64, 64, 128, 1, 4, 6) if rows <= 64 else Launch(128, 64, 64, 1, 8, 6)
    elif rows <= 32:
        default = Launch(max(16, rows), 64, 128, 2, 4, 4)
    elif rows == 64:
        default = Launch(64, 64, 128, 2, 4, 3)
    else:
        default = Launch(128, 128, 64, 1, 8, 6)
    if itemsize > 2:
        default = default._replace(BT=min(default.BT, 64 if keep else 32), BV=64, BE=64, stages=3)
    default = default._replace(BE=min(default.BE, power_of_two(E)))
    while not fits(default, itemsize, limit):
        default = default._replace(stages=default.stages - 1)
    if itemsize > 2:
        return default
    most = min(rows, default.BT)  # a record of fewer rows would read the head more often

    def usable(config: Launch) -> bool:
        return most <= config.BT and fits(config, itemsize, limit)

    return tuned("candidates", (rows, ids, E, keep), default, usable)


def walk(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, first: int, vocab: int,
    keep: int, entropy: bool, softcap: float, bias_tok: Tensor | None, bias: Tensor | None, forbidden: Tensor | None,
    config: Launch | None = None, bare: bool = False,
) -> Parts:  # fmt: skip
    """Parts [T, stretches, …] of the vocabulary. `bare`: the matmul and its maxima alone, to compare times with."""
    T, E = h.shape
    ids = max(0, min(head.shape[0], vocab - first))
    c = config or choose(T, ids, E, keep, h.element_size(), shared_limit(h))
    deep = -(-T // c.BT)
    programs = max(1, c.programs * processors(h) // deep)
    span = max(c.BV, -(-ids // programs))
    count = max(1, -(-ids // span))
    stats = torch.empty(T, count, 5 if entropy else 4, device=h.device, dtype=torch.float32)
    tok = torch.empty(T, count, device=h.device, dtype=torch.int32)
    top_z = torch.empty(T, count, keep, device=h.device, dtype=torch.float32)
    top_i = torch.empty(T, count, keep, device=h.device, dtype=torch.int32)
    pairs = 0 if bias_tok is None else bias_tok.shape[1]
    never = 0 if forbidden is None else forbidden.shape[0]
    ids_axis = 1 if c.BT >= 64 else 0  # of a tile
    pdl, options = launch_options(h)
    _candidates[(count * deep,)](
        h, head, temp, seed, pos, age, tok if bias_tok is None else bias_tok, stats if bias is None else bias,
        tok if forbidden is None else forbidden, stats, tok, top_z, top_i,
        mask, first, ids, span, T, count, deep, pairs, never, softcap,
        E, c.BT, c.BV, c.BE, ids_axis, PIECE_ELEMENTS * c.warps // c.BT if ids_axis else c.BV,
        keep, entropy, softcap > 0, power_of_two(pairs) if pairs else 0, power_of_two(never) if never else 0, bare,
        pdl, h.dtype == torch.float32, not h.is_cuda, num_warps=c.warps, num_stages=c.stages, **options,
    )  # fmt: skip
    return Parts(stats, tok, top_z, top_i)
