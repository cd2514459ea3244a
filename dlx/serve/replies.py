"""What is answered: OpenAI's objects, with dlx's own figures in `dlx` fields."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import dlx
from dlx.request import Chunk, Finish, Output
from dlx.serve.faults import Fault
from dlx.serve.stream import event

Json = dict[str, object]
Kind = Literal["chat.completion", "text_completion"]
# OpenAI's word for an end; `dlx.finish_detail` says which
REASONS = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.MAX_NFE: "length",
    Finish.REPETITION: "length",
    Finish.TIMEOUT: "abort",
    Finish.ABORT: "abort",
}


class Head(NamedTuple):
    """What all objects of one answer share."""

    id: str
    kind: Kind
    created_s: int
    model: str

    @staticmethod
    def new(kind: Kind, model: str) -> Head:
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        return Head(f"{prefix}-{secrets.token_hex(12)}", kind, int(time.time()), model)

    def fields(self, streamed: bool = False) -> Json:
        chunk = ".chunk" if streamed and self.kind == "chat.completion" else ""
        return {
            "id": self.id,
            "object": self.kind + chunk,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"dlx-{dlx.__version__}",
        }


class Seen(NamedTuple):
    """How a choice ended."""

    chunk: Chunk  # its last
    output: Output
    blocks: int  # chunks with tokens


def whole(head: Head, seen: Sequence[Seen], prompts: Sequence[int]) -> Json:
    """The answer to a request that does not stream."""
    choices: list[Json] = []
    for index, one in enumerate(seen):
        text = one.output.text
        said: Json = {"message": {"role": "assistant", "content": text}} if _chat(head) else {"text": text}
        choices.append({"index": index, **said, "logprobs": None, **end(one.output)})
    return {**head.fields(), "choices": choices, "usage": usage([one.output for one in seen], prompts)}


def end(output: Output) -> Json:
    """How and after how much work a choice ended."""
    figures: Json = {
        "finish_detail": detail(output),
        "nfe": output.nfe,
        "prefill_forwards": output.prefill_forwards,
        "cached_tokens": output.cached_tokens,
        "tokens_per_forward": round(output.tokens_per_forward, 3),
        "first_block_s": round(output.timings.first_block_s, 6),
        "total_s": round(output.timings.total_s, 6),
    }
    if output.stop is not None:
        figures["stop"] = output.stop
    return {"finish_reason": REASONS[output.finish_reason], "dlx": figures}


def detail(output: Output) -> str:
    """Which end it was: eos, stop_string, length, max_nfe, repetition, timeout or abort."""
    if output.finish_reason is not Finish.STOP:
        return str(output.finish_reason)
    return "eos" if output.stop is None else "stop_string"


def usage(outputs: Sequence[Output], prompts: Sequence[int]) -> Json:
    """Tokens of prompts, each counted once however many choices it has, and of answers; denoise forwards.

    Of prompts that were in the prefix cache it tells the mean of their choices.
    """
    tokens, nfe = sum(o.tokens for o in outputs), sum(o.nfe for o in outputs)
    cached = sum(o.cached_tokens for o in outputs) * len(prompts) // max(len(outputs), 1)
    return {
        "prompt_tokens": sum(prompts),
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens": tokens,
        "total_tokens": sum(prompts) + tokens,
        "dlx": {"nfe": nfe, "tokens_per_forward": round(tokens / max(nfe, 1), 3)},
    }


class Committed:
    """Committed text as plain OpenAI deltas, which join to the whole text."""

    watch = False

    def __init__(self, head: Head, apart: bool) -> None:
        """`apart`: the usage gets an event of its own, and is null in all others; else it is in the last chunk."""
        self._chat, self._apart = _chat(head), apart
        self._rest: Json = {**head.fields(streamed=True), **({"usage": None} if apart else {})}
        before = json.dumps({**self._rest, "choices": []}, separators=(",", ":")).removesuffix("]}")
        said = '"delta":{"content":%s}' if self._chat else '"text":%s'
        # a chunk's text is all that changes: the rest of the event is written once
        self._event = "data: " + before.replace("%", "%%") + '{"index":%d,' + said + ',"finish_reason":null}]}\n\n'

    def begin(self, index: int) -> bytes:
        if not self._chat:
            return b""
        return self._told({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        return (self._event % (index, json.dumps(chunk.text))).encode() if chunk.text else b""

    def end(self, index: int, chunk: Chunk, total: Json | None) -> bytes:
        assert chunk.output is not None
        said: Json = {"text": chunk.text}
        if self._chat:
            said = {"delta": {"content": chunk.text} if chunk.text else {}}
        last: Json = {"usage": total} if total is not None and not self._apart else {}
        return self._told({"index": index, **said, **end(chunk.output)}, last)

    def close(self, total: Json) -> bytes:
        return event({**self._rest, "choices": [], "usage": total}) if self._apart else b""

    def _told(self, choice: Json, last: Json | None = None) -> bytes:
        return event({**self._rest, "choices": [choice], **(last or {})})


def failed(last: Chunk | None) -> Fault | None:
    """The fault in the last chunk of a request, if it is no answer."""
    finish, why = (last.finish, last.error) if last is not None else (None, None)
    if finish is Finish.TIMEOUT:
        return Fault(504, "timeout", why or "the request took longer than it may")
    if finish is Finish.ABORT:
        return Fault(503, "aborted", why or "the server stopped before the answer was whole", retry_after_s=1.0)
    if last is None or last.output is None or finish not in REASONS:
        return Fault(500, "engine_error", why or "the request failed in the engine")
    return None


def _chat(head: Head) -> bool:
    return head.kind == "chat.completion"
