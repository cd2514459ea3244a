"""How answers are shown: frames, streams, plain text and JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from dlx import live
from dlx.errors import EngineError
from dlx.live import MASK, View
from dlx.request import Chunk, Finish, Output, SamplingParams, Timings

MASK_ID = 3
TEXTS = st.text(st.characters(codec="utf-8"), max_size=200)


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def console(width: int = 40, height: int = 10, **options: object) -> Console:
    options = {"file": io.StringIO(), "force_terminal": True, "color_system": "standard"} | options
    return Console(record=True, width=width, height=height, **options)  # type: ignore[arg-type]


def screen(view: View, **size: int) -> list[str]:
    """The lines of one frame, without styles."""
    out = console(**size)
    out.print(live.render(view))
    return out.export_text().rstrip("\n").split("\n")


def decode(ids: list[int]) -> str:
    return "".join(chr(i) for i in ids)


def chunks(*texts: str, tokens: int = 2, window: list[int] | None = None) -> Iterator[Chunk]:
    """A stream that commits these texts, one a forward."""
    for nfe, text in enumerate(texts[:-1], 1):
        yield Chunk(0, text, [5] * tokens, None, window or [], None, nfe=nfe)
    whole, n = "".join(texts), tokens * len(texts)
    output = Output(0, [9], whole, [5] * n, Finish.STOP, n + 1, len(texts), 1, Timings(0.0, 0.1, 0.25))
    yield Chunk(0, texts[-1], [5] * tokens, Finish.STOP, [], output)


def test_a_frame_shows_committed_text_then_the_window_then_the_figures() -> None:
    lines = screen(View("so far ", ("and", None, None, "more"), 3, 12, 0.5))
    assert lines == [f"so far and{MASK}{MASK}more", "tokens 12 · forwards 3 · tokens/forward…"]


def test_committed_text_is_steady_and_the_window_dim() -> None:
    frame = live.render(View("steady", (None, "new"), 1, 1, 0.0))
    out = console()
    dim = {s.text: bool(s.style and s.style.dim) for line in out.render_lines(frame, pad=False) for s in line}
    assert (dim["steady"], dim[MASK], dim["new"]) == (False, True, True)


def test_sure_masks_are_darker_and_unsure_tokens_coloured() -> None:
    frame = live.render(View("", (None, None, None, "weak", "sure"), 1, 1, 0.0, (0.0, 0.5, 1.0, 0.3, 0.95)))
    out = console()
    shown = {s.text: str(s.style) for line in out.render_lines(frame, pad=False) for s in line}
    assert [t for t in shown if t in ("░▒▓", *"░▒▓")] in (["░▒▓"], [*"░▒▓"])
    assert ("yellow" in shown["weak"], "yellow" in shown["sure"]) == (True, False)


def test_how_sure_a_piece_is_follows_the_pieces() -> None:
    window, confidence = [*b"ab", MASK_ID, MASK_ID, *b"c"], [0.4, 0.8, 0.1, 0.2, 0.9]
    assert list(live.sureness(window, confidence, MASK_ID)) == pytest.approx([0.6, 0.1, 0.2, 0.9])
    assert list(live.sureness(window, [], MASK_ID)) == []


def test_no_color_keeps_the_window_dim_and_drops_the_colour() -> None:
    file = io.StringIO()
    console(no_color=True, file=file).print(live.render(View("", (None,), 1, 0, 0.0)))
    assert file.getvalue().startswith(f"\x1b[2m{MASK}\x1b[0m")


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    text = "[red]x[/red] [/] [link=a]b[/link] :smile:"
    assert screen(View(text, ("[bold]", "[/bold]"), 1, 1, 0.0), width=80)[0] == text + "[bold][/bold]"


def test_escape_sequences_lose_their_escape() -> None:
    text = live.clean("a\x1b[31mb\x9b2Jc\x1b]0;title\x07d\re\x00f\u202eg")
    assert text == "a[31mb2Jc]0;titledefg"


def test_newlines_and_tabs_stay() -> None:
    assert live.clean("a\n\tb") == "a\n\tb"


@given(TEXTS, TEXTS)
def test_no_control_character_of_a_text_reaches_the_screen(text: str, window: str) -> None:
    shown = "".join(screen(View(text, (window, None), 1, 1, 0.0)))
    assert not [c for c in shown if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0]


def test_a_long_text_keeps_its_last_lines_and_the_figures() -> None:
    text = "\n".join(f"line {i}" for i in range(100))
    lines = screen(View(text, (None,), 1, 1, 0.0), height=6)
    assert lines[:-1] == ["line 96", "line 97", "line 98", f"line 99{MASK}"]
    assert lines[-1].startswith("tokens 1")


@given(TEXTS, st.integers(2, 30), st.integers(3, 8))
def test_no_frame_is_larger_than_its_screen(text: str, width: int, height: int) -> None:
    lines = screen(View("漢字" + text, ("仮名", None), 1000, 1000, 9.0), width=width, height=height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width


@given(st.text("ab 漢\n", max_size=120), st.integers(2, 20), st.integers(1, 9))
def test_the_tail_is_the_end_of_the_whole_text_wrapped(text: str, width: int, room: int) -> None:
    out = console()
    whole = [line.plain for line in Text(text).wrap(out, width, overflow="fold")]
    assert [line.plain for line in live.tail(Text(text), out, width, room)] == whole[-room:]


def test_a_window_is_decoded_in_runs_between_masks() -> None:
    window = [*b"ab", MASK_ID, MASK_ID, *b"c"]
    assert list(live.pieces(window, MASK_ID, decode)) == ["ab", None, None, "c"]


def test_a_watched_stream_ends_with_the_whole_text_and_the_true_figures() -> None:
    out = console(width=80)
    output = live.show(chunks("one ", "two", window=[MASK_ID]), MASK_ID, decode, out)
    assert output.text == "one two"
    end = out.export_text().rstrip("\n").split("\n")[-2:]
    assert end == ["one two", "tokens 5 · forwards 2 · tokens/forward 2.5 · 250 ms"]


def test_a_text_longer_than_the_screen_is_left_whole() -> None:
    text = "\n".join(f"line {i}" for i in range(50))
    out = console(height=5)
    live.show(chunks(text), MASK_ID, decode, out)
    assert text in out.export_text()


def test_a_stream_that_breaks_leaves_what_was_committed() -> None:
    def broken() -> Iterator[Chunk]:
        yield Chunk(0, "half", [5], None, [], None)
        raise EngineError("the step failed")

    out = console()
    with pytest.raises(EngineError):
        live.show(broken(), MASK_ID, decode, out)
    assert out.export_text().endswith("half\n")


def test_plain_text_is_written_as_it_is_committed() -> None:
    out, seen = io.StringIO(), []

    def watched() -> Iterator[Chunk]:
        for chunk in chunks("a", "b", "c"):
            seen.append(out.getvalue())
            yield chunk

    live.plain(watched(), out)
    assert seen == ["", "a", "ab"]
    assert out.getvalue() == "abc\n"


def test_plain_text_keeps_its_bytes_in_a_file_and_loses_controls_in_a_terminal() -> None:
    file, terminal = io.StringIO(), Terminal()
    live.plain(chunks("\x1b[1m"), file)
    live.plain(chunks("\x1b[1m"), terminal)
    assert (file.getvalue(), terminal.getvalue()) == ("\x1b[1m\n", "[1m\n")


def test_a_stream_without_an_end_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="without an answer"):
        live.plain(iter([]), io.StringIO())


class FakeLLM:
    """Streams two chunks; remembers whether it was watched."""

    card = SimpleNamespace(mask_id=MASK_ID)
    tokenizer = SimpleNamespace(decode=decode)
    watched: bool | None = None

    def stream(self, prompt: str, params: SamplingParams, watch: bool = False) -> Iterator[Chunk]:
        self.watched = watch
        return chunks("one ", "two", window=[MASK_ID] if watch else None)


def told(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, term: str) -> FakeLLM:
    llm = FakeLLM()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", out)
    live.tell(llm, "hi", SamplingParams(), as_json=False)  # type: ignore[arg-type]
    return llm


def test_a_terminal_gets_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    llm = told(monkeypatch, out, "xterm")
    assert llm.watched
    assert MASK in out.getvalue()


@pytest.mark.parametrize(("out", "term"), [(io.StringIO(), "xterm"), (Terminal(), "dumb")])
def test_a_pipe_and_a_dumb_terminal_get_the_text_alone(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, term: str
) -> None:
    llm = told(monkeypatch, out, term)
    assert not llm.watched
    assert out.getvalue() == "one two\n"


def test_json_is_one_line_of_ascii() -> None:
    line = live.dumps({"text": "é\x1b\u009b\n漢"})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["text"] == "é\x1b\u009b\n漢"


def test_a_value_in_words_is_one_line() -> None:
    value = cast(object, {"a": None, "b": (1, 2), "c": {"d": "e"}})
    assert live.in_words(value) == "a none, b 1 2, c d e"
