"""Rules: frozen values with one pure tensor function, a file an axis. What is static is a field; a number, a column."""

from __future__ import annotations

from dlx.graphs.rules.canvas import Canvas
from dlx.graphs.rules.embed import Hard
from dlx.graphs.rules.rewrite import Keep, Renoise
from dlx.graphs.rules.schedule import Annealed, Even, Factor, Within
from dlx.graphs.rules.seen import Candidates, Embed, Rewrite, Seen, Select, Settle, rank
from dlx.graphs.rules.select import EntropyBound, Fixed, Threshold
from dlx.graphs.rules.settle import Filled, Stable
from dlx.graphs.rules.turn import Refresh, SubBlock, Turn, Whole

__all__ = [
    "Annealed",
    "Even",
    "Factor",
    "Refresh",
    "SubBlock",
    "Turn",
    "Whole",
    "Within",
    "Candidates",
    "Canvas",
    "Embed",
    "EntropyBound",
    "Filled",
    "Fixed",
    "Hard",
    "Keep",
    "Renoise",
    "Rewrite",
    "Seen",
    "Select",
    "Settle",
    "Stable",
    "Threshold",
    "rank",
]
