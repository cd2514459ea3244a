"""No code comes out of data, and no check of what a user says is an assertion."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "__import__", "torch.load", "numpy.load", "np.load", "os.system", "os.popen"}
YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"}
STRICT = "dlx/documents.py"
# what is known, and why it may: its loader is a SafeLoader; it runs whitelisted syntax alone, without builtins; it runs
# what a pack says that its graphs are, and a pack is to be loaded only by who would run it
KNOWN = {STRICT: ["yaml.load"], "dlx/tasks/code.py": ["exec"], "dlx/exports.py": ["exec"]}


def dangers(text: str) -> Iterator[str]:
    """What a source does that could run data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {k.arg for k in node.keywords if ast.unparse(k.value) != "False"}
            yield from [name] if name in CALLS | YAML else []
            yield from ["shell"] if name.startswith("subprocess.") and "shell" in flags else []
            yield from ["trust_remote_code"] if "trust_remote_code" in flags else []


def test_the_package_runs_no_data() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / "dlx").rglob("*.py"))
        if (names := list(dangers(path.read_text())))
    }
    assert found == KNOWN


def test_the_one_loader_of_yaml_is_a_safe_one() -> None:
    import yaml

    from dlx.documents import Loader

    assert issubclass(Loader, yaml.SafeLoader)
    assert "yaml.load(text, Loader=Loader)" in (ROOT / STRICT).read_text()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    torch.load(path)", "torch.load"),
        ("yaml.load(text)", "yaml.load"),
        ("eval(text)", "eval"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("AutoModel.from_pretrained(x, trust_remote_code=flag)", "trust_remote_code"),
    ],
)
def test_a_planted_danger_is_found(text: str, named: str) -> None:
    assert list(dangers(text)) == [named]


def test_the_environment_is_read_in_one_module() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "dlx").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert set(found) == {"dlx/environment.py"}


@pytest.mark.slow
def test_what_users_say_is_checked_without_assertions(tmp_path: Path) -> None:
    tests = ["host/test_config.py", "host/test_request.py", "cli/test_settings.py"]
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/O"]
    # pytest keeps the tests' own assertions under -O, and warns of all others
    command += ["-W", "ignore::pytest.PytestConfigWarning", *(str(ROOT / "tests" / name) for name in tests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
