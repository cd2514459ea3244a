"""What ends a row, and what of it is final: stop ids, the limit, the forwards, a token that repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.graphs.buffer import BAD, COUNTS, LENGTH, MAX_NFE, REPETITION, RUNNING, STOP, UNLIMITED, BlockBuffer
from dlx.graphs.policies import Policy


def column(buf: BlockBuffer, name: str) -> Tensor:
    """[B] int32: that one of COUNTS."""
    return buf.ints[:, COUNTS.index(name)]


def with_columns(buf: BlockBuffer, **columns: Tensor) -> BlockBuffer:
    """The buffer with these of COUNTS, each [B]."""
    parts = [columns.get(name, column(buf, name)).int() for name in COUNTS]
    return buf._replace(ints=torch.stack(parts, 1))


def leading(whole: Tensor) -> Tensor:
    """[B, N+1] bool → [B] int32: how many leading places are whole."""
    seat = torch.arange(whole.shape[1], device=whole.device, dtype=torch.int32)
    return torch.where(whole, whole.shape[1], seat).amin(1).int()


def budgeted(policy: Policy, new: BlockBuffer, mask: int) -> BlockBuffer:
    """With `auto_max_nfe`, rows without a budget get one in that forward: max_tokens ÷ their tokens per forward so far.

    max_nfe = max(age, ⌈max_tokens · age / max(tokens, age)⌉). Source Diffulex, which has it on; it cuts answers whose
    later tokens take more forwards than their first
    """
    if policy.auto_max_nfe is None:
        return new
    given = column(new, "given")
    seat = torch.arange(new.tok.shape[1], device=new.tok.device)
    there = (new.tok != mask) & (seat < new.open[:, None])[..., None]  # what is fixed behind is not reached yet
    tokens = new.start + there.flatten(1).sum(1, dtype=torch.int32) - given
    most = (column(new, "limit") - given) * new.age
    worth = torch.maximum(new.age, -(-most // torch.maximum(tokens, new.age).clamp_min(1)))
    now = ~new.done & (new.age == policy.auto_max_nfe) & (column(new, "max_nfe") == UNLIMITED)
    return with_columns(new, max_nfe=torch.where(now, worth, column(new, "max_nfe")))


def committed(
    policy: Policy, new: BlockBuffer, spent: Tensor, bad: Tensor, mask: int
) -> tuple[BlockBuffer, Tensor, Tensor]:
    """(rows, n, why): leading positions of the slid window that are final now, and why each row ends if it does.

    Blocks that just became whole, in order; when the forwards are spent, also the decided tokens before the first
    mask. Cut after the first stop id and at the limit. Where decided tokens stay (`Policy.keeps`), a stop id or the
    limit behind decided tokens alone ends the row at once: the rest of its block is not waited for.
    """
    B, _, L = new.tok.shape
    tok, held = new.tok[:, :-1].flatten(1), new.held[:, :-1].flatten(1)
    beyond = tok.shape[1]
    at = torch.arange(beyond, device=tok.device, dtype=torch.int32)
    closed = at >= (new.open * L)[:, None]  # what is fixed there is not reached yet
    first = torch.where(closed | (tok == mask), at, beyond).amin(1)
    n = torch.where(spent, first, leading(new.whole) * L)
    room = column(new, "limit") - new.start
    n, reach = (torch.minimum(x, room) for x in (n, torch.maximum(n, first) if policy.keeps else n))
    ends = (tok[..., None] == new.stops[:, None]).any(-1) & ~held & (at < reach[:, None])
    ends = ends & (column(new, "ignore_eos") == 0)[:, None]
    stop = torch.where(ends, at, beyond).amin(1)
    full = reach >= room
    why = torch.where(spent, MAX_NFE, RUNNING)  # not read on its way: Triton fails where it is stored and compared
    why = torch.where(full, LENGTH, why)
    n = torch.where(full, reach, n)
    stopped = stop < beyond
    if policy.max_repetition_run is not None:
        new, worn = repeated(new, tok, held, n, reach)
        stopped = stopped & (stop <= worn)
        why = torch.where(worn < beyond, REPETITION, why)
        n = torch.where(worn < beyond, worn + 1, n)
    why = torch.where(stopped, STOP, why)
    n = torch.where(stopped, stop + 1, n)
    return new, torch.where(bad, 0, n), torch.where(bad, BAD, why)


def repeated(new: BlockBuffer, tok: Tensor, held: Tensor, n: Tensor, reach: Tensor) -> tuple[BlockBuffer, Tensor]:
    """(rows, [B] int32 position at which one token has stood `max_repetition_run` times in a row, else N·L).

    tok, held  [B, N·L]  the slid window; n [B] of it is delivered now, `reach` [B] is final
    The columns `tail` and `run` hold the last delivered token and how often it has stood in a row.
    """
    beyond = tok.shape[1]
    at = torch.arange(beyond, device=tok.device, dtype=torch.int32)
    run, tail = column(new, "run"), column(new, "tail")
    own = torch.where(held, -1, tok)  # a run does not begin in the prompt
    same = own == torch.cat((tail[:, None], own[:, :-1]), 1)
    since = torch.where(same, -1, at).cummax(1).values
    length = torch.where(since < 0, at + 1 + run[:, None], at - since + 1)
    worn = (length >= column(new, "max_repetition_run")[:, None]) & ~held & (at < reach[:, None])
    last = (n - 1).clamp_min(0).long()[:, None]
    moved = (n > 0) & ~new.done
    run = torch.where(moved, length.gather(1, last)[:, 0], run)
    tail = torch.where(moved, own.gather(1, last)[:, 0], tail)
    return with_columns(new, run=run, tail=tail), torch.where(worn, at, beyond).amin(1)
