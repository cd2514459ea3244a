"""Ctrl-C ends a command with 130, whatever it is doing, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 100
LOADING = "import sys, threading, dlx.llm; from dlx.cli import main\ndef load(config): print('loading', flush=True); \
threading.Event().wait()\ndlx.llm.Engine = load\nsys.exit(main(sys.argv[1:]))"

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


class Started:
    """A process, and those that it starts, known by a variable that they inherit."""

    def __init__(self, *args: str, **env: str) -> None:
        self.mark = uuid.uuid4().hex
        env = {**os.environ, **env, "TEST_MARK": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, *args], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def family(self) -> set[int]:
        """Processes that bear the mark."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes():
                    found.add(int(path.parent.name))
            except OSError:  # it ended, or is another user's
                continue
        return found

    def interrupted(self) -> tuple[int, str]:
        """Exit code and last line of stderr after ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, err.splitlines()[-1]


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    all_: list[Started] = []

    def run(*args: str, **env: str) -> Started:
        all_.append(Started(*args, **env))
        return all_[-1]

    yield run
    for one in all_:
        for pid in one.family():
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


def until(fact: Callable[[], bool]) -> bool:
    """Whether a fact comes true in time."""
    end = time.monotonic() + PATIENCE_S
    while not fact() and time.monotonic() < end:
        time.sleep(0.05)
    return fact()


def test_an_interrupt_while_a_model_is_loaded(start: Callable[..., Started], nano: Path) -> None:
    one = start("-c", LOADING, "generate", "hi", "--model", str(nano), "--device", "cpu")
    assert one.process.stdout is not None and one.process.stdout.readline() == "loading\n"
    assert one.interrupted() == (130, "interrupted")
    assert until(lambda: not one.family())


@pytest.mark.long
def test_an_interrupt_while_graphs_are_compiled(start: Callable[..., Started], nano: Path, tmp_path: Path) -> None:
    flags = ["--model", str(nano), "--device", "cpu", "--graphs", "compile"]
    one = start("-m", "dlx.cli", "generate", "hi", *flags, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert until(lambda: len(one.family()) > 1)  # the C++ compiler, or a worker of Inductor
    assert one.interrupted() == (130, "interrupted")
    assert until(lambda: not one.family())


def test_an_interrupt_while_an_answer_is_written(start: Callable[..., Started], nano: Path) -> None:
    flags = ["--model", str(nano), "--device", "cpu", "--ignore-eos", "--max-tokens", "2000"]
    one = start("-m", "dlx.cli", "generate", "12 + 30 = ?", *flags)
    assert one.process.stdout is not None and one.process.stdout.read(1)
    assert one.interrupted() == (130, "interrupted")
    assert until(lambda: not one.family())
