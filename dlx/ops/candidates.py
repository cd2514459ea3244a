"""The LM head fused with the sampler: one candidate token and its confidence for each position.

    z = h · headᵀ / temp                       temp 0 counts as 1
    tok = argmax_v z + noise                   noise = 0 at temp 0, else Gumbel(seed, v, pos, age)
    conf = softmax(z)[tok]                     over v < vocab, v ≠ mask; ties go to the lowest id

h      [T, E]               hidden states after the last norm
head   [V, E]               contiguous
temp   [T]       f32        0 is greedy
seed   [T]       int64      key of the draws
pos    [T]       int32      absolute position, counter of the draws
age    [T]       int32      forwards of the row so far, counter of the draws
→      tok [T] int32, conf [T] f32
Work   2·T·V·E flops; reads V·E + T·E elements once; logits stay in registers
Source Philox4x32-10 (Salmon et al., 2011); Gumbel-max: argmax of z + noise is a draw from softmax(z)

Each program reduces one tile of the vocabulary to five numbers a position; a second kernel combines the tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dlx.ops.op import FLOATS, WIDE, Cost, Op, launch_options, need, need_tensor, power_of_two

LAST = 2**31 - 1


def reference(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int
) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    z = h.to(acc) @ head[:vocab].to(acc).T
    z = z / torch.where(temp > 0, temp, 1.0).to(acc)[:, None]
    z[:, mask] = float("-inf")
    key = z
    if bool((temp > 0).any()):
        key = torch.where((temp > 0)[:, None], z + gumbel(seed, vocab, pos, age).to(acc), z)
    tok = key.argmax(-1)
    conf = z.softmax(-1).gather(1, tok[:, None])[:, 0]
    return tok.int(), conf.float()


def gumbel(seed: Tensor, vocab: int, pos: Tensor, age: Tensor) -> Tensor:
    """[T, vocab] f32 Gumbel noise from Philox4x32-10, keyed by `seed`, counted by (token, pos, age)."""
    low32 = 0xFFFFFFFF
    c = [
        torch.arange(vocab, device=seed.device)[None],
        pos.long()[:, None],
        age.long()[:, None],
        torch.zeros_like(seed)[:, None],
    ]
    k0, k1 = (seed & low32)[:, None], (seed >> 32 & low32)[:, None]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & low32) ^ c[1] ^ k0, b & low32, (a >> 32 & low32) ^ c[3] ^ k1, a & low32]
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    u = ((c[0] >> 9).float() + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
    return -torch.log(-torch.log(u))


@triton.jit
def _candidates(
    h_ptr, head_ptr, temp_ptr, seed_ptr, pos_ptr, age_ptr, value_ptr, index_ptr, mask, vocab, T, TILES, plane,
    E: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    v = tile * BV + tl.arange(0, BV)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    row = v.to(tl.int64)[:, None] * E
    acc = tl.zeros([BV, BT], tl.float32)
    for e0 in range(0, E, BE):
        inside = e0 + e < E
        w = tl.load(head_ptr + row + (e0 + e)[None, :], mask=(v < vocab)[:, None] & inside[None, :], other=0.0,
                    eviction_policy="evict_first")  # fmt: skip
        x = tl.load(h_ptr + t[None, :] * E + (e0 + e)[:, None], mask=(t < T)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee" if EXACT else "tf32")
    temp = tl.load(temp_ptr + t, mask=t < T, other=0.0)
    z = acc / tl.where(temp > 0, temp, 1.0)[None, :]
    z = tl.where(((v < vocab) & (v != mask))[:, None], z, float("-inf"))
    key = z
    if tl.max(temp, 0) > 0:
        seed = tl.load(seed_ptr + t, mask=t < T, other=0)[None, :]
        zero = tl.zeros([BV, BT], tl.int32)
        pos = tl.load(pos_ptr + t, mask=t < T, other=0)[None, :] + zero
        age = tl.load(age_ptr + t, mask=t < T, other=0)[None, :] + zero
        bits, _, _, _ = tl.philox(seed + zero, v[:, None] + zero, pos, age, zero)
        u = ((bits.to(tl.uint32, bitcast=True) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        key = tl.where((temp > 0)[None, :], z - tl.log(-tl.log(u)), z)
    top = tl.max(z, 0)
    total = tl.sum(tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[None, :]), 0)
    best = tl.max(key, 0)
    tok = tl.min(tl.where(key == best[None, :], v[:, None], 2147483647), 0)
    won = tl.sum(tl.where(v[:, None] == tok[None, :], z, 0.0), 0)
    out = t.to(tl.int64) * TILES + tile
    tl.store(value_ptr + out, top, mask=t < T)
    tl.store(value_ptr + plane + out, total, mask=t < T)
    tl.store(value_ptr + 2 * plane + out, best, mask=t < T)
    tl.store(value_ptr + 3 * plane + out, won, mask=t < T)
    tl.store(index_ptr + out, tok, mask=t < T)


@triton.jit
def _candidates_combine(
    value_ptr, index_ptr, tok_ptr, conf_ptr, TILES, plane, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    ok = i < TILES
    at = t.to(tl.int64) * TILES + i
    top = tl.load(value_ptr + at, mask=ok, other=float("-inf"))
    total = tl.load(value_ptr + plane + at, mask=ok, other=0.0)
    best = tl.load(value_ptr + 2 * plane + at, mask=ok, other=float("-inf"))
    won = tl.load(value_ptr + 3 * plane + at, mask=ok, other=0.0)
    tok = tl.load(index_ptr + at, mask=ok, other=2147483647)
    first = tl.min(tl.where(best == tl.max(best, 0), tok, 2147483647), 0)
    most = tl.max(top, 0)
    mass = tl.sum(total * tl.exp(top - most), 0)
    z = tl.sum(tl.where(ok & (tok == first), won, 0.0), 0)
    tl.store(tok_ptr + t, tl.where(first < 2147483647, first, 0))  # no number at all: any id, conf tells
    tl.store(conf_ptr + t, tl.exp(z - most) / mass)


class Launch(NamedTuple):
    """A launch configuration: positions, vocabulary and hidden width of a tile, warps, pipeline stages."""

    BT: int
    BV: int
    BE: int
    warps: int
    stages: int


def choose(T: int) -> Launch:
    """The default configuration for T positions."""
    BT = min(64, max(16, power_of_two(T)))
    return Launch(BT, 64, 128, 4, 4 if BT <= 32 else 3)


def kernel(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int
) -> tuple[Tensor, Tensor]:
    T, E = h.shape
    c = choose(T)
    tiles = -(-vocab // c.BV)
    pdl, options = launch_options(h)
    value = torch.empty(4, T, tiles, device=h.device, dtype=torch.float32)
    index = torch.empty(T, tiles, device=h.device, dtype=torch.int32)
    tok = torch.empty(T, device=h.device, dtype=torch.int32)
    conf = torch.empty(T, device=h.device, dtype=torch.float32)
    _candidates[(tiles, triton.cdiv(T, c.BT))](
        h, head, temp, seed, pos, age, value, index, mask, vocab, T, tiles, T * tiles,
        E, c.BT, c.BV, min(c.BE, power_of_two(E)), pdl, h.dtype == torch.float32, not h.is_cuda,
        num_warps=c.warps, num_stages=c.stages, **options,
    )  # fmt: skip
    _candidates_combine[(T,)](
        value, index, tok, conf, tiles, T * tiles, power_of_two(tiles), pdl, num_warps=4, **options
    )
    return tok, conf


def fake(
    h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape[0], dtype=torch.int32), h.new_empty(h.shape[0], dtype=torch.float32)


def check(h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int) -> None:
    need_tensor("candidates' h", h, (None, None), FLOATS)
    T, E = h.shape
    need_tensor("candidates' head", head, (None, E), (h.dtype,))
    need(1 < vocab <= head.shape[0], "candidates' vocab", vocab, f"2 to the {head.shape[0]} rows of the head")
    need(mask >= 0, "candidates' mask", mask, "an id, 0 or above")
    need_tensor("candidates' temp", temp, (T,), WIDE)
    need_tensor("candidates' seed", seed, (T,), (torch.int64,))
    for name, x in (("pos", pos), ("age", age)):
        need_tensor(f"candidates' {name}", x, (T,), (torch.int32,))


def cases() -> dict[str, tuple[Any, ...]]:
    return {
        "greedy": _case(4, 32, 320, 320, temp=0.0),
        "padded vocabulary": _case(5, 48, 192, 150, temp=0.0),
        "drawn": _case(6, 32, 256, 256, temp=0.7),
        "mixed rows, ties": _case(20, 16, 128, 128, temp=0.0, mixed=True, ties=True),
    }


def _case(T: int, E: int, V: int, vocab: int, temp: float, mixed: bool = False, ties: bool = False) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(1)
    head = torch.randn(V, E, generator=rng)
    h = torch.randn(T, E, generator=rng)
    if ties:  # every token has a twin of which the lower id must win; small integers make the products exact
        head, h = (4 * head).round(), (2 * h).round()
        head[V // 2 :] = head[: V // 2]
    temps = torch.full((T,), temp)
    if mixed:
        temps[::3] = 1.3
    seed = torch.randint(0, 2**62, (T,), generator=rng)
    pos = torch.arange(T, dtype=torch.int32) + 40
    return h, head, temps, seed, pos, torch.arange(T, dtype=torch.int32) // 4, 3, vocab


def cost(h: Tensor, head: Tensor, temp: Tensor, seed: Tensor, pos: Tensor, age: Tensor, mask: int, vocab: int) -> Cost:
    T, E = h.shape
    return Cost(2 * T * vocab * E, (vocab * E + T * E) * h.element_size() + T * 28)


candidates = Op("candidates", reference, kernel, fake, check, cases, cost, rtol=1e-2, atol=1e-4)
