"""One step of a canvas, whole: look, think, decide, commit. Its tokens are random, and drawn anew until they fit.

A row is a prefix and one canvas of L positions behind it, wherever the prompt ends. In a forward a row does one of two:

    decode   its canvas sees the prefix and all of itself; a position that is not accepted is a mask to the buffer and
             a random token to the network. Candidates are accepted anew in every forward. Once the rule `settle` says
             so, or the steps or forwards are spent, the canvas' likeliest tokens are committed.
    encode   a committed canvas is seen again, causally, as a part of the prefix; that writes its final K/V. It
             decides nothing and is not counted among the row's denoise forwards; a row that ends does not need it.

Both write the K/V of what they look at and attend to pages: what a decoding canvas wrote is overwritten.

Of the Block Buffer, place 0 of `tok` is the canvas, place 1 its likeliest tokens of the forward before (masks before
its first forward), and `whole[:, 0]` says that the next forward encodes. More is in `Memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dlx.graphs.buffer import COUNTS, NUMBERS, RUNNING, BlockBuffer, Outbox
from dlx.graphs.policies import Policy
from dlx.graphs.rules import Candidates, Seen
from dlx.graphs.rules.shown import CONF, GUESS
from dlx.graphs.step import Ids, Network, silent
from dlx.graphs.stops import committed
from dlx.ops import OPS
from dlx.ops.attention import View
from dlx.ops.candidates.reference import philox


class CanvasNetwork(Network, Protocol):
    """What the step asks of a model beside embed, forward and head. z = softcap · tanh(h · headᵀ / softcap) / temp."""

    softcap: float

    def condition(self, x: Tensor, soft: Tensor) -> Tensor: ...  # [B, C, E] twice → [B, C, E], a canvas' input

    # (h [T, E], temp [T], argmax z [T], its p [T], V) → Σ softmax(z) · embedding [T, E]
    def expected(self, h: Tensor, temp: Tensor, best: Tensor, p: Tensor, vocab: int) -> Tensor: ...


class Memory(NamedTuple):
    """What a canvas remembers from forward to forward; void before its first."""

    turn: Tensor  # [B]        int32  forwards spent on it
    calm: Tensor  # [B]        int32  of these, the last ones that did not change its likeliest tokens
    soft: Tensor  # [B, L, E]         the embedding that the distributions of the last forward expect


def allocate(B: int, L: int, E: int, dtype: torch.dtype, device: torch.device) -> Memory:
    """Empty memories."""
    turn = torch.zeros(B, dtype=torch.int32, device=device)
    return Memory(turn, torch.zeros_like(turn), torch.zeros(B, L, E, dtype=dtype, device=device))


def rows(memory: Memory, B: int) -> Memory:
    """Those of the first B rows, as views."""
    return Memory(*(t[:B] for t in memory))


def canvas_(
    policy: Policy,
    ids: Ids,
    net: CanvasNetwork,
    buf: BlockBuffer,
    memory: Memory,
    kv: tuple[Tensor, ...],
    out: Tensor,
    at: Callable[[str], None] = silent,
) -> None:
    """One forward of every row, in place; arguments as of `graphs.step.step_`."""
    new, kept, outbox = denoise(policy, ids, net, buf, memory, kv, at)
    pairs = zip((*buf[:-1], *memory), (*new[:-1], *kept), strict=True)
    for old, value in (*pairs, *((old, new.mem[name]) for name, old in buf.mem.items())):
        if old is not value:
            old.copy_(value)
    out.copy_(outbox.pack())


def denoise(
    policy: Policy,
    ids: Ids,
    net: CanvasNetwork,
    buf: BlockBuffer,
    memory: Memory,
    kv: tuple[Tensor, ...],
    at: Callable[[str], None] = silent,
) -> tuple[BlockBuffer, Memory, Outbox]:
    """The rows and their memories after one forward, and what it committed; only `kv` is written."""
    B, _, L = buf.tok.shape
    assert policy.canvas is not None
    accept, force_at, warm = (buf.num[:, NUMBERS.index(name)] for name in ("accept", "force_at", "temp"))

    # look: who encodes and who decodes, and what each position sees
    at("look")
    encode = buf.whole[:, 0]
    decode = ~buf.done & ~encode
    tok, before = buf.tok.unbind(1)
    fresh = before[:, 0] == ids.mask
    turn, calm = (torch.where(fresh, 0, x) for x in (memory.turn, memory.calm))
    soft = torch.where(fresh[:, None, None], 0.0, memory.soft)
    pos = buf.start[:, None] + torch.arange(L, dtype=torch.int32, device=tok.device)
    seen = torch.where(encode[:, None], pos + 1, buf.start[:, None] + L)
    seen = torch.where(buf.done[:, None], 0, seen)

    # think: candidates at this forward's temperature, and what their distributions expect to be embedded
    at("think")
    x = policy.embed(net.embed, torch.where(tok == ids.mask, noise(buf.seed, pos, buf.age, ids.vocab), tok), {})
    x = torch.where(encode[:, None, None], x, net.condition(x, soft))
    h = net.forward(x, View(pos, buf.pages, seen, encode=encode), kv).flatten(0, 1)
    heat = policy.canvas.heat(turn) * torch.where(warm > 0, warm, 1.0)
    each, seed, age = (v[:, None].expand(B, L).contiguous().flatten() for v in (heat, buf.seed, buf.age))
    drawn, conf, best, likely, entropy, _ = OPS["candidates"](
        h, net.head(), each, seed, pos.flatten(), age, ids.vocab, ids.vocab, 1, True, False, net.softcap
    )
    expected = net.expected(h, each, best[:, 0], likely[:, 0], ids.vocab).view(B, L, -1)
    drawn, conf, best, entropy = (v.view(B, 1, L) for v in (drawn, conf, best, entropy))
    hot = (warm > 0)[:, None, None]
    c = Candidates(torch.where(hot, drawn, best), conf, entropy)

    # decide
    at("decide")
    calm = torch.where((best[:, 0] == before).all(-1), calm + 1, 0)
    live = decode[:, None, None].expand(B, 1, L)
    one = torch.ones_like(heat)[:, None]
    w = Seen(tok[:, None], live & (tok == ids.mask)[:, None], live, one, accept, force_at, ids.mask, calm[:, None])
    after = policy.rewrite(c, w, policy.select(c, w))[:, 0]
    turn = turn + decode.int()
    new_age = buf.age + decode.int()
    spent = new_age >= buf.ints[:, COUNTS.index("max_nfe")]
    settled = policy.settle(c, w, after[:, None])[:, 0]
    whole = decode & (settled | spent | (turn >= policy.canvas.steps))
    bad = (live & ~conf.isfinite()).flatten(1).any(1)

    # commit: a canvas that is decided now is delivered; behind one that was encoded the next begins
    at("commit")
    after = torch.where(whole[:, None], best[:, 0], after)
    after, last = (torch.where(decode[:, None], v, ids.mask) for v in (after, best[:, 0]))
    moved = torch.stack((after, torch.where(whole[:, None], ids.mask, last)), 1)
    done = buf.done[:, None, None]
    new = buf._replace(
        tok=torch.where(done, buf.tok, moved),
        whole=torch.where(done[..., 0], buf.whole, torch.stack((whole, torch.zeros_like(whole)), 1)),
        start=torch.where(~buf.done & encode, buf.start + L, buf.start),
        age=new_age,
    )
    kept = (turn, calm, torch.where(decode[:, None, None], expected, soft))
    kept = Memory(
        *(torch.where(buf.done.view(-1, *[1] * (v.dim() - 1)), u, v) for u, v in zip(memory, kept, strict=True))
    )
    if policy.watch:
        told = {CONF: torch.where(hot, conf, likely.view(B, 1, L)), GUESS: c.tok}
        told = {name: torch.where(live, v, 0) for name, v in told.items()}
        new = new._replace(mem={name: torch.cat((v, torch.zeros_like(v)), 1) for name, v in told.items()})
    new, n, why = committed(policy, new, spent & decode, bad, ids.mask)
    n, why = (torch.where(buf.done, 0, v).int() for v in (n, why))
    new = new._replace(done=buf.done | (why != RUNNING))
    return new, kept, Outbox(new.tok[:, 0], n, new_age, why, new.start)


def noise(seed: Tensor, pos: Tensor, age: Tensor, vocab: int) -> Tensor:
    """Random ids [B, L] int32, each of 0 to vocab − 1 as likely, for positions [B, L] in forward `age` [B]."""
    word = philox((0, pos.long(), age.long()[:, None], 1), seed[:, None])
    return (word * vocab >> 32).int()
