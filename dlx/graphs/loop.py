"""Several forwards in one launch: the step, repeated on the device while a row still runs.

    begin   the launch's outbox is emptied
    turn    one step; what it committed goes behind what the launch has committed so far
    again   another turn is of use: a row runs, the launch has forwards left, and the host did not halt it

On CUDA `nodes.py` puts the captured turn into a WHILE node, so that the host sends one launch and sleeps; elsewhere,
and for a profile that is to show every kernel, the turns are run one after the other. Rows that are done are inert, so
both ways give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs.buffer import FACTS, RUNNING, BlockBuffer


class Launch(NamedTuple):
    """The static tensors of launches of up to `most` forwards.

    Outbox room is for all that `most` forwards can commit, so it is never full.
    """

    out: Tensor  # [B, most · N·L + FACTS] int32  an Outbox, packed, of all forwards of the launch
    step: Tensor  # [B, N·L + FACTS]       int32  that of one forward
    left: Tensor  # [1]                 int32  forwards that the launch may still run
    on: Tensor  # [1]                 int32  1 while a row runs
    epoch: Tensor  # [1]                 int32  number of the launch
    halt: Tensor  # [1]                 int32  in pinned memory: launches up to this number take no further turn
    most: int


def allocate(B: int, width: int, most: int, device: torch.device, room: int | None = None) -> Launch:
    """width  N·L, what one forward may commit; room: what a launch may, if it is less than that of each forward"""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    halt = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Launch(
        zeros(B, (most * width if room is None else room) + FACTS),
        zeros(B, width + FACTS),
        zeros(1),
        zeros(1),
        zeros(1),
        halt,
        most,
    )


def rows(launch: Launch, B: int) -> Launch:
    """The first B rows."""
    return launch._replace(out=launch.out[:B], step=launch.step[:B])


def running(buf: BlockBuffer) -> Tensor:
    """[B] bool: who is not done."""
    return ~buf.done


def begin_(launch: Launch, buf: BlockBuffer, busy: Callable[[], Tensor]) -> None:
    """An empty outbox, and whether there is anything to do. The host has written `left` and `epoch`.

    busy  → [B] bool: whose row another turn is for; reads the device
    """
    none = torch.zeros_like(buf.age)
    launch.out[:, -FACTS:].copy_(torch.stack((none, buf.age, none, buf.start), 1))
    launch.on.copy_(busy().any()[None])


def turn_(step: Callable[[], None], busy: Callable[[], Tensor], launch: Launch) -> None:
    """One forward of every row, by `step`, which writes `launch.step`; that goes behind what the launch has."""
    step()
    gather_(launch.out, launch.step)
    launch.on.copy_(busy().any()[None])


def gather_(out: Tensor, step: Tensor) -> None:
    """Append a forward's Outbox [B, N·L + FACTS] to that of the launch [B, room + FACTS]."""
    width, room = step.shape[1] - FACTS, out.shape[1] - FACTS
    (n, _, ended, _), (more, nfe, why, start) = out[:, room:].split(1, 1), step[:, width:].split(1, 1)
    at = torch.arange(room, device=out.device, dtype=torch.int32) - n
    new = (at >= 0) & (at < more)
    tok = torch.where(new, step[:, :width].gather(1, at.clamp(0, width - 1).long()), out[:, :room])
    why = torch.where(ended > RUNNING, ended, why)  # a row that ended before says RUNNING
    out.copy_(torch.cat((tok, n + more, nfe, why, start), 1))


def unrolled(begin: Callable[[], None], turn: Callable[[], None], launch: Launch) -> Callable[[], None]:
    """A launch as separate runs of its parts; early exit where reading the device costs nothing."""
    on_host = launch.on.device.type == "cpu"

    def run() -> None:
        begin()
        for _ in range(launch.most):
            if on_host and not again(launch):
                return
            turn()
            launch.left.sub_(1)

    return run


def again(launch: Launch) -> bool:
    """What the WHILE node asks before each turn; reads the device."""
    return bool(launch.on) and int(launch.left) > 0 and int(launch.halt) < int(launch.epoch)
