"""What the pages show runs as written, and what they name is there.

Python blocks run, each as a file. Commands of dlx are parsed, all of them; those that a CPU can run run too, with the
nano model and a prompt or two where the page has more. Servers, benches and tunings are parsed alone, as is what needs
a GPU. What pages ask of a server is asked in tests/serve; the page of the command line has tests/cli/test_pages.py.
"""

from __future__ import annotations

import gzip
import json
import re
import runpy
from pathlib import Path

import pytest

from dlx.cli import main
from tests.harness.test_tasks import CODE, SUMS
from tests.pages import ROOT, blocks, commands, known, of_dlx, parsed, scripts

PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [*PAGES, ROOT / "README.md", ROOT / "profiles" / "README.md"]
SERVED = ("serving.md", "page.md")
BLOCKS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python"))) if page.name not in SERVED]
COMMANDS = [(page, line) for page in PAGES for line in commands(page)]
# what is parsed and not run: they do not end, or need a GPU or minutes
PARSED = re.compile(r"^(dlx (serve|bench|tune|pack|chat)\b|nsys |ncu )|--graphs capture|--tool cuda")
OTHERS = re.compile(r"^(curl |echo |nsys stats|TRITON_INTERPRET=1 python -m pytest |pip |make )")
PLACES = ("path/to/SDAR-8B-Chat", "path/to/checkpoint")


def ends(line: str) -> bool:
    """Whether a command is one of dlx that a CPU runs to its end."""
    return line.startswith("dlx ") and not PARSED.search(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, CODE)).encode()))
    (folder / "prompts.jsonl").write_text(blocks(ROOT / "docs" / "cli.md", "json")[0])
    (folder / "run.yaml").write_text(blocks(ROOT / "docs" / "keys.md", "yaml")[0])
    return folder


def smaller(words: list[str], nano: Path) -> list[str]:
    """The command with the nano model, and a prompt or two instead of many."""
    words = [str(nano) if word in PLACES else word for word in words]
    if words[0] == "eval":
        words = [*words, *([] if str(nano) in words else ["--model", str(nano)]), "--device", "cpu"]
        at = words.index("--limit") if "--limit" in words else len(words)
        words[at : at + 2] = ["--limit", "1"]
        words += [] if "--max-tokens" in words else ["--max-tokens", "24"]
    return words


@pytest.mark.parametrize(("page", "i"), BLOCKS, ids=lambda value: getattr(value, "name", value))
def test_a_block_of_python_runs(page: Path, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(blocks(page, "python")[i])  # a file, as Triton reads the source of kernels
    runpy.run_path(str(tmp_path / "block.py"), run_name="page")


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: getattr(value, "name", value))
def test_a_command_is_one_that_there_is(page: Path, line: str) -> None:
    words = of_dlx(line)
    if words is not None:
        parsed(words)
    else:
        assert OTHERS.match(line), line


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, line in COMMANDS if page.name != "cli.md" and ends(line)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_command_runs(page: Path, line: str, folder: Path, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = of_dlx(line)
    assert words is not None
    assert main(smaller(words, nano)) == 0


@pytest.mark.parametrize("line", sorted({line for page in ALL for line in scripts(page)}))
def test_a_script_of_a_page_has_the_flags_that_the_page_gives_it(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not known(line, monkeypatch, capsys)


def test_the_rule_of_the_page_is_at_most_20_lines_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(ROOT / "docs" / "strategies.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    exec(compile(block, "strategies.md", "exec", dont_inherit=True), {"__name__": "page"})
    assert "#### 52" in capsys.readouterr().out


def test_the_tests_that_the_differences_name_are_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "differences.md").read_text()))
    assert named and named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:dlx|tools|tests|docs|profiles)/[\w./-]*[\w/])`", page.read_text())
    gone = [name for name in named if not (ROOT / name).exists() and not re.search(r"[A-Z]{3}", name)]
    assert not gone
