"""Two forwards of the same rows, one of which a turn runs: with the place in which blocks commit, or without.

A window has a place more than may decode. Blocks of 32 tokens at four a forward fill it every eighth time, and its
32 positions would cost matmuls and attention in every forward. Where no row has a block that only commits, the forward
of N places does the same. On CUDA a node of the step's graph chooses (`nodes.py`); elsewhere the host, where it need
not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

LONG = 16  # tokens of a block from which on a second graph is worth it: shorter ones commit in every other forward


class Either(NamedTuple):
    """Both forwards: functions, the same compiled, or captured."""

    committing: Any  # of N + 1 places, whatever the rows hold
    plain: Any  # of N; where `commits` is False
    whole: Tensor  # [B, N+1] bool  of the rows
    done: Tensor  # [B]      bool


def both(f: Callable[[Any], Any], turn: Any) -> Any:
    """`f` applied to a turn, or to both forwards of an Either."""
    if not isinstance(turn, Either):
        return f(turn)
    return turn._replace(committing=f(turn.committing), plain=f(turn.plain))


def commits(whole: Tensor, done: Tensor) -> bool:
    """Whether a row has a block that only commits: its first one is decided. Reads the device."""
    return bool((whole[:, 0] & ~done).any())
