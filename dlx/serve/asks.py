"""From a checked body to requests of the engine: its prompts as ids, its parameters, how many choices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dlx.graphs.policies import POLICIES
from dlx.request import COLDEST, SamplingParams
from dlx.serve.faults import Fault
from dlx.serve.options import Options
from dlx.serve.protocol import Chat, Completion, Message, Own, Sampling

if TYPE_CHECKING:
    from dlx.async_engine import AsyncEngine

INLINE = 4096  # characters that are encoded, and ids that are decoded, on the event loop: about a millisecond
NUMBERS = ("threshold", "open_at", "force_at", "edit", "remask", "stability", "max_nfe", "max_repetition_run")


T = TypeVar("T")


class Call(NamedTuple):
    """What a client asked for, ready to be submitted."""

    prompts: list[list[int]]
    params: list[SamplingParams]  # one a choice: those of the first prompt, then of the second, …
    timeout_s: float | None

    @property
    def choices(self) -> list[tuple[list[int], SamplingParams]]:
        """Prompt and parameters of each choice."""
        n = len(self.params) // len(self.prompts)
        return [(self.prompts[at // n], params) for at, params in enumerate(self.params)]


class Desk:
    """Where bodies become calls. Long texts are encoded by threads of its own, until it is closed."""

    def __init__(self, engine: AsyncEngine, options: Options) -> None:
        self._engine, self._options = engine, options
        self._threads = ThreadPoolExecutor(2, "dlx-text")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def call(self, body: Chat | Completion, adapter: str | None) -> Call:
        """The call that a body asks for. Raises Fault or RequestError for what cannot be done."""
        n, options = body.n or 1, self._options
        if n > options.max_n:
            raise Fault(400, "invalid_value", f"n={n} is not allowed; at most {options.max_n} choices are", "n")
        if body.dlx is not None:
            self._settled(body.dlx)
        params = replace(params_of(body), adapter=adapter)
        if params.seed is not None and params.seed + n > 2**63:
            raise Fault(400, "invalid_value", f"seed={params.seed} with n={n} passes 2^63 - 1", "seed")
        prompts = [await self.chat(body.messages)] if isinstance(body, Chat) else await self._prompts(body.prompt)
        if n * len(prompts) > options.max_queued:
            text = (
                f"{n * len(prompts)} choices can never be taken at once: at most {options.max_queued} requests may wait"
            )
            raise Fault(400, "invalid_value", text, "n")
        asked = body.max_tokens if body.max_tokens is not None else getattr(body, "max_completion_tokens", None)
        fitted = [replace(params, max_tokens=self._room(len(ids), asked)) for ids in prompts]
        each = [p if p.seed is None else replace(p, seed=p.seed + i) for p in fitted for i in range(n)]
        return Call(prompts, each, body.dlx.timeout_s if body.dlx else None)

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, in the model's own template."""
        plain = [message.plain() for message in messages]
        chars = sum(len(message["content"]) for message in plain)
        return await self._elsewhere(chars, partial(self._engine.tokenizer.chat, plain, most=self._engine.max_len))

    async def text(self, text: str, beside: int = 0) -> list[int]:
        """Ids of a text; `beside` are the characters of others that are encoded for the same request."""
        work = partial(self._engine.tokenizer.encode, text, most=self._engine.max_len)
        return await self._elsewhere(len(text) + beside, work)

    async def decoded(self, ids: list[int]) -> str:
        """The text of ids."""
        return await self._elsewhere(len(self._given(ids)), partial(self._engine.tokenizer.decode, ids))

    async def _elsewhere(self, size: int, work: Callable[[], T]) -> T:
        """Do small work here and now, other work in a thread."""
        return work() if size <= INLINE else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _prompts(self, prompt: Any) -> list[list[int]]:  # Any: one of four shapes, which protocol.py checked
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        if len(prompt) > self._options.max_prompts:
            text = f"{len(prompt)} prompts; at most {self._options.max_prompts} are allowed"
            raise Fault(400, "invalid_value", text, "prompt")
        chars = sum(len(one) for one in prompt if isinstance(one, str))
        return [await self.text(one, chars) if isinstance(one, str) else self._given(one) for one in prompt]

    def _given(self, ids: list[int]) -> list[int]:
        if len(ids) > self._engine.max_len:
            raise self._long(len(ids), None)
        return ids

    def _room(self, prompt: int, asked: int | None) -> int:
        """max_tokens: what was asked for if it fits, else what is left of the model's length, up to the default."""
        room = self._engine.max_len - prompt
        if room < (asked or 1):
            raise self._long(prompt, asked)
        return asked or min(self._options.default_max_tokens, room)

    def _long(self, prompt: int, asked: int | None) -> Fault:
        more = f" and max_tokens={asked}" if asked else ""
        text = f"the prompt of {prompt} tokens{more} pass the {self._engine.max_len} tokens that a request may have"
        return Fault(400, "context_length_exceeded", f"{text}; shorten it", "max_tokens" if asked else "prompt")

    def _settled(self, own: Own) -> None:
        """What the server was started with cannot be changed by a request."""
        bound = self._engine.policy
        if own.block_length not in (None, bound.L):
            text = f"block_length={own.block_length} is not compiled; {bound.L} is"
            raise Fault(400, "invalid_value", text, "dlx.block_length")
        if own.policy not in (None, name := name_of(bound)):
            text = f"policy={own.policy[:100]!r} is not this server's; it decodes with {name!r}"
            raise Fault(400, "invalid_value", text, "dlx.policy")


def name_of(policy: Any) -> str:  # Any: a Policy, bound
    """The name of a policy in the table of policies, however it was bound to a model; else "custom"."""
    own = ("L", "full", "watch", "filters")  # what a model, or a setting, decides
    told = [field.name for field in fields(policy) if field.compare and field.name not in own]
    alike = [name for name, one in POLICIES.items() if all(getattr(one, f) == getattr(policy, f) for f in told)]
    return alike[0] if alike else "custom"


def params_of(body: Sampling) -> SamplingParams:
    """The engine's parameters, but for max_tokens. Raises RequestError for values that it refuses."""
    own = body.dlx or Own()
    named = {name: value for name in NUMBERS if (value := getattr(own, name)) is not None}
    warm = body.temperature or 0.0
    stop = body.stop or ()
    params = SamplingParams(
        max_tokens=2**31 - 1,
        temperature=0.0 if warm < COLDEST else warm,
        seed=body.seed,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        ignore_eos=bool(body.ignore_eos or own.ignore_eos),
        stop_token_ids=(*(body.stop_token_ids or ()), *(own.stop_token_ids or ())),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        fixed=tuple(own.fixed or ()),
        priority=own.priority or 0,
        cache_salt=own.cache_salt or "",
        **named,
    )
    params.check()
    return params
