"""The command line: which commands there are, and how one line of it is run.

Stdout carries results only; progress, notices and errors go to stderr. Heavy imports are inside commands.
"""

from __future__ import annotations

import io
import os
import sys

from cyclopts import App, Parameter

import dlx
from dlx.cli.notices import INTERRUPTED, UNREAD, complain, notice, set_logging

# command → where it is, imported when it is called or completed, and its line of help
COMMANDS = {
    "generate": ("answers:generate", "Answer one prompt, or all of a JSONL file."),
    "chat": ("answers:chat", "Talk, turn by turn: /reset forgets, /exit leaves."),
    "serve": ("serving:serve", "Serve a model over HTTP, as OpenAI's API."),
    "eval": ("evaluation:evaluate", "Measure accuracy, tokens per forward and speed on tasks."),
    "bench": ("bench:bench", "Measure speed: latency, throughput, startup, roofline, serve."),
    "profile": ("graphs:profile", "Record steps of one answer: a trace, and where their time goes."),
    "tune": ("bench:tune", "Search launch configurations of the kernels on this GPU, and record them."),
    "pack": ("graphs:pack", "Compile a model's graphs once, and keep them for a fast start; prints the folder."),
    "convert": ("checkpoints:convert", "Rewrite a checkpoint: fused, with an adapter merged, or in fp8."),
    "models": ("checkpoints:models", "List the families that dlx loads, with their checkpoints and policies."),
    "config": ("machine:config", "Show, check or describe the settings."),
    "doctor": ("machine:doctor", "Print versions, devices, compilers, and what would be captured."),
    "completion": ("machine:completion", "Print a script that completes commands and flags in a shell."),
    "version": ("machine:version", "Print versions."),
}


def versions() -> str:
    """What --version prints."""
    from dlx.doctor import installed

    return f"dlx {dlx.__version__}\ntorch {installed('torch')}"


app = App(
    name="dlx",
    help="A compiled inference runtime for diffusion language models.",
    version=versions,
    default_parameter=Parameter(negative=()),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
for name, (place, line) in COMMANDS.items():
    app.command(f"dlx.cli.{place}", name=name, help=line)


def words(argv: list[str]) -> list[str]:
    """The arguments with a lone - put where cyclopts does not take it for an option: behind a --, or a =."""
    if "--jsonl" in argv[:-1] and argv[at := argv.index("--jsonl") + 1] == "-":
        return [*argv[: at - 1], "--jsonl=-", *argv[at + 1 :]]
    given = [word for word in argv if word != "-"]
    return [*given, "--", "-"] if len(given) == len(argv) - 1 and "--" not in argv else argv


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    set_logging(debug=False)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        given = words(sys.argv[1:] if argv is None else argv)
        code = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        notice("interrupted")
        return INTERRUPTED
    except SystemExit as error:  # what rich, which prints help, makes of a broken pipe
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return UNREAD
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return UNREAD
    except Exception as error:
        return complain(error)
    return code or 0
