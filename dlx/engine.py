"""The loop: plan, launch, harvest. On a GPU one step overlaps: launch t + 1 is sent before t is read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from dlx import weights
from dlx.config import Config
from dlx.observe import span
from dlx.pages import PagePool
from dlx.plan import Plan
from dlx.request import Chunk, Finish, Output, Request, SamplingParams, Timings
from dlx.scheduler import Scheduler
from dlx.tokenizer import TextStream, Tokenizer
from dlx.worker import Worker


class Engine:
    """Requests in, chunks out; the caller owns the loop and calls `step` until `idle`."""

    def __init__(self, config: Config) -> None:
        weights.read_config(config.model)  # first, for the plainer word on a folder that is not there
        self.tokenizer = Tokenizer.load(config.model)
        self.worker = Worker(config, self.tokenizer.size)
        w = self.worker
        self.before_turn: Callable[[], None] | None = None  # told of every turn: profiles count by it
        told = w.policy.turn is not None and len(w.policy.turn.scopes) > 1  # the device tells which scope comes next
        self.lag = 1 if w.device.type == "cuda" and not told else 0  # launches that may be unread when the next is sent
        self.scheduler = Scheduler(
            w.policy, w.card, w.shapes, PagePool(w.num_pages), w.max_len, tuple(config.adapters),
            2 * config.forwards, config.max_num_batched_tokens, config.prefix_caching,
        )  # fmt: skip
        self._ids = itertools.count()
        self._text: dict[int, tuple[TextStream, list[str]]] = {}

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self.scheduler.idle

    def add_all(self, requests: list[tuple[list[int], SamplingParams]]) -> list[int]:
        """Queue requests and return their numbers; all of them, or none.

        Raises RequestError  for one that can never run
        """
        fresh = [Request(next(self._ids), ids, params, time.monotonic()) for ids, params in requests]
        for request in fresh:
            self.scheduler.check(request)
        for request in fresh:
            self.scheduler.add(request)
            self._text[request.id] = (self.tokenizer.stream(), [])
        return [request.id for request in fresh]

    def abort(self, id: int) -> None:
        """Drop a request that has not finished; others go on. Unknown numbers are ignored."""
        if self._text.pop(id, None) is not None:
            slot = self.scheduler.abort(id)
            self.worker.rows.forget(id)
            if slot is not None:
                self.worker.stop(slot)

    def step(self, watch: bool = False) -> list[Chunk]:
        """One turn of the loop; what it committed. With `watch`, chunks also hold the undecided window, one a turn."""
        if self.before_turn is not None:
            self.before_turn()
        with span("plan"):
            plan = self.scheduler.plan()
        if plan is not None:
            self._launch(plan)
        chunks: list[Chunk] = []
        while self.worker.in_flight > (0 if watch or plan is None else self.lag):
            if self.scheduler.idle:
                self.worker.discard()
                break
            chunks += self._harvest(watch and self.worker.in_flight == 1)
        return chunks

    def _launch(self, plan: Plan) -> None:
        """Launch; if that fails, what was to be admitted waits again, and the rows that run are as they were."""
        try:
            self.worker.launch(plan)
        except BaseException:
            for slot in (*plan.admit, *plan.resume, *plan.preempt):
                self.worker.stop(slot)
            self.scheduler.put_back(plan)
            raise

    def _harvest(self, watch: bool) -> list[Chunk]:
        plan, replies = self.worker.harvest()
        with span("take"):
            chunks = [self._chunk(r, ids) for r, ids in self.scheduler.take(plan.running, replies)]
            if not watch:
                return chunks
            news = {chunk.id: chunk for chunk in chunks}
            live = [(slot, r) for slot, r in plan.running.items() if r.finish is None or r.id in news]
            return [self._watched(news, r, slot) for slot, r in live]

    def _watched(self, news: dict[int, Chunk], request: Request, slot: int) -> Chunk:
        chunk = news.get(request.id) or Chunk(request.id, "", [], None, [], None)
        return chunk if chunk.finish else chunk._replace(window=self.worker.window(slot, request.tail))

    def _chunk(self, request: Request, ids: list[int]) -> Chunk:
        shown = ids[:-1] if request.finish is Finish.STOP else ids
        stream, parts = self._text[request.id]
        text = stream.add(shown)
        if request.finish is not None:
            text += stream.flush()
        parts.append(text)
        output = self._output(request, "".join(parts)) if request.finish is not None else None
        return Chunk(request.id, text, shown, request.finish, [], output)

    def _output(self, request: Request, text: str) -> Output:
        del self._text[request.id]
        self.worker.rows.forget(request.id)
        now, began = time.monotonic(), request.arrived_s
        assert request.finish is not None and request.admitted_s is not None
        times = Timings(request.admitted_s - began, (request.first_s or now) - began, now - began)
        shown = request.out[:-1] if request.finish is Finish.STOP else request.out
        return Output(
            request.id,
            request.prompt,
            text,
            shown,
            request.finish,
            len(request.out),
            request.nfe,
            request.prefills,
            times,
            request.cached,
        )
