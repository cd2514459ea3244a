"""Many clients at once against a server: whether each gets its own answer, and what that does to queue and memory."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Json = dict[str, Any]
LOOK_S = 0.5  # between two looks at the server's figures


class Question(NamedTuple):
    """A chat's only message, and the one right answer."""

    text: str
    answer: str


class Heard(NamedTuple):
    """One answer as it was streamed."""

    status: int
    text: str
    finish: str | None
    done: bool  # [DONE] came
    first_s: float
    total_s: float
    retry_s: float


class Peer:
    """One connection to a server, kept for request after request."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._host, self._port = parts.hostname, parts.port
        self._key = "" if api_key is None else f"authorization: Bearer {api_key}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: Json) -> Heard:
        """Ask, and hear the stream to its end."""
        raw, began_s = json.dumps(body).encode(), time.monotonic()
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}{self._key}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
        if status != 200:
            await reader.readexactly(int(headers.get("content-length", "0")))
            return Heard(status, "", None, False, 0.0, time.monotonic() - began_s, float(headers.get("retry-after", 1)))
        text, finish, first_s, rest, events = "", None, 0.0, b"", list[bytes]()
        while size := int((await reader.readline()).strip(), 16):
            rest += (await reader.readexactly(size + 2))[:-2]
            *events, rest = rest.split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                choice = json.loads(event[6:])["choices"][0]
                said = choice["delta"].get("content") or ""
                first_s = first_s or (time.monotonic() - began_s if said else 0.0)
                text, finish = text + said, choice["finish_reason"] or finish
        await reader.readline()
        return Heard(200, text, finish, events[-1:] == [b"data: [DONE]"], first_s, time.monotonic() - began_s, 0.0)

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def storm(
    url: str, questions: Sequence[Question], clients: int, seconds: float, look: Callable[[], Json], max_tokens: int,
    api_key: str | None = None,
) -> Json:  # fmt: skip
    """Let clients ask for so many seconds, each one question after another; what came of it.

    look  figures of the server now, with `waiting`; heard twice a second
    """
    ends_s = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    heard: list[Heard] = []

    async def client(number: int) -> None:
        peer, turn = Peer(url, api_key), number
        try:
            while time.monotonic() < ends_s:
                question = questions[turn % len(questions)]
                message = {"role": "user", "content": question.text}
                one = await peer.ask({"messages": [message], "stream": True, "max_tokens": max_tokens})
                if one.status == 429:
                    counts["put_off"] += 1
                    await asyncio.sleep(min(one.retry_s, max(ends_s - time.monotonic(), 0.0)))
                    continue
                turn += clients
                heard.append(one)
                counts["asked"] += 1
                counts["failed"] += one.status != 200
                counts["lost"] += one.status == 200 and not (one.done and one.finish in ("stop", "length"))
                counts["wrong"] += one.done and one.text != question.answer
        except (OSError, asyncio.IncompleteReadError):
            counts["lost"] += 1
        finally:
            peer.close()

    looks: list[Json] = []

    async def watch() -> None:
        while True:
            looks.append(await asyncio.get_running_loop().run_in_executor(None, look))
            await asyncio.sleep(LOOK_S)

    watching = asyncio.create_task(watch())
    began_s = time.monotonic()
    try:
        await asyncio.gather(*(client(number) for number in range(clients)))
    finally:
        watching.cancel()
    wall_s = time.monotonic() - began_s
    each = ("asked", "failed", "lost", "wrong", "put_off")
    return {
        "clients": clients,
        "wall_s": round(wall_s, 1),
        **{name: counts[name] for name in each},
        "most_waiting": max((one["waiting"] for one in looks), default=0),
        "first_s": spread([one.first_s for one in heard if one.first_s]),
        "total_s": spread([one.total_s for one in heard if one.done]),
        "requests_per_s": round(counts["asked"] / wall_s, 2),
    }


def spread(values: Sequence[float]) -> Json:
    """Median, 99th percentile and worst."""
    if not values:
        return {}
    high = sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]
    return {"median": round(statistics.median(values), 3), "p99": round(high, 3), "worst": round(max(values), 3)}


def metric(text: str, name: str) -> float:
    """A number of a page in Prometheus' format."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _head(raw: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = raw.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
