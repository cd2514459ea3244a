"""The server's life: a port, an engine that loads behind it, signals, and an end without orphans."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from dlx.async_engine import AsyncEngine
from dlx.config import Config
from dlx.health import Limits
from dlx.serve.app import application, named
from dlx.serve.options import Options
from dlx.serve.wire import protocol

log = logging.getLogger(__name__)

CLOSE_S = 5.0  # that the engine's thread may take to end, and that answers may take to be sent
LOOK_S = 0.2
CONNECTIONS = 4  # times max_concurrency; beyond, connections are refused unread
HEADER_BYTES = 64 << 10
BACKLOG = 2048  # connections that wait to be accepted


class Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal; a subclass, as it has no switch."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front:
    """A server over an engine that it starts and closes. `drain` and `stop` may be called from its event loop.

    code  that the process is to exit with
    """

    def __init__(self, engine: AsyncEngine, names: Mapping[str, str | None], options: Options) -> None:
        self.code = 0
        self.hung = False  # the engine's thread did not end
        self._engine, self._options = engine, options
        self._ends: asyncio.Queue[float] = asyncio.Queue()  # seconds to drain for
        self._app = application(engine, names, options)
        self._server = Uvicorn(
            uvicorn.Config(
                self._app,
                http=protocol(options),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS * options.max_concurrency,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=int(CLOSE_S),
                backlog=BACKLOG,
            )
        )

    @property
    def places(self) -> int:
        """Requests in progress."""
        return self._app.inside

    async def run(self, sock: socket.socket, told: Callable[[str], object] = log.info) -> int:
        """Serve until drained or stopped; the exit code. Raises what loading the model raised."""
        sock.listen(BACKLOG)
        host, port = sock.getsockname()[:2]
        told(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}; the model is being loaded")
        serving = asyncio.create_task(self._server.serve([sock]))
        starting = asyncio.create_task(self._engine.start())
        ending = asyncio.create_task(self._ends.get())
        try:
            await asyncio.wait((serving, starting, ending), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                told("ready")
                watching = asyncio.create_task(self._watch())
                await asyncio.wait((serving, ending, watching), return_when=asyncio.FIRST_COMPLETED)
                watching.cancel()
            if ending.done() and starting.done():
                await self._drained(ending.result(), told)
        finally:
            for task in (starting, ending):
                task.cancel()
            await self._close()
            self._server.should_exit = True
            await serving
        return self.code

    def drain(self, code: int = 0) -> None:
        """Let running requests finish, refuse new ones, then end; called again, end now."""
        self.code = code
        self._ends.put_nowait(self._options.drain_s)

    async def _drained(self, seconds: float, told: Callable[[str], object]) -> None:
        told(f"draining for {seconds:g} s at most; once more to end at once")
        drained = asyncio.create_task(self._engine.drain(seconds))
        again = asyncio.create_task(self._ends.get())
        await asyncio.wait((drained, again), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again):
            task.cancel()
        await asyncio.gather(drained, again, return_exceptions=True)

    async def _close(self) -> None:
        try:
            await asyncio.wait_for(self._engine.close(), CLOSE_S)
        except TimeoutError:
            self.hung = True
            log.error("the engine's thread did not end within %g s; it is left", CLOSE_S)

    async def _watch(self) -> None:
        """Return once the engine has been unhealthy for so long that those who probe have seen it."""
        while self._engine.health().status != "unhealthy":
            await asyncio.sleep(LOOK_S)
        log.error(
            "the engine is unhealthy: %s; exit in %g s", self._engine.health().reason, self._options.unhealthy_exit_s
        )
        await asyncio.sleep(self._options.unhealthy_exit_s)
        self.code = 1


def bound(options: Options) -> socket.socket:
    """A socket at the options' address. Raises OSError where it cannot be had."""
    (family, kind, proto, _, address), *_ = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def serve(config: Config, options: Options, told: Callable[[str], object] = log.info) -> int:
    """Serve a model until a signal ends it; the process' exit code. Call it in the main thread.

    0 after SIGTERM, 130 after SIGINT: running requests finish first, until drain_s, or until the next signal.
    1 where the address cannot be had, or the engine broke.

    told  hears what the operator is to know: the address, ready, draining
    Raises ConfigError, ModelError, CapacityError  what loading raises
    """
    options.check()
    try:
        sock = bound(options)
    except OSError as error:
        log.error("cannot listen at %s port %d: %s; choose another host or port", options.host, options.port, error)
        return 1
    limits = Limits(
        options.max_queued, options.max_queued_tokens, options.timeout_s, options.queue_timeout_s, options.watchdog_s
    )

    async def run() -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, front.drain, 0)
        loop.add_signal_handler(signal.SIGINT, front.drain, 128 + signal.SIGINT)
        return await front.run(sock, told)

    with sock:
        front = Front(AsyncEngine(config.local(), limits), named(config, options), options)
        code = asyncio.run(run())
    if front.hung:  # its thread cannot be ended: no clean-up can be waited for
        logging.shutdown()
        os._exit(code)
    return code
