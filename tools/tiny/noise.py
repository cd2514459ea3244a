"""What a training row hides, and what each of its tokens may see.

A row holds documents, each padded to whole blocks; a network's input is [noisy | clean], the row twice.
Dims: B rows, R tokens a row, L tokens a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskFunction = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """A batch of packed rows, each [B, R] int64."""

    block_length: int
    ids: Tensor
    prompt: Tensor  # tokens of the prompt of a token's document; far past the row where there is none
    doc: Tensor  # number of a token's document from 1; 0 is padding
    pos: Tensor  # position in the document


class Noise(NamedTuple):
    """What of a batch is masked, each [B, R]."""

    masked: Tensor  # bool
    weight: Tensor  # f32: response tokens ÷ masked tokens of the block
    block: Tensor  # int64: block number in the document
    group: Tensor  # int64: first block of the noise group that a token is in


def visible(doc: Tensor, block: Tensor, group: Tensor) -> MaskFunction:
    """The mask function of [noisy | clean] rows of 2R tokens.

    A noisy token sees the clean blocks before its group, and the group's noisy blocks up to its own; a clean
    token sees the clean blocks up to its own; nobody sees another document.
    """
    R = doc.shape[1]

    def sees(b: Tensor, _head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        qi, ki, from_noisy = q % R, k % R, q < R
        own, other, first = block[b, qi], block[b, ki], group[b, qi]
        noisy_key = from_noisy & (other >= first) & (other <= own)
        clean_key = torch.where(from_noisy, other < first, other <= own)
        return (doc[b, qi] == doc[b, ki]) & torch.where(k < R, noisy_key, clean_key)

    return sees


def dense_mask(doc: Tensor, block: Tensor, group: Tensor) -> Tensor:
    """`visible` written out: [B, 1, 2R, 2R] bool."""
    B, R = doc.shape
    at = torch.arange(2 * R, device=doc.device)
    b = torch.arange(B, device=doc.device)[:, None, None]
    return visible(doc, block, group)(b, None, at[None, :, None], at[None, None, :])[:, None]


def block_mask(doc: Tensor, block: Tensor, group: Tensor) -> BlockMask:
    """`visible` for flex attention, made by a compiled function: meant for CUDA."""
    B, R = doc.shape
    sees = visible(doc, block, group)
    return _compiled()(sees, B, None, 2 * R, 2 * R, device=doc.device)


@cache
def _compiled() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)


def corrupt(rows: Rows, group_blocks: int, group_share: float, generator: torch.Generator | None = None) -> Noise:
    """Draw noise groups and masked tokens: of a block's n response tokens k, uniform in 1 to n, are masked.

    In `group_share` of the documents, groups of 2 to `group_blocks` blocks are noisy together, at a random
    offset; the later blocks of a group are the noisier: k ÷ n is drawn as u^(1 / (1 + place in the group)).
    """
    L, doc, device = rows.block_length, rows.doc, rows.ids.device
    B, R = doc.shape
    per_doc = (B, R // L + 1)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, device=device, generator=generator)

    block, first = rows.pos // L, rows.prompt // L  # first: the block where the response begins
    answer = (rows.pos >= rows.prompt) & (doc > 0)
    many = 2 + (uniform(*per_doc) * (group_blocks - 1)).long().clamp(max=group_blocks - 2)
    size = torch.where(uniform(*per_doc) < group_share, many, 1)
    offset = (uniform(*per_doc) * size).long().clamp(max=size - 1)
    size, offset = size.gather(1, doc), offset.gather(1, doc)
    since = block - first
    start = ((since + offset) // size * size - offset).clamp_min(0) + first
    group = torch.where((since >= 0) & (doc > 0), start, block)

    answer_BNL = rearrange(answer, "B (N L) -> B N L", L=L)
    n = answer_BNL.sum(-1)
    place = rearrange(block - group, "B (N L) -> B N L", L=L)[..., 0]
    share = uniform(B, R // L) ** (1.0 / (1 + place))
    k = (share * n).ceil().clamp_min(1)
    order = uniform(B, R // L, L).masked_fill(~answer_BNL, 2.0).argsort(-1).argsort(-1)
    masked = (order < k[..., None]) & answer_BNL
    weight = repeat(n / k, "B N -> B (N L)", L=L)
    return Noise(rearrange(masked, "B N L -> B (N L)"), weight, block, group)
