"""What the README shows runs as written."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

from dlx.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "#### 52" in capsys.readouterr().out  # (12 + 7) * 3 - 5
    assert names["llm"].policy.select.k == 4  # type: ignore[attr-defined]


def test_the_commands_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("dlx ")]
    assert len(lines) >= 4
    monkeypatch.setattr("sys.stdin", io.StringIO())  # chat reads its end and leaves
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    out = capsys.readouterr().out
    assert "#### 44" in out  # 24 + 35 - 15
    assert "7, 12, 31, 90" in out
