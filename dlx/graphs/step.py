"""One diffusion step, whole: open, look, think, decide, commit. Static shapes, no host in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dlx.graphs.buffer import COUNTS, NUMBERS, RUNNING, BlockBuffer, Outbox, fixed_at
from dlx.graphs.packing import fitting, layout, seats
from dlx.graphs.policies import Policy
from dlx.graphs.rules import Candidates, Memory, Seen
from dlx.graphs.rules.settle import SAME
from dlx.graphs.rules.shown import proposals
from dlx.graphs.stops import budgeted, committed, leading
from dlx.ops import OPS
from dlx.ops.attention import View


class Network(Protocol):
    """What the step asks of a model; models satisfy it and do not know it."""

    def embed(self, tok: Tensor) -> Tensor: ...  # [B, C] → [B, C, E]
    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor: ...  # [B, C, E] → [B, C, E]
    def head(self) -> Tensor: ...  # [V, E]


class Ids(NamedTuple):
    """Facts of how the model speaks that the step is compiled with."""

    mask: int
    vocab: int  # ids at and above are padding and never chosen
    shift: bool = False  # a token is read off the hidden state of the position before it


def silent(verb: str) -> None:
    """Tell nobody which part of a step begins."""


def step_(
    policy: Policy,
    ids: Ids,
    net: Network,
    buf: BlockBuffer,
    kv: tuple[Tensor, ...],
    out: Tensor,
    at: Callable[[str], None] = silent,
    commits: bool = True,
) -> None:
    """One denoise forward of every row, in place.

    buf  Block Buffer of B rows; written
    kv   one tensor a layer [2, P, S, G, D]; written
    out  [B, N·L + FACTS] int32, an Outbox packed; written
    at   told the verb of each part as it begins; for profiles of eager steps
    commits  whether N + 1 places are computed; False only where `either.commits` is False
    """
    new, outbox = denoise(policy, ids, net, buf, kv, at, commits)
    for old, value in (*zip(buf[:-1], new[:-1], strict=True), *((old, new.mem[k]) for k, old in buf.mem.items())):
        if old is not value:
            old.copy_(value)
    out.copy_(outbox.pack())


def denoise(
    policy: Policy,
    ids: Ids,
    net: Network,
    buf: BlockBuffer,
    kv: tuple[Tensor, ...],
    at: Callable[[str], None] = silent,
    commits: bool = True,
) -> tuple[BlockBuffer, Outbox]:
    """The rows after one forward, and what it committed; only `kv` is written."""
    B, places, L = buf.tok.shape
    num = NUMBERS.index
    seat = torch.arange(places, device=buf.tok.device)
    limit = buf.ints[:, COUNTS.index("limit")]

    # open: a new block once the last open one is far enough, while a place and tokens to decode are left
    at("open")
    lead = torch.where(buf.done, 0, leading(buf.whole))
    # a division, not a mean: that multiplies by 1 / L on a GPU, and 5 of 25 would be less than 0.2
    progress = torch.where(buf.whole, 1.0, (buf.tok != ids.mask).sum(-1).float() / L)
    last = progress.gather(1, (buf.open - 1).clamp_min(0).long()[:, None])[:, 0]
    most = torch.minimum(policy.N + (lead > 0).int(), (limit - buf.start + L - 1) // L)
    more = (last >= buf.num[:, num("open_at")]) & (buf.open < most) & ~buf.done
    if SAME in buf.mem:
        same = buf.mem[SAME].gather(1, (buf.open - 1).clamp_min(0).long()[:, None])[:, 0]
        more = more & (same >= buf.num[:, num("stability")])
    opened = buf.open + more.int()

    # look: every open place is computed, if there is room; the N from `lead` (or 0) on may decode
    at("look")
    shown = torch.where(buf.done, 0, opened)
    room = seats(B, policy.N, L) if commits else None
    taken = shown if room is None else fitting(shown, lead, room)
    given = None
    if policy.full:  # what the window still has of the prompt sees all of the prompt, and nothing else
        given = torch.where(taken > 0, buf.ints[:, COUNTS.index("given")], 0)
    there = layout(buf, taken, room, given, policy.N + commits)
    part = seat < taken[:, None]
    cut = Cut(policy.N, lead > 0 if commits else None)
    before = torch.cat((torch.ones_like(progress[:, :1]), progress[:, :-1]), 1)
    tok, live = cut(buf.tok), (cut(part & ~buf.whole))[..., None] & ~cut(buf.held)
    accept, force_at, temp, edit, remask = (
        buf.num[:, num(name)] for name in ("accept", "force_at", "temp", "edit", "remask")
    )
    mem = {name: cut(kept) for name, kept in buf.mem.items()}
    mine = (cut(before), accept, force_at, ids.mask, None, edit, remask, temp, buf.age, mem)
    w = Seen(tok, live & (tok == ids.mask), live, *mine)

    # think: write K/V of what is looked at, attend to pages, turn the deciding positions into candidates
    at("think")
    soft = {name: there.tokens(buf.mem[name]) for name in policy.seen}
    h = there.places(net.forward(policy.embed(net.embed, there.tokens(buf.tok), soft), there.view(), kv), L)
    pos = buf.start[:, None, None] + torch.arange(places * L, dtype=torch.int32, device=seat.device).view(places, L)
    proposed = propose(policy, cut(shifted(h, buf.last) if ids.shift else h), net.head(), temp, buf, cut(pos), ids)

    # decide
    at("decide")
    c = policy.score(proposed, w)
    take = policy.select(c, w)
    tok = torch.where(live, policy.rewrite(c, w, take), tok)
    whole = cut(buf.whole) | policy.settle(c, w, tok) & cut(part)
    mem, deciding = {}, cut(part & ~buf.whole)
    for rule in policy.keepers:
        for name, kept in rule.keep(proposed, w, tok, whole).items():
            now = deciding.view(*whole.shape, *[1] * (kept.dim() - 2))
            mem[name] = cut.back(buf.mem[name], torch.where(now, kept, w.mem[name]))
    if policy.watch:
        mem |= {name: cut.back(buf.mem[name], kept) for name, kept in proposals(c, w, tok, w.mem).items()}
    tok, whole = cut.back(buf.tok, tok), cut.back(buf.whole, whole)
    bad = (w.todo & ~c.conf.isfinite()).any(-1).any(-1)  # of blocks first: with what the rules reduce so

    # commit: leading blocks that were whole before this forward now have their final K/V; slide them out
    at("commit")
    new = slide(buf, tok, whole, opened, lead, ids.mask, mem)
    if ids.shift:
        new = new._replace(last=last_of(h, lead, buf.last))
    age = buf.age + (~buf.done & (taken == shown)).int()
    new = budgeted(policy, new._replace(age=age), ids.mask)
    spent = age >= new.ints[:, COUNTS.index("max_nfe")]
    new, n, why = committed(policy, new, spent, bad, ids.mask)
    n, why = (torch.where(buf.done, 0, x).int() for x in (n, why))
    new = new._replace(done=buf.done | (why != RUNNING))
    return new, Outbox(new.tok[:, :-1].flatten(1), n, age, why, new.start)


class Cut(NamedTuple):
    """The N of N + 1 places that may decode: from place 1 on where place 0 only commits, else from place 0 on."""

    N: int
    ahead: Tensor | None  # [B] bool  place 0 only commits; None: nowhere

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N+1, …], or what was computed of it → [B, N, …]"""
        early = x[:, : self.N]
        return early if self.ahead is None else torch.where(_as(self.ahead, x), x[:, 1:], early)

    def back(self, x: Tensor, part: Tensor) -> Tensor:
        """x [B, N+1, …] with its N places replaced by `part` [B, N, …]."""
        early = torch.cat((part, x[:, -1:]), 1)
        if self.ahead is None:
            return early
        return torch.where(_as(self.ahead, x), torch.cat((x[:, :1], part), 1), early)


def _as(row: Tensor, x: Tensor) -> Tensor:
    """[B] of as many dims as x [B, …]."""
    return row.view(-1, *[1] * (x.dim() - 1))


def shifted(h: Tensor, last: Tensor) -> Tensor:
    """h [B, places, L, E] moved on by a position: each has what was before it, the first one `last` [B, E]."""
    return torch.cat((last[:, None], h.flatten(1, 2)[:, :-1]), 1).view_as(h)


def last_of(h: Tensor, n: Tensor, last: Tensor) -> Tensor:
    """[B, E]: what is before the window once n [B] blocks, final now, have left it."""
    ends = h[:, :, -1]
    at = (n - 1).clamp_min(0).long()[:, None, None].expand(-1, 1, h.shape[-1])
    return torch.where((n > 0)[:, None], ends.gather(1, at)[:, 0], last)


def propose(
    policy: Policy, h: Tensor, head: Tensor, temp: Tensor, buf: BlockBuffer, pos: Tensor, ids: Ids
) -> Candidates:
    """h [B, N, L, E] → Candidates [B, N, L]."""
    B, N, L, E = h.shape

    def each(x: Tensor) -> Tensor:
        return x[:, None].expand(B, N * L).contiguous().flatten()

    asks, filters = policy.asks, ()
    if policy.filters:  # behind no softcap and no biases
        top_k, top_p = buf.ints[:, COUNTS.index("top_k")], buf.num[:, NUMBERS.index("top_p")]
        filters = (0.0, None, None, each(top_k), each(top_p))
    rows = (each(temp), each(buf.seed), pos.reshape(-1), each(buf.age))
    tok, conf, top, likely, entropy, margin = OPS["candidates"](
        h.reshape(-1, E), head, *rows, ids.mask, ids.vocab, asks.k, asks.entropy, asks.margin, *filters
    )
    c = Candidates(tok.view(B, N, L), conf.view(B, N, L))
    if asks.k:
        c = c._replace(top=top.view(B, N, L, asks.k), likely=likely.view(B, N, L, asks.k))
    if asks.entropy:
        c = c._replace(entropy=entropy.view(B, N, L))
    if asks.margin:
        c = c._replace(margin=margin.view(B, N, L))
    if policy.confidence != "prob":
        c = c._replace(rank=c.margin if c.entropy is None or policy.confidence == "margin" else -c.entropy)
    return c


def slide(
    buf: BlockBuffer, tok: Tensor, whole: Tensor, opened: Tensor, n: Tensor, mask: int, mem: Memory
) -> BlockBuffer:
    """The window moved on by n [B] blocks; fresh places are closed, and masked where nothing is fixed."""
    _, places, L = tok.shape
    source = torch.arange(places, device=tok.device) + n[:, None]
    fresh = source >= places
    source = source.clamp_max(places - 1)
    wide = source[..., None].expand(-1, -1, L)
    start = buf.start + n * L
    there = fixed_at(buf.fixed, start, places, L)

    def moved(x: Tensor) -> Tensor:
        """Fresh places hold zeros."""
        tail = [1] * (x.dim() - 2)
        kept = x.gather(1, source.view(-1, places, *tail).expand_as(x))
        return torch.where(fresh.view(-1, places, *tail), 0, kept)

    return buf._replace(
        tok=torch.where(fresh[..., None], there, tok.gather(1, wide)),
        held=torch.where(fresh[..., None], there != mask, buf.held.gather(1, wide)),
        whole=~fresh & whole.gather(1, source),
        open=opened - n,
        start=start,
        mem={name: moved(kept) for name, kept in mem.items()},
    )
