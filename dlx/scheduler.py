"""Who runs: the queue, slots and pages, the plan of a launch, and what a launch brought back."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence

from dlx import prefix
from dlx.admission import Admission
from dlx.graphs import buffer
from dlx.graphs.buffer import Row
from dlx.graphs.policies import Policy
from dlx.graphs.prefill import Stretch
from dlx.graphs.rules.turn import REST
from dlx.graphs.shapes import Shapes, bucket
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.plan import FINISH, Plan, Reply
from dlx.request import Finish, Request

AGEING_S = 30.0  # that a request waits for one step of priority


def rank(request: Request) -> tuple[float, int]:
    """Who comes first: the least. It never changes, so whoever waits long enough comes first."""
    return request.arrived_s + request.params.priority * AGEING_S, request.id


class Scheduler:
    """Slots, pages and the queue. The first of all by `rank` runs or is about to, and always gets its pages.

    forwards  that may run before the host hears of a row: it holds pages for so many, and gets more ahead of the
              device; the newest is preempted for them. None: all that it may ever need, when it is admitted
    budget    positions of prompts a launch prefills; None: all
    caching   pages of finished prefixes are kept and found again
    """

    def __init__(
        self, policy: Policy, card: Card, shapes: Shapes, pool: PagePool, max_len: int, adapters: Sequence[str] = (),
        forwards: int | None = None, budget: int | None = None, caching: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.shapes, self.pool = policy, shapes, pool
        self.terms = Admission(policy, card, shapes, max_len, adapters, forwards)
        self.budget = None if budget is None else max(budget, shapes.C)
        self.caching = caching and self.terms.chained
        self.waiting: list[Request] = []  # by rank
        self.running: dict[int, Request] = {}  # by slot; those whose prompt is not all prefilled do not decode yet
        self.prefix_queries = self.prefix_hits = 0  # tokens of prompts that were admitted, and of these found
        self.preemptions = 0
        self._slots = list(range(shapes.rows[-1] - 1, -1, -1))
        self._stale: set[int] = set()  # slots whose page table the device does not have

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def check(self, request: Request) -> None:
        """Raise RequestError for what can never run, before it is queued."""
        self.terms.check(request, self.pool.total)

    def add(self, request: Request) -> None:
        """Queue a checked request, behind those of its rank."""
        insort(self.waiting, request, key=rank)

    def plan(self) -> Plan | None:
        """The next launch, or None if there is nothing to run."""
        preempt: dict[int, int] = {}
        self._grow(preempt)
        self._admit(preempt)
        if not self.running:
            return None
        prefill: list[Stretch] = []
        admit: dict[int, Row] = {}
        resume: dict[int, int] = {}
        filling: list[Request] = []
        for request in sorted((r for r in self.running.values() if not r.decodes), key=rank):
            slot = request.slot
            assert slot is not None
            if self._fill(request, prefill):
                filling.append(request)
            if request.filled < self.terms.goal(request):
                continue
            filling = [r for r in filling if r is not request]
            request.decodes = True
            if request.kept:
                resume[slot] = request.id
                self._stale.add(slot)
            else:
                request.tail = len(request.prompt) % self.terms.step
                admit[slot] = self.terms.row(request)
        running = {slot: r for slot, r in self.running.items() if r.decodes}
        for request in running.values():
            request.flying += 1
        tables = {slot: running[slot].pages for slot in self._stale if slot in running}
        self._stale.clear()
        rows = bucket(self.shapes.rows, max(running) + 1) if running else 0
        return Plan(prefill, admit, rows, running, *self._scope(running), preempt, resume, tables, tuple(filling))

    def take(self, running: dict[int, Request], replies: list[Reply]) -> list[tuple[Request, list[int]]]:
        """Book what a launch brought back: (request, newly committed ids) where something changed."""
        news = []
        for slot, request in running.items():
            request.flying -= 1
            if request.finish is not None:
                continue  # it ended in the launch before; its row was inert in this one
            reply = replies[slot]
            request.nfe = reply.nfe
            ids = reply.tok[: reply.n][request.tail :]
            request.tail = 0 if reply.n else request.tail
            if self.policy.canvas is not None:  # a canvas was, or will be, encoded; not the last
                request.prefills += (reply.n - (reply.why != buffer.RUNNING)) // self.terms.L if reply.n else 0
            if reply.why == buffer.LENGTH and request.params.fixed:  # what is fixed behind all gaps is not decoded
                fixed = dict(request.params.fixed)
                ids = ids + [fixed[i] for i in range(self.terms.open(request), request.params.max_tokens)]
            request.out += ids
            if ids and request.first_s is None:
                request.first_s = time.monotonic()
            request.want = max(0, -reply.why)
            if reply.why != buffer.BAD:
                request.final = max(request.final, reply.start)
                self._publish(request)
            if reply.why > buffer.RUNNING:
                self._end(request, FINISH[reply.why])
            if ids or request.finish is not None:
                news.append((request, ids))
        return news

    def put_back(self, plan: Plan) -> None:
        """Undo the admissions of a plan that was not launched: they wait again, in their order."""
        for request in plan.running.values():
            request.flying -= 1
        entered = [plan.running[slot] for slot in (*plan.admit, *plan.resume)]
        for request in (*entered, *plan.filling):
            self._leave(request)
            if not request.kept:
                request.tail, request.prefills, request.want, request.admitted_s = 0, 0, 0, None
            insort(self.waiting, request, key=rank)
        self._stale.update(slot for slot in plan.pages if slot in self.running)

    def abort(self, id: int, finish: Finish = Finish.ABORT) -> int | None:
        """End a request that waits or runs; the slot it held, if its row is on the device."""
        for request in (*self.waiting, *self.running.values()):
            if request.id == id:
                slot = request.slot if request.decodes else None
                self._end(request, finish)
                return slot
        return None

    def recount(self) -> None:
        """Set right what an interrupt left between two lines: who is neither queued nor in a slot is gone."""
        self.waiting = [r for r in self.waiting if r.finish is None and r.slot is None]
        self.running = {slot: r for slot, r in self.running.items() if r.finish is None and r.slot == slot}
        self._slots = [slot for slot in range(self.shapes.rows[-1] - 1, -1, -1) if slot not in self.running]
        self._stale &= set(self.running)
        self.pool.recount(r.pages for r in self.running.values())

    def check_invariants(self) -> None:
        """Slots and pages are held once, what is shared or published is never written, and all wait in order."""
        self.pool.check_invariants()
        holders = self.pool.holders()
        for slot, request in self.running.items():
            assert request.slot == slot and request.finish is None
            holders.subtract(request.pages)
            behind = max(self.terms.goal(request), request.final) // self.shapes.S
            assert all(self.pool.private(page) for page in request.pages[behind:]) or not self.caching
            assert len(set(request.pages)) == len(request.pages)
        assert not any(holders.values())
        assert sorted(self._slots + list(self.running)) == list(range(self.shapes.rows[-1]))
        for request in self.waiting:
            assert request.slot is None and not request.pages and not request.decodes and request.finish is None
        assert [rank(r) for r in self.waiting] == sorted(rank(r) for r in self.waiting)
        assert self._stale <= set(self.running)

    def _grow(self, preempt: dict[int, int]) -> None:
        """Give every row the pages for what the device may do next; the newest gives way."""
        S, ahead = self.shapes.S, self.terms.ahead
        if ahead is None:
            return
        short = [r for r in self.running.values() if r.final + ahead > len(r.pages) * S]  # or near its end
        for request in sorted(short, key=rank):
            more = self._want(request) - len(request.pages) if request.slot is not None else 0
            while more > self.pool.free and request.slot is not None:
                self._preempt(max(self.running.values(), key=rank), preempt)
            if more > 0 and request.slot is not None:
                request.pages = request.pages + self.pool.allocate(more)
                self._stale.add(request.slot)

    def _admit(self, preempt: dict[int, int]) -> None:
        """Those who wait get slots and pages in their order; nobody overtakes. The first of all need not wait."""
        growing: int | None = None  # of those who run, each of which is left a page; counted where it matters
        while self.waiting and self.waiting[0].flying <= 0:  # else it may have ended in a launch that is not read
            request = self.waiting[0]
            first = all(rank(request) < rank(other) for other in self.running.values())
            if not self._slots and not first:
                return
            hit = self._found(request)
            more = self._want(request) - len(hit)
            spare = self.pool.free - more - self.pool.idle(hit)
            if not first and spare >= 0 and growing is None:
                growing = sum(map(self._grows, self.running.values()))
            if not self._slots or spare < (0 if first else growing or 0):
                if not first or not self.running or self.policy.turn is not None:
                    return
                self._preempt(max(self.running.values(), key=rank), preempt)
                growing = None
                continue
            del self.waiting[0]
            self.pool.share(hit)
            request.pages = hit + self.pool.allocate(more)
            request.filled, request.published = len(hit) * self.shapes.S, len(hit)
            request.slot = self._slots.pop()
            self.running[request.slot] = request
            growing = None if growing is None else growing + self._grows(request)
            if request.admitted_s is None:
                request.admitted_s, request.cached = time.monotonic(), request.filled
                self.prefix_queries += len(request.prompt) if self.caching else 0
                self.prefix_hits += request.filled

    def _grows(self, request: Request) -> bool:
        """It will ask for more pages."""
        return self._want(request, True) > len(request.pages)

    def _want(self, request: Request, all: bool = False) -> int:
        return self.terms.pages(request, None if all else self.terms.ahead)

    def _fill(self, request: Request, prefill: list[Stretch]) -> bool:
        """Prefill what the launch has room for; whether there was any."""
        room = None if self.budget is None else self.budget - sum(len(piece.tok) for piece in prefill)
        pieces = self.terms.stretches(request, room, first=not prefill)
        prefill += pieces
        request.prefills += len(pieces)
        if pieces:
            request.filled = pieces[-1].start + len(pieces[-1].tok)
        return bool(pieces)

    def _found(self, request: Request) -> list[int]:
        """Pages wholly before its window whose K/V is there already."""
        n = self.terms.goal(request) // self.shapes.S if self.caching else 0
        self._name(request, n)
        return self.pool.find(request.digests[:n])

    def _publish(self, request: Request) -> None:
        """Let others find the pages that are final: all before the window."""
        n = min(request.final // self.shapes.S, len(request.pages)) if self.caching else 0
        if n > request.published:
            self._name(request, n)
            for page, digest in zip(request.pages[request.published : n], request.digests[request.published : n]):
                self.pool.publish(page, digest)
            request.published = n

    def _name(self, request: Request, n: int) -> None:
        done, S, prompt, params = request.digests, self.shapes.S, request.prompt, request.params
        if n > len(done):
            first = done[-1] if done else prefix.root(params.cache_salt, params.adapter)
            at, end = len(done) * S, n * S
            ids = prompt[at:end] + request.out[max(0, at - len(prompt)) : max(0, end - len(prompt))]
            prefix.extend(done, first, ids, S)

    def _scope(self, running: dict[int, Request]) -> tuple[int, int]:
        """The scope that most rows want, the first of them, and how many positions it has in the longest of those."""
        if self.policy.turn is None or not running:
            return 0, 0
        wants = [r.want for r in running.values()]
        scope = max(sorted(set(wants)), key=wants.count)
        rest = self.policy.turn.scopes[scope].kind == REST
        some = [r for r in running.values() if r.want == scope]
        return scope, max((0 if rest else len(r.prompt)) + r.params.max_tokens - rest * len(r.out) for r in some)

    def _preempt(self, request: Request, preempt: dict[int, int]) -> None:
        """Take slot and pages; what its row is stays on the device, and what it has written is prefilled again."""
        assert request.slot is not None
        self.preemptions += 1
        if request.decodes:
            preempt[request.slot] = request.id
            request.kept = True
        self._leave(request)
        insort(self.waiting, request, key=rank)

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        """Give slot and pages back."""
        assert request.slot is not None
        del self.running[request.slot]
        self._stale.discard(request.slot)
        self._slots.append(request.slot)
        self._slots.sort(reverse=True)  # the lowest slot first: small buckets
        self.pool.release(request.pages[::-1])  # of a prefix that is kept, the end goes before what it follows
        request.slot, request.pages, request.decodes = None, [], False
        request.filled = request.published = 0
