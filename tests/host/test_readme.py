"""What the README shows runs as written."""

from __future__ import annotations

import io

import pytest

from dlx.cli import main
from tests.pages import ROOT, blocks, commands, of_dlx, parsed

PAGE = ROOT / "README.md"
ELSEWHERE = ("serve", "eval")  # run in tests/serve and tests/harness; here they are parsed alone


def test_the_python_examples_run_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks(PAGE, "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "#### 52" in capsys.readouterr().out  # (12 + 7) * 3 - 5
    assert names["llm"].policy.select.k == 4  # type: ignore[attr-defined]


def test_the_commands_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [words for line in commands(PAGE) if (words := of_dlx(line)) is not None]
    assert len(lines) >= 4
    for words in lines:
        parsed(words)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # chat reads its end and leaves
    for words in lines:
        if words[0] not in ELSEWHERE:
            assert main(words) == 0, words
    out = capsys.readouterr().out
    assert "#### 44" in out  # 24 + 35 - 15
    assert "7, 12, 31, 90" in out
