"""One step over a whole sequence, or a part of it: look, think, decide, commit. For policies with a `turn`.

The device holds all of a row's sequence, what is given and what is decided, and masks elsewhere. A row decodes one
block [s, s + L) at a time, s anywhere, or all of its answer. A forward has a scope, which the host picks for all rows;
those that want another are inert in it. Which one a row wants next is its policy's `turn`, told to the host as −why.

All positions write the K/V of what they are now, and attend to pages only. Trained all-to-all, each sees the whole
sequence: what a forward did not compute is seen as it was when it was last computed. What is behind the block is in
the pages like what is before it, and the block's own keys replace the old ones there, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs.buffer import COUNTS, NUMBERS, RUNNING, BlockBuffer, Outbox
from dlx.graphs.policies import Policy
from dlx.graphs.rules import Candidates, Seen
from dlx.graphs.rules.shown import proposals
from dlx.graphs.rules.turn import ALL, PAIR, REST, SUB, After, Scope, first
from dlx.graphs.step import Ids, Network, propose, silent
from dlx.graphs.stops import budgeted, committed
from dlx.ops import OPS
from dlx.ops.attention import View
from dlx.ops.candidates.reference import philox


class Memory(NamedTuple):
    """The rows' sequences. T is the longest, and a block more."""

    ids: Tensor  # [B, T]  int32  0 behind the end of a sequence
    held: Tensor  # [B, T]  bool   given: the prompt, what is fixed of the answer, what is behind the end
    turn: Tensor  # [B]     int32  forwards spent on the block
    want: Tensor  # [B]     int32  scope of the next forward
    end: Tensor  # [B]     int32  of the sequence; from `limit` on all is given


def allocate(B: int, T: int, device: torch.device) -> Memory:
    """Empty sequences."""
    ids = torch.zeros(B, T, dtype=torch.int32, device=device)
    turn = torch.zeros(B, dtype=torch.int32, device=device)
    return Memory(ids, torch.zeros_like(ids, dtype=torch.bool), turn, torch.zeros_like(turn), torch.zeros_like(turn))


def rows(memory: Memory, B: int) -> Memory:
    """Those of the first B rows, as views."""
    return Memory(*(t[:B] for t in memory))


def admit_(memory: Memory, slot: int, packed: Tensor, mask: int) -> None:
    """Write a sequence's end and itself [1 + T] int32, already on the device, into `slot`; no host sync."""
    end, ids = packed.split((1, packed.shape[0] - 1))
    memory.ids[slot].copy_(ids)
    memory.held[slot].copy_(ids != mask)
    memory.turn[slot].fill_(0)
    memory.want[slot].fill_(0)
    memory.end[slot].copy_(end[0])


def busy(memory: Memory, buf: BlockBuffer, scope: int) -> Tensor:
    """[B] bool: who takes part in a forward of this scope."""
    return ~buf.done & (memory.want == scope)


def sequence_(
    policy: Policy,
    scope: int,
    C: int,
    ids: Ids,
    net: Network,
    buf: BlockBuffer,
    memory: Memory,
    kv: tuple[Tensor, ...],
    out: Tensor,
    at: Callable[[str], None] = silent,
) -> None:
    """One forward of the rows that want it, in place; arguments as of `graphs.step.step_`.

    scope  number of it in `policy.turn.scopes`
    C      positions of a row that are computed
    """
    new, kept, outbox = denoise(policy, scope, C, ids, net, buf, memory, kv, at)
    pairs = zip((*buf[:-1], *memory), (*new[:-1], *kept), strict=True)
    for old, value in (*pairs, *((old, new.mem[name]) for name, old in buf.mem.items())):
        if old is not value:
            old.copy_(value)
    out.copy_(outbox.pack())


def denoise(
    policy: Policy,
    scope: int,
    C: int,
    ids: Ids,
    net: Network,
    buf: BlockBuffer,
    memory: Memory,
    kv: tuple[Tensor, ...],
    at: Callable[[str], None] = silent,
) -> tuple[BlockBuffer, Memory, Outbox]:
    """The rows and their sequences after one forward, and what it committed; only `kv` is written."""
    assert policy.turn is not None and policy.L is not None
    B, _, width = buf.tok.shape
    what, full = policy.turn.scopes[scope], policy.turn.full
    limit = buf.ints[:, COUNTS.index("limit")]
    accept, force_at, temp, edit, remask = (
        buf.num[:, NUMBERS.index(name)] for name in ("accept", "force_at", "temp", "edit", "remask")
    )
    device = buf.tok.device

    # look: the C positions from `low` on are computed, of rows that want this scope
    at("look")
    on = busy(memory, buf, scope)
    block = buf.start[:, None] + torch.arange(width, dtype=torch.int32, device=device)
    before, given = (x.gather(1, block.clamp_max(x.shape[1] - 1).long()) for x in (memory.ids, memory.held))
    low = lowest(what, buf.start, policy.L, (before == ids.mask) & ~given)
    end = memory.end if full else buf.start + policy.L
    if full or what.kind == SUB:  # all see up to the end
        pos, seen = OPS["positions"](low, torch.zeros_like(low), 1, C, torch.where(on, end, 0))
    else:
        blocks = C // policy.L
        pos, seen = OPS["positions"](low, torch.where(on, blocks, 0).int(), policy.L, blocks)
    tok = memory.ids.gather(1, pos.clamp(0, memory.ids.shape[1] - 1).long())

    # think: write K/V of what is computed, attend to pages, turn what may be decided into candidates
    at("think")
    soft = {name: spread(buf.mem[name][:, 0], pos - buf.start[:, None]) for name in policy.seen}
    h = net.forward(policy.embed(net.embed, tok, soft), View(pos, buf.pages, seen, lora=buf.lora), kv)
    where = block if policy.turn.blocks else pos  # an answer without blocks is decided wherever it is computed
    source = where - low[:, None] - int(ids.shift)
    known = (source >= 0) & (source < C) & on[:, None]
    h = h.gather(1, source.clamp(0, C - 1).long()[..., None].expand(-1, -1, h.shape[-1]))
    proposed = propose(policy, h[:, None], net.head(), temp, buf, where[:, None], ids)

    # decide
    at("decide")
    tok, held = (before, given) if policy.turn.blocks else (tok, memory.held[:, :C])
    live = known & ~held
    todo = live & (tok == ids.mask)
    first_only = ids.shift and what.kind == ALL and leaves_first(policy.turn.scopes)
    if first_only:
        todo = todo & (torch.arange(width, device=device) == 0)
    one = torch.ones_like(temp)[:, None]
    span = torch.minimum(torch.full_like(limit, width), limit - buf.start)
    draw = uniform(buf.seed, where, buf.age)
    mem = {name: kept[:, :1] for name, kept in buf.mem.items()}
    mine = (one, accept, force_at, ids.mask, None, edit, remask, temp, buf.age, mem, memory.turn, span, draw[:, None])
    w = Seen(tok[:, None], todo[:, None], live[:, None], *mine)
    c = policy.score(proposed, w)
    take = w.todo if first_only else policy.select(c, w)
    tok = torch.where(live, policy.rewrite(c, w, take)[:, 0], tok)
    bad = (w.todo & ~c.conf.isfinite()).flatten(1).any(1)
    after = memory.ids.scatter(1, where.clamp_max(memory.ids.shape[1] - 1).long(), tok)
    tok = after.gather(1, block.clamp_max(after.shape[1] - 1).long())
    whole = policy.settle(c, w, tok[:, None])[:, 0] & on
    kept = {}
    for rule in policy.keepers:
        for name, now in rule.keep(proposed, w, tok[:, None], whole[:, None]).items():
            shape = (B, *[1] * (now.dim() - 1))
            now = torch.where(whole.view(shape), 0, torch.where(on.view(shape), now, mem[name]))
            kept[name] = torch.cat((now, torch.zeros_like(now)), 1)
    if policy.watch:  # an answer without blocks is decided from position 0 on, and shown from its begin
        place = (block - where[:, :1]).clamp(0, where.shape[1] - 1).long()[:, None]
        there = Candidates(c.tok.gather(2, place), c.conf.gather(2, place))
        seen = w._replace(**{name: getattr(w, name).gather(2, place) for name in ("tok", "todo", "live")})
        for name, now in proposals(there, seen, tok[:, None], mem).items():
            kept[name] = torch.cat((torch.where(whole[:, None, None], 0, now), torch.zeros_like(now)), 1)

    # commit: a block that is decided is delivered, and the next begins
    at("commit")
    age = buf.age + on.int()
    told = torch.where((block >= limit[:, None]) & full, ids.mask, tok)  # nothing is there
    shown = buf._replace(
        tok=torch.stack((told, torch.full_like(tok, ids.mask)), 1),
        held=torch.stack((given, torch.zeros_like(given)), 1),
        whole=torch.stack((whole, torch.zeros_like(whole)), 1),
        age=age,
        mem=kept,
    )
    shown = budgeted(policy, shown, ids.mask)
    spent = (age >= shown.ints[:, COUNTS.index("max_nfe")]) & on
    shown, n, why = committed(policy, shown, spent, bad, ids.mask)
    n, why = (torch.where(on, v, 0).int() for v in (n, why))
    new = shown._replace(done=buf.done | (why != RUNNING), start=torch.where(whole, buf.start + policy.L, buf.start))
    ahead = new.start[:, None] + torch.arange(policy.L, dtype=torch.int32, device=device)
    ahead = after.gather(1, ahead.clamp_max(after.shape[1] - 1).long())
    want = torch.where(on, policy.turn(After(ahead, whole, age, ids.mask)), memory.want)
    turn = torch.where(whole, 0, memory.turn + on.int())
    why = torch.where(why == RUNNING, torch.where(buf.done, 0, -want), why)
    return new, Memory(after, memory.held, turn, want, memory.end), Outbox(told, n, age, why, torch.zeros_like(n))


def lowest(what: Scope, s: Tensor, L: int, todo: Tensor) -> Tensor:
    """[B] int32: the first position that a scope computes; below 0 nothing is there."""
    if what.kind == ALL:
        return torch.zeros_like(s)
    if what.kind == SUB:
        return s + first(todo, what.left)
    return s - {REST: 0, PAIR: L}.get(what.kind, what.left)


def spread(kept: Tensor, at: Tensor) -> Tensor:
    """What is kept of a block [B, L, …], at offsets [B, C] from its begin → [B, C, …]; zeros outside."""
    shape = (*at.shape, *[1] * (kept.dim() - 2))
    found = kept.gather(1, at.clamp(0, kept.shape[1] - 1).long().view(shape).expand(*at.shape, *kept.shape[2:]))
    return torch.where(((at >= 0) & (at < kept.shape[1])).view(shape), found, 0)


def leaves_first(scopes: tuple[Scope, ...]) -> bool:
    """Some scope does not compute the position before the block."""
    return any(what.kind == REST or (what.kind not in (ALL, PAIR, SUB) and what.left == 0) for what in scopes)


def uniform(seed: Tensor, pos: Tensor, age: Tensor) -> Tensor:
    """[B, L] f32 below 1: a draw for each position [B, L] in forward `age` [B]."""
    word = philox((0, pos.long(), age.long()[:, None], 2), seed[:, None])
    return (word >> 8).float() * 2.0**-24
