"""LLM: prompts in, answers out, in the caller's own process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from rich.progress import Progress

from dlx.answer import NOT_FINITE
from dlx.config import Config
from dlx.engine import Engine
from dlx.errors import EngineError, RequestError
from dlx.graphs.policies import Policy
from dlx.models.card import Card
from dlx.request import Chunk, Finish, Output, SamplingParams
from dlx.terminal import stderr
from dlx.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | list[int] | list[Message]  # raw text, token ids, or a conversation for the chat template


class LLM:
    """A model ready to decode; `LLM()` is the bundled one. See `dlx.config.Config` for the arguments.

    On a GPU, LLMs of one process share the kernels' counters: let one of them decode at a time.

    Raises ConfigError, PolicyError, ModelError, CapacityError  when built
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        policy: str | Policy | None = None,
        graphs: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **config: Any,
    ) -> None:
        self.config = Config.from_args(model, policy, graphs, device, dtype, **config).local()
        self._engine: Engine | None = Engine(self.config)
        self._streams: dict[int, deque[Chunk]] = {}  # open streams: what they have not yet handed on

    @property
    def engine(self) -> Engine:
        """The engine; EngineError once closed."""
        if self._engine is None:
            raise EngineError("this LLM is closed; build a new one")
        return self._engine

    @property
    def card(self) -> Card:
        """Facts of the model."""
        return self.engine.worker.card

    @property
    def policy(self) -> Policy:
        """The policy as it is bound to the model."""
        return self.engine.worker.policy

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Output]:
        """Answer prompts, in their order.

        prompts  one prompt or a list: raw text, token ids, or chat messages [{"role": …, "content": …}, …]
        params   one for all, or one a prompt
        lora     name of an adapter that the LLM was built with, for all or one a prompt; None leaves it to `params`
        Raises RequestError  before anything runs, if any prompt or its parameters are not allowed
        Raises EngineError   if a step fails; what else was asked for in this call is dropped
        """
        many = _as_list(prompts)
        each = _adapted(_as_params(params, len(many)), lora)
        engine = self.engine
        ids = [self._ids(prompt) for prompt in many]
        requests = engine.add_all(list(zip(ids, each, strict=True)))
        done: dict[int, Output | None] = dict.fromkeys(requests)
        left = len(done)
        try:
            with Progress(console=stderr(), disable=not progress) as bar:
                task = bar.add_task("prompts", total=left)
                while left:
                    for chunk in self._turn(engine):
                        if chunk.output is not None and chunk.id in done:
                            self._check(chunk)
                            done[chunk.id] = chunk.output
                            left -= 1
                            bar.advance(task)
        finally:
            for id in requests if left else ():
                engine.abort(id)
        return [output for output in done.values() if output is not None]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, watch: bool = False, lora: str | None = None
    ) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; the last chunk holds the whole output.

        lora   as in `generate`
        watch  a chunk every launch, with the window's undecided tokens; with Config.watch their confidences too
        """
        engine = self.engine
        many = _as_list(prompt)
        if len(many) != 1:
            raise RequestError(f"a stream answers one prompt, not {len(many)}; use generate, or a stream a prompt")
        (request,) = engine.add_all([(self._ids(many[0]), _adapted(_as_params(params, 1), lora)[0])], watch)
        inbox = self._streams[request] = deque[Chunk]()
        finished = False
        try:
            while not finished:
                while not inbox:
                    if engine.idle:
                        raise EngineError("the stream lost its request to an interrupt; ask again")
                    self._turn(engine)
                chunk = inbox.popleft()
                self._check(chunk)
                finished = chunk.output is not None
                yield chunk
        finally:
            del self._streams[request]
            engine.abort(request)  # ignored if it has ended

    def close(self) -> None:
        """Give the memory back; may be called twice."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn(self, engine: Engine) -> list[Chunk]:
        """One step, whoever asks for it; chunks of open streams are kept for them."""
        chunks = engine.step()
        for chunk in chunks:
            if chunk.id in self._streams:
                self._streams[chunk.id].append(chunk)
        return chunks

    def _check(self, chunk: Chunk) -> None:
        """Raise EngineError for a request that ended with a step that failed."""
        if chunk.finish is Finish.ERROR and chunk.error != NOT_FINITE:
            raise EngineError(f"a step failed, and the request with it ({chunk.error})") from self.engine.cause

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.chat(prompt) if _is_chat(prompt) else list(prompt)  # type: ignore[arg-type]


def _is_chat(prompt: object) -> TypeGuard[list[Message]]:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of it; [] of prompts stays empty."""
    if isinstance(prompts, str) or _is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"prompts is a {type(prompts).__name__}; pass text, token ids, messages, or a list of them")
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]  # type: ignore[arg-type]
    for at, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list | tuple):
            raise RequestError(f"prompts[{at}] is a {type(prompt).__name__}; pass text, token ids or messages")
    return list(prompts)  # type: ignore[arg-type]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if not isinstance(params, list | tuple) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"params={params!r} is not allowed; pass SamplingParams(…), or a list of one a prompt")
    if len(params) != n:
        raise RequestError(f"{len(params)} sampling parameters for {n} prompts; pass one for all, or one a prompt")
    return list(params)


def _adapted(params: list[SamplingParams], lora: str | Sequence[str | None] | None) -> list[SamplingParams]:
    if lora is None:
        return params
    if not isinstance(lora, str | list | tuple):
        raise RequestError(f"lora={lora!r} is not allowed; use the name of an adapter, or a list with one a prompt")
    names = [lora] * len(params) if isinstance(lora, str) else list(lora)
    if len(names) != len(params):
        raise RequestError(f"{len(names)} adapters for {len(params)} prompts; pass one name for all, or one a prompt")
    return [p if name is None else replace(p, adapter=name) for p, name in zip(params, names)]
