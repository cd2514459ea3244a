"""Programs of a model pass only if they run to their end, and take nothing along if they do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dlx.harness.program import passes


def test_a_program_that_ends_passes() -> None:
    assert passes("assert sum(range(4)) == 6 and len('é') == 1")


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nprint('passed')\nsys.exit()",
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(program: str) -> None:
    assert not passes(program)


def test_a_program_without_end_is_stopped() -> None:
    assert not passes("while True: pass", seconds=1.0)


def test_a_program_that_sleeps_is_stopped() -> None:
    assert not passes("import time\ntime.sleep(60)", seconds=1.0)


def test_a_program_that_wants_much_memory_fails() -> None:
    assert not passes("x = bytearray(1 << 30)", megabytes=256)


def test_a_program_that_leaves_another_running_fails_and_both_end(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    lines = ["import os, time", "pid = os.fork()", f"if pid: open({str(note)!r}, 'w').write(str(pid))"]
    assert not passes("\n".join([*lines, "else: time.sleep(60)"]), seconds=2.0)
    if note.exists():  # only root may start one
        assert gone(int(note.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended, read or not, within five seconds."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_program_sees_no_environment_and_an_empty_folder_that_goes(tmp_path: Path) -> None:
    note = tmp_path / "seen"
    code = f"import os\nopen('x', 'w')\nopen({str(note)!r}, 'w').write(os.getcwd() + ' ' + ' '.join(os.environ))"
    assert passes(code)
    folder, *variables = note.read_text().split()
    assert not Path(folder).exists()
    assert "PATH" not in variables and "HOME" not in variables


def test_what_a_program_prints_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    assert passes("import sys\nprint('x' * 1_000_000)\nprint('y', file=sys.stderr)")
    assert capfd.readouterr() == ("", "")
