"""What clients may ask: OpenAI's fields with strict types, and a `dlx` object whose fields are all known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from dlx.request import STOP_CHARS, STOP_IDS, STOPS
from dlx.serve.faults import Fault, invalid

MESSAGES = 1024  # a conversation at most
WARNED = 8  # unknown fields that a warning names
Share = Annotated[float, Field(ge=0, le=1)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARS)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
B = TypeVar("B", bound="Body")

# fields that are not there, and the values of them that ask for nothing
REFUSED: Mapping[str, tuple[object, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "prompt_embeds": (),
    "web_search_options": (),
}
SILENT = {"user", "store", "metadata", "service_tier", "safety_identifier", "parallel_tool_calls"}


class Body(BaseModel):
    """A request's body: types are strict; fields that it does not name are kept apart, to be refused or told of."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class Own(BaseModel):
    """The `dlx` object of a request: what OpenAI's fields do not say. Fields are those of `SamplingParams`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    threshold: Share | None = None
    open_at: Share | None = None
    force_at: Share | None = None
    edit: Share | None = None
    remask: Share | None = None
    stability: Share | None = None
    max_nfe: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_repetition_run: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=STOP_IDS)] | None = None
    fixed: Annotated[list[tuple[Id, Id]], Field(fail_fast=True, max_length=65536)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    timeout_s: Annotated[float, Field(ge=1)] | None = None
    policy: str | None = Field(default=None, description="Must be the server's: one policy is compiled.")
    block_length: int | None = Field(default=None, description="Must be the server's.")


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool = False


class Sampling(Body):
    """What both kinds of completion share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_mode: Literal["committed", "denoise"] = "committed"
    dlx: Own | None = None


def _prompts(value: object) -> object:
    """Check the shape of a prompt by hand: a union would look at millions of ids four times over."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists, not empty")
    kind = type(value[0])
    if kind not in (str, int, list) or any(type(part) is not kind for part in value):
        raise ValueError("expected all texts, all integers, or all lists of integers")
    if kind is list and any(not part or any(type(tok) is not int for tok in part) for part in value):
        raise ValueError("expected lists of integers, none empty")
    return value


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SHAPES = [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, _IDS]
Prompts = Annotated[
    Any,  # checked by hand
    AfterValidator(_prompts),
    WithJsonSchema({"anyOf": [*_SHAPES, {"type": "array", "items": _IDS, "minItems": 1}]}),
]


class Completion(Sampling):
    """POST /v1/completions"""

    prompt: Prompts


class Part(BaseModel):
    """A piece of a message; pictures and sound are not understood, and nothing is fetched."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]

    def plain(self) -> dict[str, str]:
        """As the chat template takes it."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}


class Chat(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class Tokenize(Body):
    """POST /v1/tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)] | None = None


class Detokenize(Body):
    """POST /v1/detokenize"""

    model: str | None = None
    tokens: Ids


def parsed(kind: type[B], raw: bytes, strict: bool) -> tuple[B, list[str]]:
    """The body, and the unknown fields in it that were ignored.

    strict  refuse unknown fields
    Raises Fault  400: what is wrong, by its field's name
    """
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error) from None
    extra = body.model_extra or {}
    for name, value in extra.items():
        if name in REFUSED and not _neutral(value, REFUSED[name]):
            raise Fault(400, "unsupported_parameter", f"{name} is not supported; leave it out", name)
    unknown = [name for name in extra if name not in REFUSED and name not in SILENT]
    if unknown and strict:
        raise Fault(400, "unknown_parameter", f"{_shown(unknown)}: not known to this server; leave it out")
    messages = body.messages if isinstance(body, Chat | Tokenize) else None
    for at, message in enumerate(messages or ()):
        asked = [name for name, value in (message.model_extra or {}).items() if value and name != "name"]
        if asked:
            raise Fault(400, "unsupported_parameter", f"messages[{at}] has {_shown(asked)}; only text is", "messages")
    return body, unknown


def warning(unknown: list[str]) -> dict[str, str]:
    """The header that tells of ignored fields."""
    return {"x-dlx-warning": f"ignored: {_shown(unknown)}"} if unknown else {}


def _shown(names: list[str]) -> str:
    """Names of fields, fit for a header, whatever they are."""
    plain = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) or "?" for name in names[:WARNED]]
    return ", ".join(plain) + (f" and {len(names) - WARNED} more" if len(names) > WARNED else "")


def _neutral(value: object, allowed: tuple[object, ...]) -> bool:
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
