"""Programs that a model wrote, run in a process of their own with little time and memory.

The limits keep a bad program from taking the machine along. They are no wall against a hostile one: it runs as the
same user, and may read files and use the network. Run what you would run yourself, or run all of it in a container.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from dlx.errors import ConfigError

SECONDS = 10.0
MEGABYTES = 1024
FILE_MEGABYTES = 16

# told by its first line what to say if the program ends well: a program that calls exit(0) has not passed
CHILD = """
import os, resource, sys
word, seconds, memory, size = sys.stdin.readline().split()
code = sys.stdin.read()
limits = {"CPU": int(seconds), "AS": int(memory), "FSIZE": int(size), "CORE": 0, "NOFILE": 64, "NPROC": 0}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
tell = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
try:
    exec(compile(code, "answer", "exec"), {"__name__": "__main__"})
    os.write(tell, word.encode())
finally:
    os._exit(0)
"""


def passes(program: str, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether a Python program, and all that it starts, ends without an exception in so much time and memory.

    It runs isolated, without site packages, with an empty environment, in an empty folder that is removed afterwards;
    but for root, no process or thread may be started.
    Raises ConfigError  where the system has no POSIX limits
    """
    if os.name != "posix":
        raise ConfigError(f"programs cannot be limited on {os.name!r}; evaluate them on Linux or in a container")
    word = secrets.token_hex(16)
    head = f"{word} {int(-(-seconds // 1))} {megabytes << 20} {FILE_MEGABYTES << 20}\n"
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            said, _ = child.communicate((head + program).encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            child.communicate()
    return said == word.encode()
