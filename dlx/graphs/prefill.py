"""Prefill: K/V of prompts into pages: of their complete blocks, or where a prompt sees itself whole, of all of it.
No head: nothing is decided here.

A forward takes stretches of C positions, of one prompt or of several: to the network a stretch is a row with its
prompt's page table. All of a layer's K/V is stored before anything attends to it, so stretches of a prompt may go
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlx.graphs.step import Network
from dlx.ops import OPS
from dlx.ops.attention import View


class Stretch(NamedTuple):
    """Part of a prompt: ids at absolute position `start`, of a row with these pages; complete blocks if `end` is 0."""

    tok: list[int]
    start: int
    pages: list[int]
    end: int = 0  # where a prompt ends that sees itself whole; 0 is block-causal
    lora: int = 0  # adapter slot; 0 is none


class Prompt(NamedTuple):
    """The static inputs of one prefill graph: R stretches of C positions."""

    tok: Tensor  # [R, C] int32
    start: Tensor  # [R]    int32  absolute position of tok[r, 0]; a multiple of L
    n: Tensor  # [R]    int32  valid positions; the rest is padding
    end: Tensor  # [R]    int32  as in Stretch
    lora: Tensor  # [R]    int32  as in Stretch
    pages: Tensor  # [R, W] int32


def blank(R: int, C: int, W: int, device: torch.device) -> Prompt:
    """Stretches of nothing."""
    shapes = ((R, C), (R,), (R,), (R,), (R,), (R, W))
    return Prompt(*(torch.zeros(*s, dtype=torch.int32, device=device) for s in shapes))


def batches(chunks: Iterable[Stretch], C: int, most: int) -> Iterator[list[Stretch]]:
    """Chunks of any length as stretches of C at most, `most` of them together, in their order.

    A prompt that sees itself whole stays together, for each layer takes all of the one below.
    """
    batch: list[Stretch] = []
    for tok, start, pages, end, lora in chunks:
        if end and batch and len(batch) + -(-len(tok) // C) > most:
            yield batch
            batch = []
        for at in range(0, len(tok), C):
            batch.append(Stretch(tok[at : at + C], start + at, pages, end, lora))
            if len(batch) == most:
                yield batch
                batch = []
    if batch:
        yield batch


def pack(stretches: list[Stretch], R: int, C: int, W: int) -> Tensor:
    """Up to R stretches as int32 [R, 4 + W + C]; those that are left over are empty."""
    rows = [
        [s.start, len(s.tok), s.end, s.lora, *s.pages, *[0] * (W - len(s.pages)), *s.tok, *[0] * (C - len(s.tok))]
        for s in stretches
    ]
    return torch.tensor(rows + [[0] * (4 + W + C)] * (R - len(rows)), dtype=torch.int32)


def fill_(prompt: Prompt, packed: Tensor) -> None:
    """Write packed stretches, already on the device, into the graph's inputs; no host sync."""
    head, pages, tok = packed.split((4, prompt.pages.shape[1], prompt.tok.shape[1]), 1)
    prompt.start.copy_(head[:, 0])
    prompt.n.copy_(head[:, 1])
    prompt.end.copy_(head[:, 2])
    prompt.lora.copy_(head[:, 3])
    prompt.pages.copy_(pages)
    prompt.tok.copy_(tok)


def prefill_(L: int, net: Network, prompt: Prompt, kv: tuple[Tensor, ...]) -> None:
    """Write the stretches' K/V: a position sees all before it and its own block of L, or all before `end`.

    kv  one tensor a layer [2, P, S, G, D]; written
    """
    pos, seen = OPS["positions"](prompt.start, prompt.n // L, L, prompt.tok.shape[1] // L, prompt.end)
    net.forward(net.embed(prompt.tok), View(pos, prompt.pages, seen, lora=prompt.lora), kv)
