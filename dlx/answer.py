"""What was committed as text: of one answer, cut where a stop string is complete; of all open requests, as chunks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set
from typing import NamedTuple

from dlx.request import Chunk, Finish, Output, Request, Timings
from dlx.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

NOT_FINITE = "its logits were not finite"


class Piece(NamedTuple):
    """What one step added to an answer."""

    text: str
    ids: Sequence[int]  # of what was given, those that count: behind the id that completed a stop string there are none
    stop: str | None  # the stop string that ended the answer


class Answer:
    """Text of committed ids, which grows and is never taken back.

    The stop string that is complete first counts; of two, the one that began first. It is cut from the text, with all
    behind it. What may turn out to be its beginning is held back, across the borders of blocks. Ids are looked at one
    after the other, so the answer does not depend on how many came at once. Without a stream there is no text.
    """

    def __init__(self, stream: TextStream | None, stops: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._parts: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        """All that was handed on so far."""
        return "".join(self._parts)

    def add(self, ids: Sequence[int], last: bool = False) -> Piece:
        """Take committed ids; `last` says that no more follow, so nothing is held back."""
        if self._stream is None:
            return Piece("", ids, None)
        if not self._stops:
            piece = Piece(self._stream.add(ids) + (self._stream.flush() if last else ""), ids, None)
        else:
            piece = self._searched(self._stream, ids, last)
        self._parts.append(piece.text)
        return piece

    def _searched(self, stream: TextStream, ids: Sequence[int], last: bool) -> Piece:
        ready = ""
        for n, tok in enumerate(ids, 1):
            text, stop = self._cut(stream.add([tok]))
            ready += text
            if stop is not None:
                return Piece(ready, ids[:n], stop)
        text, stop = self._cut(stream.flush()) if last else ("", None)
        ready += text
        if last and stop is None:
            ready, self._held = ready + self._held, ""
        return Piece(ready, ids, stop)

    def _cut(self, new: str) -> tuple[str, str | None]:
        """What may be handed on now that `new` is known, and the stop string that is complete in it."""
        text = self._held + new
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        keep = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


class Answers:
    """The requests whose last chunk is yet to come, and what was said to each so far.

    text  chunks and outputs hold text; without, they hold some where stop strings are asked for
    """

    def __init__(self, tokenizer: Tokenizer, text: bool = True) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._open: dict[int, tuple[Request, Answer]] = {}

    def __contains__(self, id: int) -> bool:
        return id in self._open

    def __getitem__(self, id: int) -> Request:
        return self._open[id][0]

    def besides(self, ids: Set[int]) -> list[Request]:
        """All but the requests with these numbers."""
        return [request for id, (request, _) in self._open.items() if id not in ids]

    def open(self, request: Request) -> None:
        """Begin to answer."""
        stops = request.params.stop
        stream = self._tokenizer.stream() if self._text or stops else None
        self._open[request.id] = request, Answer(stream, stops)

    def chunk(self, request: Request, ids: list[int]) -> Chunk:
        """What was committed, the stop id included. A stop string may end the request here: its output names it."""
        shown = ids[:-1] if request.finish is Finish.STOP else ids
        piece = self._open[request.id][1].add(shown, last=request.finish is not None)
        if piece.stop is not None:
            request.finish = Finish.STOP
            del request.out[len(request.out) - (len(ids) - len(piece.ids)) :]
        output = self._output(request, piece.stop) if request.finish is not None else None
        error = NOT_FINITE if request.finish is Finish.ERROR else None
        return Chunk(request.id, piece.text, list(piece.ids), request.finish, [], output, error, nfe=request.nfe)

    def last(self, request: Request, finish: Finish, error: str | None = None) -> Chunk:
        """The last chunk of a request that ends for another reason than what was committed."""
        request.finish = finish
        rest = ""
        if error is None:
            try:
                rest = self._open[request.id][1].add([], last=True).text
            except Exception:  # it ends all the same, without what was held back
                log.exception("the end of the text of request %d failed", request.id)
        return Chunk(request.id, rest, [], finish, [], self._output(request), error, nfe=request.nfe)

    def _output(self, request: Request, stop: str | None = None) -> Output:
        _, answer = self._open.pop(request.id)
        now, began = time.monotonic(), request.arrived_s
        assert request.finish is not None
        times = Timings((request.admitted_s or now) - began, (request.first_s or now) - began, now - began)
        shown = request.out[:-1] if request.finish is Finish.STOP and stop is None else request.out
        return Output(
            request.id,
            request.prompt,
            answer.text,
            shown,
            request.finish,
            len(request.out),
            request.nfe,
            request.prefills,
            times,
            request.cached,
            stop,
        )


def _begun(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
