"""What pages show: blocks of a language, commands, and lines of the command line that are parsed and not run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dlx.cli import app

ROOT = Path(__file__).parents[1]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of the sh blocks, one a line, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def of_dlx(line: str) -> list[str] | None:
    """The words of a line behind the word dlx, whatever stands before it; None if there is no such word."""
    words = shlex.split(line, comments=True)
    return words[words.index("dlx") + 1 :] if "dlx" in words else None


def parsed(words: list[str]) -> None:
    """Read a command line without running it. Raises CycloptsError for a flag or value that there is not."""
    app.parse_args(words, exit_on_error=False, print_error=False)


def scripts(page: Path) -> list[str]:
    """The lines that call a Python file of the project or a module of dlx, in blocks and in the text."""
    text = page.read_text()
    found = [line for line in commands(page) if line.startswith("python ")] + re.findall(r"`(python [^`]+)`", text)
    return [" ".join(line.split()) for line in found if re.match(r"python (tools/|-m dlx)", line)]


def known(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The flags of a script's line that its --help does not know."""
    words = shlex.split(line)[1:]
    path = ROOT / words[0]
    if words[0] == "-m":
        place = ROOT.joinpath(*words[1].split("."))
        path, words = place / "__main__.py" if place.is_dir() else place.with_suffix(".py"), words[1:]
    subs = [word for word in words[1:2] if path.name == "bench.py" and path.parent.name == "tools"]
    monkeypatch.setattr(sys, "argv", [str(path), *subs, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert left.value.code == 0
    said = capsys.readouterr().out
    return [word for word in words if word.startswith("--") and word not in said]
