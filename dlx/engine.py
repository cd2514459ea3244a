"""The loop: plan, launch, harvest. On a GPU one step overlaps: launch t + 1 is sent before t is read.

A step that fails ends the requests that were in it, and no other: they get a last chunk with `Finish.ERROR` and the
cause in a line. A device that does not answer after that, or FAILURES steps in a row, break the engine for good.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from dlx import weights
from dlx.answer import Answers
from dlx.config import Config
from dlx.errors import EngineError
from dlx.graphs.capture import short
from dlx.observe import span
from dlx.pages import PagePool
from dlx.plan import Plan, Reply
from dlx.request import Chunk, Finish, Request, SamplingParams, Window
from dlx.scheduler import Scheduler
from dlx.tokenizer import Tokenizer
from dlx.worker import Worker

log = logging.getLogger(__name__)

FAILURES = 3  # failed steps in a row after which no other is tried


class Engine:
    """Requests in, chunks out; the caller owns the loop and calls `step` until `idle`.

    text  chunks and outputs hold text; without, it is empty where no stop strings are asked for
    """

    def __init__(self, config: Config, text: bool = True) -> None:
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
        self.broken = ""  # why no further step is taken
        self.cause: Exception | None = None  # of the last failure
        self._failures = 0  # in a row
        self._sent: Plan | None = None  # the newest that the worker was told of
        self._pid = os.getpid()
        self._ids = itertools.count()
        self._answers = Answers(self.tokenizer, text)
        self.counts: Counter[str] = Counter()  # tokens, and denoise forwards of each request, so far
        self._due: list[Chunk] = []  # what `step` returns next: an interrupt loses nothing

    def prepare(self) -> None:
        """Make all graphs now, and on a GPU all kernels, instead of with the first launch that needs them."""
        if self.worker.config.graphs != "off" or self.worker.device.type == "cuda":
            self.worker.prepare(self.worker.shapes.rows, self.worker.shapes.tokens)

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing runs, nothing is to be told."""
        return self.scheduler.idle and not self._due

    def request(self, prompt: list[int], params: SamplingParams, watch: bool = False) -> Request:
        """A checked request with a number, for `add`. May be called from any thread.

        watch  it gets a chunk from every launch, with its window
        Raises RequestError  if it can never run
        Raises EngineError   if the engine is broken, or belongs to the process that this one was forked from
        """
        if self.broken:
            raise EngineError(self.broken)
        if os.getpid() != self._pid:
            raise EngineError(
                "the process was forked, and an engine belongs to the process that built it; build another"
            )
        request = Request(next(self._ids), prompt, params, time.monotonic(), watch)
        self.scheduler.check(request)
        return request

    def add(self, request: Request) -> None:
        """Queue what `request` returned."""
        self._answers.open(request)
        self.scheduler.add(request)

    def add_all(self, requests: list[tuple[list[int], SamplingParams]], watch: bool = False) -> list[int]:
        """Queue requests and return their numbers; all of them, or none.

        watch  they get a chunk from every launch, with their windows
        Raises RequestError  for one that can never run
        """
        fresh = [self.request(ids, params, watch) for ids, params in requests]
        try:
            for request in fresh:
                self.add(request)
        except BaseException:
            for request in fresh:
                self.abort(request.id)
            raise
        return [request.id for request in fresh]

    def abort(self, id: int, finish: Finish = Finish.ABORT) -> Chunk | None:
        """End a request that has not finished; others go on. Its last chunk; None if the number is unknown by now."""
        if id not in self._answers:
            return None
        try:
            chunk, slot = self._end(self._answers[id], finish)
            self._stop([slot])
        except BaseException as error:
            if not isinstance(error, Exception):
                self._fail(error, [])
            raise
        return chunk

    def step(self) -> list[Chunk]:
        """One turn of the loop; what it committed, and the windows of those who are watched.

        Raises EngineError  if the engine is broken
        """
        if self.broken:
            return self._rest()
        if self.before_turn is not None:
            self.before_turn()
        self._read(self.lag)  # pages are given for no more than is unread then: an interrupt may have left some
        plan = None
        try:
            with span("plan"):
                plan = self.scheduler.plan()
            if plan is not None:
                self._launch(plan)
        except Exception as error:
            self._read(0)  # what the launches before have finished has not failed
            self._fail(error, [*self._halfway(plan), *self.scheduler.running.values()] or self.scheduler.waiting[:1])
        except BaseException as error:
            if plan is None or plan is not self._sent:  # nothing says what the device knows of it
                self._fail(error, [*self._halfway(None), *self.scheduler.running.values()])
            raise
        self._read(0 if plan is None else self.lag)
        chunks, self._due = self._due, []
        return chunks

    def _halfway(self, plan: Plan | None) -> list[Request]:
        """Who gave way in half a plan, and is lost with it. Its row still runs, in pages that are no longer its own."""
        if plan is not None:
            return []
        self._stop(list(range(self.worker.config.max_num_seqs)))
        return [r for r in self.scheduler.waiting if r.kept and not self.worker.rows.holds(r.id)]

    def _rest(self) -> list[Chunk]:
        """What a broken engine has yet to say."""
        if not self._due:
            raise EngineError(self.broken)
        chunks, self._due = self._due, []
        return chunks

    def _launch(self, plan: Plan) -> None:
        """Launch. An interrupt that comes before the step leaves all as it was: who was to be admitted waits again."""
        steps, unread = self.worker.epoch, self.worker.in_flight
        try:
            self._sent = plan
            self.worker.launch(plan)
        except BaseException as error:
            interrupt = not isinstance(error, Exception)
            if interrupt and self.worker.in_flight > unread:
                raise  # it is on its way
            self._stop([*plan.admit, *plan.resume, *plan.preempt])
            if interrupt and self.worker.epoch > steps:
                self._fail(error, plan.running.values())  # the step may have run, and what it committed is lost
            elif interrupt:
                self.scheduler.put_back(plan)
            gone = [id for id in plan.preempt.values() if id in self._answers and not self.worker.rows.holds(id)]
            self._due += [self._end(self._answers[id], Finish.ERROR, _line(error))[0] for id in gone]
            raise

    def _read(self, most: int) -> None:
        """Harvest until so many launches are in flight."""
        while self.worker.in_flight > most:
            if self.scheduler.idle:
                self.worker.discard()
                break
            self._harvest()

    def _harvest(self) -> None:
        plan, unread = self.worker.oldest, self.worker.in_flight
        try:
            _, replies = self.worker.harvest()
            with span("take"):
                self._take(plan, replies)
            self._failures = 0 if plan.running else self._failures  # prompts alone say little
        except Exception as error:
            lost = [plan] if self.worker.in_flight < unread else self.worker.discard()
            self._fail(error, [r for plan in lost for r in (*plan.running.values(), *plan.filling)])
        except BaseException as error:
            if self.worker.in_flight < unread:  # it was read, and is not booked
                self._fail(error, plan.running.values())
            raise

    def _take(self, plan: Plan, replies: list[Reply]) -> None:
        """Book what a launch brought back; chunks are due one by one, so a failure loses none that was told."""
        forwards = sum(request.nfe for request in plan.running.values())
        windows = {r.id: replies[slot].window for slot, r in plan.running.items()}
        for request, ids in self.scheduler.take(plan.running, replies):
            self._due.append(_seen(self._told(request, ids), windows.pop(request.id)))
            self.counts["tokens"] += len(ids)
        for request in plan.running.values():
            if windows.get(request.id) is not None and request.finish is None:
                self._due.append(_seen(Chunk(request.id, "", [], None, [], None, nfe=request.nfe), windows[request.id]))
        self.counts["forwards"] += sum(request.nfe for request in plan.running.values()) - forwards

    def _told(self, request: Request, ids: list[int]) -> Chunk:
        """The chunk of what was committed; a text that cannot be told fails its request alone."""
        try:
            chunk = self._answers.chunk(request, ids)
        except Exception as error:
            log.exception("the text of request %d failed", request.id)
            self.cause = error
            chunk, slot = self._end(request, Finish.ERROR, _line(error))
            self._stop([slot])
            return chunk
        if chunk.output is not None:
            self.worker.rows.forget(request.id)
            if chunk.output.stop is not None:  # the device does not know: its pages are free, its row is inert from now
                self._stop([self.scheduler.abort(request.id, Finish.STOP)])
        return chunk

    def _fail(self, error: BaseException, requests: Iterable[Request]) -> None:
        """End the requests of a step that failed; if the device fails again meanwhile, all there are."""
        requests = [*requests, *([] if isinstance(error, Exception) else self._gone())]
        failed = list({request.id: request for request in requests if request.id in self._answers}.values())
        ended = [self._end(request, Finish.ERROR, _line(error)) for request in failed]
        self._due += [chunk for chunk, _ in ended]
        self._stop([slot for _, slot in ended])
        if not isinstance(error, Exception):
            return
        log.error("a step failed, and %d requests with it", len(failed), exc_info=error)
        traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
        self.cause = error.with_traceback(None)  # it is logged, and the frame that runs holds this engine
        if short(error):
            torch.cuda.empty_cache()  # the next batch may be smaller
        else:
            self._failures += 1
        if self._failures >= FAILURES:
            self._break(f"{FAILURES} steps in a row failed, the last with {_line(error)}")

    def _gone(self) -> list[Request]:
        """Set right what an interrupt may have left between two lines of bookkeeping: who is lost with it."""
        scheduler = self.scheduler
        scheduler.recount()
        self._stop([slot for slot in range(self.worker.config.max_num_seqs) if slot not in scheduler.running])
        return self._answers.besides({r.id for r in (*scheduler.waiting, *scheduler.running.values())})

    def _end(self, request: Request, finish: Finish, error: str | None = None) -> tuple[Chunk, int | None]:
        """Take a request out of the queue or its slot: its last chunk, and the slot that is to be stopped."""
        slot = self.scheduler.abort(request.id, finish)
        self.worker.rows.forget(request.id)
        return self._answers.last(request, finish, error), slot

    def _stop(self, slots: list[int | None]) -> None:
        """Make rows inert; where the device does not do that, it does nothing any more."""
        try:
            for slot in slots:
                if slot is not None:
                    self.worker.stop(slot)
        except Exception as error:
            self.cause = error
            self._break(f"the device does not answer: {_line(error)}")

    def _break(self, why: str) -> None:
        """Take no further step: all there are end."""
        self.broken = f"{why}; build a new engine, in a new process if the device was lost"
        log.error("%s", self.broken)
        self.worker.discard()
        for request in (*self.scheduler.running.values(), *self.scheduler.waiting):
            self._due.append(self._end(request, Finish.ERROR, why)[0])


def _seen(chunk: Chunk, window: Window | None) -> Chunk:
    """A chunk with the window behind it, unless it is the last."""
    if window is None or chunk.finish is not None:
        return chunk
    return chunk._replace(window=window.ids, confidence=window.confidence, guess=window.guess)


def _line(error: BaseException) -> str:
    """An error in one line."""
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
