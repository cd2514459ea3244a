"""The Block Buffer: one row a request slot, every tensor of fixed shape and fixed address.

A row is a window of N + 1 places of L tokens over its sequence, blocks aligned to position 0. At most N places decode;
the one more lets a decided block write its final K/V in the same forward in which the next blocks decode. A row's whole
status is three facts: how many leading places are `open`, which of them are `whole`, and where the window `start`s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = ("accept", "open_at", "force_at", "temp", "edit", "remask", "stability", "top_p")
COUNTS = ("limit", "max_nfe", "ignore_eos", "top_k", "given", "max_repetition_run", "run", "tail")
UNLIMITED = 2**31 - 1  # of a count that ends nothing
RUNNING, STOP, LENGTH, MAX_NFE, BAD, REPETITION = range(6)  # Outbox.why
FACTS = 4  # numbers of a row behind its tokens in a packed Outbox: n, nfe, why, start


class BlockBuffer(NamedTuple):
    """The rows' state, read and written by the step alone; `admit_` writes a row."""

    tok: Tensor  # [B, N+1, L]       int32  window tokens
    held: Tensor  # [B, N+1, L]       bool   given tokens (the prompt's tail, what is fixed), never edited
    whole: Tensor  # [B, N+1]          bool   block is decided; its next forward writes its final K/V
    open: Tensor  # [B]               int32  leading places that take part
    start: Tensor  # [B]               int32  absolute position of tok[b, 0, 0]
    pages: Tensor  # [B, W]            int32  page table
    num: Tensor  # [B, len(NUMBERS)] f32    per-request numbers
    ints: Tensor  # [B, len(COUNTS)]  int32  limit: position that the answer may not reach; given: the prompt's tokens
    stops: Tensor  # [B, STOP_IDS]     int32  ids that end the answer; -1 is none
    seed: Tensor  # [B]               int64  key of the draws
    age: Tensor  # [B]               int32  denoise forwards so far
    done: Tensor  # [B]               bool   the row is inert: writes no K/V, commits nothing
    lora: Tensor  # [B]               int32  adapter slot; 0 is none
    last: Tensor  # [B, E or 0]       final hidden state before `start`, where a token is read off the position before
    fixed: (
        Tensor  # [B, T]            int32  what is at a position beforehand: an id, or the mask, as in the last column
    )
    mem: dict[str, Tensor]  # [B, N+1, …] each  what the policy's rules keep, by name


class Outbox(NamedTuple):
    """All that the host reads of a step, packed in one int32 tensor [B, N·L + FACTS]."""

    tok: Tensor  # [B, N·L] int32  the window's first N places after the step
    n: Tensor  # [B]      int32  how many leading ones of `tok` this step committed (held ones counted)
    nfe: Tensor  # [B]      int32  denoise forwards so far
    why: Tensor  # [B]      int32  why the row ended in this step; else RUNNING, or −the scope that it wants next
    start: Tensor  # [B]      int32  K/V before this position is final; 0 where none ever is

    def pack(self) -> Tensor:
        return torch.cat((self.tok, torch.stack((self.n, self.nfe, self.why, self.start), 1)), 1)


class Row(NamedTuple):
    """What the host knows of a request when it takes a slot; `pack` makes one int32 vector of it."""

    tok: list[int]  # the prompt's tokens from `start` on: of the first, incomplete block, or of a whole one to look at
    start: int
    pages: list[int]  # page table, W entries at most
    num: tuple[float, ...]
    ints: tuple[int, ...]
    stops: list[int]
    seed: int
    lora: int = 0
    ids: Sequence[int] = ()  # with a turn: the sequence's end and itself, which `pack` leaves out (see sequence.py)
    fixed: Sequence[tuple[int, int]] = ()  # without: (position, id) of what is fixed; `pack` leaves it out too


def allocate(
    B: int, N: int, L: int, W: int, stops: int, device: torch.device, E: int = 0, dtype: torch.dtype = torch.float32,
    mem: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = MappingProxyType({}), T: int = 1,
) -> BlockBuffer:  # fmt: skip
    """A buffer whose rows are all done; E is 0 where no hidden state is kept, `mem` as of Policy.memory.

    T  one more than the positions at which something may be fixed
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return BlockBuffer(
        tok=zeros(B, N + 1, L),
        held=zeros(B, N + 1, L, dtype=torch.bool),
        whole=zeros(B, N + 1, dtype=torch.bool),
        open=zeros(B),
        start=zeros(B),
        pages=zeros(B, W),
        num=zeros(B, len(NUMBERS), dtype=torch.float32),
        ints=zeros(B, len(COUNTS)),
        stops=zeros(B, stops),
        seed=zeros(B, dtype=torch.int64),
        age=zeros(B),
        done=torch.ones(B, dtype=torch.bool, device=device),
        lora=zeros(B),
        last=zeros(B, E, dtype=dtype),
        fixed=zeros(B, T),
        mem={name: zeros(B, N + 1, *shape, dtype=kind) for name, (shape, kind) in mem.items()},
    )


def rows(buf: BlockBuffer, B: int) -> BlockBuffer:
    """The first B rows, as views: one a tensor, so that a compiled step may write them in place."""
    return BlockBuffer(*(t[:B] for t in buf[:-1]), mem={name: t[:B] for name, t in buf.mem.items()})


def saved(buf: BlockBuffer, slot: int) -> BlockBuffer:
    """A copy of one row, each tensor without its first dim; no host sync."""
    return BlockBuffer(*(t[slot].clone() for t in buf[:-1]), mem={name: t[slot].clone() for name, t in buf.mem.items()})


def restore_(buf: BlockBuffer, slot: int, row: BlockBuffer) -> None:
    """Write a row that was saved into `slot`; its page table is written by `pages_`."""
    for old, value in (*zip(buf[:-1], row[:-1], strict=True), *((old, row.mem[k]) for k, old in buf.mem.items())):
        old[slot].copy_(value)


def pages_(buf: BlockBuffer, packed: Tensor) -> None:
    """Write page tables [n, 1 + W] int32, each behind its slot, already on the device; no host sync."""
    buf.pages.index_copy_(0, packed[:, 0].long(), packed[:, 1:])


def tables(pages: Mapping[int, Sequence[int]], W: int) -> Tensor:
    """Page tables by slot as `pages_` takes them."""
    return torch.tensor([[slot, *of, *[0] * (W - len(of))] for slot, of in pages.items()], dtype=torch.int32)


def pack(row: Row, L: int, W: int, stops: int) -> Tensor:
    """Row → int32 [3 + L + W + len(NUMBERS) + len(COUNTS) + stops + 2], floats and seed as their bits."""
    given = torch.tensor(row.tok + [0] * (L - len(row.tok)), dtype=torch.int32)
    pages = torch.tensor(row.pages + [0] * (W - len(row.pages)), dtype=torch.int32)
    ends = torch.tensor(row.stops + [-1] * (stops - len(row.stops)), dtype=torch.int32)
    num = torch.tensor(row.num, dtype=torch.float32).view(torch.int32)
    seed = torch.tensor([row.seed], dtype=torch.int64).view(torch.int32)
    head = torch.tensor([row.start, len(row.tok), row.lora, *row.ints], dtype=torch.int32)
    return torch.cat((head, num, seed, given, pages, ends))


def fixed_at(fixed: Tensor, start: Tensor, places: int, L: int) -> Tensor:
    """[B, places, L] int32: what stands beforehand at the positions from `start` [B] on; fixed [B, T]."""
    at = start[:, None] + torch.arange(places * L, dtype=torch.int32, device=fixed.device)
    return fixed.gather(1, at.clamp_max(fixed.shape[1] - 1).long()).view(-1, places, L)


def admit_(buf: BlockBuffer, slot: int, packed: Tensor, mask: int, fixed: Tensor | None = None) -> None:
    """Write one packed row [·] int32, already on the device, into `slot`; no host sync.

    fixed  [n, 2] int32  positions, and the ids that stand there beforehand; None: nothing does
    """
    _, places, L = buf.tok.shape
    sizes = (3, len(COUNTS), len(NUMBERS), 2, L, buf.pages.shape[1], buf.stops.shape[1])
    head, ints, num, seed, given, pages, stops = packed.split(sizes)
    held = torch.arange(L, device=packed.device) < head[1]
    buf.tok[slot].fill_(mask)
    buf.tok[slot, 0].copy_(torch.where(held, given, mask))
    buf.held[slot].fill_(False)
    buf.held[slot, 0].copy_(held)
    given_whole = head[1] == L  # its forward gives the hidden state that the block after it begins with
    buf.whole[slot].fill_(False)
    buf.whole[slot, 0].copy_(given_whole)
    buf.open[slot].copy_(1 + given_whole.int())
    buf.start[slot].copy_(head[0])
    buf.pages[slot].copy_(pages)
    buf.num[slot].copy_(num.view(torch.float32))
    buf.ints[slot].copy_(ints)
    buf.stops[slot].copy_(stops)
    buf.seed[slot].copy_(seed.clone().view(torch.int64)[0])  # the clone aligns the bits for an int64 view
    buf.age[slot].fill_(0)
    buf.lora[slot].copy_(head[2])
    for kept in buf.mem.values():
        kept[slot].fill_(0)
    buf.fixed[slot].fill_(mask)
    if fixed is not None:
        buf.fixed[slot].index_copy_(0, fixed[:, 0].long(), fixed[:, 1])
        tok = fixed_at(buf.fixed[slot][None], head[:1], places, L)[0]
        buf.tok[slot].copy_(torch.where(tok == mask, buf.tok[slot], tok))
        buf.held[slot].logical_or_(tok != mask)
    buf.done[slot].fill_(False)
