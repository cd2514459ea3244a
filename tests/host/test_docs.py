"""What the pages show runs as written, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def python(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_rule_of_the_page_is_at_most_20_lines_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python(ROOT / "docs" / "strategies.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    exec(compile(block, "strategies.md", "exec", dont_inherit=True), {"__name__": "page"})
    assert "#### 52" in capsys.readouterr().out


def test_the_tests_that_the_differences_name_are_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "differences.md").read_text()))
    assert named and named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
