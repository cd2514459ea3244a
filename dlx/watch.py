"""The windows of rows that somebody watches: packed on the device, sent beside the outbox, read when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlx.graphs.buffer import COUNTS, FACTS, BlockBuffer
from dlx.graphs.rules.shown import CONF, GUESS
from dlx.request import Window

if TYPE_CHECKING:
    from dlx.plan import Plan

HEAD = 4  # numbers of a packed row before its tokens


def watched(plan: Plan) -> list[int]:
    """Slots of the rows that somebody watches."""
    return [slot for slot, request in plan.running.items() if request.watch]


def packed(plan: Plan, buf: BlockBuffer, step: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor | None:
    """int32 [watched rows, HEAD + n] on the device, with confidences HEAD + 3 · n; n = (N + 1) · L. None: nobody looks.

    step  [B, N·L + FACTS]  Outbox of the launch's last forward: what came before it has left the window
    send  brings a small tensor to the device
    """
    slots = watched(plan)
    if not slots:
        return None
    at = send(torch.tensor(slots, dtype=torch.int32))
    head = torch.stack((step[:, -FACTS], buf.open, buf.start, buf.ints[:, COUNTS.index("limit")]), 1)
    shown = [buf.mem[CONF].view(torch.int32), buf.mem[GUESS]] if CONF in buf.mem else []
    return torch.cat([x.index_select(0, at).flatten(1) for x in (head, buf.tok, *shown)], 1)


def unpacked(plan: Plan, rows: Tensor | None, places: int, width: int, ends: bool) -> dict[int, Window]:
    """The windows behind what is given or committed, by slot.

    rows           as packed, on the host
    places, width  of a window: N + 1 blocks of L
    ends           leave out what is behind the end of the answer
    """
    windows: dict[int, Window] = {}
    for slot, row in zip(watched(plan), () if rows is None else rows):
        n, opened, start, limit = row[:HEAD].tolist()
        end = min(opened * width, limit - start) if ends else opened * width
        seen = slice(max(n, plan.running[slot].tail), end)
        ids, *shown = (part[seen] for part in row[HEAD:].split(places * width))
        conf, guess = shown or (ids[:0], ids[:0])
        windows[slot] = Window(ids.tolist(), conf.view(torch.float32).tolist(), guess.tolist())
    return windows
