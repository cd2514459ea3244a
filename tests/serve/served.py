"""A real server on a loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from dlx.serve.options import Options
from dlx.serve.run import Front, bound

T = TypeVar("T")


class Served:
    """Serves an engine from entering to leaving; leaving drains it.

    url     its address
    errors  what ended it, if anything did
    """

    def __init__(self, engine: Any, names: dict[str, str | None] | None = None, **options: Any) -> None:
        self.engine, self.options = engine, Options(**{"port": 0, "drain_s": 5.0, **options})
        self._names = names or {"nano": None}
        self._sock = bound(self.options)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self.code: int | None = None
        self.error: BaseException | None = None
        self._up = threading.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def run() -> int:
            self.loop = asyncio.get_running_loop()
            self.front = Front(self.engine, self._names, self.options)
            return await self.front.run(self._sock, self._hear)

        try:
            self.code = asyncio.run(run())
        except BaseException as error:
            self.error = error
        finally:
            self._sock.close()
            self._listening.set()
            self._up.set()

    def _hear(self, text: str) -> None:
        self._listening.set()
        if text == "ready":
            self._up.set()

    def begin(self) -> Served:
        """Start without waiting for the model."""
        self._thread.start()
        self._listening.wait(10)
        return self

    def __enter__(self) -> Served:
        self.begin()
        self._up.wait(60)
        if self.error is not None:
            raise self.error
        self.client = httpx.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.front.drain)
        self.join()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def inside(self, work: Callable[[], T]) -> T:
        """Call something on the server's event loop."""

        async def call() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def until(self, fact: Callable[[], bool]) -> None:
        """Wait on the server's event loop for a fact; fail after ten seconds."""

        async def wait() -> None:
            async with asyncio.timeout(10):
                while not fact():
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(15)
