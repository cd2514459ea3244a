"""Who runs: admission into slots, the plan of a launch, and what a launch brought back."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dlx.errors import RequestError
from dlx.graphs import buffer
from dlx.graphs.buffer import Row
from dlx.graphs.policies import Policy
from dlx.graphs.prefill import Stretch
from dlx.graphs.rules.turn import REST
from dlx.graphs.shapes import Shapes, bucket
from dlx.models.card import Card
from dlx.pages import PagePool
from dlx.request import STOP_IDS, Finish, Request, Window

FINISH = {
    buffer.STOP: Finish.STOP,
    buffer.LENGTH: Finish.LENGTH,
    buffer.MAX_NFE: Finish.MAX_NFE,
    buffer.BAD: Finish.ERROR,
    buffer.REPETITION: Finish.REPETITION,
}


class Plan(NamedTuple):
    """One launch: prompts to prefill, rows to admit by slot, and the step's bucket of rows."""

    prefill: list[Stretch]
    admit: dict[int, Row]
    bucket: int
    running: dict[int, Request]  # by slot, as they are in this launch
    scope: int = 0  # of the policy's turn
    reach: int = 0  # positions of a row that the scope has at most


class Reply(NamedTuple):
    """What the host reads of one row after a launch; see graphs.buffer.Outbox."""

    tok: list[int]
    n: int
    nfe: int
    why: int
    start: int = 0  # K/V before this position is final
    window: Window | None = None  # where somebody watches


class Scheduler:
    """Slots, pages and the queue: requests are admitted as they came, once a slot and all their pages are free."""

    def __init__(
        self, policy: Policy, card: Card, shapes: Shapes, pool: PagePool, max_len: int, adapters: Sequence[str] = ()
    ) -> None:
        self.adapters = ("", *adapters)  # by slot
        self.policy, self.card, self.shapes, self.pool, self.max_len = policy, card, shapes, pool, max_len
        assert policy.L is not None, "bind() gives a policy its block length"
        self.L = policy.L
        self.whole = policy.turn is not None and policy.turn.full  # prompts are part of what is decoded
        self.step = 1 if policy.canvas is not None or self.whole else policy.L  # what is decoded begins at a multiple
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._slots = list(range(shapes.rows[-1] - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queue a checked request."""
        self.waiting.append(request)

    def plan(self) -> Plan | None:
        """The next launch, or None if there is nothing to run."""
        prefill: list[Stretch] = []
        admit: dict[int, Row] = {}
        while self.waiting and self._slots and self._need(self.waiting[0]) <= self.pool.free:
            request = self.waiting.popleft()
            request.pages = self.pool.allocate(self._need(request))
            request.slot = self._slots.pop()
            request.admitted_s = time.monotonic()
            self.running[request.slot] = request
            chunks = self._chunks(request)
            request.prefills = len(chunks)
            prefill += chunks
            admit[request.slot] = self._row(request)
        if not self.running:
            return None
        rows = bucket(self.shapes.rows, max(self.running) + 1)
        return Plan(prefill, admit, rows, dict(self.running), *self._scope())

    def take(self, running: dict[int, Request], replies: list[Reply]) -> list[tuple[Request, list[int]]]:
        """Book what a launch brought back: (request, newly committed ids) where something changed."""
        news = []
        for slot, request in running.items():
            if request.finish is not None:
                continue  # it ended in the launch before; its row was inert in this one
            reply = replies[slot]
            request.nfe = reply.nfe
            ids = reply.tok[: reply.n][request.tail :]
            request.tail = 0 if reply.n else request.tail
            if self.policy.canvas is not None:  # a canvas was, or will be, encoded; not the last
                request.prefills += (reply.n - (reply.why != buffer.RUNNING)) // self.L if reply.n else 0
            if reply.why == buffer.LENGTH and request.params.fixed:  # what is fixed behind all gaps is not decoded
                fixed = dict(request.params.fixed)
                ids = ids + [fixed[i] for i in range(self._open(request), request.params.max_tokens)]
            request.out += ids
            if ids and request.first_s is None:
                request.first_s = time.monotonic()
            request.want = max(0, -reply.why)
            if reply.why > buffer.RUNNING:
                request.finish = FINISH[reply.why]
                self._release(request)
            if ids or request.finish is not None:
                news.append((request, ids))
        return news

    def put_back(self, plan: Plan) -> None:
        """Undo the admissions of a plan that was not launched: they wait again, in their order."""
        for slot in reversed(plan.admit):
            request = self.running[slot]
            self._release(request)
            request.tail, request.prefills, request.want, request.admitted_s = 0, 0, 0, None
            self.waiting.appendleft(request)

    def abort(self, id: int) -> int | None:
        """Forget a request that waits or runs; the slot it held, if it ran."""
        for request in (*self.waiting, *self.running.values()):
            if request.id != id:
                continue
            request.finish = Finish.ABORT
            if request.slot is None:
                self.waiting.remove(request)
                return None
            slot = request.slot
            self._release(request)
            return slot
        return None

    def _scope(self) -> tuple[int, int]:
        """The scope that most rows want, the first of them, and how many positions it has in the longest of those."""
        if self.policy.turn is None:
            return 0, 0
        wants = [r.want for r in self.running.values()]
        scope = max(sorted(set(wants)), key=wants.count)
        rest = self.policy.turn.scopes[scope].kind == REST
        some = [r for r in self.running.values() if r.want == scope]
        return scope, max((0 if rest else len(r.prompt)) + r.params.max_tokens - rest * len(r.out) for r in some)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        del self.running[request.slot]
        self._slots.append(request.slot)
        self._slots.sort(reverse=True)  # the lowest slot first: small buckets
        self.pool.release(request.pages)
        request.slot, request.pages = None, []

    def _need(self, request: Request) -> int:
        """Pages for every block that the request may ever compute."""
        start = self._start(request)
        blocks = -(-(len(request.prompt) + request.params.max_tokens - start) // self.L)
        return -(-(start + blocks * self.L) // self.shapes.S)

    def _lora(self, request: Request) -> int:
        return self.adapters.index(request.params.adapter or "")

    def _start(self, request: Request) -> int:
        """Where the window begins: with the first incomplete block. Where the first token of a block is read off the
        position before, not right behind the prompt: then the prompt's last block is looked at once more."""
        again = self.card.shift and self.policy.turn is None
        return (len(request.prompt) - int(again)) // self.step * self.step

    def _chunks(self, request: Request) -> list[Stretch]:
        prompt, end, most = request.prompt, self._start(request), self.shapes.tokens[-1]
        lora = self._lora(request)
        if self.whole:
            return []
        if self.policy.full:  # in one piece; what is in the window is computed there too, so without more there is none
            return [Stretch(prompt, 0, request.pages, len(prompt), lora)] if end else []
        return [Stretch(prompt[at : min(at + most, end)], at, request.pages, lora=lora) for at in range(0, end, most)]

    def _row(self, request: Request) -> Row:
        p, start = request.params, self._start(request)
        request.tail = len(request.prompt) % self.step
        stops = list(dict.fromkeys((*self.card.stop_ids, *p.stop_token_ids)))
        return Row(
            tok=[] if self.policy.turn else request.prompt[start:],
            start=start,
            pages=request.pages,
            num=(
                self.policy.accept if p.threshold is None else p.threshold,
                self.policy.open_at if p.open_at is None else p.open_at,
                self.policy.force_at if p.force_at is None else p.force_at,
                p.temperature,
                self.policy.edit if p.edit is None else p.edit,
                self.policy.remask if p.remask is None else p.remask,
                self.policy.stability if p.stability is None else p.stability,
                p.top_p,
            ),
            ints=(
                len(request.prompt) + self._open(request),
                p.max_nfe or buffer.UNLIMITED,
                int(p.ignore_eos),
                p.top_k,
                len(request.prompt),
                p.max_repetition_run or self.policy.max_repetition_run or buffer.UNLIMITED,
                0,
                -1,
            ),
            stops=stops,
            seed=random.getrandbits(62) if p.seed is None else p.seed,
            lora=self._lora(request),
            ids=self._ids(request) if self.policy.turn else (),
        )

    def _open(self, request: Request) -> int:
        """Tokens of the answer up to the last that is not fixed; 1 at least."""
        fixed, n = dict(request.params.fixed), request.params.max_tokens
        while n > 1 and n - 1 in fixed:
            n -= 1
        return n

    def _ids(self, request: Request) -> list[int]:
        """Prompt and answer, and what is behind it; masks are decided: the last block of block-causal models whole."""
        mask, most = self.card.mask_id, request.params.max_tokens
        fixed = dict(request.params.fixed)
        beyond = int(mask == 0) if self.whole else mask
        ids = request.prompt + [fixed.get(i, mask) for i in range(most)]
        return [len(ids), *ids] + [beyond] * (self.shapes.tokens[-1] + self.L - len(ids))

    def check(self, request: Request) -> None:
        """Raise RequestError for what can never run, before it is queued."""
        request.params.check()
        prompt, params, card = request.prompt, request.params, self.card
        for name in ("edit", "remask", "stability"):
            if getattr(params, name) is not None and name not in self.policy.asks.numbers:
                raise RequestError(f"{name}={getattr(params, name)} has no rule that reads it; use another policy")
        if (params.top_k or params.top_p < 1) and not self.policy.filters:
            raise RequestError(
                f"top_k={params.top_k} and top_p={params.top_p} need a policy with filters=True; build the LLM with one"
            )
        if params.adapter is not None and params.adapter not in self.adapters[1:]:
            known = ", ".join(self.adapters[1:]) or "none: build it with adapters={name: folder}"
            raise RequestError(f"adapter={params.adapter!r} is not one that the engine was built with ({known})")
        if params.max_repetition_run is not None and self.policy.max_repetition_run is None:
            raise RequestError(
                f"max_repetition_run={params.max_repetition_run} needs a policy that guards; "
                "build the engine with replace(policy, max_repetition_run=64), say, or pass None"
            )
        if not prompt:
            raise RequestError("the prompt is empty; pass at least one token")
        for at, tok in enumerate(prompt):
            if isinstance(tok, bool) or not isinstance(tok, int) or not 0 <= tok < card.vocab:
                raise RequestError(f"prompt[{at}]={tok!r} is not a token id; pass integers from 0 to {card.vocab - 1}")
            if tok == card.mask_id:
                raise RequestError(f"prompt[{at}]={tok} is the mask id, which only the decoder may write; leave it out")
        for tok in params.stop_token_ids:
            if tok >= card.vocab or tok == card.mask_id:
                raise RequestError(
                    f"stop_token_ids has {tok}; pass ids from 0 to {card.vocab - 1} other than the mask id"
                )
        if params.fixed and not self.whole:
            raise RequestError(
                "fixed tokens of the answer need a policy that computes whole sequences, and this one decodes from "
                "left to right; use policy='fast_dllm_v1' or 'low_confidence' with a model trained all-to-all"
            )
        for _, tok in params.fixed:
            if tok >= card.vocab or tok == card.mask_id:
                raise RequestError(
                    f"fixed has the id {tok}; pass ids from 0 to {card.vocab - 1} other than the mask id"
                )
        stops = {*card.stop_ids, *params.stop_token_ids}
        if len(stops) > STOP_IDS:
            raise RequestError(
                f"{len(stops)} stop ids with the model's own {card.stop_ids}; at most {STOP_IDS} are allowed"
            )
        if len(prompt) + params.max_tokens > self.max_len:
            raise RequestError(
                f"the prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} pass "
                f"max_model_len={self.max_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
        if self._need(request) > self.pool.total:
            raise RequestError(
                f"the request needs {self._need(request)} pages and the pool has {self.pool.total}; "
                "lower max_tokens or raise num_pages"
            )
