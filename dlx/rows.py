"""The rows on the device: a request's row is admitted to a slot, kept aside when it is preempted, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs import buffer, canvas, sequence
from dlx.graphs.buffer import BlockBuffer, Row
from dlx.plan import Plan


class Kept(NamedTuple):
    """Copies of one row, all but its K/V."""

    row: BlockBuffer
    canvas: canvas.Memory


class Rows:
    """Writes rows between launches; nothing here waits for the device.

    send  copies an int32 tensor to the device
    """

    def __init__(
        self,
        buf: BlockBuffer,
        memory: canvas.Memory,
        sequences: sequence.Memory,
        mask: int,
        send: Callable[[Tensor], Tensor],
    ) -> None:
        self.buf, self.memory, self.sequences, self.mask, self.send = buf, memory, sequences, mask, send
        self._kept: dict[int, Kept] = {}  # by request

    def leave(self, plan: Plan) -> None:
        """Keep aside the rows that the plan preempts; they are inert from here on."""
        for slot, id in plan.preempt.items():
            memory = canvas.Memory(*(t[slot].clone() for t in self.memory))
            self._kept[id] = Kept(buffer.saved(self.buf, slot), memory)
            self.buf.done[slot].fill_(True)

    def enter(self, plan: Plan) -> None:
        """Admit and resume the plan's rows, and give rows their new page tables."""
        for slot, row in plan.admit.items():
            self._admit(slot, row)
        for slot, id in plan.resume.items():
            kept = self._kept[id]
            buffer.restore_(self.buf, slot, kept.row)
            for mine, value in zip(self.memory, kept.canvas, strict=True):
                mine[slot].copy_(value)
        self._tables(plan.pages)

    def holds(self, id: int) -> bool:
        """The row of this request is kept aside."""
        return id in self._kept

    def forget(self, id: int) -> None:
        """Drop what is kept of a request, if anything is."""
        self._kept.pop(id, None)

    def _admit(self, slot: int, row: Row) -> None:
        width, W, stops = self.buf.tok.shape[2], self.buf.pages.shape[1], self.buf.stops.shape[1]
        fixed = self.send(torch.tensor(row.fixed, dtype=torch.int32)) if row.fixed else None
        buffer.admit_(self.buf, slot, self.send(buffer.pack(row, width, W, stops)), self.mask, fixed)
        if row.ids:
            ids = self.send(torch.tensor(row.ids, dtype=torch.int32))
            sequence.admit_(self.sequences, slot, ids, self.mask)

    def _tables(self, pages: Mapping[int, list[int]]) -> None:
        if pages:
            buffer.pages_(self.buf, self.send(buffer.tables(pages, self.buf.pages.shape[1])))
