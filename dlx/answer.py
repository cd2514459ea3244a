"""The text of one answer, as its ids are committed: cut where a stop string is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dlx.tokenizer import TextStream


class Piece(NamedTuple):
    """What one step added to an answer."""

    text: str
    ids: Sequence[int]  # of what was given, those that count: behind the id that completed a stop string there are none
    stop: str | None  # the stop string that ended the answer


class Answer:
    """Text of committed ids, which grows and is never taken back.

    The stop string that is complete first counts; of two, the one that began first. It is cut from the text, with all
    behind it. What may turn out to be its beginning is held back, across the borders of blocks. Ids are looked at one
    after the other, so the answer does not depend on how many came at once.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str] = ()) -> None:
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
        if not self._stops:
            piece = Piece(self._stream.add(ids) + (self._stream.flush() if last else ""), ids, None)
        else:
            piece = self._searched(ids, last)
        self._parts.append(piece.text)
        return piece

    def _searched(self, ids: Sequence[int], last: bool) -> Piece:
        ready = ""
        for n, tok in enumerate(ids, 1):
            text, stop = self._cut(self._stream.add([tok]))
            ready += text
            if stop is not None:
                return Piece(ready, ids[:n], stop)
        text, stop = self._cut(self._stream.flush()) if last else ("", None)
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


def _begun(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
