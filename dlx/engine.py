"""The loop: plan, launch, harvest. On a GPU one step overlaps: launch t + 1 is sent before t is read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from dlx import weights
from dlx.answer import Answer
from dlx.config import Config
from dlx.observe import span
from dlx.pages import PagePool
from dlx.request import Chunk, Finish, Output, Request, SamplingParams, Timings
from dlx.scheduler import Plan, Scheduler
from dlx.tokenizer import Tokenizer
from dlx.worker import Worker


class Engine:
    """Requests in, chunks out; the caller owns the loop and calls `step` until `idle`."""

    def __init__(self, config: Config) -> None:
        weights.read_config(config.model)  # first, for the plainer word on a folder that is not there
        self.tokenizer = Tokenizer.load(config.model)
        self.worker = Worker(config, self.tokenizer.size)
        w = self.worker
        self.scheduler = Scheduler(w.policy, w.card, w.shapes, PagePool(w.num_pages), w.max_len, tuple(config.adapters))
        self.before_turn: Callable[[], None] | None = None  # told of every turn: profiles count by it
        told = w.policy.turn is not None and len(w.policy.turn.scopes) > 1  # the device tells which scope comes next
        self.lag = 1 if w.device.type == "cuda" and not told else 0  # launches that may be unread when the next is sent
        self._ids = itertools.count()
        self._answers: dict[int, Answer] = {}

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self.scheduler.idle

    def add_all(self, requests: list[tuple[list[int], SamplingParams]], watch: bool = False) -> list[int]:
        """Queue requests and return their numbers; all of them, or none.

        watch  they get a chunk from every launch, with their windows
        Raises RequestError  for one that can never run
        """
        fresh = [Request(next(self._ids), ids, params, time.monotonic(), watch) for ids, params in requests]
        for request in fresh:
            self.scheduler.check(request)
        for request in fresh:
            self.scheduler.add(request)
            self._answers[request.id] = Answer(self.tokenizer.stream(), request.params.stop)
        return [request.id for request in fresh]

    def abort(self, id: int) -> None:
        """Drop a request that has not finished; others go on. Unknown numbers are ignored."""
        if self._answers.pop(id, None) is not None:
            slot = self.scheduler.abort(id)
            if slot is not None:
                self.worker.stop(slot)

    def step(self) -> list[Chunk]:
        """One turn of the loop; what it committed, and the windows of those who are watched."""
        if self.before_turn is not None:
            self.before_turn()
        with span("plan"):
            plan = self.scheduler.plan()
        if plan is not None:
            self._launch(plan)
        chunks: list[Chunk] = []
        while self.worker.in_flight > (0 if plan is None else self.lag):
            if self.scheduler.idle:
                self.worker.discard()
                break
            chunks += self._harvest()
        return chunks

    def _launch(self, plan: Plan) -> None:
        """Launch; if that fails, what was to be admitted waits again, and the rows that run are as they were."""
        try:
            self.worker.launch(plan)
        except BaseException:
            for slot in plan.admit:
                self.worker.stop(slot)
            self.scheduler.put_back(plan)
            raise

    def _harvest(self) -> list[Chunk]:
        plan, replies = self.worker.harvest()
        with span("take"):
            news = {r.id: self._chunk(r, ids) for r, ids in self.scheduler.take(plan.running, replies)}
            for slot, request in plan.running.items():
                window = replies[slot].window
                if window is not None and request.finish is None:
                    chunk = news.get(request.id) or Chunk(request.id, "", [], None, [], None, nfe=request.nfe)
                    news[request.id] = chunk._replace(**dict(zip(("window", "confidence", "guess"), window)))
            return list(news.values())

    def _chunk(self, request: Request, ids: list[int]) -> Chunk:
        shown = ids[:-1] if request.finish is Finish.STOP else ids
        piece = self._answers[request.id].add(shown, last=request.finish is not None)
        if piece.stop is not None:
            self._stop(request, len(ids) - len(piece.ids))
        output = self._output(request, piece.stop) if request.finish is not None else None
        return Chunk(request.id, piece.text, list(piece.ids), request.finish, [], output, nfe=request.nfe)

    def _stop(self, request: Request, beyond: int) -> None:
        """End a request at a stop string: its row is inert from the next launch on, its pages are free now."""
        slot = self.scheduler.abort(request.id)
        if slot is not None:
            self.worker.stop(slot)
        request.finish = Finish.STOP
        del request.out[len(request.out) - beyond :]

    def _output(self, request: Request, stop: str | None) -> Output:
        text = self._answers.pop(request.id).text
        now, began = time.monotonic(), request.arrived_s
        assert request.finish is not None and request.admitted_s is not None
        times = Timings(request.admitted_s - began, (request.first_s or now) - began, now - began)
        shown = request.out[:-1] if request.finish is Finish.STOP and stop is None else request.out
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
            stop,
        )
