"""A file of prompts: every line answered or told of, in order, whatever the other lines are."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlx.cli import loading, main
from dlx.cli.batch import read
from dlx.errors import DlxError
from dlx.request import SamplingParams

if TYPE_CHECKING:
    from dlx import LLM

Capture = pytest.CaptureFixture[str]
CHAT: Any = [{"role": "user", "content": "12 + 30 = ?"}]


@pytest.fixture
def model(nano: Path) -> list[str]:
    """Flags of the nano model, four rows at once."""
    return ["--model", str(nano), "--device", "cpu", "--max-num-seqs", "4", "--max-tokens", "8"]


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_answered_as_it_is_alone_and_in_order(
    tmp_path: Path, model: list[str], nano_llm: LLM, capsys: Capture
) -> None:
    asked = [f"{n} + {n} = ?" for n in range(20)]
    path, out = written(tmp_path, *({"prompt": text, "id": i} for i, text in enumerate(asked))), tmp_path / "out.jsonl"
    assert main(["generate", "--jsonl", str(path), "--out", str(out), *model]) == 0
    alone = [nano_llm.generate([{"role": "user", "content": x}], SamplingParams(max_tokens=8))[0] for x in asked]
    found = records(out)
    assert [r["line"] for r in found] == [*range(1, 21)]
    assert [r["id"] for r in found] == [*range(20)]
    assert [r["text"] for r in found] == [output.text for output in alone]
    assert capsys.readouterr() == ("", "")


def test_bad_lines_are_told_by_number_and_the_others_answered(
    tmp_path: Path, model: list[str], nano_llm: LLM, capsys: Capture
) -> None:
    lines: list[Any] = [
        {"messages": CHAT},
        b"{not json",
        {"prompt": ""},
        {"prompt": "hi", "params": {"max_tokens": 0}},
        {"prompt": "hi", "params": {"max_token": 3}},
        {"prompt": "hi", "promt": 1},
        {"prompt": "hi", "messages": CHAT},
        ["hi"],
        {"prompt": [1, "a"]},
        {"prompt": [10**9]},
        {"prompt": "x" * 99999},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": "hi"},
        b'{"prompt": "a\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b"",
        {"prompt": [5, 6], "id": "ids"},
    ]
    path, out = written(tmp_path, *lines), tmp_path / "out.jsonl"
    assert main(["generate", "--jsonl", str(path), "--out", str(out), *model]) == 1
    found = records(out)
    assert [r["line"] for r in found if "text" in r] == [1, 19]
    assert [r["line"] for r in found if "error" in r] == [*range(2, 18)]
    assert found[0]["text"] == nano_llm.generate(CHAT, SamplingParams(max_tokens=8))[0].text
    err = capsys.readouterr().err
    assert [n for n in range(2, 18) if f"in.jsonl, line {n}: " not in err] == []
    assert "Traceback" not in err
    for part in ("max_tokens=0", "did you mean max_tokens?", "did you mean prompt?", "a list is no request", "UTF-8"):
        assert part in err


def test_a_request_may_have_parameters_of_its_own(tmp_path: Path, model: list[str], capsys: Capture) -> None:
    path = written(tmp_path, {"prompt": "hi", "params": {"max_tokens": 3, "ignore_eos": True}}, {"prompt": "hi"})
    assert main(["generate", "--jsonl", str(path), *model, "--ignore-eos"]) == 0
    assert [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()] == [3, 8]


def test_lines_come_from_stdin_and_answers_go_to_stdout(
    model: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "hi"}\n'), encoding="utf-8"))
    assert main(["generate", "--jsonl", "-", *model]) == 0
    assert json.loads(capsys.readouterr().out)["line"] == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--jsonl", "gone.jsonl"], "gone.jsonl cannot be read"),
        (["hi", "--jsonl", "in.jsonl"], "give a prompt, or --jsonl"),
        (["hi", "--out", "x"], "--out is where answers to --jsonl go"),
        (["--jsonl", "in.jsonl", "--out", "in.jsonl"], "is the file of --jsonl"),
        (["--jsonl", "in.jsonl", "--out", "."], "cannot be written"),
    ],
)
def test_what_cannot_be_read_or_written_is_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, args: list[str], named: str
) -> None:
    monkeypatch.setattr(loading, "load", lambda found: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {"prompt": "hi"})
    assert main(["generate", *args]) == 2
    assert named in capsys.readouterr().err
    assert records(tmp_path / "in.jsonl") == [{"prompt": "hi"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "messages", "params", "role", "content", "stop", "fixed"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON.map(json.dumps) | st.text())
def test_any_line_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(DlxError, ValueError):
        assert read(1, text, SamplingParams(), raw=False).number == 1
