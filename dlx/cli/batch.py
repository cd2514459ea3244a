"""Answers to a file of prompts: a JSON object a line in, one a line out, in the same order.

in   {"prompt": text or ids} or {"messages": […]}, with "id" and, in "params", sampling parameters of its own
out  {"line": 1, "id": …, "text": …, and what else `dlx generate --json` tells of an answer}
     {"line": 2, "id": …, "error": …}
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from dlx.cli import loading
from dlx.cli.flags import SAMPLING, Asked
from dlx.cli.notices import notice
from dlx.errors import DlxError, RequestError
from dlx.request import SamplingParams
from dlx.sources import nearest, tupled

if TYPE_CHECKING:
    from dlx.llm import LLM

KEYS = ("prompt", "messages", "id", "params")
AHEAD = 4  # requests in the engine for each row that decodes


class Line(NamedTuple):
    """One line of the file, read."""

    number: int
    id: Any
    prompt: Any  # text, ids or messages
    params: SamplingParams


def answered(found: Asked, source: Path, out: Path | None, raw: bool) -> int:
    """Answer every line that can be; 1 if any could not, which are told by their numbers."""
    wrong = 0
    with opened(source) as file, writer(out, source) as to, loading.load(found) as llm, progress() as advance:
        for record in answers(llm, file, found.sampling, raw):
            to.write(json.dumps(record, default=str) + "\n")
            to.flush()
            advance()
            if "error" in record:
                wrong += 1
                notice(f"error: {source}, line {record['line']}: {record['error']}")
    if wrong:
        notice(f"{wrong} of the lines had no answer")
    return int(wrong > 0)


def answers(llm: LLM, file: Iterable[str], params: SamplingParams, raw: bool) -> Iterator[dict[str, Any]]:
    """Records in the order of the lines; a few requests a row are in the engine at once."""
    from dlx.live import record

    engine, most = llm.engine, AHEAD * llm.config.max_num_seqs
    lines = enumerate(file, 1)
    waiting: dict[int, Line] = {}  # by request
    done: dict[int, dict[str, Any]] = {}  # by line number
    order: list[int] = []  # numbers of lines that are not handed on yet
    more = True
    while more or order:
        while more and len(order) < most:
            number, text = next(lines, (0, None))
            more = text is not None
            if text is None or not text.strip():
                continue
            order.append(number)
            try:
                line = read(number, text, params, raw)
                waiting[engine.add_all([(ids(llm, line.prompt), line.params)])[0]] = line
            except (DlxError, ValueError) as error:
                done[number] = {"line": number, "error": str(error).splitlines()[0]}
        if waiting and order[0] not in done:
            for chunk in engine.step():
                if chunk.output is not None and chunk.id in waiting:
                    line = waiting.pop(chunk.id)
                    named = {} if line.id is None else {"id": line.id}
                    done[line.number] = {"line": line.number} | named | record(llm, chunk.output)
        while order and order[0] in done:
            yield done.pop(order.pop(0))


def read(number: int, text: str, params: SamplingParams, raw: bool) -> Line:
    """A line's prompt and parameters. Raises RequestError or ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise RequestError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise RequestError(f'a {type(value).__name__} is no request; write an object, as {{"prompt": "…"}}')
    for name in value:
        if name not in KEYS:
            raise RequestError(f"{name!r} is no key of a request{nearest(name, KEYS)}")
    if ("prompt" in value) is ("messages" in value):
        raise RequestError("a request has a prompt or messages; give one of them")
    own = value.get("params", {})
    if not isinstance(own, dict):
        raise RequestError(f"params is a {type(own).__name__}; write an object")
    for name in own:
        if name not in SAMPLING.knobs:
            raise RequestError(f"{name!r} is no sampling parameter{nearest(name, SAMPLING.knobs)}")
    merged = replace(params, **{name: tupled(one) for name, one in own.items()})
    merged.check()
    prompt = value.get("prompt", value.get("messages"))
    if "messages" in value:
        if not (prompt and isinstance(prompt, list) and all(map(is_message, prompt))):
            raise RequestError('messages is no list of {"role": …, "content": …}')
        for message in prompt:
            loading.encoded(message["content"])
    elif isinstance(prompt, str):
        loading.checked(prompt)
        prompt = prompt if raw else [{"role": "user", "content": prompt}]
    elif not (isinstance(prompt, list) and all(type(one) is int for one in prompt)):
        raise RequestError("prompt is neither text nor a list of ids")
    return Line(number, value.get("id"), prompt, merged)


def is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def ids(llm: LLM, prompt: Any) -> list[int]:
    """The ids of text, messages, or of ids."""
    if isinstance(prompt, str):
        return llm.tokenizer.encode(prompt)
    return llm.tokenizer.chat(prompt) if prompt and is_message(prompt[0]) else prompt


@contextlib.contextmanager
def opened(source: Path) -> Iterator[TextIO]:
    """The lines of a file or of stdin; what is not UTF-8 stays visible to `json`."""
    if str(source) == "-":
        yield sys.stdin
        return
    try:
        file = source.expanduser().open(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror}; name a file of JSON lines") from None
    with file:
        yield file


@contextlib.contextmanager
def writer(out: Path | None, source: Path) -> Iterator[TextIO]:
    """Where records go, which is not where the lines are."""
    if out is None:
        yield sys.stdout
        return
    try:
        if out.exists() and source.exists() and out.samefile(source):
            raise RequestError(f"--out {out} is the file of --jsonl; name another one")
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("w", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}; name another file") from None
    with file:
        yield file


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Count answers on stderr, if it is a terminal."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from dlx.terminal import stderr

    columns = (SpinnerColumn(), TextColumn("{task.completed} answers"), TimeElapsedColumn())
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("answers", total=None)
        yield lambda: bar.advance(task)
