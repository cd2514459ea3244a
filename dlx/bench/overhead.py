"""What the server costs beside the engine: CPU time of its event loop a streamed chunk."""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

from dlx.async_engine import AsyncEngine
from dlx.health import Health, Status
from dlx.request import Chunk, Finish, Output, Request, SamplingParams, Timings
from dlx.serve.options import Options
from dlx.serve.run import Front, bound
from dlx.ticket import Ticket

TEXT = " and twelve words of text, as a block of an answer might hold"
METHOD = (
    "thread CPU time of the server's event loop / chunks, less that of a loop that only reads the same tickets; "
    "medians of rounds. Chunks of text cross from another thread, once a turn for all streams, as the engine's do; "
    "clients read on loopback, in a process of their own; there is no model"
)

# in a process of their own: threads of the server's would pass its interpreter's lock to and fro
CLIENTS = """
import json, socket, sys, threading
port, streams = map(int, sys.argv[1:])
body = json.dumps({"prompt": "a", "stream": True})
head = f"POST /v1/completions HTTP/1.1\\r\\nhost: a\\r\\nconnection: close\\r\\ncontent-length: {len(body)}\\r\\n"
heard = []
def hear():
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(f"{head}content-type: application/json\\r\\n\\r\\n{body}".encode())
        heard.append(b"".join(iter(lambda: peer.recv(1 << 20), b"")).count(b"data: {"))
clients = [threading.Thread(target=hear) for _ in range(streams)]
[client.start() for client in clients]
[client.join() for client in clients]
print(sum(heard))
"""


class Script:
    """An engine without a model: all requests get the same chunks, one a turn, from a thread of its own."""

    def __init__(self, streams: int, chunks: int) -> None:
        self.policy = SimpleNamespace(L=16, filters=False)
        self.tokenizer = SimpleNamespace(encode=lambda text, most: [5])
        self.max_len, self.took_s = 1 << 30, 0.0
        self.status: Status = "new"
        self._streams, self._chunks, self._tickets = streams, chunks, list[Ticket]()

    async def start(self) -> None:
        self.status = "ready"

    def submit(self, prompt: list[int], params: SamplingParams, **_: Any) -> Ticket:
        """As AsyncEngine's; the turns begin with the last stream."""
        request = Request(len(self._tickets), prompt, params, 0.0)
        self._tickets.append(Ticket(request, lambda _: None))
        if len(self._tickets) == self._streams:
            threading.Thread(target=self._run, args=(asyncio.get_running_loop(),)).start()
        return self._tickets[-1]

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Each turn waits until the one before has been sent: what is measured is work, not a queue."""
        began_s = asyncio.run_coroutine_threadsafe(_cpu_s(), loop).result()
        for turn in range(self._chunks):
            loop.call_soon_threadsafe(self._hear, turn + 1 == self._chunks)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
        self.took_s = asyncio.run_coroutine_threadsafe(_cpu_s(), loop).result() - began_s

    def _hear(self, last: bool) -> None:
        for ticket in self._tickets:
            output = None
            if last:
                output = Output(ticket.id, [5], "", [], Finish.LENGTH, 1, 1, 1, Timings(0.0, 0.0, 0.0))
            ticket.put(Chunk(ticket.id, TEXT, [7] * 16, Finish.LENGTH if last else None, [], output))

    async def drain(self, timeout_s: float) -> None:
        self.status = "draining"

    async def close(self) -> None:
        self.status = "closed"

    def health(self) -> Health:
        return Health(self.status, "")


async def _cpu_s() -> float:
    return time.thread_time()


def overhead(streams: int, chunks: int, rounds: int) -> dict[str, Any]:
    """Microseconds of the server's event loop a chunk, with so many streams at once."""
    served, bare = ([one(streams, chunks) for _ in range(rounds)] for one in (_served, _bare))
    us, own = statistics.median(served), statistics.median(bare)
    figures = {"us_per_chunk": round(us - own, 1), "with_server_us": round(us, 1), "tickets_alone_us": round(own, 1)}
    return {**figures, "streams": streams, "chunks": chunks, "rounds": rounds, "method": METHOD}


def _bare(streams: int, chunks: int) -> float:
    engine = Script(streams, chunks)

    async def read(ticket: Ticket) -> None:
        async for _ in ticket:
            pass

    async def run() -> None:
        tickets = [engine.submit([5], SamplingParams()) for _ in range(streams)]
        await asyncio.gather(*map(read, tickets))
        while not engine.took_s:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    return engine.took_s / (streams * chunks) * 1e6


def _served(streams: int, chunks: int) -> float:
    engine, options = Script(streams, chunks), Options(port=0)
    sock = bound(options)
    port, up, heard = sock.getsockname()[1], threading.Event(), list[int]()

    async def run() -> None:
        front = Front(cast(AsyncEngine, engine), {"script": None}, options)
        serving = asyncio.create_task(front.run(sock, lambda text: up.set() if text == "ready" else None))
        while not up.is_set():
            await asyncio.sleep(0.01)
        told = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENTS, str(port), str(streams), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await told.communicate()
        heard.append(int(out))
        front.drain()
        await serving

    asyncio.run(run())
    assert sum(heard) >= streams * chunks * 0.99, f"{sum(heard)} events of {streams * chunks}"
    return engine.took_s / (streams * chunks) * 1e6
