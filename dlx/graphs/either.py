"""Two forwards of the same rows, one of which a turn runs: with the places in which blocks commit, or without.

A window has a place more than may decode. Blocks of 32 tokens at four a forward fill it every eighth time, and 32
positions more cost what they cost: matmuls that read them, attention that sees for them. Where no row has a block that
only commits, the forward of N places does the same. On CUDA a node of the step's graph chooses (`nodes.py`), elsewhere
the host where it need not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

LONG = 16  # tokens of a block from which on most forwards have none that only commits


class Either(NamedTuple):
    """Both forwards, as functions or as what is made of them; `narrow` counts where `commits` says no."""

    wide: Any
    narrow: Any
    whole: Tensor  # [B, N+1] bool  of the rows
    done: Tensor  # [B]      bool


def each(f: Callable[[Any], Any], turn: Any) -> Any:
    """f of a function, or of both."""
    return turn._replace(wide=f(turn.wide), narrow=f(turn.narrow)) if isinstance(turn, Either) else f(turn)


def commits(whole: Tensor, done: Tensor) -> bool:
    """Whether a row has a block that only commits; reads the device."""
    return bool((whole[:, 0] & ~done).any())
