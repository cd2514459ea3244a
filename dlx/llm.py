"""LLM: prompts in, answers out, in the caller's own process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console
from rich.progress import Progress

from dlx.config import Config
from dlx.engine import Engine
from dlx.errors import EngineError, RequestError
from dlx.graphs.policies import Policy
from dlx.models.card import Card
from dlx.request import Chunk, Output, SamplingParams
from dlx.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | list[int] | list[Message]  # raw text, token ids, or a conversation for the chat template


class LLM:
    """A model ready to decode; `LLM()` is the bundled one. See `dlx.config.Config` for the arguments.

    Raises ConfigError, PolicyError, ModelError, CapacityError  when built
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        policy: str | Policy = "single_bd",
        graphs: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **config: Any,
    ) -> None:
        self.config = Config.from_args(model, policy, graphs, device, dtype, **config)
        self._engine: Engine | None = Engine(self.config)

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
    ) -> list[Output]:
        """Answer prompts, in their order.

        prompts  one prompt or a list: raw text, token ids, or chat messages [{"role": …, "content": …}, …]
        params   one for all, or one a prompt
        Raises RequestError  before anything runs, if any prompt or its parameters are not allowed
        """
        many = _as_list(prompts)
        each = _as_params(params, len(many))
        engine = self.engine
        ids = [self._ids(prompt) for prompt in many]
        requests = engine.add_all(list(zip(ids, each, strict=True)))
        done: dict[int, Output] = {}
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("prompts", total=len(many))
            while len(done) < len(requests):
                for chunk in engine.step():
                    if chunk.output is not None:
                        done[chunk.id] = chunk.output
                        bar.advance(task)
        return [done[id] for id in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, watch: bool = False) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; the last chunk holds the whole output.

        watch  a chunk every forward, with the window's undecided tokens: for live views, as it waits for the device
        """
        engine = self.engine
        (request,) = engine.add_all([(self._ids(prompt), params or SamplingParams())])
        finished = False
        try:
            while not finished:
                for chunk in engine.step(watch):
                    if chunk.id == request:
                        finished = chunk.output is not None
                        yield chunk
        finally:
            if not finished:
                engine.abort(request)

    def close(self) -> None:
        """Give the memory back; may be called twice."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    if len(params) != n:
        raise RequestError(f"{len(params)} sampling parameters for {n} prompts; pass one for all, or one a prompt")
    return list(params)
