"""Processes: narrow terminals, no colour, readers that go away, completion in a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlx.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
SHELLS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


def dlx(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `dlx` in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "dlx.cli", *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["generate", "--help"], {"NO_COLOR": "1"}),
        (["--help"], {"TERM": "dumb"}),
        (["serve", "--help"], {"COLUMNS": "12"}),
        (["models"], {"COLUMNS": "1"}),
        (["config", "show"], {"COLUMNS": "20", "NO_COLOR": "1"}),
        (["genrate"], {"COLUMNS": "10"}),
    ],
)
def test_what_is_not_a_terminal_gets_no_control_codes_and_no_traceback(args: list[str], env: dict[str, str]) -> None:
    done = dlx(*args, **env)
    assert done.returncode == (2 if args == ["genrate"] else 0)
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ["--help", "config schema", "models"])
def test_a_reader_that_stops_early_ends_a_command_quietly(line: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dlx.cli", *line.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_names_every_command_and_is_one_of_its_shell(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in script] == []
    assert "max-num-seqs" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([*SHELLS[shell], tmp_path / "script"], capture_output=True, check=True).stderr == b""


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dlx", "gen"], "generate"),
        (["dlx", "bench", "lat"], "latency"),
        (["dlx", "generate", "--max-num"], "--max-num-seqs"),
        (["dlx", "generate", "--graphs", "c"], "capture"),
    ],
)
def test_bash_completes_commands_flags_and_values(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    script += f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{' '.join(words)}'\n"
    script += 'COMP_POINT=${#COMP_LINE}; _dlx; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert expected in done.stdout.split()


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert '"bash", "zsh", "fish"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("genrate", "generate"), ("serv", "serve"), ("bench latncy", "latency"), ("config shw", "show")],
)
def test_a_mistyped_command_is_told_with_the_one_that_may_be_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    err = capsys.readouterr().err
    assert f'Did you mean "{meant}"?' in err
    assert err.count("\n") == 1


def test_a_mistyped_flag_is_told_with_the_one_that_may_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--max-tokns", "3"]) == 2
    assert "Did you mean --max-tokens?" in capsys.readouterr().err
