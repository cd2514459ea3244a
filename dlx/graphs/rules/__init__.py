"""Rules: frozen values with one pure tensor function, a file an axis. What is static is a field; a number, a column."""

from __future__ import annotations

from dlx.graphs.rules.canvas import Canvas
from dlx.graphs.rules.embed import Hard, Merge, Smooth
from dlx.graphs.rules.rewrite import Edit, Keep, Remask, Renoise
from dlx.graphs.rules.schedule import Annealed, Even, Factor, Within
from dlx.graphs.rules.score import Credit, Plain
from dlx.graphs.rules.seen import (
    Asking,
    Asks,
    Candidates,
    Embed,
    Keeping,
    Memory,
    Rewrite,
    Score,
    Seen,
    Select,
    Settle,
    rank,
)
from dlx.graphs.rules.select import EntropyBound, EntropyFirst, Fixed, Hierarchical, Leading, Quota, Threshold
from dlx.graphs.rules.settle import Calm, Filled, Stable
from dlx.graphs.rules.turn import Refresh, SubBlock, Turn, Whole

__all__ = [
    "Annealed",
    "Asking",
    "Asks",
    "Calm",
    "Candidates",
    "Canvas",
    "Credit",
    "Edit",
    "Embed",
    "EntropyBound",
    "EntropyFirst",
    "Even",
    "Factor",
    "Filled",
    "Fixed",
    "Hard",
    "Hierarchical",
    "Keep",
    "Keeping",
    "Leading",
    "Memory",
    "Merge",
    "Plain",
    "Quota",
    "Refresh",
    "Remask",
    "Renoise",
    "Rewrite",
    "Score",
    "Seen",
    "Select",
    "Settle",
    "Smooth",
    "Stable",
    "SubBlock",
    "Threshold",
    "Turn",
    "Whole",
    "Within",
    "rank",
]
