"""An LLM as lm-eval sees a model. Imports lm-eval: import this module only to evaluate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dlx.errors import RequestError
from dlx.llm import LLM, Message
from dlx.request import STOP_CHARS, STOPS, Output, SamplingParams

MAX_TOKENS = 256  # where neither the caller nor the task says how many
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # what tasks call it
KNOWN = {*LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k"}


class Answer(NamedTuple):
    """What one request gave; `text` is cut at the task's stop strings, the output's own is not."""

    task: str
    doc: int
    text: str
    output: Output


class Harness(LM):
    """An LLM behind lm-eval's interface: it generates; it does not score given continuations.

    A subclass, as lm-eval asks for one. All requests of a call go to the engine at once, which batches them.

        simple_evaluate(model=Harness(llm), tasks=[…], apply_chat_template=True)

    params   what every request is decoded with
    given    names of `params` that go before what a task asks for; of others the task's own values hold
    answers  what was generated, in order
    seconds  wall time of it
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams | None = None,
        given: Sequence[str] = (),
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.llm, self.params, self.given, self.progress = llm, params or SamplingParams(), frozenset(given), progress
        self.answers: list[Answer] = []
        self.seconds = 0.0
        self._chats: dict[str, list[int]] = {}  # rendered conversation → ids, in which messages are mere text

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer (context, generation arguments) pairs.

        Raises RequestError  for an argument that dlx does not know, or a request that can never run
        """
        asked = [(request.arguments[0], request.arguments[1]) for request in requests]
        prompts = [self._ids(context) for context, _ in asked]
        params = [self._params(arguments, at) for at, (_, arguments) in enumerate(asked)]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, progress=self.progress)
        self.seconds += time.perf_counter() - began
        texts = [cut(output.text, until(arguments)) for output, (_, arguments) in zip(outputs, asked)]
        for request, text, output in zip(requests, texts, outputs, strict=True):
            self.answers.append(Answer(request.task_name or "", request.doc_id or 0, text, output))
        return texts

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation in the checkpoint's chat template, up to where the assistant begins."""
        if not add_generation_prompt:
            raise RequestError("a task begins the assistant's answer (gen_prefix), which dlx cannot; use another task")
        text = self.llm.tokenizer.text(chat_history)
        self._chats[text] = self.llm.tokenizer.chat(chat_history)
        return text

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer is from."""
        return str(self.llm.config.model)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: see `unscored`."""
        raise unscored(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: see `unscored`."""
        raise unscored(requests)

    def _ids(self, context: str) -> list[int]:
        return self._chats[context] if context in self._chats else self.llm.tokenizer.encode(context)

    def _params(self, arguments: Mapping[str, Any], at: int) -> SamplingParams:
        """The caller's parameters, and the task's where the caller gave none; each request has a seed of its own."""
        unknown = sorted(set(arguments) - KNOWN)
        if unknown:
            raise RequestError(f"the task asks for {', '.join(unknown)}; dlx knows {', '.join(sorted(KNOWN))}")
        theirs: dict[str, Any] = {"max_tokens": MAX_TOKENS} if "max_tokens" not in self.given else {}
        for name in LENGTHS:
            theirs |= {"max_tokens": int(arguments[name])} if name in arguments else {}
        theirs |= {name: arguments[name] for name in ("temperature", "top_p", "top_k") if name in arguments}
        if not arguments.get("do_sample", "temperature" in theirs):
            theirs |= {"temperature": 0.0}
            theirs = {name: value for name, value in theirs.items() if name not in ("top_p", "top_k")}
        elif "temperature" not in theirs:
            theirs["temperature"] = 1.0
        mine = {name: value for name, value in theirs.items() if name not in self.given}
        stops = [text for text in until(arguments) if len(text) <= STOP_CHARS]
        mine["stop"] = tuple(stops[:STOPS])  # of more, the first ones end an answer early; it is cut at all of them
        seed = None if self.params.seed is None else (self.params.seed + at) % 2**63
        return replace(self.params, **mine, seed=seed)


def unscored(requests: Sequence[Instance]) -> RequestError:
    """The refusal of a task that is scored by log-likelihood."""
    task = requests[0].task_name if requests else None
    return RequestError(
        f"task {task!r} is scored by the log-likelihood of given answers, which a diffusion language model has no "
        "exact one of; use a task that generates (output_type: generate_until)"
    )


def until(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of a request's generation arguments."""
    said = arguments.get("until") or ()
    return tuple(filter(None, (said,) if isinstance(said, str) else said))


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
