"""The pages about the command line say what is so: their tables are whole and fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dlx.cli import COMMANDS
from tools import configuration

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "cli.md").read_text()


def test_the_table_of_settings_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert configuration.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    page.write_text(configuration.PAGE.read_text().replace("`--max-num-seqs`", "`--rows`"))
    monkeypatch.setattr(configuration, "PAGE", page)
    assert configuration.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert configuration.main([]) == configuration.main(["--check"]) == 0


def test_the_page_names_every_command() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(COMMANDS)
