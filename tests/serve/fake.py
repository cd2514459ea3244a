"""An engine without a model: it says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dlx.answer import Answer
from dlx.errors import BusyError, EngineError, RequestError
from dlx.graphs.policies import POLICIES
from dlx.health import Health, Stats, Status
from dlx.models.card import Card
from dlx.request import Chunk, Finish, Output, Request, SamplingParams, Timings
from dlx.ticket import Ticket
from dlx.tokenizer import Tokenizer

NANO = Path(__file__).parents[1] / "data" / "nano"
ANSWER = "One two three, four five six. Ünïcödé 🎈 and on."
BLOCK = 4


class FakeEngine:
    """The interface of AsyncEngine. Requests are answered with `answer`, a block a turn of the event loop.

    held    requests give their first block and then wait until it is cleared
    failing raised by submit
    ends    the finish of every request, and why, where it is not the answer's own
    """

    def __init__(self, answer: str = ANSWER, max_len: int = 256) -> None:
        self.tokenizer = Tokenizer.load(NANO)
        self.policy = POLICIES["single_bd"]
        self.max_len = max_len
        self.card = cast(Card, SimpleNamespace(family="sdar", vocab=self.tokenizer.size, mask_id=3, stop_ids=(2,)))
        self.answer, self.held, self.slots = answer, False, 1000
        self.failing: Exception | None = None
        self.ends: tuple[Finish, str] | None = None
        self.loading: Callable[[], Any] | None = None  # awaited by start
        self.asked: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self.open: dict[int, asyncio.Task[None]] = {}
        self.aborted: list[int] = []
        self.status: Status = "new"

    async def start(self) -> None:
        self.status = "starting"
        if self.loading is not None:
            await self.loading()
        self.status = "ready"

    def submit(
        self, prompt: list[int], params: SamplingParams, *, watch: bool = False, timeout_s: float | None = None
    ) -> Ticket:
        if self.status != "ready":
            raise EngineError(f"the engine is {self.status}")
        if self.failing is not None:
            raise self.failing
        params.check()
        if (params.top_k or params.top_p < 1) and not self.policy.filters:
            raise RequestError("top_k and top_p need a policy with filters=True")
        if not prompt:
            raise RequestError("the prompt is empty")
        if any(not 0 <= tok < self.card.vocab or tok == 3 for tok in prompt):
            raise RequestError(f"the prompt has an id that is the mask's or not from 0 to {self.card.vocab - 1}")
        if len(self.open) >= self.slots:
            raise BusyError(f"the queue is full: {len(self.open)} requests wait", 7.2)
        request = Request(len(self.asked), prompt, params, time.monotonic(), watch)
        self.asked.append(params)
        self.prompts.append(prompt)
        ticket = Ticket(request, self.abort)
        task = asyncio.get_running_loop().create_task(self._work(request, ticket))
        self.open[request.id] = task
        task.add_done_callback(lambda _: self.open.pop(request.id, None))
        return ticket

    async def _work(self, request: Request, ticket: Ticket) -> None:
        """Commit the answer, with draws of its own for each seed."""
        params = request.params
        text = self.answer if not params.temperature else f"{self.answer} {params.seed}"
        ids = self.tokenizer.encode(text, plain=True)
        finish = Finish.STOP if len(ids) < params.max_tokens else Finish.LENGTH
        ids = ids[: params.max_tokens]
        answer = Answer(self.tokenizer.stream(), params.stop)
        sent: list[int] = []
        try:
            for at in range(0, max(len(ids), 1), BLOCK):
                last = at + BLOCK >= len(ids)
                piece = answer.add(ids[at : at + BLOCK], last=last)
                sent += piece.ids
                if self.ends is not None and at:
                    end, why = self.ends
                    output = self._output(request, answer.text, sent, end, None)
                    ticket.put(Chunk(request.id, "", [], end, [], output, why))
                    return
                end = Finish.STOP if piece.stop is not None else finish if last else None
                output = None if end is None else self._output(request, answer.text, sent, end, piece.stop)
                ticket.put(Chunk(request.id, piece.text, list(piece.ids), end, [], output))
                if end is not None:
                    return
                await asyncio.sleep(0)
                while self.held:
                    await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            output = self._output(request, answer.text, sent, Finish.ABORT, None)
            ticket.put(Chunk(request.id, "", [], Finish.ABORT, [], output))

    def _output(self, request: Request, text: str, ids: Sequence[int], end: Finish, stop: str | None) -> Output:
        tokens = len(ids) + (end is Finish.STOP and stop is None)
        times = Timings(0.001, 0.002, 0.003)
        return Output(request.id, request.prompt, text, list(ids), end, tokens, -(-tokens // 2), 1, times, stop=stop)

    def abort(self, id: int) -> None:
        if id in self.open and not self.open[id].done():
            self.aborted.append(id)
            self.open[id].cancel()

    async def drain(self, timeout_s: float) -> None:
        self.status = "draining"
        if self.open:
            await asyncio.wait(list(self.open.values()), timeout=timeout_s)
        for id in list(self.open):
            self.abort(id)
        while self.open:
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.status = "closed"
        for task in list(self.open.values()):
            task.cancel()

    def health(self) -> Health:
        return Health(self.status, "as told" if self.status == "unhealthy" else "")

    def stats(self) -> Stats:
        n = len(self.open)
        return Stats(n, 1, 20, 100, 25, 5, 6, 7, 8, 9, 10, 11, 12, 13, {"stop": 14})
