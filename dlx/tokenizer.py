"""Text to ids and back: a checkpoint's tokenizer, its chat template, and text that arrives token by token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

import tokenizers
from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from dlx.errors import ModelError, RequestError
from dlx.vocabulary import VOCABULARY, assembled
from dlx.weights.files import inside

Message = Mapping[str, str]
FILE = "tokenizer.json"
SLACK = 4  # times that normalising may shorten a text
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")  # what templates may use


class Tokenizer:
    """A checkpoint's tokenizer; it holds no state between calls, so threads may share it.

    size     ids are 0 to size - 1
    special  special tokens as they are written → id
    eos_id, pad_id, mask_id  as tokenizer_config.json names them, or None
    """

    def __init__(self, written: str, config: Mapping[str, object], template: str | None, source: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(written)
        except Exception as error:  # the library raises no narrower class
            raise ModelError(f"{source / FILE} is no tokenizer ({error}); fetch the file again") from error
        self._template = _compiled(template, source) if template is not None else None
        self._source = source
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._names = {key: text for key in NAMED if (text := _text(config.get(key))) is not None}
        self._longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self.eos_id, self.pad_id, self.mask_id = (self._id(key) for key in ("eos_token", "pad_token", "mask_token"))

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and, if it is there, chat_template.jinja of a folder.

        Without a tokenizer.json, vocab.json and merges.txt are read in its place: see `vocabulary`.
        Raises ModelError  a file is missing, broken, or a link out of the folder
        """
        folder = Path(folder)
        alone = not (folder / FILE).is_file() and (folder / VOCABULARY).is_file()
        written = "" if alone else _read(folder / FILE)
        path = folder / "tokenizer_config.json"
        try:
            config = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is no JSON ({error}); fetch the file again") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds a {type(config).__name__}; expected a JSON object; fetch the file again")
        separate = folder / "chat_template.jinja"
        template = _read(separate) if separate.is_file() else _template(config.get("chat_template"), path)
        return Tokenizer(assembled(folder, config) if alone else written, config, template, folder)

    def encode(self, text: str, *, plain: bool = False, most: int | None = None) -> list[int]:
        """Ids of a text. Special tokens written in it count as such; with `plain` they are mere text.

        most  ids to return at most: a text that cannot have so few is refused unread
        Raises RequestError  for more ids than `most`, or lone surrogates
        """
        return self._encoded(text, plain=plain, whole=not plain, most=most)

    def chat(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """Ids of a conversation in the checkpoint's chat template, up to where the assistant begins to speak.

        A special token written in a message is mere text: it cannot end the message or begin another.

        messages  [{"role": "user", "content": "…"}, …]
        most      as in `encode`, of each piece of the conversation that is encoded on its own
        Raises RequestError  a malformed message; no chat template, or one that refuses the conversation
        """
        _check(messages)
        text = self._render(messages)
        if not any(token in message["content"] for message in messages for token in self.special):
            return self._encoded(text, most=most)
        # put a mark in each content's place, to tell what the template wrote from what the caller wrote
        key = secrets.token_hex(8)
        marks = {f"\ue000{key}.{n}\ue001": message["content"] for n, message in enumerate(messages)}
        marked = self._render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
        pieces = re.split(f"(\ue000{key}\\.[0-9]+\ue001)", marked)
        if "".join(marks.get(piece, piece) for piece in pieces) != text:
            raise RequestError(
                f"a message contains a special token ({', '.join(self.special)}), and the chat template "
                "rewrites messages, so that it cannot be kept as plain text; remove it from the message"
            )
        written = [self._encoded(marks.get(p, p), plain=p in marks, most=most) for p in pieces]
        return [i for ids in written for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; RequestError if an id is not from 0 to size - 1."""
        return self._tokenizer.decode(_checked(ids, self.size), skip_special_tokens=True)

    @property
    def templated(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return self._template is not None

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation in the checkpoint's chat template, as it would be read; `chat` gives its ids."""
        _check(messages)
        return self._render(messages)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive bit by bit."""
        return TextStream(self._tokenizer, self.size)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A twin to which special tokens are mere text; not a switched flag, as threads share the first."""
        twin = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        twin.encode_special_tokens = True
        return twin

    def _encoded(self, text: str, *, plain: bool = False, whole: bool = False, most: int | None = None) -> list[int]:
        """`whole` adds what the tokenizer puts around a text, such as a begin-of-text; templates bring their own."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text cannot be written as UTF-8 ({error}); remove lone surrogates") from error
        if most is not None and len(text) > SLACK * most * self._longest:
            raise RequestError(f"a text of {len(text)} characters has more than {most} tokens; shorten it")
        # a batch of one: encode() would hold the interpreter's lock, and every other thread up, for seconds
        (found,) = (self._plain if plain else self._tokenizer).encode_batch([text], add_special_tokens=whole)
        if most is not None and len(found) > most:
            raise RequestError(f"the text has {len(found)} tokens; at most {most} are allowed; shorten it")
        return found.ids

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise RequestError(f"{self._source} has no chat template; pass a text or token ids")
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refuses the conversation: {error}") from error

    def _id(self, key: str) -> int | None:
        text = self._names.get(key)
        found = self._tokenizer.token_to_id(text) if text is not None else None
        if text is not None and found is None:
            raise ModelError(
                f"{self._source}: tokenizer_config.json names {key}={text!r}, which {FILE} lacks; "
                "take both files from the same checkpoint"
            )
        return found


class TextStream:
    """Text of ids that arrive bit by bit; what `add` and then `flush` return joins to the text of all ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._out = 0  # characters returned so far

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; the bytes of an unfinished character wait for what follows."""
        new = _checked(ids, self._size)
        self._ids += new
        # one at a time: the decoder holds back all it is given at once if that ends within a character
        piece = "".join(self._decoder.step(self._tokenizer, i) or "" for i in new)
        self._out += len(piece)
        return piece

    def flush(self) -> str:
        """What was held back, once no more ids follow."""
        piece = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._out :]
        self._out += len(piece)
        return piece


def _checked(ids: Sequence[int], size: int) -> list[int]:
    for i in ids:
        if not isinstance(i, int) or not 0 <= i < size:
            raise RequestError(f"the id {i!r} is not in the tokenizer; pass ids from 0 to {size - 1}")
    return list(ids)


def _read(path: Path) -> str:
    try:
        return inside(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; name a checkpoint's folder in the Hugging Face layout, "
            f"with {FILE} and tokenizer_config.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch the file again") from error


def _text(token: object) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object that describes an added token."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(value: object, path: Path) -> str | None:
    """The chat template of tokenizer_config.json: a string, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path}: chat_template is a {type(value).__name__}; expected a string; fetch the file again")
    return value


def _compiled(template: str, source: Path) -> Template:
    """A template in a sandbox with what the Hugging Face layout assumes; a checkpoint may not run code."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return sandbox.from_string(template)
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template of {source} is broken (line {error.lineno}: {error.message})") from error


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # jinja's own escapes HTML


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _check(messages: Sequence[Message]) -> None:
    """RequestError unless there is a message, and each has a role and a content and nothing else."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f'messages={messages!r} is not allowed; pass [{{"role": "user", "content": "…"}}, …]')
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"message {n} is {message!r}; expected an object with role and content, nothing else")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not role.isidentifier():
            raise RequestError(f"message {n} has role={role!r}; expected a word such as system, user, assistant")
        if not isinstance(content, str):
            raise RequestError(f"message {n} has a content of type {type(content).__name__}; expected a string")
