"""A running server under the load of many clients, which ask the bundled tasks' questions and compare answers."""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from random import Random
from typing import Any

from dlx.bench.storm import Peer, Question, metric, storm
from dlx.errors import ConfigError, EngineError
from dlx.tasks import MIX, installed, sample

SEED = 1
LOOK_S = 30.0  # that a page of figures may take


def serve(
    url: str, clients: int, seconds: float, questions: int, max_tokens: int, api_key: str | None = None
) -> dict[str, Any]:
    """One record: requests, the time to their first text and their end, and answers that differ from those alone.

    Raises ConfigError  for an address where no server is
           EngineError  for a server that does not answer a client who is alone
    """
    if not re.fullmatch(r"http://[^/:@]+:\d{1,5}", url):
        raise ConfigError(f"url={url!r} is not allowed; use http://HOST:PORT")
    given = {"clients": clients, "seconds": seconds, "questions": questions, "max-tokens": max_tokens}
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"--{name} {value} is not allowed; use more than 0")
    try:
        return asyncio.run(_serve(url, clients, seconds, questions, max_tokens, api_key))
    except ConnectionError as error:
        raise ConfigError(f"no server at {url}: {error.strerror}; start one with dlx serve") from None


async def _serve(
    url: str, clients: int, seconds: float, questions: int, max_tokens: int, api_key: str | None
) -> dict[str, Any]:
    known = await _alone(url, _texts(questions), max_tokens, api_key)
    record = await storm(url, known, clients, seconds, lambda: _look(url, api_key), max_tokens, api_key)
    return {"what": "serve", "url": url, "questions": questions, "max_tokens": max_tokens, **record}


async def _alone(url: str, texts: list[str], max_tokens: int, api_key: str | None) -> list[Question]:
    """The questions with what the server answers while nobody else asks."""
    peer, known = Peer(url, api_key), []
    try:
        for text in texts:
            message = {"role": "user", "content": text}
            heard = await peer.ask({"messages": [message], "stream": True, "max_tokens": max_tokens})
            if heard.status != 200:
                raise EngineError(f"{url} answered {heard.status} to a chat; see its log, or pass --api-key")
            known.append(Question(text, heard.text))
    finally:
        peer.close()
    return known


def _texts(n: int) -> list[str]:
    """Questions of the bundled tasks, all different."""
    rng, mix, texts = Random(SEED), installed(MIX), dict[str, None]()
    while len(texts) < n:
        texts[sample(rng, mix, want_held=True).prompt] = None
    return list(texts)


def _look(url: str, api_key: str | None) -> dict[str, Any]:
    """How many requests wait; 0 where the server does not say."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", headers=headers), timeout=LOOK_S) as page:
            return {"waiting": metric(page.read().decode(), "dlx_requests_waiting")}
    except (OSError, urllib.error.URLError):
        return {"waiting": 0.0}


def sentence(record: dict[str, Any]) -> str:
    """What a record says."""
    first, total = record["first_s"], record["total_s"]
    parts = [f"{record['clients']} clients for {record['wall_s']} s: {record['asked']} requests, "]
    parts.append(f"{record['requests_per_s']} a second; ")
    if total:
        parts.append(f"first text {first['median']} s (p99 {first['p99']}), ")
        parts.append(f"whole answer {total['median']} s (p99 {total['p99']}); ")
    parts.append(f"{record['failed']} failed, {record['lost']} lost, {record['wrong']} other than alone, ")
    parts.append(f"{record['put_off']} put off, {record['most_waiting']:g} waiting at most")
    return "".join(parts)
