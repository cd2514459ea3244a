"""DecodeSession: token ids in, token ids out, in the caller's loop and thread; for programs that embed dlx."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlx.config import Config
from dlx.engine import Engine
from dlx.errors import EngineError, RequestError, ShapeError
from dlx.graphs.policies import Policy
from dlx.models.card import Card
from dlx.request import Finish, SamplingParams


class State(IntEnum):
    """What a request is, as a number that never changes its meaning."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    MAX_NFE = 3
    REPETITION = 4
    ERROR = 5
    ABORT = 6
    TIMEOUT = 7


class Event(NamedTuple):
    """What one step committed for one request; ids leave the stop id out."""

    id: int
    token_ids: list[int]
    finish: Finish | None  # on its last event
    error: str | None = None  # why it failed, in one line; its finish is ERROR


class DecodeSession:
    """A model ready to decode, without text and without threads: `open` requests, and `step` while any is open.

    What it is built of is what an `LLM` is built of. A session belongs to one thread at a time.

    Raises ConfigError, PolicyError, ModelError, CapacityError  when built
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        policy: str | Policy | None = None,
        graphs: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **config: Any,
    ) -> None:
        self.config = Config.from_args(model, policy, graphs, device, dtype, **config).local()
        self._engine: Engine | None = Engine(self.config, text=False)
        self._news: deque[Event] = deque()  # that `step_into` had no room for

    @property
    def engine(self) -> Engine:
        """The engine; EngineError once closed."""
        if self._engine is None:
            raise EngineError("this session is closed; build a new one")
        return self._engine

    @property
    def card(self) -> Card:
        """Facts of the model."""
        return self.engine.worker.card

    @property
    def idle(self) -> bool:
        """No request is open: a step would bring nothing."""
        return self.engine.idle and not self._news

    def prepare(self) -> None:
        """Make all graphs now, so that no step waits for one."""
        self.engine.prepare()

    def open(self, ids: list[int] | Tensor, params: SamplingParams | None = None) -> int:
        """Queue a request and return its number. Nothing is computed before the next step.

        ids  of the prompt: a list, or [T] int32
        Raises RequestError  if it can never run
        """
        if isinstance(ids, Tensor):
            if ids.dim() != 1 or ids.dtype != torch.int32:
                raise RequestError(f"ids is {list(ids.shape)} {ids.dtype}; pass a list of integers, or [T] int32")
            ids = ids.tolist()
        (id,) = self.engine.add_all([(list(ids), params or SamplingParams())])
        return id

    def step(self) -> list[Event]:
        """One turn of the loop, with at most one launch: what it committed, an event a request.

        Raises EngineError  if the engine is broken: no step will come any more
        """
        events = [*self._news, *(Event(c.id, c.token_ids, c.finish, c.error) for c in self.engine.step())]
        self._news.clear()
        return events

    def step_into(self, requests: Tensor, tokens: Tensor, lengths: Tensor, states: Tensor) -> int:
        """One turn of the loop, told in the caller's buffers; what lies in them beyond that is left as it was.

        Row i is news of one request. What does not fit, rows or tokens, comes with the next call, which then only
        tells; a request whose tokens are not all told yet is RUNNING.

        requests  [R]    int32  its number
        tokens    [R, K] int32  what was committed
        lengths   [R]    int32  how many tokens that is
        states    [R]    int32  a `State`
        →         n             rows that were written
        Raises ShapeError  for other buffers; EngineError as `step`
        """
        R, K = _sizes(requests, tokens, lengths, states)
        if not self._news:
            self._news += self.step()
        n = 0
        while n < R and self._news:
            event = self._news.popleft()
            now, later = event.token_ids[:K], event.token_ids[K:]
            if later:
                self._news.appendleft(event._replace(token_ids=later))
            ends = event.finish is not None and not later
            requests[n], lengths[n] = event.id, len(now)
            states[n] = State[event.finish.name] if ends and event.finish else State.RUNNING
            tokens[n, : len(now)] = torch.tensor(now, dtype=torch.int32)
            n += 1
        return n

    def close(self, id: int | None = None) -> None:
        """End a request, with no further event; without a number, the session. Ignored for what has ended."""
        if self._engine is None:
            return
        if id is None:
            self._engine = None
            self._news.clear()
            return
        self._engine.abort(id)
        self._news = deque(event for event in self._news if event.id != id)

    def __enter__(self) -> DecodeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sizes(requests: Tensor, tokens: Tensor, lengths: Tensor, states: Tensor) -> tuple[int, int]:
    """Rows and tokens a row. Raises ShapeError for buffers that cannot be written."""
    buffers = {"requests": requests, "tokens": tokens, "lengths": lengths, "states": states}
    for name, t in buffers.items():
        if t.dtype != torch.int32 or t.device.type != "cpu" or t.dim() != (2 if name == "tokens" else 1):
            wants = "[R, K]" if name == "tokens" else "[R]"
            raise ShapeError(f"{name} is {list(t.shape)} {t.dtype} on {t.device}; pass {wants} int32 on the CPU")
    R, K = tokens.shape
    if min(R, K) < 1 or any(len(t) != R for t in buffers.values()):
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in buffers.items())
        raise ShapeError(f"{shapes}: the buffers need one R and one K, of 1 or more")
    return R, K
