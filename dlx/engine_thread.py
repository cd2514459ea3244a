"""EngineThread: an engine and its loop in a thread of their own.

Commands cross to the thread in a queue that it empties once a turn; chunks cross back in one call a turn. While there
is nothing to do the thread sleeps.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from dlx.config import Config
from dlx.engine import Engine
from dlx.errors import EngineError
from dlx.request import Chunk, Finish, Request


class Due(NamedTuple):
    """When a request's time is over, by `time.monotonic()`; and when, if it waits by then."""

    request: Request
    end_s: float
    queue_s: float


class EngineThread:
    """Built and asked by an event loop, to which it tells what happens, each in a call on that loop.

    ready  an engine, once it is loaded
    hear   the chunks of a turn
    over   that the thread ends, and what ended it if it was not asked to
    """

    def __init__(
        self,
        config: Config,
        ready: Callable[[Engine], object],
        hear: Callable[[list[Chunk]], object],
        over: Callable[[BaseException | None], object],
    ) -> None:
        self.began_s: float | None = None  # when the turn that runs began
        self._config, self._ready, self._hear, self._over = config, ready, hear, over
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._commands: list[Callable[[Engine], None]] = []
        self._ending = False
        self._open: dict[int, Due] = {}
        self._next_s = float("inf")  # no request's time is over before
        self._chunks: list[Chunk] = []
        self.thread = threading.Thread(target=self._run, name="dlx-engine", daemon=True)
        self.thread.start()

    def add(self, due: Due) -> None:
        """Queue a checked request."""

        def add(engine: Engine) -> None:
            engine.add(due.request)
            self._open[due.request.id] = due
            self._next_s = min(self._next_s, due.end_s, due.queue_s)

        self._send(add)

    def abort(self, id: int) -> None:
        """End a request; ignored if it has ended."""
        self._send(lambda engine: self._abort(engine, id, Finish.ABORT))

    def end(self) -> None:
        """Abort what is left, and end the thread after the turn that runs."""
        with self._wake:
            self._ending = True
            self._wake.notify()

    def _send(self, command: Callable[[Engine], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        reason: BaseException | None = None
        try:
            engine = Engine(self._config)
            engine.prepare()
            self._tell(self._ready, engine)
            while self._turn(engine):
                pass
            self._obey(engine)
            for id in list(self._open):
                self._abort(engine, id, Finish.ABORT)
            self._tell_chunks()
        except BaseException as error:  # whatever it is, the event loop must know
            reason = error
        try:
            self._tell(self._over, reason)
        finally:
            del reason  # it holds this frame, and so the engine

    def _turn(self, engine: Engine) -> bool:
        """Do what was asked for, and take a step; False once the thread shall end."""
        with self._wake:
            while not self._commands and not self._ending and engine.idle:
                self._wake.wait()
            if self._ending:
                return False
        self.began_s = time.monotonic()
        self._obey(engine)
        if self.began_s >= self._next_s:
            self._expire(engine, self.began_s)
        self._tell_chunks()  # who was aborted need not wait for the step
        if not engine.idle:
            self._chunks += engine.step()
            self._tell_chunks()
        self.began_s = None
        if engine.broken:
            raise EngineError(engine.broken)
        return True

    def _obey(self, engine: Engine) -> None:
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:
            command(engine)

    def _expire(self, engine: Engine, now_s: float) -> None:
        """End what has waited or run for too long."""
        for due in list(self._open.values()):
            if now_s >= due.end_s or (now_s >= due.queue_s and due.request.admitted_s is None):
                self._abort(engine, due.request.id, Finish.TIMEOUT)
        times = (t for due in self._open.values() for t in (due.end_s, due.queue_s) if t > now_s)
        self._next_s = min(times, default=float("inf"))

    def _abort(self, engine: Engine, id: int, finish: Finish) -> None:
        chunk = engine.abort(id, finish)
        if chunk is not None:
            self._chunks.append(chunk)

    def _tell_chunks(self) -> None:
        chunks, self._chunks = self._chunks, []
        for chunk in chunks:
            if chunk.finish is not None:
                self._open.pop(chunk.id, None)
        if chunks:
            self._tell(self._hear, chunks)

    def _tell(self, call: Callable[..., object], *what: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *what)
        except RuntimeError:  # the loop was closed: nobody listens
            self._ending = True
