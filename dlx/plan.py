"""What passes between scheduler and worker: the plan of a launch, and what is read of a row after it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from dlx.graphs import buffer
from dlx.graphs.buffer import Row
from dlx.graphs.prefill import Stretch
from dlx.request import Finish, Request, Window

NONE: Mapping[int, int] = MappingProxyType({})
FINISH = {
    buffer.STOP: Finish.STOP,
    buffer.LENGTH: Finish.LENGTH,
    buffer.MAX_NFE: Finish.MAX_NFE,
    buffer.BAD: Finish.ERROR,
    buffer.REPETITION: Finish.REPETITION,
}


class Plan(NamedTuple):
    """One launch, in this order: rows to keep aside, prompts to prefill, rows to admit and resume, tables, the step."""

    prefill: list[Stretch]
    admit: dict[int, Row]
    bucket: int  # rows of the step; 0 where no row decodes yet
    running: dict[int, Request]  # by slot, as they decode in this launch
    scope: int = 0  # of the policy's turn
    reach: int = 0  # positions of a row that the scope has at most
    preempt: Mapping[int, int] = NONE  # slot → id of a request whose row is kept aside, and inert in its slot
    resume: Mapping[int, int] = NONE  # slot → id of a request whose kept row goes on there
    pages: Mapping[int, list[int]] = MappingProxyType({})  # slot → page table that is new to the device
    filling: tuple[Request, ...] = ()  # whose prompts are prefilled in part, and not to their ends


class Reply(NamedTuple):
    """What the host reads of one row after a launch; see graphs.buffer.Outbox."""

    tok: list[int]
    n: int
    nfe: int
    why: int
    start: int = 0  # K/V before this position is final
    window: Window | None = None  # where somebody watches
