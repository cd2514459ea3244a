"""What a caller asks for, what the host remembers of it, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from dlx.errors import RequestError

COLDEST = 1e-4  # below, logits ÷ temperature may overflow
STOP_IDS = 8  # stop ids one row of the Block Buffer holds
STOPS, STOP_CHARS = 4, 256  # stop strings of a request, and their length, at most


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop id was committed, or a stop string
    LENGTH = "length"  # max_tokens, or the model's length, was reached
    MAX_NFE = "max_nfe"  # the budget of denoise forwards was spent
    REPETITION = "repetition"  # one token stood max_repetition_run times in a row
    ERROR = "error"  # its logits were not finite, or a step failed
    ABORT = "abort"  # the caller dropped it
    TIMEOUT = "timeout"  # its time was over


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded; `None` takes the policy's or the model's value.

    max_tokens      int     tokens to commit at most, stop id included
    temperature     float   0 takes the most probable token; above, tokens are drawn
    seed            int     key of the draws, 0 ≤ seed < 2⁶³; None draws one at random
    threshold       float   confidence above which a token is accepted, 0 to 1
    open_at         float   share of the last open block that opens the next one, 0 to 1
    force_at        float   share of the block before at which a block must accept a token, 0 to 1
    edit            float   confidence above which a decided token is replaced, 0 to 1; of policies that edit
    remask          float   confidence below which a decided token is masked again, 0 to 1; of policies that remask
    stability       float   share of the last open block's tokens proposed again that opens the next one, 0 to 1
    top_k           int     draw from so many of the likeliest tokens; 0 is off; of engines with filters
    top_p           float   draw from the likeliest tokens up to the first that brings their sum above it; 1 is off
    max_nfe         int     denoise forwards to spend at most
    max_repetition_run  times that one token may stand in a row, 2 or more; of a policy that has such a guard
    ignore_eos      bool    go on past stop ids
    stop_token_ids  ids that end the answer, besides the model's own
    stop            strings that end the answer, each cut from its text; at most 4, of 1 to 256 characters
    fixed           (offset in the answer, id) of tokens that are known beforehand and stay: a gap is what is between
                    the prompt and them. Whole sequences see all of them, a block those up to its end; a canvas has none
    adapter         name of the LoRA adapter to answer with, of those that the engine was built with
    priority        int     lower runs sooner; a step is worth 30 s of waiting
    cache_salt      str     K/V of prefixes is shared among requests of one salt alone
    Raises RequestError  from `check`, if a value is outside its range
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    threshold: float | None = None
    open_at: float | None = None
    force_at: float | None = None
    edit: float | None = None
    remask: float | None = None
    stability: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    max_nfe: int | None = None
    max_repetition_run: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    adapter: str | None = None
    fixed: tuple[tuple[int, int], ...] = ()
    stop: tuple[str, ...] = ()
    priority: int = 0
    cache_salt: str = ""

    def check(self) -> None:
        """Raise RequestError for the first value that is outside its range."""
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        if 0 < self.temperature < COLDEST:
            raise RequestError(
                f"temperature={self.temperature!r} is not allowed; pass 0, or a number from {COLDEST:g} to 100"
            )
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        for name in ("threshold", "open_at", "force_at", "edit", "remask", "stability"):
            value = getattr(self, name)
            if value is not None:
                _number(name, value, 0.0, 1.0)
        if self.max_nfe is not None:
            _integer("max_nfe", self.max_nfe, 1, 2**31 - 1)
        if self.max_repetition_run is not None:
            _integer("max_repetition_run", self.max_repetition_run, 2, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} is not a bool; pass True or False")
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Iterable):
            raise RequestError(f"stop_token_ids={self.stop_token_ids!r} is not allowed; pass a tuple of ids")
        for stop in self.stop_token_ids:
            _integer("stop_token_ids", stop, 0, 2**31 - 1)
        if not isinstance(self.stop, tuple | list) or len(self.stop) > STOPS:
            raise RequestError(f"stop={self.stop!r} is not allowed; pass a tuple of at most {STOPS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= STOP_CHARS:
                given = f"one of {len(text)} characters" if isinstance(text, str) else repr(text)
                raise RequestError(f"stop has {given}; pass strings of 1 to {STOP_CHARS} characters")
        if not isinstance(self.fixed, tuple) or any(not isinstance(p, tuple) or len(p) != 2 for p in self.fixed):
            raise RequestError(f"fixed={self.fixed!r} is not allowed; pass a tuple of pairs (offset in the answer, id)")
        for at, tok in self.fixed:
            _integer("an offset of fixed", at, 0, self.max_tokens - 1)
            _integer("an id of fixed", tok, 0, 2**31 - 1)
        if len(dict(self.fixed)) < len(self.fixed):
            raise RequestError("fixed has an offset twice; pass one id for each")
        _integer("priority", self.priority, -1_000_000, 1_000_000)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > 256:
            raise RequestError(f"cache_salt={self.cache_salt!r} is not allowed; pass text of at most 256 characters")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise RequestError(f"adapter={self.adapter!r} is not a name; pass one of the engine's adapters, or None")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={value!r} is not allowed; pass an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name}={value!r} is not allowed; pass a number from {low:g} to {high:g}")


@dataclass(slots=True)
class Request:
    """One request on the host, from arrival to finish; times are `time.monotonic()` seconds."""

    id: int
    prompt: list[int]
    params: SamplingParams
    arrived_s: float
    watch: bool = False  # its chunks, one a launch, hold its window
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    out: list[int] = field(default_factory=list)  # committed ids, the stop id included
    tail: int = 0  # prompt tokens at the head of the first block that have yet to be skipped
    prefills: int = 0  # prefill forwards
    nfe: int = 0  # denoise forwards
    want: int = 0  # scope of its next forward, where its policy has several
    filled: int = 0  # positions whose K/V is in its pages, or will be once what was sent is done
    final: int = 0  # of these, the ones whose K/V never changes, as far as the host knows from the device
    published: int = 0  # pages that others can find
    digests: list[bytes] = field(default_factory=list)  # of the prefixes that its pages end; see prefix.py
    cached: int = 0  # tokens of the prompt that were found when it was admitted
    decodes: bool = False  # its row is in the Block Buffer
    kept: bool = False  # it was preempted: its row is kept on the device
    flying: int = 0  # launches of its row that are not read
    admitted_s: float | None = None
    first_s: float | None = None  # when the first block was committed
    finish: Finish | None = None


class Timings(NamedTuple):
    """Wall seconds of one request, each from its arrival."""

    admitted_s: float
    first_block_s: float
    total_s: float


class Window(NamedTuple):
    """What of a watched row is behind what is committed, a position each; without Config.watch its ids alone."""

    ids: list[int]  # masks included
    confidence: list[float]  # of each id; of its proposal where it is a mask; 0 where nothing was proposed yet
    guess: list[int]  # the proposal, of the last forward that decided on the position


class Chunk(NamedTuple):
    """What one step committed for one request; text and ids leave the stop id out.

    window, confidence, guess  of a watched request, as Window's; else empty
    output                     on the last chunk: the whole answer
    error                      why the request failed, in one line; its finish is ERROR
    nfe                        the request's denoise forwards so far
    """

    id: int
    text: str
    token_ids: list[int]
    finish: Finish | None
    window: list[int]
    output: Output | None
    error: str | None = None
    confidence: list[float] = []  # noqa: RUF012
    guess: list[int] = []  # noqa: RUF012
    nfe: int = 0


class Output(NamedTuple):
    """The whole answer to one request; text and ids leave the stop id out, `tokens` counts it.

    prefill_forwards  chunks of the prompt that were prefilled, and canvases that were encoded to go on behind them;
                      those of several requests may share a forward
    """

    id: int
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: Finish
    tokens: int
    nfe: int
    prefill_forwards: int
    timings: Timings
    cached_tokens: int = 0  # of the prompt, whose K/V was there already
    stop: str | None = None  # the stop string that ended it

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens ÷ denoise forwards; prefill forwards are not counted."""
        return self.tokens / max(self.nfe, 1)
