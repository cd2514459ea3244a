"""A talk with a server that runs elsewhere, dlx's or another of OpenAI's API, as its text comes."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dlx.errors import ConfigError, EngineError, RequestError

if TYPE_CHECKING:
    from dlx.llm import Message

SILENCE_S = 600.0  # that a server may need for its next words
# sampling parameters that have a field of the API's own; others go into its `dlx` object
NAMED = ("max_tokens", "temperature", "seed", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos")


def tell(url: str, key: str | None, messages: Sequence[Message], params: dict[str, Any], *, as_json: bool) -> str:
    """The answer to a talk, on stdout while it comes, or as one JSON object.

    Raises ConfigError   where no server is
           RequestError  for what it refuses
           EngineError   for an answer that breaks off
    """
    from dlx.live import clean, dumps

    text = ""
    for piece in pieces(url, key, messages, params):
        text += piece
        if not as_json:
            sys.stdout.write(clean(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    print(dumps({"text": text, "url": url}) if as_json else "", flush=True)
    return text


def pieces(url: str, key: str | None, messages: Sequence[Message], params: dict[str, Any]) -> Iterator[str]:
    """Committed text, piece by piece."""
    own = {name: value for name, value in params.items() if name not in (*NAMED, "adapter")}
    body = {name: params[name] for name in NAMED if name in params}
    body |= {"messages": list(messages), "stream": True} | ({"dlx": own} if own else {})
    body |= {"model": params["adapter"]} if params.get("adapter") else {}
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    try:
        asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=SILENCE_S) as lines:
            yield from deltas(lines)
    except urllib.error.HTTPError as error:
        kind = RequestError if error.code < 500 else EngineError
        raise kind(f"{url} answered {error.code}: {reason(error.read())}") from None
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(f"no server at {url}: {why}; start one with dlx serve, or name another --url") from None


def deltas(lines: Iterator[bytes]) -> Iterator[str]:
    """The text of server-sent events. Raises EngineError for one that tells of an error, or if the end is missing."""
    for line in lines:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: {"):
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise EngineError(f"the server broke off: {event['error']['message']}")
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    raise EngineError("the server broke off in the middle of an answer")


def reason(body: bytes) -> str:
    """What an error's envelope says; else its first words."""
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "nothing"
