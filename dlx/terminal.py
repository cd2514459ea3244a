"""The console that spinners and bars are drawn on. Two of them would draw over each other's lines."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def stderr() -> Console:
    """The one console on stderr; it writes to what `sys.stderr` is at the time."""
    return Console(stderr=True)
