"""The ladder of ways to run a graph. Imports nothing, so that the command line can name them at once."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["off", "compile", "capture"]
MODES: tuple[Mode, ...] = get_args(Mode)
