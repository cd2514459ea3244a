"""Shown: what whoever watches sees of a window beside its tokens. Kept like a rule's memory; it decides nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dlx.graphs.rules.seen import Candidates, Memory, Seen

CONF, GUESS = "shown_conf", "shown_guess"  # [B, N, L] f32, int32


def columns(width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → the shape behind [B, N], dtype."""
    return {CONF: ((width,), torch.float32), GUESS: ((width,), torch.int32)}


def proposals(c: Candidates, w: Seen, tok: Tensor, mem: Memory) -> Memory:
    """The proposal of each position and its confidence, of the last forward that decided on it.

    c    candidates as they were scored: what `select` went by
    tok  [B, N, L] as rewritten; a decided position is decided on again where its token changes
    mem  both columns as they were
    """
    now = w.todo | w.live & (tok != w.tok)
    return {CONF: torch.where(now, c.conf, mem[CONF]), GUESS: torch.where(now, c.tok, mem[GUESS])}
