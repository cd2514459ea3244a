"""Which blocks a forward computes, and how they lie: the first places of every row, or blocks that have work, packed.

A window has a place more than may decode, so that a block commits without a forward of its own; at one request that
place is free, from some hundred positions on it is not. Packed, the device fills a fixed number of seats with the
blocks that have work; a seat is a row of one block to the network, with its request's page table.

A row is looked at whole, or in its committing blocks alone, or not at all: what decodes always sees what it would see
without packing, so the answers are the same. Every row's least need fits; what commits and decodes may have to wait
with decoding for a forward, which is not counted as one of the row's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs.buffer import BlockBuffer
from dlx.ops import OPS
from dlx.ops.attention import View

ENOUGH = 256  # positions of a forward from which on packing is worth the kernels that it takes and who has to wait


def seats(B: int, N: int, L: int) -> int | None:
    """Blocks that a forward of B rows computes; None where packing saves nothing.

    N a row, and room for those that commit as well: every row's block after L / 2 forwards, at two tokens each, and a
    quarter of the rows at least: rows that were admitted together want to commit together.
    """
    most = B * (N + 1)
    some = B * N + max(-(-B // 4), min(B, -(-2 * B // L)))
    return some if most * L >= ENOUGH and some < most else None


def fitting(shown: Tensor, lead: Tensor, room: int) -> Tensor:
    """[B] int32: leading places that are computed, `room` at most in all.

    shown  [B] int32  leading places with work
    lead   [B] int32  of these, the first ones that only commit
    """
    least = torch.where(lead > 0, lead, shown)
    more = shown - least
    fits = more.cumsum(0) <= room - least.sum()
    return torch.where(fits, shown, least).int()


class Every(NamedTuple):
    """The first places of every row, each row one row of queries."""

    pos: Tensor  # [B, places · L]  int32
    seen: Tensor  # [B, places · L]  int32
    pages: Tensor  # [B, W]           int32
    lora: Tensor  # [B]              int32

    @staticmethod
    def of(buf: BlockBuffer, taken: Tensor, given: Tensor | None, places: int) -> Every:
        L = buf.tok.shape[2]
        pos, seen = OPS["positions"](buf.start, taken, L, places, given)
        return Every(pos, seen, buf.pages, buf.lora)

    def view(self) -> View:
        return View(self.pos, self.pages, self.seen, lora=self.lora)

    def tokens(self, tok: Tensor) -> Tensor:
        """[B, N+1, L, …] → [B, places · L, …]"""
        return tok[:, : self.pos.shape[1] // tok.shape[2]].flatten(1, 2)

    def places(self, h: Tensor, L: int) -> Tensor:
        """[B, places · L, E] → [B, places, L, E]"""
        return h.unflatten(1, (-1, L))


class Packed(NamedTuple):
    """Blocks with work, each a row of queries; seats that are left over see and store nothing."""

    pos: Tensor  # [seats, L]  int32
    seen: Tensor  # [seats, L]  int32
    pages: Tensor  # [seats, W]  int32
    row: Tensor  # [seats]     int64  whose block sits there
    place: Tensor  # [seats]     int64  and which
    seat: Tensor  # [B, places] int64  where a block sits; anywhere for one that does not
    lora: Tensor  # [seats]     int32

    @staticmethod
    def of(buf: BlockBuffer, taken: Tensor, room: int, given: Tensor | None = None) -> Packed:
        B, places, L = buf.tok.shape
        device = buf.tok.device
        some = (torch.arange(places, device=device) < taken[:, None]).flatten()
        at = some.cumsum(0)  # a block's seat, counted from 1
        here = some & (at == torch.arange(1, room + 1, device=device)[:, None])  # [seats, B · places]
        block = (here * torch.arange(B * places, device=device)).sum(1)
        row, place = block // places, block % places
        start = buf.start[row] + (place * L).int()
        used = here.any(1)
        given = None if given is None else torch.where(used, given[row], 0)
        pos, seen = OPS["positions"](start, used.int(), L, 1, given)
        at = (at - 1).clamp(0, room - 1).view(B, places)
        return Packed(pos, seen, buf.pages[row], row, place, at, buf.lora[row])

    def view(self) -> View:
        return View(self.pos, self.pages, self.seen, lora=self.lora)

    def tokens(self, tok: Tensor) -> Tensor:
        """[B, places, L, …] → [seats, L, …]"""
        return tok[self.row, self.place]

    def places(self, h: Tensor, L: int) -> Tensor:
        """[seats, L, E] → [B, places, L, E]"""
        return h[self.seat]


def layout(buf: BlockBuffer, taken: Tensor, room: int | None, given: Tensor | None, places: int) -> Every | Packed:
    """How the first `taken` [B] places of each row lie in a forward with `room` seats, or without.

    places         of each row that are computed where there are no seats
    given   [B] int32  None, or where each row's prompt ends, which sees itself whole; 0 if none of the row is computed
    """
    return Every.of(buf, taken, given, places) if room is None else Packed.of(buf, taken, room, given)
