"""A device in plain Python: pages hold what was written there, rows decide at random, replies come when they are read.

The K/V of a position stands for all ids up to it, and for the salt that they are kept apart by: a row that reads a page
of another prefix, or one that was never written or not finally, is found out at once.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from dlx.graphs import buffer
from dlx.graphs.buffer import Row
from dlx.plan import Plan, Reply
from dlx.request import Request
from dlx.scheduler import Scheduler

JUNK = -1  # K/V of a block that is not final
KV = int  # the hash of a prefix, or JUNK


@dataclass
class Seat:
    """A row: ids up to the end of what is delivered, of which the K/V before `start` is final."""

    salt: str
    ids: list[int]
    start: int
    limit: int
    pages: list[int]
    done: bool = False
    nfe: int = 0


class Device:
    """Runs plans at once; `harvest` hands the replies out in their order.

    ends  share of forwards in which a row ends early
    """

    def __init__(self, scheduler: Scheduler, draw: Random, forwards: int = 1, ends: float = 0.02) -> None:
        self.scheduler, self.draw, self.forwards, self.ends = scheduler, draw, forwards, ends
        self.L, self.S = scheduler.terms.L, scheduler.shapes.S
        self.kv: dict[int, list[KV | None]] = {}
        self.seats: dict[int, Seat] = {}
        self.kept: dict[int, Seat] = {}
        self.flights: deque[tuple[Plan, list[Reply]]] = deque()

    def launch(self, plan: Plan) -> None:
        """All that a worker does with a plan."""
        asked = {id(r.pages): r for r in (*plan.running.values(), *plan.filling)}
        for slot, who in plan.preempt.items():
            self.kept[who] = copy.deepcopy(self.seats[slot])
            self.seats[slot].done = True
        for piece in plan.prefill:
            request = asked[id(piece.pages)]
            known = request.prompt + request.out
            assert known[piece.start : piece.start + len(piece.tok)] == piece.tok
            self.read(request.params.cache_salt, known, piece.pages, piece.start)
            names = chain(request.params.cache_salt, known)
            for at in range(piece.start, piece.start + len(piece.tok)):
                self.write(piece.pages, at, names[at])
        for slot, row in plan.admit.items():
            self.seats[slot] = self.seat(plan.running[slot], row)
        for slot, who in plan.resume.items():
            self.seats[slot] = self.kept.pop(who)
        for slot, pages in plan.pages.items():
            self.seats[slot].pages = list(pages)
        if plan.bucket:
            assert max(plan.running) < plan.bucket
            self.flights.append((plan, [self.reply(slot) for slot in range(plan.bucket)]))

    def harvest(self) -> tuple[Plan, list[Reply]]:
        """The oldest launch."""
        return self.flights.popleft()

    def stop(self, slot: int) -> None:
        """Make a row inert."""
        if slot in self.seats:
            self.seats[slot].done = True

    def seat(self, request: Request, row: Row) -> Seat:
        assert row.pages == request.pages
        ids = request.prompt[: row.start] + row.tok
        return Seat(request.params.cache_salt, ids, row.start, row.ints[0], list(row.pages))

    def reply(self, slot: int) -> Reply:
        """A launch of one row."""
        seat = self.seats.get(slot)
        if seat is None or seat.done:
            return Reply([], 0, seat.nfe if seat else 0, buffer.RUNNING, seat.start if seat else 0)
        tok: list[int] = []
        why = buffer.RUNNING
        for _ in range(self.forwards):
            more, why = self.forward(seat)
            tok += more
            if why != buffer.RUNNING:
                seat.done = True
                break
        return Reply(tok + [0] * self.L, len(tok), seat.nfe, why, seat.start)

    def forward(self, seat: Seat) -> tuple[list[int], int]:
        """Whole blocks of what is known slide out with their final K/V; up to N blocks behind are delivered."""
        N, L = self.scheduler.policy.N, self.L
        self.read(seat.salt, seat.ids, seat.pages, seat.start)
        seat.nfe += 1
        bad = self.draw.random() < self.ends  # what it computes is not finite
        end, names = -(-seat.limit // L) * L, chain(seat.salt, seat.ids)
        for at in range(seat.start, min(seat.start + (N + 1) * L, end)):
            self.write(seat.pages, at, names[at] if at < len(seat.ids) // L * L and not bad else JUNK)
        seat.start = len(seat.ids) // L * L
        if bad or self.draw.random() < self.ends:
            return [], buffer.BAD if bad else self.draw.choice([buffer.MAX_NFE, buffer.STOP])
        blocks = self.draw.randint(0, N)
        more = seat.ids[seat.start :] if blocks else []  # the prompt's tail, or nothing
        fresh = [self.draw.randrange(10, 50) for _ in range(blocks * L - len(more))]
        fresh = fresh[: seat.limit - len(seat.ids)]
        seat.ids += fresh
        return more + fresh, buffer.LENGTH if len(seat.ids) == seat.limit else buffer.RUNNING

    def read(self, salt: str, ids: list[int], pages: list[int], end: int) -> None:
        for at, name in enumerate(chain(salt, ids[:end])):
            assert self.kv[pages[at // self.S]][at % self.S] == name, (at, pages)

    def write(self, pages: list[int], at: int, what: KV) -> None:
        page = pages[at // self.S]  # an IndexError: the row outran its pages
        assert self.scheduler.pool.private(page), f"page {page} is written, and others see it"
        self.kv.setdefault(page, [None] * self.S)[at % self.S] = what


def chain(salt: str, ids: list[int]) -> list[KV]:
    """What the K/V of each of these ids stands for."""
    return list(accumulate(ids, lambda name, tok: hash((name, tok)), initial=hash(salt)))[1:]
