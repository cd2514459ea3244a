"""Prefill: K/V of a chunk of a prompt's complete blocks into pages. No head: nothing is decided here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs.step import Network
from dlx.ops import OPS
from dlx.ops.attention import View


class Prompt(NamedTuple):
    """The static inputs of one prefill graph: a chunk of T positions of one row."""

    tok: Tensor  # [1, T] int32
    start: Tensor  # [1]    int32  absolute position of tok[0, 0]; a multiple of L
    n: Tensor  # [1]    int32  valid positions, a multiple of L; the rest is padding
    pages: Tensor  # [1, W] int32


def blank(T: int, W: int, device: torch.device) -> Prompt:
    """A prompt of nothing."""
    shapes = ((1, T), (1,), (1,), (1, W))
    return Prompt(*(torch.zeros(*s, dtype=torch.int32, device=device) for s in shapes))


def pack(tok: list[int], start: int, pages: list[int], T: int, W: int) -> Tensor:
    """A chunk as int32 [2 + W + T]."""
    return torch.tensor(
        [start, len(tok), *pages, *[0] * (W - len(pages)), *tok, *[0] * (T - len(tok))], dtype=torch.int32
    )


def fill_(prompt: Prompt, packed: Tensor) -> None:
    """Write a packed chunk, already on the device, into the graph's inputs; no host sync."""
    head, pages, tok = packed.split((2, prompt.pages.shape[1], prompt.tok.shape[1]))
    prompt.start.copy_(head[:1])
    prompt.n.copy_(head[1:])
    prompt.pages.copy_(pages[None])
    prompt.tok.copy_(tok[None])


def prefill_(L: int, net: Network, prompt: Prompt, kv: tuple[Tensor, ...]) -> None:
    """Write the chunk's K/V: a position sees all before it and its own block of L.

    kv  one tensor a layer [2, P, S, G, D]; written
    """
    pos, seen = OPS["positions"](prompt.start, prompt.n // L, L, prompt.tok.shape[1] // L)
    net.forward(net.embed(prompt.tok), View(pos, prompt.pages, seen), kv)
