"""The stream of `stream_mode: "denoise"`: what is committed, as OpenAI's deltas, and what is not yet.

Every event has a `type`, and in `dlx` the answer's denoise forwards (nfe) and committed tokens (tokens) so far:

    committed    as `stream_mode: "committed"` sends it: the deltas join to the whole text and are never revised
    provisional  no choices, but `dlx.block`: the positions behind what is committed, from `token_offset` on, each with
                     token_ids, text    what stands there; text is empty for a mask
                     masked             it is not decided yet
                     guess_ids, guess_text, confidence
                                        what was proposed there, and how sure of it the model was; where the server
                                        keeps them (watch)
                 A later event replaces it.

A client that reads slowly misses blocks, and no text: a ticket of a watched request joins what waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dlx.request import Chunk
from dlx.serve.replies import Committed, Head, Json
from dlx.serve.stream import event

if TYPE_CHECKING:
    from dlx.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what bytes that are no character are decoded to
COMMITTED = 'data: {"type":"committed","dlx":{"nfe":%d,"tokens":%d},'


class Words:
    """Texts of single tokens, as they read behind others."""

    def __init__(self, decode: Callable[[list[int]], str], mask_id: int) -> None:
        self._decode, self._mask_id = decode, mask_id
        self._known: dict[int, str] = {}

    def one(self, id: int) -> str:
        """Its text; some tokenizers leave out the space of a first word, so it is decoded behind itself."""
        if id not in self._known:
            self._known[id] = "" if id == self._mask_id else self._decode([id, id])[len(self._decode([id])) :]
        return self._known[id]

    def each(self, ids: list[int]) -> list[str]:
        """One text a position, empty for masks. Where a character takes several tokens, the first has it all."""
        texts = [self.one(id) for id in ids]
        at = 0
        while at < len(ids):
            end = at
            while end < len(ids) and BROKEN in texts[end]:
                end += 1
            if end > at:
                texts[at:end] = [self._decode(ids[at:end]), *[""] * (end - at - 1)]
            at = end + 1
        return texts


class Denoise:
    """One answer: committed text in events of its kind, and behind it the block that is being decided."""

    watch = True

    def __init__(self, head: Head, apart: bool, tokenizer: Tokenizer, mask_id: int) -> None:
        self._committed = Committed(head, apart)
        self._words, self._mask_id = Words(tokenizer.decode, mask_id), mask_id
        self._rest = head.fields(streamed=True)
        self._nfe, self._tokens = 0, 0

    def begin(self, index: int) -> bytes:
        return self._typed(self._committed.begin(index))

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        self._count(chunk)
        return self._typed(self._committed.chunk(index, chunk)) + (self._block(index, chunk) if chunk.window else b"")

    def end(self, index: int, chunk: Chunk, total: Json | None) -> bytes:
        self._count(chunk)
        return self._typed(self._committed.end(index, chunk, total))

    def close(self, total: Json) -> bytes:
        return self._typed(self._committed.close(total))

    def _count(self, chunk: Chunk) -> None:
        self._nfe, self._tokens = chunk.nfe, self._tokens + len(chunk.token_ids)

    def _typed(self, data: bytes) -> bytes:
        return (COMMITTED % (self._nfe, self._tokens)).encode() + data.removeprefix(b"data: {") if data else b""

    def _block(self, index: int, chunk: Chunk) -> bytes:
        ids = chunk.window
        block: Json = {
            "token_offset": self._tokens,
            "token_ids": ids,
            "text": self._words.each(ids),
            "masked": [id == self._mask_id for id in ids],
        }
        if chunk.confidence:
            block["confidence"] = [round(p, 4) for p in chunk.confidence]
            block["guess_ids"] = chunk.guess
            block["guess_text"] = [self._words.one(id) for id in chunk.guess]
        told: Json = {"nfe": self._nfe, "tokens": self._tokens, "block": block}
        return event({"type": "provisional", "dlx": told, **self._rest, "choices": []})
