"""What goes to stderr: notices, logs, errors in a line; and the exit code of an error.

0 done   1 a step failed   2 usage, configuration, policy or request   3 model   4 memory or device
130 interrupted   141 the reader of stdout went away
"""

from __future__ import annotations

import logging
import shlex
import sys

from cyclopts import CycloptsError

from dlx.errors import CapacityError, ConfigError, DlxError, ModelError, PolicyError, RequestError

log = logging.getLogger("dlx")

EXITS = {CycloptsError: 2, ConfigError: 2, PolicyError: 2, RequestError: 2, ModelError: 3, CapacityError: 4}
INTERRUPTED, UNREAD = 130, 141
MESSAGE_CHARS = 1000  # of one error; --debug shows all


def set_logging(debug: bool) -> None:
    """Log to stderr: warnings, and with `debug` everything."""
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    log.handlers = [logging.StreamHandler()] if debug else []


def command() -> str:
    """This command line, for records: without a key, which is nobody's business."""
    before = ["", *sys.argv[1:]]
    given = ["KEY" if flag == "--api-key" else word for flag, word in zip(before, sys.argv[1:])]
    return shlex.join(["dlx", *("--api-key=KEY" if word.startswith("--api-key=") else word for word in given)])


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def complain(error: Exception, where: str = "") -> int:
    """Tell an error on stderr, its traceback first with --debug; its exit code."""
    from dlx.live import clean

    if log.isEnabledFor(logging.DEBUG):
        log.debug("traceback", exc_info=error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        error = CapacityError(f"out of memory: {error}; use a smaller --model, or --device cpu")
    known = isinstance(error, DlxError | CycloptsError)
    text = clean(str(error) if known else f"{type(error).__name__}: {error}; --debug shows where")
    text += " See --help." if isinstance(error, CycloptsError) else ""
    notice(f"error: {where}" + (text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + " …"))
    return next((code for kind, code in EXITS.items() if isinstance(error, kind)), 1)
