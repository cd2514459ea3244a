"""The device does not know the host: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# room → what its files may import of dlx; host modules may import everything
ROOMS = {
    "ops": {"ops", "environment", "errors", "provenance"},  # leaves, like errors: DLX_DEBUG; records name their machine
    "models": {"models", "ops", "errors"},
    "graphs": {"graphs", "ops", "errors"},
}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports; names taken out of `dlx` itself count as its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            module = node.module or ""
            yield from (f"dlx.{alias.name}" for alias in node.names) if module == "dlx" else [module]


def breaches(root: Path) -> list[str]:
    """What breaks the rooms' rule below a folder that holds `dlx`."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for room, known in ROOMS.items()
        for path in sorted((root / "dlx" / room).rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] == "dlx" and name.split(".")[1:2] not in [[room] for room in known]
    ]


def test_the_device_does_not_know_the_host() -> None:
    assert not breaches(ROOT)


def test_every_folder_of_code_is_a_known_room() -> None:
    # host: what is measured, evaluation through lm-eval, the shop front, the bundled model's tasks, checkpoints
    folders = {path.parent.name for path in (ROOT / "dlx").glob("*/*.py")}
    assert folders - {"bench", "cli", "harness", "serve", "tasks", "weights"} == set(ROOMS)


def test_the_package_imports_no_tool_and_no_test() -> None:
    outside = ("tools", "tests")
    bad = [(path, name) for path in (ROOT / "dlx").rglob("*.py") for name in imports(path)]
    assert not [f"{path} imports {name}" for path, name in bad if name.split(".")[0] in outside]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/a.py", "from dlx.models import card"),
        ("models/deep/a.py", "import dlx.graphs.step"),
        ("graphs/a.py", "from dlx import config"),
        ("graphs/a.py", "def f():\n    import dlx"),
    ],
)
def test_a_planted_breach_is_named(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "dlx" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    (named,) = breaches(tmp_path)
    assert named.startswith(f"dlx/{file} imports dlx")
