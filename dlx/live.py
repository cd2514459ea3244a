"""How an answer is shown: a live view where tokens come out of their masks, plain text, or JSON.

Model text is never read as markup, and control characters never reach a terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, NamedTuple, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dlx.errors import EngineError
from dlx.request import Chunk, Output, SamplingParams
from dlx.terminal import stderr

if TYPE_CHECKING:
    from dlx.llm import LLM, Message

MASK = "░"
SHADES = "░▒▓"  # of a mask, by how sure its proposal is
FIGURES = ("text", "token_ids", "finish_reason", "tokens", "nfe", "prefill_forwards", "tokens_per_forward")
SURE = 0.8  # a decided token below it is told apart
FRAME_S = 0.03  # at most one frame in this many seconds: drawing shares the core with the model
C0_C1 = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they reorder what stands around them
UNSEEN = dict.fromkeys(C0_C1 | BIDI)


class View(NamedTuple):
    """What one frame shows.

    text      committed text
    window    pieces of text after it; None is one mask
    forwards  denoise forwards so far
    tokens    committed tokens so far
    sure      how sure each piece is, 0 to 1; of a mask, its proposal; empty: not known
    """

    text: str
    window: tuple[str | None, ...]
    forwards: int
    tokens: int
    elapsed_s: float
    sure: tuple[float, ...] = ()


@dataclass(frozen=True)
class Frame:
    """A body cut to the last lines that fit the screen, and a status line under it."""

    body: Text
    status: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = (options.height or console.size.height) - 2  # the status line and the cursor's own
        yield from tail(self.body, console, options.max_width, max(room, 1))
        yield self.status


def clean(text: str) -> str:
    """The text without control characters, newline and tab apart: no escape sequence survives."""
    return text.translate(UNSEEN)


def tail(body: Text, console: Console, width: int, room: int) -> list[Text]:
    """The last `room` screen lines of a text; only as many paragraphs as they need are wrapped."""
    lines: list[Text] = []
    for paragraph in reversed(body.split("\n", allow_blank=True)):
        if len(lines) >= room:
            break
        lines = [*paragraph.wrap(console, width, overflow="fold"), *lines]
    return lines[-room:]


def render(view: View) -> Frame:
    """The picture of a view: committed text plain, the window dim, masks as blocks; shade and colour tell how sure."""
    body = Text(clean(view.text))
    for piece, sure in zip_longest(view.window, view.sure):
        if piece is None:
            body.append(SHADES[min(int((sure or 0.0) * len(SHADES)), len(SHADES) - 1)], style="dim cyan")
        else:
            body.append(clean(piece), style="dim" if sure is None or sure >= SURE else "dim yellow")
    return Frame(body, status(view.forwards, view.tokens, view.elapsed_s))


def status(forwards: int, tokens: int, elapsed_s: float) -> Text:
    """One line of figures; a narrow screen cuts it."""
    rate = tokens / max(forwards, 1)
    line = f"tokens {tokens} · forwards {forwards} · tokens/forward {rate:.1f} · {elapsed_s * 1e3:.0f} ms"
    return Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def pieces(window: list[int], mask_id: int, decode: Callable[[list[int]], str]) -> Iterator[str | None]:
    """The window's ids as text: a run of tokens is decoded together, a mask is None."""
    run: list[int] = []
    for token in window:
        if token != mask_id:
            run.append(token)
            continue
        if run:
            yield decode(run)
            run = []
        yield None
    if run:
        yield decode(run)


def sureness(window: list[int], confidence: list[float], mask_id: int) -> Iterator[float]:
    """How sure each of the `pieces` is: a mask's own confidence, a run's mean."""
    for masked, part in groupby(zip(window, confidence), lambda one: one[0] == mask_id):
        run = [p for _, p in part]
        yield from run if masked else [sum(run) / len(run)]


def show(chunks: Iterable[Chunk], mask_id: int, decode: Callable[[list[int]], str], console: Console) -> Output:
    """Draw a watched stream while it runs; then leave the whole text and its figures on the screen."""
    began = drawn = time.monotonic()
    text, tokens, output = "", 0, None
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for n, chunk in enumerate(chunks):
                text += chunk.text
                tokens += len(chunk.token_ids)
                output = chunk.output
                now = time.monotonic()
                if now - drawn >= FRAME_S or n == 0:
                    window = tuple(pieces(chunk.window, mask_id, decode))
                    sure = tuple(sureness(chunk.window, chunk.confidence, mask_id))
                    live.update(render(View(text, window, chunk.nfe, tokens, now - began, sure)), refresh=True)
                    drawn = now
    finally:  # also what an interrupt leaves
        if text:
            console.print(Text(clean(text)), soft_wrap=True)
    output = finished(output)
    line = status(output.nfe, output.tokens, output.timings.total_s)
    console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
    return output


def plain(chunks: Iterable[Chunk], out: TextIO) -> Output:
    """Write committed text as it comes, and a newline; a terminal gets it without control characters."""
    output = None
    for chunk in chunks:
        out.write(clean(chunk.text) if out.isatty() else chunk.text)
        out.flush()
        output = chunk.output
    out.write("\n")
    out.flush()
    return finished(output)


def tell(llm: LLM, prompt: str | list[Message], params: SamplingParams, *, as_json: bool) -> Output:
    """Decode one prompt onto stdout: one JSON object, the live view in a terminal, or plain text."""
    if as_json:
        output = llm.generate(prompt, params)[0]
        print(dumps(record(llm, output)), flush=True)
        return output
    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return plain(llm.stream(prompt, params), sys.stdout)
    return show(llm.stream(prompt, params, watch=True), llm.card.mask_id, llm.tokenizer.decode, console)


def record(llm: LLM, output: Output) -> dict[str, object]:
    """An answer, its figures, and what made it."""
    figures: dict[str, object] = {name: getattr(output, name) for name in FIGURES}
    figures["timings"] = output.timings._asdict()
    made = {name: getattr(llm.config, name) for name in ("model", "device", "graphs")}
    return figures | made | {"policy": llm.policy.describe()}


def dumps(value: object) -> str:
    """One line of JSON in ASCII: no control character reaches a terminal."""
    return json.dumps(value, default=str)


def in_words(value: object) -> str:
    """A value that JSON can hold, as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    return "none" if value is None else str(value)


def finished(output: Output | None) -> Output:
    """The output of a stream's last chunk."""
    if output is None:
        raise EngineError("the stream ended without an answer; run again with --debug and report it")
    return output


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes long, if stderr is a terminal."""
    with stderr().status(what) if sys.stderr.isatty() else contextlib.nullcontext():
        yield


def ask() -> str | None:
    """The user's next line, stripped; None at the end of input. Only a terminal is prompted."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    with contextlib.suppress(EOFError):
        return input("› ").strip()
    print()
    return None
